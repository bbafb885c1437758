"""Results of ahead-of-time compilation (aot.py), kept from run to run until a source changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from paths import ROOT

Found = list[dict[str, Any]]
PROGRAM = ROOT / "tests" / "support" / "aot.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
JOBS = [  # longest job first
    *(
        f"{target}-{model}"
        for model in ("flags", "Llama-3-8B", "SmolLM2-135M")
        for target in TARGETS
    ),
    *(f"sm_90-{model}" for model in ("Llama-3-70B", "Qwen3-32B")),
    "keys",
]
SOURCES = [
    PROGRAM,
    *sorted((ROOT / "kernels" / "triton").glob("*.py")),
    *(ROOT / "kernels" / name for name in ("breakpoints.py", "contract.py")),
]


def key(sources: Iterable[Path], *versions: str) -> str:
    """A hash of the sources' contents and of the versions."""
    found = hashlib.sha256(repr(versions).encode())
    for path in sources:
        found.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return found.hexdigest()[:20]


def cached(
    folder: Path, name: str, jobs: list[str], run: Callable[[list[str], Path], None]
) -> dict[str, Found]:
    """The results of `jobs` from folder / name; `run` writes those that are missing there, a file a
    job. Results under other names are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / name
    with FileLock(folder / "lock"):
        missing = [job for job in jobs if not (place / f"{job}.json").exists()]
        if missing:
            place.mkdir(exist_ok=True)
            run(missing, place)
        for other in folder.iterdir():
            if other.is_dir() and other != place:
                shutil.rmtree(other)
        return {job: json.loads((place / f"{job}.json").read_text()) for job in jobs}


def compile_jobs(jobs: list[str], place: Path) -> None:
    """Runs aot.py, from an empty cache of Triton's own."""
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(PROGRAM), str(place), *jobs],
            env={**os.environ, "TRITON_CACHE_DIR": scratch, "TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr


def compiled(folder: Path) -> dict[str, Found]:
    """The results of all jobs."""
    name = key(SOURCES, version("triton"), version("torch"), sys.version)
    return cached(folder, name, JOBS, compile_jobs)
