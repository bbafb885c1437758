"""The Ray engine against the local one; one small cluster for all."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from survey_inputs import SMALL, assert_same_rows, write_records

from ifr_fast import IfrError
from ifr_fast.survey import Source, State, Survey, survey
from ifr_fast.survey.engines import ModelSource, RayEngine

ray = pytest.importorskip("ray", reason="expected: ray is not installed (extra 'ray')")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """An actor has as many threads as this process: two actors on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl", 60)


@pytest.fixture(scope="module")
def local(
    one_thread: None, tiny_dir: Path, records: Path, tmp_path_factory: pytest.TempPathFactory
) -> Survey:
    return survey(records, tmp_path_factory.mktemp("local"), model=tiny_dir, **SMALL)


def test_rows_are_the_local_engine_s_though_an_actor_is_killed(
    cluster: None,
    local: Survey,
    tiny_dir: Path,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit; SIGKILL in the middle costs windows a second try, and nothing else."""
    assert len(local.part_numbers) > 8
    engines, killed, tries = [], [], []
    own = RayEngine.__init__

    def init(self: RayEngine, *args: Any) -> None:
        own(self, *args)
        engines.append(self)

    monkeypatch.setattr(RayEngine, "__init__", init)
    monkeypatch.setattr(RayEngine, "on_retry", lambda _, window, __: tries.append(window.part))

    def kill_once(state: State) -> None:
        if not killed:
            pid = ray.get(engines[0].workers[1].pid.remote())
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    found = survey(
        records,
        tmp_path,
        model=tiny_dir,
        engine="ray",
        workers=2,
        on_state=kill_once,
        **SMALL,
    )
    assert killed
    assert tries
    assert_same_rows(found, local)


def test_what_ray_has_left_the_local_engine_goes_on_with(
    cluster: None, local: Survey, tiny_dir: Path, records: Path, tmp_path: Path
) -> None:
    def stop(state: State) -> None:
        if state.documents > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        survey(records, tmp_path, model=tiny_dir, engine="ray", workers=1, on_state=stop, **SMALL)
    assert 0 < len(Survey.open(tmp_path).part_numbers) < len(local.part_numbers)
    found = survey(records, tmp_path, model=tiny_dir, resume=True, **SMALL)
    assert_same_rows(found, local)


def test_a_model_that_cannot_be_opened(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(IfrError, match="cannot open the model"):
        RayEngine(ModelSource(str(tmp_path / "nowhere")), 1, 1)


def test_an_actor_that_always_dies_ends_the_run(
    cluster: None, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifr_fast.survey.engines._ATTEMPTS", 1)

    def texts() -> Iterator[str]:
        yield "the cat sat on the mat and stopped " * 3
        os.kill(ray.get(engines[0].workers[0].pid.remote()), signal.SIGKILL)
        yield "the cat sat on the mat and stopped " * 4

    engines = []
    own = RayEngine.__init__

    def init(self: RayEngine, *args: Any) -> None:
        own(self, *args)
        engines.append(self)

    monkeypatch.setattr(RayEngine, "__init__", init)
    with pytest.raises(IfrError, match=r"an actor died 1 times over part \d"):
        survey(Source(texts(), "c"), tmp_path, model=tiny_dir, engine="ray", workers=1,
               thresholds=(0.02,), window_tokens=50)  # fmt: skip
