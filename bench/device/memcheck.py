"""compute-sanitizer's memory checker on three tests of the kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from device.common import Check

TESTS = "test_blocks_of_rows or test_corrections_alone or test_a_frontier_shares_out_the_keys"


def run(check: Check) -> None:
    """Appends the number of errors that it found."""
    command = ["compute-sanitizer", "--tool", "memcheck", "--target-processes", "all"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", TESTS]
    done = subprocess.run(
        [*command, *pytest, "tests/kernels/test_triton.py"],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    print(done.stdout[-20000:], done.stderr[-5000:])
    summary = re.findall(r"ERROR SUMMARY: (\d+) error", done.stdout + done.stderr)
    passed = re.search(r"(\d+) passed", done.stdout)
    errors = sum(map(int, summary)) if summary else None
    check.found(kind="memcheck", errors=errors, passed=int(passed[1]) if passed else 0)
    if errors != 0 or passed is None:
        raise SystemExit(f"{errors} errors, {passed and passed[0]}")
