"""Compiles every launch of the Triton kernels for GPUs that are not there, and reads the code.

A program of its own, because Triton's interpreter, by which other tests run the same kernels, is
chosen once a process. Real launches of the driver, on tensors without data ("meta": a read by the
host would raise), reach Triton's own specialization and compilation; a driver that knows a target
and nothing else stands in for the GPU's.

    python aot.py FOLDER JOB ...    writes FOLDER/JOB.json for each job, on all cores

A job is TARGET-MODEL (each kernel as compiled for the target), TARGET-flags (likewise with all
options and dtypes), or `keys` (specialization keys of launches at several lengths). Its file is a
list of JSON objects and appears only when it is complete. NVIDIA's code is disassembled, which
takes as long as to compile it, only for kernels that have products, whose instructions are counted.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ifr_fast.kernels.contract import LayerInputs
from ifr_fast.kernels.triton import kernel


class Limits(NamedTuple):
    """Limits of a target's multiprocessor (compute unit)."""

    registers: int  # 32-bit, of all threads
    register_unit: int  # a warp's are allocated in multiples
    shared: int  # bytes
    block_shared: int  # bytes, of one block
    block_reserved: int  # bytes, of each block, the system's own
    warps: int
    blocks: int
    matrix: str  # matrix instructions, a pattern


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD Instinct MI300
# instruction set reference, 3.6: 512 vector registers a lane on each of 4 units, 8 waves a unit.
TARGETS = {
    "sm_80": (
        GPUTarget("cuda", 80, 32),
        Limits(65536, 256, 167936, 166912, 1024, 64, 32, r"\bHMMA\b"),
    ),
    "sm_90": (
        GPUTarget("cuda", 90, 32),
        Limits(65536, 256, 233472, 232448, 1024, 64, 32, r"\b(HMMA|HGMMA|WGMMA)\b"),
    ),
    "sm_100": (
        GPUTarget("cuda", 100, 32),
        Limits(65536, 256, 233472, 232448, 1024, 64, 32, r"\b(HMMA|UTC\w*MMA)\b"),
    ),
    "gfx942": (
        GPUTarget("hip", "gfx942", 64),
        Limits(4 * 512 * 64, 8 * 64, 65536, 65536, 0, 32, 32, r"\bv_mfma_"),
    ),
}


# Kernels that have products on matrix units.
PRODUCTS = {
    *("value_space_signs_kernel", "reach_kernel"),
    *("log_sum_exp_kernel", "linear_kernel", "light_kernel", "heavy_kernel"),
}


class Model(NamedTuple):
    """A layer's shape."""

    H: int
    H_kv: int
    K: int
    D: int


MODELS = {
    "Llama-3-8B": Model(32, 8, 128, 4096),
    "Llama-3-70B": Model(64, 8, 128, 8192),
    "Qwen3-32B": Model(64, 8, 128, 5120),
    "SmolLM2-135M": Model(9, 3, 64, 576),
}


def inputs(
    model: Model, R: int, S: int, dtype: torch.dtype = torch.bfloat16, flags: bool = False
) -> LayerInputs:
    """The last R rows of S, without data; K and V laid out as a Hugging Face cache has them."""
    H, H_kv, K, D = model

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return LayerInputs(
        rows=torch.arange(S - R, S),
        resid_pre=empty(R, D),
        y=empty(R, D),
        q=empty(H, R, K).transpose(0, 1),
        k=empty(H_kv, S, K).transpose(0, 1),
        v=empty(H_kv, S, K).transpose(0, 1),
        W_O=empty(H, K, D),
        scale=K**-0.5,
        **(
            {
                "row_scale": empty(R),
                "value_gate": empty(R, H, K),
                "window": 100,
                "softcap": 30.0,
                "sinks": empty(H),
                "alibi_slopes": empty(H),
                "ffn": empty(R, D),
            }
            if flags
            else {}
        ),
    )


class TargetDriver:
    """Triton's driver for a GPU that is not there."""

    def __init__(self, index: int, target: GPUTarget) -> None:
        self.index, self.target = index, target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Launch(NamedTuple):
    """A kernel function and the arguments that a launch gives it."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.function.__name__)

    def key(self) -> str:
        """The key that Triton looks a compiled kernel up by."""
        *_, binder = self.function.device_caches[driver.active.get_current_device()]
        _, specialization, options = binder(*self.arguments, **self.options, debug=False)
        return f"{self.name} {specialization} {options}"

    def compile(self) -> Any:
        return self.function.warmup(*self.arguments, grid=(1,), **self.options)


def launches(given: LayerInputs) -> list[Launch]:
    """Each launch that scores a layer's rows."""
    seen: list[Launch] = []
    own = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **options: seen.append(
        Launch(self, args, options)
    )
    try:
        kernel.score_attention(given, 0.01)
        kernel.score_ffn(given.resid_pre, given.y)
    finally:
        JITFunction.run = own
    return seen


