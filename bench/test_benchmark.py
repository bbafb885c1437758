"""pytest-benchmark cases, each beside a plain forward pass of the same text: `pytest bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import launch
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ifr_fast import Recording, Tracer
from ifr_fast.benchmark import THRESHOLD, first_tokens, machine, plain_forward, prose
from ifr_fast.recording.layer_inputs import layer_inputs
from ifr_fast.recording.recording import RecordingMode
from ifr_fast.scoring.implementations import load_kernel, what_is_missing

LENGTHS = [128, 512]


class Case(NamedTuple):
    tracer: Tracer
    token_ids: torch.Tensor  # [T]
    recording: Recording


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    return Tracer.from_pretrained()


@pytest.fixture(scope="module", params=LENGTHS)
def case(tracer: Tracer, request: pytest.FixtureRequest) -> Case:
    token_ids = first_tokens(prose(), tracer.tokenizer, request.param)
    return Case(tracer, token_ids, tracer.record(token_ids, mode=RecordingMode.FULL))


@pytest.fixture
def time(benchmark: BenchmarkFixture, case: Case) -> Callable[[Callable[[], object]], None]:
    """Times a job: the same rounds for each, one uncounted before."""
    benchmark.group = f"T={len(case.token_ids)}"
    benchmark.extra_info |= machine(case.tracer.decoder.device)._asdict()
    return lambda job: benchmark.pedantic(job, rounds=5, warmup_rounds=1)


def test_forward(time, case):
    time(plain_forward(case.tracer.model, case.token_ids))


def test_record(time, case):
    time(lambda: case.tracer.record(case.token_ids))


def test_trace(time, case):
    time(lambda: case.tracer.trace(case.recording, threshold=THRESHOLD))


def test_trace_all(time, case):
    time(lambda: case.tracer.trace_all(case.recording, threshold=THRESHOLD))


@pytest.mark.parametrize("impl", ["eager", "cpu"])
def test_kernel(time, case, impl):
    """`score_attention` alone, on all rows of the middle layer."""
    decoder = case.tracer.decoder
    missing = what_is_missing(impl, decoder.device, decoder.dtype)
    if missing is not None:
        pytest.skip(missing)
    kernel, layer = load_kernel(impl), decoder.n_layers // 2
    inputs = layer_inputs(case.recording, layer, torch.arange(len(case.token_ids))).inputs
    with torch.inference_mode():
        time(lambda: kernel.score_attention(inputs, THRESHOLD))


@pytest.mark.parametrize("way", [launch.merging, launch.picking, launch.at_hand])
def test_launches(benchmark, way):
    """All launches of a layer: the former launcher, the launcher, a stand-in for Triton's alone."""
    jobs = [way(x) for x in launch.layer_launches()]
    benchmark.group = f"{len(jobs)} launches"
    benchmark.pedantic(lambda: [job() for job in jobs], rounds=200, warmup_rounds=5)
