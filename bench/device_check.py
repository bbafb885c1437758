"""The Triton kernels on a GPU, in its first minutes: right, how fast, and what was predicted.

Every step is a process of its own, which is killed at its deadline; a step that fails stops none of
those behind it. What a step finds is a JSON line in OUT/lines.jsonl at once, its output goes to
OUT/log.txt, and the table in OUT/table.txt is printed last. A plain checkout suffices:

    PYTHONPATH=$PWD python3 bench/device_check.py --out $OUT                  # the first part
    PYTHONPATH=$PWD python3 bench/device_check.py --out $OUT --part second
    PYTHONPATH=$PWD python3 bench/device_check.py --out $OUT --steps kernels sweeps --lengths 8192
    python bench/device_check.py --stand-in    # every step that can, tiny, on Triton's interpreter

Steps are modules of bench/device/, each with a function `run`. docs/gpu.md has more.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Step(NamedTuple):
    """A step: a module of bench/device, and the seconds that it may take."""

    name: str
    part: str
    seconds: int
    needs_gpu: str = ""  # the reason why a stand-in cannot run it
    command: tuple[str, ...] = ()  # in place of the module, for tests


STEPS = [
    Step("versions", "first", 30),
    Step("ceilings", "first", 30),
    Step("compile", "first", 90, "a stand-in compiles nothing"),
    Step("correctness", "first", 70),
    Step("kernels", "first", 90),
    Step("tests", "first", 120),
    Step("model", "second", 130),
    Step("sweeps", "second", 110),
    Step("counters", "second", 60, "ncu reads a GPU's counters"),
    Step("peers", "second", 70),
    Step("weights", "second", 45),
    Step("memcheck", "second", 70, "compute-sanitizer watches a GPU's memory"),
    Step("long", "second", 70),
]


def record(out: Path, line: dict[str, Any]) -> None:
    """Appends a line to OUT/lines.jsonl."""
    with (out / "lines.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    """All whole lines of OUT/lines.jsonl; a process that was killed may have left half a line."""
    path, found = out / "lines.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def run_step(step: Step, out: Path, options: list[str], stand_in: bool) -> None:
    """Runs a step to its end or its deadline, and records which it was."""
    if stand_in and step.needs_gpu:
        record(out, {"step": step.name, "end": "cannot run", "why": step.needs_gpu, "seconds": 0})
        return
    own = (sys.executable, str(Path(__file__).resolve()), "--child", step.name, "--out", str(out))
    command = [*(step.command or own), *([] if step.command else options)]
    start, log = time.monotonic(), out / "log.txt"
    with log.open("a") as file:
        file.write(f"\n==== {step.name}\n")
        file.flush()
        begin = file.tell()
        try:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
                env=environment(stand_in),
            )  # fmt: skip
        except OSError as error:
            record(out, {"step": step.name, "end": "failed", "why": str(error), "seconds": 0})
            return
        try:
            code: int | None = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # its own processes are in its session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    end = "killed" if code is None else "failed" if code else "done"
    line = {"step": step.name, "end": end, "seconds": round(time.monotonic() - start, 1)}
    if end == "killed":
        line["why"] = f"its {step.seconds} s were over"
    elif end == "failed":
        with log.open(errors="replace") as file:
            file.seek(begin)
            said = [text for text in file.read().splitlines() if text.strip()]
        line["why"] = said[-1][:200] if said else f"exit status {code}"
    # A line that the step was writing when it was killed is cut off from this one.
    lines = out / "lines.jsonl"
    if lines.exists() and lines.read_bytes()[-1:] not in (b"", b"\n"):
        with lines.open("a") as file:
            file.write("\n")
    record(out, line)


def environment(stand_in: bool) -> dict[str, str]:
    """Variables of a step."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    tools = ["/usr/local/cuda/bin", *glob.glob("/opt/nvidia/nsight-compute/*")]
    found["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *tools])
    found |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1"}
    if stand_in:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return found


def run(steps: list[Step], out: Path, options: list[str], budget: float, stand_in: bool) -> str:
    """Runs the steps that `budget` seconds suffice for; returns the table."""
    sys.path.insert(0, str(Path(__file__).parent))
    from device.table import table

    out.mkdir(parents=True, exist_ok=True)
    for name in ("lines.jsonl", "log.txt", "table.txt"):  # an earlier run's
        (out / name).unlink(missing_ok=True)
    stop = time.monotonic() + budget
    for step in steps:
        left = int(stop - time.monotonic())
        if left < 5:
            record(out, {"step": step.name, "end": "cannot run", "why": "no time", "seconds": 0})
            continue
        run_step(step._replace(seconds=min(step.seconds, left)), out, options, stand_in)
        last = read(out)[-1]
        print(f"{last['step']}: {last['end']} after {last['seconds']} s", flush=True)
    text = table(read(out))
    (out / "table.txt").write_text(text + "\n")
    return text


def is_right(line: dict[str, Any]) -> bool:
    """False for a step that failed or was killed, and for values that are wrong."""
    return line.get("end") not in ("failed", "killed") and line.get("right") is not False


def main() -> None:
    """Parses the arguments, runs the steps, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out") / "device", help="folder")
    parser.add_argument("--part", choices=("first", "second", "all"), default="first")
    parser.add_argument("--steps", nargs="+", choices=[s.name for s in STEPS], help="only these")
    parser.add_argument("--lengths", type=int, nargs="+", help="of the steps kernels and model")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all steps")
    parser.add_argument("--patience", type=float, default=1, help="factor of all deadlines")
    parser.add_argument("--stand-in", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--weights", type=Path, help="file that --make-weights wrote")
    parser.add_argument("--make-weights", type=Path, metavar="FILE", help="write it, and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        sys.path.insert(0, str(ROOT / "tests" / "support"))
        from device.common import Check

        with Check.of(args) as check:
            importlib.import_module(f"device.{args.child}").run(check)
        return
    if args.make_weights is not None:
        from device import weights

        weights.make(args.make_weights)
        return
    out = args.out.resolve()
    part = "all" if args.stand_in and args.part == "first" else args.part
    chosen = [s for s in STEPS if (s.name in args.steps if args.steps else part in (s.part, "all"))]
    options = ["--stand-in"] if args.stand_in else []
    options += ["--lengths", *map(str, args.lengths)] if args.lengths else []
    options += ["--weights", str(args.weights.resolve())] if args.weights else []
    chosen = [step._replace(seconds=int(args.patience * step.seconds)) for step in chosen]
    print(run(chosen, out, options, args.budget, args.stand_in))
    sys.exit(not all(is_right(line) for line in read(out)))


if __name__ == "__main__":
    main()
