"""bench/device_check.py: its runner, its table, and one step of a stand-in as it is run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import device_check
import pytest
import torch
from device import counters
from device.common import TINY, Check
from device.table import LIMIT, table
from device_check import STEPS, Step, read
from gpu_model.shapes import TARGETS
from paths import ROOT

from ifr_fast.kernels.triton import launch


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_deadlines_kill_and_failures_stop_nothing(tmp_path: Path) -> None:
    """A step's own processes are killed with it, and its half line spoils no other."""
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(alive)!r}, 'w')"
    hang = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"file = open({str(tmp_path / 'lines.jsonl')!r}, 'a')\n"
        'file.write(\'{"step": "hang", "kind": "half"}\\n{"step": "ha\')\n'
        "file.close()\ntime.sleep(60)"
    )
    steps = [
        Step("fine", "first", 20, command=python("print('said')")),
        Step("hang", "first", 2, command=python(hang)),
        Step("wrong", "first", 20, command=python("raise ValueError('what is wrong')")),
        Step("absent", "first", 20, command=(str(tmp_path / "no-such-program"),)),
        Step("gpu", "first", 20, "it has none", python("raise SystemExit(1)")),
        Step("last", "first", 20, command=python("pass")),
    ]
    start = time.monotonic()
    text = device_check.run(steps, tmp_path, [], 100, stand_in=True)
    assert time.monotonic() - start < 15
    ends = {x["step"]: x for x in read(tmp_path) if "end" in x}
    assert {name: x["end"] for name, x in ends.items()} == {
        "fine": "done", "hang": "killed", "wrong": "failed", "absent": "failed",
        "gpu": "cannot run", "last": "done",
    }  # fmt: skip
    assert ends["wrong"]["why"] == "ValueError: what is wrong"
    assert ends["hang"]["why"] == "its 2 s were over"
    assert ends["gpu"]["why"] == "it has none"
    assert {"step": "hang", "kind": "half"} in read(tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert "==== fine\nsaid" in log
    assert (tmp_path / "table.txt").read_text() == text + "\n"
    wrong = [x["step"] for x in read(tmp_path) if not device_check.is_right(x)]
    assert wrong == ["hang", "wrong", "absent"]
    assert not device_check.is_right({"kind": "correctness", "right": False})
    time.sleep(max(0.0, 5.5 - (time.monotonic() - start)))
    assert not alive.exists()


def test_no_step_begins_when_the_time_is_over(tmp_path: Path) -> None:
    steps = [Step(f"{i}", "first", 30, command=python("pass")) for i in range(2)]
    device_check.run(steps, tmp_path, [], 0, stand_in=True)
    assert [x["why"] for x in read(tmp_path)] == ["no time", "no time"]


def test_a_table_of_everything_is_short() -> None:
    number = 12.345678
    by = {"T": 8192, "ms": number, "predicted": number}
    lines: list[dict[str, Any]] = [
        {"kind": "card", "card": "H100", "driver": "580", "free_gb": number},
        {"kind": "software", "torch": "2.11.0"},
        {"kind": "scoring", **by, "rows": 8192, "units": 1.5, "light": 3356.2, "heavy": 88.4},
        {"kind": "correctness", "case": "all", "dtype": "bfloat16", "T": 8192, "right": True,
         "errors": {"residual": 2e-4, "of_pairs": 3e-4}},
        {"kind": "correctness", "case": "few", "dtype": "bfloat16", "T": 8192, "right": False,
         "errors": {"residual": float("nan")}},
        {"kind": "tests", "passed": 40, "failed": 1, "error": 0, "which": ["test_x"]},
        *({"kind": "kernel", **by, "rows": 8192, "kernel": f"k{i}", "bound": "memory"}
          for i in range(20)),
        *({"kind": "sweep", "kernel": "light", "what": f"{i}", "ms": i, "all_kernels": i}
          for i in range(40)),
        {"kind": "sweep", "kernel": "light", "what": "x", "failed": "out of memory"},
        *({"step": step.name, "end": "killed", "seconds": 10, "why": "slow" * 100}
          for step in STEPS),
    ]  # fmt: skip
    found = table(lines).splitlines()
    assert len(found) == LIMIT < 60
    assert max(map(len, found)) <= 118
    text = "\n".join(found)
    assert "8192 rows: 12.3 ms, predicted 12.3, 1.5 forward; a row 3356 light, 88 heavy" in text
    assert "worst error nan of 2 cases, WRONG: few" in text
    assert "tests: 40 passed, 1 failed test_x" in text
    assert text.index("sweep light 0:") < text.index("sweep light 1:")
    assert "long: killed, 10 s: slow" in found[-1]


def test_every_step_has_a_module_and_each_part_fits_one_command() -> None:
    for step in STEPS:
        assert (
            "\ndef run(check: Check) -> None:"
            in (ROOT / "bench" / "device" / f"{step.name}.py").read_text()
        )
    for part in ("first", "second"):
        assert sum(step.seconds for step in STEPS if step.part == part) <= 570


def test_a_stand_in_runs_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process of its own finds its machine, and says it line by line."""
    steps = ["--steps", "versions", "memcheck"]
    monkeypatch.setattr("sys.argv", ["check", "--stand-in", "--out", str(tmp_path), *steps])
    with pytest.raises(SystemExit) as done:
        device_check.main()
    assert done.value.code == 0
    lines = [json.loads(x) for x in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [x.get("kind", x.get("end")) for x in lines] == [
        "software", "card", "attention", "attention", "done", "cannot run",
    ]  # fmt: skip
    assert "memcheck: cannot run, 0 s: compute-sanitizer" in capsys.readouterr().out


class Event:
    """A GPU's event: the time goes on by a millisecond with each."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.now += 1
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at

    def synchronize(self) -> None:
        pass


def test_times_by_events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a job, and of each kernel, whose launches are added up."""
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    gpu, target = torch.device("cuda"), TARGETS["H100"]
    check = Check(gpu, TINY, target, False, [], None, tmp_path, "kernels")

    def job() -> None:
        for name, n in (("linear_kernel", 1), ("light_kernel", 2), ("light_kernel", 3)):
            assert launch.around is not None
            with launch.around(name):
                Event.now += n

    assert check.of_kernels(job, 3) == {"linear_kernel": 2.0, "light_kernel": 7.0}
    assert launch.around is None
    assert len(slept) == 4
    monkeypatch.setattr(Event, "now", 0.0)
    assert check.milliseconds(lambda: setattr(Event, "now", Event.now + 4)) == 5.0


def test_counters_of_ncu_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["ID", "Kernel Name", *counters.METRICS]
    units = ["", "", "ns", *["%"] * 5, "register/thread"]
    values = ["0", "linear_kernel", "1843200", "61.5", "20", "70.1", "30", "12.4", "249"]
    rows = [names, units, values]
    table = "\n".join(",".join(f'"{x}"' for x in row) for row in rows)
    said = f"==PROF== Connected\n{table}\n==PROF== Disconnected"
    done = SimpleNamespace(stdout=said, stderr="", returncode=0)
    monkeypatch.setattr(counters.subprocess, "run", lambda *_, **__: done)
    cpu, target = torch.device("cpu"), TARGETS["H100"]
    counters.run(Check(cpu, TINY, target, True, [], None, tmp_path, "counters"))
    (line,) = read(tmp_path)
    assert (line["kernel"], line["ns"], line["registers"]) == ("linear_kernel", "1843200", "249")
    done.stdout = "==ERROR== no permission"
    with pytest.raises(SystemExit, match="ncu named no kernel"):
        counters.run(Check(cpu, TINY, target, True, [], None, tmp_path, "counters"))
