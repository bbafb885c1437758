from __future__ import annotations

import os
import pydoc_data.topics
from collections.abc import Iterator

import page
import pytest
import torch

# Read when a kernel's module is imported: without a GPU, Triton's kernels run interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ifr_fast import Tracer
from ifr_fast.model.pretrained import load


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-skip",
        action="store_true",
        help="fail the run if a test is skipped, unless its reason begins with 'expected:'",
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--fail-on-skip"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reasons = [report.longrepr[2] for report in reporter.stats.get("skipped", [])]
    if any("expected:" not in reason for reason in reasons):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def smol() -> Tracer:
    """The default model, fetched and converted on first use."""
    model, tokenizer = load()
    return Tracer(model, tokenizer)


@pytest.fixture(scope="session")
def prose(smol: Tracer) -> torch.Tensor:
    """Token ids of real English prose."""
    topics = pydoc_data.topics.topics
    return torch.tensor(smol.tokenizer("\n".join(topics[k] for k in sorted(topics)))["input_ids"])


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN within the test, so that nothing is read before it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def browser() -> Iterator[None]:
    """A running browser for the pages of `page.Opened`, closed after the module."""
    with page.running():
        yield
