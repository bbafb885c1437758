"""The machine and its software, and what torch's attention would choose here."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from importlib import metadata

import torch
from device.common import Check
from torch.nn.attention import SDPBackend

PACKAGES = ("torch", "triton", "numpy", "transformers", "safetensors", "accelerate", "pytest")
TOOLS = ("nvcc", "gcc", "ncu", "compute-sanitizer")


def run(check: Check) -> None:
    """Appends what it finds."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    check.found(
        kind="software",
        **versions,
        tools={name: shutil.which(name) or "missing" for name in TOOLS},
        pydoc_data=importlib.util.find_spec("pydoc_data") is not None,
        matmul_precision=torch.get_float32_matmul_precision(),
    )
    if check.stand_in:
        check.found(kind="card", card="stand-in", driver="none", free_gb=0)
    else:
        query = ["--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"]
        command = ["nvidia-smi", *query, "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        card = torch.cuda.get_device_properties(check.device)
        free, total = torch.cuda.mem_get_info()
        check.found(
            kind="card",
            card=card.name,
            driver=said.stdout.strip(),
            processors=card.multi_processor_count,
            l2_mb=round(card.L2_cache_size / 1e6, 1),
            free_gb=round(free / 1e9, 1),
            total_gb=round(total / 1e9, 1),
        )
    T = 64 if check.stand_in else 8192
    m = check.model
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (
            torch.randn(1, heads, T, m.K, device=check.device, dtype=dtype)
            for heads in (m.H, m.H_kv, m.H_kv)
        )
        choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=True)
        check.found(kind="attention", dtype=str(dtype), choice=SDPBackend(choice).name)
