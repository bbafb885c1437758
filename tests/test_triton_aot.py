"""The Triton kernels compiled for GPUs that are not there (aot.py): what the machine code says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

from ifr_fast import Tracer, scoring

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# (b) and (c) of kernels/triton/kernel.py, and what in them is a product on matrix units.
LINEAR, CORRECTION = {"log_sum_exp_kernel", "linear_kernel"}, {"light_kernel", "heavy_kernel"}
PREPARATION = {"value_space_signs_kernel", "reach_kernel"}  # whose products (c) reads, or (b)
ALL_KERNELS = 20


def aot(argument: str, cache: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests" / "support" / "aot.py"), argument],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every kernel as compiled for each target, from an empty cache."""
    caches = [tmp_path_factory.mktemp(target) for target in TARGETS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(TARGETS, pool.map(aot, TARGETS, caches), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_default_configurations(
    target: str, compiled: dict[str, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bfloat16 at real shapes: no spill, matrix instructions, warps that fit."""
    kernels = [x for x in compiled[target] if not x["flags"]]
    with capsys.disabled():
        print("\n" + table(kernels))
    assert len({x["kernel"] for x in kernels}) == ALL_KERNELS
    for x in kernels:
        name = f"{x['kernel']} {x['model']} {x['rows']}"
        assert x["spills"] == 0, name
        assert x["shared"] <= x["shared_limit"], name
        heart = x["kernel"] in LINEAR | CORRECTION
        assert x["resident"] >= (8 if heart else 16), name
        if heart or x["kernel"] in PREPARATION:
            assert x["matrix"] > 0, name


@pytest.mark.parametrize("target", TARGETS)
def test_every_flag_and_dtype(target: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    kernels = [x for x in compiled[target] if x["flags"]]
    assert {x["dtype"] for x in kernels} == {"bfloat16", "float16", "float32"}
    for x in kernels:
        assert x["shared"] <= x["shared_limit"], f"{x['kernel']} {x['dtype']} {x['rows']}"
        assert x["resident"] > 0, f"{x['kernel']} {x['dtype']} {x['rows']}"


def table(kernels: list[dict[str, Any]]) -> str:
    """Registers a thread, bytes of shared memory, matrix and all instructions, resident warps."""
    columns = ("registers", "spills", "shared", "matrix", "instructions", "resident")
    lines = [f"{'':70}" + "".join(f"{name:>13}" for name in columns)]
    for x in kernels:
        case = f"{x['target']} {x['model']} {x['rows']} {x['dtype']} {x['kernel']}"
        lines.append(f"{case:70}" + "".join(f"{x[name]:>13}" for name in columns))
    return "\n".join(lines)


def test_no_kernel_is_compiled_again_for_another_length(tmp_path: Path) -> None:
    lengths = {1, 16, 17, 128, 513, 4096}
    keys: dict[str, set[str]] = defaultdict(set)
    seen: dict[str, set[int]] = defaultdict(set)
    for x in aot("keys", tmp_path):
        keys[x["kernel"]].add(x["key"])
        seen[x["kernel"]].add(x["T"])
    assert len(keys) == ALL_KERNELS
    assert all(found == lengths for found in seen.values())
    assert {kernel: found for kernel, found in keys.items() if len(found) > 1} == {}


# Where it cannot run


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("IFR_FAST_IMPL", raising=False)


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.usefixtures("compiling")
def test_not_on_cpu_tensors() -> None:
    from tiny import tiny_model

    message = "impl: 'triton' cannot run: the model is on cpu, and TRITON_INTERPRET=1 is not set"
    with pytest.raises(ValueError, match=message):
        Tracer(tiny_model("llama"), impl="triton")


@pytest.mark.usefixtures("compiling")
def test_not_on_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or newer, and cuda has 7\.5"):
        scoring.choose_impl("triton", GPU, torch.bfloat16)
    assert scoring.choose_impl("auto", GPU, torch.bfloat16) == "eager"


@pytest.mark.usefixtures("compiling")
def test_where_it_can_run_it_is_the_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert scoring.choose_impl("auto", GPU, torch.bfloat16) == "triton"
    assert scoring.choose_impl("auto", CPU, torch.bfloat16) in ("cpu", "eager")
    assert scoring.choose_impl("auto", GPU, torch.float64) == "eager"
    with pytest.raises(ValueError, match=r"the model is in float64"):
        scoring.choose_impl("triton", GPU, torch.float64)


@pytest.mark.usefixtures("compiling")
def test_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    own = importlib.util.find_spec
    missing = lambda name, *args: None if name == "triton" else own(name, *args)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        scoring.choose_impl("triton", GPU, torch.bfloat16)
    assert scoring.choose_impl("auto", GPU, torch.bfloat16) == "eager"


def test_interpreted_on_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert scoring.choose_impl("triton", CPU, torch.float32) == "triton"
