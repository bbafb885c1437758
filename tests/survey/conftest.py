from __future__ import annotations

from pathlib import Path

import pytest
from survey_inputs import SMALL, save_tiny, write_records

from ifr_fast import Tracer
from ifr_fast.survey import Survey, survey


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tracer(tiny_dir: Path) -> Tracer:
    return Tracer.from_pretrained(tiny_dir)


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl", 40)


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of a survey of a few parts."""
    return write_records(tmp_path_factory.mktemp("records") / "few.jsonl", 12)


@pytest.fixture(scope="session")
def unbroken(tracer: Tracer, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Survey:
    """A survey of the records that nothing interrupts. Tests must not write into it."""
    out = tmp_path_factory.mktemp("unbroken")
    return survey(records, out, model=tracer, label_by=["kind"], **SMALL)
