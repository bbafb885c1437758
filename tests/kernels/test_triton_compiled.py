"""The Triton kernels compiled for GPUs that are not there (aot.py), by their machine code."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from pathlib import Path

import aot_cache
import pytest
import torch
from aot_cache import TARGETS, Found

from ifr_fast import Tracer
from ifr_fast.scoring import implementations

pytest.importorskip("triton")

# The kernels of (b) and (c) in kernels/triton/kernel.py that have products on matrix units.
LINEAR, CORRECTION = {"log_sum_exp_kernel", "linear_kernel"}, {"light_kernel", "heavy_kernel"}
PREPARATION = {"value_space_signs_kernel", "reach_kernel"}  # products that (b) or (c) reads
ALL_KERNELS = 20


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Found]:
    """Every job's results: those of earlier runs, as long as no source has changed."""
    cache: pytest.Cache | None = getattr(request.config, "cache", None)
    folder = cache.mkdir("aot") if cache is not None else tmp_path_factory.mktemp("aot")
    return aot_cache.compiled(folder)


def kernels_of(target: str, compiled: dict[str, Found], flags: bool) -> Found:
    jobs = [found for job, found in compiled.items() if job.split("-")[0] == target]
    return [x for found in jobs for x in found if x["flags"] == flags]


@pytest.mark.parametrize("target", TARGETS)
def test_default_configurations(
    target: str, compiled: dict[str, Found], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bfloat16 at real shapes: no spill, matrix instructions, warps that fit."""
    kernels = kernels_of(target, compiled, flags=False)
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
def test_every_flag_and_dtype(target: str, compiled: dict[str, Found]) -> None:
    kernels = kernels_of(target, compiled, flags=True)
    assert {x["dtype"] for x in kernels} == {"bfloat16", "float16", "float32"}
    for x in kernels:
        assert x["shared"] <= x["shared_limit"], f"{x['kernel']} {x['dtype']} {x['rows']}"
        assert x["resident"] > 0, f"{x['kernel']} {x['dtype']} {x['rows']}"


def table(kernels: Found) -> str:
    """Registers a thread, bytes of shared memory, matrix instructions, resident warps."""
    columns = ("registers", "spills", "shared", "matrix", "resident")
    lines = [f"{'':70}" + "".join(f"{name:>13}" for name in columns)]
    for x in kernels:
        case = f"{x['target']} {x['model']} {x['rows']} {x['dtype']} {x['kernel']}"
        numbers = ("-" if x[name] is None else x[name] for name in columns)
        lines.append(f"{case:70}" + "".join(f"{number:>13}" for number in numbers))
    return "\n".join(lines)


def test_no_kernel_is_compiled_again_for_another_length(compiled: dict[str, Found]) -> None:
    lengths = {1, 16, 17, 128, 513, 4096}
    keys: dict[str, set[str]] = defaultdict(set)
    seen: dict[str, set[int]] = defaultdict(set)
    for x in compiled["keys"]:
        keys[x["kernel"]].add(x["key"])
        seen[x["kernel"]].add(x["T"])
    assert len(keys) == ALL_KERNELS
    assert all(found == lengths for found in seen.values())
    assert {kernel: found for kernel, found in keys.items() if len(found) > 1} == {}


def test_results_are_kept_while_sources_stay_the_same(tmp_path: Path) -> None:
    source, folder = tmp_path / "kernel.py", tmp_path / "kept"
    ran: list[list[str]] = []

    def run(jobs: list[str], place: Path) -> None:
        ran.append(jobs)
        for job in jobs:
            if job == "interrupted" and len(ran) == 1:
                (place / f"{job}.part").write_text("[")
                raise KeyboardInterrupt
            (place / f"{job}.json").write_text(json.dumps([{"run": len(ran)}]))

    def results() -> dict[str, Found]:
        return aot_cache.cached(folder, aot_cache.key([source], "1"), ["a", "interrupted"], run)

    source.write_text("x = 1")
    with pytest.raises(KeyboardInterrupt):
        results()
    expected = {"a": [{"run": 1}], "interrupted": [{"run": 2}]}
    assert results() == results() == expected
    assert ran == [["a", "interrupted"], ["interrupted"]]
    source.write_text("x = 2")
    assert results() == {"a": [{"run": 3}], "interrupted": [{"run": 3}]}
    assert len([x for x in folder.iterdir() if x.is_dir()]) == 1
    assert aot_cache.key([source], "1") != aot_cache.key([source], "2")


# Machines that it cannot run on


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
        implementations.choose_impl("triton", GPU, torch.bfloat16)
    assert implementations.choose_impl("auto", GPU, torch.bfloat16) == "eager"


@pytest.mark.usefixtures("compiling")
def test_where_it_can_run_it_is_the_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert implementations.choose_impl("auto", GPU, torch.bfloat16) == "triton"
    assert implementations.choose_impl("auto", CPU, torch.bfloat16) in ("cpu", "eager")
    assert implementations.choose_impl("auto", GPU, torch.float64) == "eager"
    with pytest.raises(ValueError, match=r"the model is in float64"):
        implementations.choose_impl("triton", GPU, torch.float64)


@pytest.mark.usefixtures("compiling")
def test_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    own = importlib.util.find_spec
    missing = lambda name, *args: None if name == "triton" else own(name, *args)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        implementations.choose_impl("triton", GPU, torch.bfloat16)
    assert implementations.choose_impl("auto", GPU, torch.bfloat16) == "eager"


def test_interpreted_on_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert implementations.choose_impl("triton", CPU, torch.float32) == "triton"


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [("3.6.0", "2.4.0", False), ("3.4.0", "2.5.2", False), ("3.6.0", "2.3.5", True),
     ("3.7.0", "2.4.6", True), ("3.10.0", "3.0.1", True)],
)  # fmt: skip
def test_not_interpreted_where_the_interpreter_fails(
    triton: str, numpy: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(implementations, "version", versions.__getitem__)
    found = implementations.what_is_missing("triton", CPU, torch.float32)
    if runs:
        assert found is None
    else:
        message = f"interpreter of triton {triton} does not run with numpy {numpy}; it takes numpy<"
        assert found is not None
        assert message in found
