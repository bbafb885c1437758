"""What a GPU's counters say of one launch of each of the largest kernels, by ncu."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from device.common import Check

KERNELS = ("linear_kernel", "lists_kernel", "light_kernel", "heavy_kernel", "fold_kernel")
METRICS = {
    "gpu__time_duration.sum": "ns",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "processor",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "matrix",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "cache",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
    "launch__registers_per_thread": "registers",
}


def run(check: Check) -> None:
    """Appends a line for each kernel."""
    script = Path(__file__).parents[1] / "device_check.py"
    program = [sys.executable, str(script), "--child", "profiled", "--out", str(check.out)]
    command = [
        "ncu", "--csv", "--page", "raw", "--clock-control", "none", "--print-units", "base",
        "--kernel-name", f"regex:^({'|'.join(KERNELS)})$", "--launch-count", str(len(KERNELS)),
        "--metrics", ",".join(METRICS), *program,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    table = [line for line in done.stdout.splitlines() if line.startswith('"')]
    n = 0
    for row in csv.DictReader(table):
        if row.get("Kernel Name") in KERNELS:
            n += 1
            values = {short: row.get(name) for name, short in METRICS.items()}
            check.found(kind="profile", kernel=row["Kernel Name"], **values)
    if n == 0:
        raise SystemExit(f"ncu named no kernel (exit status {done.returncode})")