def use(target: str) -> None:
    driver.set_active(TargetDriver(list(TARGETS).index(target), TARGETS[target][0]))


def report(launch: Launch, target: str, flags: bool) -> dict[str, Any]:
    """Compiles one launch: registers, shared memory, spills, matrix instructions, warps."""
    limits = TARGETS[target][1]
    begin = time.process_time()
    compiled = launch.compile()
    seconds = time.process_time() - begin
    if "cubin" in compiled.asm:
        read = not flags and launch.name in PRODUCTS
        found = of_cubin(compiled.asm["cubin"], limits.matrix if read else None)
    else:
        found = of_amdgcn(compiled.asm["amdgcn"], limits)
    metadata = compiled.metadata
    found |= {"kernel": launch.name, "shared": metadata.shared, "warps": metadata.num_warps}
    return found | {
        "target": target,
        "shared_limit": limits.block_shared,
        "resident": resident(found, limits),
        "seconds": round(seconds, 2),
    }


def resident(found: dict[str, Any], limits: Limits) -> int:
    """Warps that registers and shared memory let a multiprocessor hold at once."""
    lanes = limits.register_unit // 8  # 32 or 64: registers a lane come in eights
    per_warp = math.ceil(found["registers"] * lanes / limits.register_unit) * limits.register_unit
    of_registers = limits.registers // (per_warp * found["warps"])
    shared = found["shared"] + limits.block_reserved
    of_shared = limits.shared // shared if shared else limits.blocks
    blocks = min(of_registers, of_shared, limits.blocks, limits.warps // found["warps"])
    return blocks * found["warps"]


def of_cubin(cubin: bytes, matrix: str | None) -> dict[str, Any]:
    """matrix: the pattern of matrix instructions, or None where they are not counted."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def cuobjdump(what: str) -> str:
            command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = cuobjdump("-res-usage")
        sass = "" if matrix is None else cuobjdump("-sass")
    numbers = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "spills": numbers["STACK"] + numbers["LOCAL"],  # registers spill to the stack
        "matrix": None if matrix is None else len(re.findall(matrix, sass)),
    }


def of_amdgcn(asm: str, limits: Limits) -> dict[str, Any]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", asm)[1])

    # Scalar registers spill into lanes of vector registers, not to memory: those are counted.
    return {
        "registers": number("vgpr_count"),  # accumulation registers included
        "spills": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "matrix": len(re.findall(limits.matrix, asm)),
    }


def compiled(target: str, model: str) -> list[dict[str, Any]]:
    """The model's launches for all rows of a text and for a few; for "flags" the smallest model's,
    with all options, in all dtypes.
    """
    use(target)
    of_rows = (("all", 2048), ("few", 4))
    flags = model == "flags"
    model = "SmolLM2-135M" if flags else model
    found: dict[str, dict[str, Any]] = {}
    for rows, R in of_rows:
        for dtype in ("bfloat16", "float16", "float32") if flags else ("bfloat16",):
            case = {"model": model, "rows": rows, "dtype": dtype, "flags": flags}
            given = inputs(MODELS[model], R, 2048, getattr(torch, dtype), flags)
            for launch in launches(given):
                key = launch.key()
                if key not in found:
                    found[key] = report(launch, target, flags) | case
    return list(found.values())


def keys(lengths: tuple[int, ...] = (1, 16, 17, 128, 513, 4096)) -> list[dict[str, Any]]:
    use("sm_90")
    return [
        {"T": T, "kernel": launch.name, "key": launch.key()}
        for T in lengths
        for launch in launches(inputs(MODELS["SmolLM2-135M"], T, T))
    ]


def run(job: str, folder: Path) -> None:
    """Does one job and writes its file."""
    found = keys() if job == "keys" else compiled(*job.split("-", 1))
    part = folder / f"{job}.part"
    part.write_text(json.dumps(found))
    part.replace(folder / f"{job}.json")


def main() -> None:
    folder, jobs = Path(sys.argv[1]), sys.argv[2:]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        pool.starmap(run, [(job, folder) for job in jobs], chunksize=1)


if __name__ == "__main__":
    main()
