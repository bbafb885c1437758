"""How a survey runs: its arguments, directory, states and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from survey_inputs import SMALL, assert_same_rows, sentence

from ifr_fast import IfrError, Tracer
from ifr_fast.survey import Source, State, survey


@pytest.mark.parametrize("existed", [False, True])
def test_nothing_is_left_of_a_survey_that_was_not_begun(tmp_path: Path, existed: bool) -> None:
    out = tmp_path / "survey"
    if existed:
        out.mkdir()
    with pytest.raises((ValueError, OSError)):
        survey([sentence(0)], out, model=str(tmp_path / "no model"), **SMALL)
    assert out.exists() == existed
    assert not existed or list(out.iterdir()) == []


def test_a_folder_around_the_output(
    tracer: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ifr-fast survey . --out survey`: what it has written is no text of it."""
    (tmp_path / "a.txt").write_text(sentence(0))
    monkeypatch.chdir(tmp_path)
    first = survey(".", "survey", model=tracer, **SMALL)
    again = survey(".", "survey", model=tracer, resume=True, **SMALL)
    assert again.problems == []
    assert_same_rows(again, first)
    assert again.corpora.read("corpus")["corpus"].tolist() == [tmp_path.name.partition(".")[0]]


def test_two_runs_do_not_write_into_one_directory(
    tracer: Tracer, few: Path, tmp_path: Path
) -> None:
    def meddle(_: State) -> None:
        with pytest.raises(IfrError, match="another run is writing"):
            survey(few, tmp_path, model=tracer, resume=True, **SMALL)

    survey(few, tmp_path, model=tracer, on_state=meddle, **SMALL)


def test_memory_does_not_grow(tracer: Tracer, tmp_path: Path) -> None:
    """Within 5% from the 50th to the 500th document."""

    def texts() -> Any:
        for i in range(501):
            yield sentence(i, 10)

    resident: dict[int, int] = {}

    def watch(state: State) -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                resident[state.documents] = int(line.split()[1])

    if not Path("/proc/self/status").exists():
        pytest.skip("expected: resident memory is read from /proc")
    survey(Source(texts(), "c"), tmp_path, model=tracer, on_state=watch, window_tokens=400)
    early = min(n for n in resident if n >= 50)
    assert early < 80
    late = max(resident)
    assert late >= 500
    assert resident[late] < 1.05 * resident[early]


def test_states_say_how_far_it_is(tracer: Tracer, records: Path, tmp_path: Path) -> None:
    states: list[State] = []
    found = survey(records, tmp_path, model=tracer, on_state=states.append, **SMALL)
    shares = [state.share for state in states]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert states[-1].predictions == len(found.predictions)
    assert states[-1].documents == 40
    assert states[-1].seconds_left == 0
    assert states[0].seconds_left > 0


def test_wrong_arguments(tracer: Tracer, records: Path, tmp_path: Path) -> None:
    for changed, reason in [
        ({"thresholds": (0.05, 0.02)}, "ascending"),
        ({"thresholds": ()}, "ascending"),
        ({"thresholds": (2,)}, "from 0 to 1"),
        ({"split": "word"}, "split"),
        ({"engine": "spark"}, "engine"),
        ({"workers": 2}, "workers"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 129}, "context holds 128"),
        ({"label_by": ["a b"]}, "label_by"),
        ({"engine": "ray"}, "expected a name or a directory"),
    ]:
        with pytest.raises(ValueError, match=reason):
            survey(records, tmp_path / "out", **{"model": tracer, **changed})
    for inputs in ("nowhere.txt", [], {"c": "nowhere"}, 3):
        with pytest.raises(ValueError, match="inputs"):
            survey(inputs, tmp_path / "out", model=tracer)
