"""The tests of the Triton kernels, on the device, shared out among processes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

from device.common import Check

FEW = "blocks_of_rows or half_values"  # of a stand-in


def run(check: Check) -> None:
    """Appends how many passed and failed, and names those that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    shared = ["-n", "14"] if importlib.util.find_spec("xdist") else []
    more = ["-k", FEW] if check.stand_in else shared
    said = subprocess.run(
        [*command, "tests/kernels/test_triton.py", *more],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    print(said)
    counts = {
        name: int(found[1]) if (found := re.search(rf"(\d+) {name}", said)) else 0
        for name in ("passed", "failed", "error")
    }
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", said, re.MULTILINE)
    check.found(kind="tests", **counts, which=failed[:10])
    if counts["passed"] == 0 or failed:
        raise SystemExit(f"{counts['failed'] + counts['error']} tests failed")
