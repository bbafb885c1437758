"""The cost of attribution on a GPU: the Triton kernels, eager torch, the oracle and FlashTrace.

One run writes one report: the device, its driver and versions, the bandwidth and the matrix rate
that it reached in this very run, and then

- the default model, float32 and bfloat16, each implementation in units of the plain forward pass
  (what the columns mean is said in ifr_fast/benchmark.py);
- two layers of a model of Llama-3-8B's shape with random weights, in bfloat16, at longer contexts;
- the materializing oracle and FlashTrace on the default model (bench/peers/peers.py), where
  flashtrace is installed.

    make bench-gpu                                  # writes out/gpu.md and out/gpu.json
    python bench/gpu.py --lengths 2048 8192 32768
    TRITON_INTERPRET=1 python bench/gpu.py --device cpu --tiny    # tries it out without a GPU
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ifr_fast import Tracer
from ifr_fast.benchmark import TIMED, Throughput, first_tokens, machine, measure, prose
from ifr_fast.model.pretrained import load
from ifr_fast.scoring.implementations import what_is_missing

IMPLEMENTATIONS = ("triton", "eager")
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 4096,  # instead of 128,256, as the head is not measured
    "max_position_embeddings": 1 << 17,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


class Ceilings(NamedTuple):
    """Speeds that the device reached in this run."""

    bandwidth: float  # bytes a second, read and written, of a large copy
    matrix: dict[str, float]  # FLOP a second of a large product, by dtype


class Result(NamedTuple):
    """One implementation on one text of one model."""

    model: str
    dtype: str
    impl: str
    figures: Throughput


def seconds_of(job: Callable[[], object], device: torch.device, repeat: int = 5) -> float:
    """Best of some runs, after one that is not counted."""
    best = float("inf")
    for i in range(repeat + 1):
        start = time.perf_counter()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            best = min(best, time.perf_counter() - start)
    return best


def ceilings(device: torch.device, tiny: bool) -> Ceilings:
    """Measures the device: a copy of 1 GiB, and square products of 8,192 (tiny: far less)."""
    n_bytes, n = (1 << 22, 256) if tiny else (1 << 30, 8192)
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * n_bytes / seconds_of(lambda: target.copy_(source), device)
    matrix = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, n, n, device=device, dtype=torch.float32).to(dtype)
        took = seconds_of(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
        matrix[str(dtype).removeprefix("torch.")] = 2 * n**3 / took
    return Ceilings(bandwidth, matrix)


def driver() -> str:
    """The driver's version, as nvidia-smi or rocm-smi says it."""
    for command in (
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        ["rocm-smi", "--showdriverversion", "--csv"],
    ):
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return " ".join(run.stdout.split())
    return "unknown"


def random_model(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Any:
    """Two layers with random weights, scaled so that attention is not uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, initializer_range=0.04, **shape)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval()


def results_of(
    name: str, model: PreTrainedModel, tokens: Callable[[int], Tensor], args: argparse.Namespace
) -> list[Result]:
    """Every implementation at every length; reports and skips those that do not fit in memory."""
    results = []
    dtype = str(model.dtype).removeprefix("torch.")
    for impl in IMPLEMENTATIONS:
        missing = what_is_missing(impl, torch.device(args.device), model.dtype)
        if missing is not None:
            raise SystemExit(f"--device: impl {impl!r} cannot run: {missing}")
        tracer = Tracer(model, None, impl=impl)
        for T in args.lengths:
            Console(stderr=True).print(f"{name}, {dtype}, {impl}, {T} tokens")
            try:
                figures = measure(tracer, tokens(T), repeat=args.repeat)
            except torch.OutOfMemoryError:
                Console(stderr=True).print("  does not fit")
                continue
            results.append(Result(name, dtype, impl, figures))
    return results


def markdown(document: dict[str, Any], results: list[Result], peers: str) -> str:
    """The report."""
    on, of = document["machine"], document["ceilings"]
    rates = ", ".join(
        f"{rate / 1e12:.1f} TFLOP/s in {dtype}" for dtype, rate in of["matrix"].items()
    )
    lines = [
        f"# {on['processor']}",
        "",
        f"Driver {document['driver']}, torch {on['torch']}, triton {document['triton']}, "
        f"transformers {on['transformers']}, Python {on['python']}, ifr_fast {on['ifr_fast']}; "
        f"{of['bandwidth'] / 1e9:,.0f} GB/s copied, {rates} reached in this run. "
        f"Medians of {document['repeat']}.",
        "",
        "All else is in units of the forward pass; record, trace and trace_all include their own.",
        "",
        "| model | dtype | implementation | T | forward (s) | "
        + " | ".join(TIMED[1:])
        + " | scoring adds (MB) | peak (MB) |",
        "|" + "---|" * (len(TIMED) + 6),
    ]
    for model, dtype, impl, f in results:
        megabytes = (
            "?" if n is None else f"{n / 1e6:,.0f}" for n in (f.scoring_bytes, f.peak_bytes)
        )
        cells = [model, dtype, impl, f"{f.n_tokens:,}", f"{f.forward_seconds:.4f}"]
        cells += [f"{f.units(name):.4f}" for name in TIMED[1:]]
        lines.append("| " + " | ".join([*cells, *megabytes]) + " |")
    return "\n".join([*lines, "", "## Beside others", "", peers, ""])


def beside_others(args: argparse.Namespace, folder: Path) -> str:
    """The output of bench/peers/peers.py on the device, from a process of its own."""
    if args.tiny:
        return "Left out: --tiny."
    script = Path(__file__).parent / "peers" / "peers.py"
    command = [sys.executable, str(script), "--device", args.device]
    run = subprocess.run(
        [*command, "--json", str(folder / "gpu_peers.json")], capture_output=True, text=True
    )
    if run.returncode:
        return f"`bench/peers/peers.py` failed: {run.stderr.strip().splitlines()[-1]}"
    return f"```\n{run.stdout}```"


def main() -> None:
    """Parses the arguments, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the report")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this out")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: torch sees no GPU here")

    document: dict[str, Any] = {
        "machine": machine(device)._asdict(),
        "driver": driver(),
        "triton": metadata.version("triton"),
        "ceilings": ceilings(device, args.tiny)._asdict(),
        "repeat": args.repeat,
    }
    results: list[Result] = []
    if args.tiny:
        args.lengths = [8, 40]
    else:
        for dtype in (torch.float32, torch.bfloat16):
            model, tokenizer = load(dtype=dtype)
            text = first_tokens(prose(), tokenizer, max(args.lengths))
            name = "SmolLM2-135M-Instruct"
            results += results_of(name, model.to(device), lambda T, text=text: text[:T], args)  # type: ignore[misc]
    shape, name = (TINY, "tiny") if args.tiny else (LLAMA_3_8B, "Llama-3-8B's shape, 2 layers")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape["vocab_size"], (max(args.lengths),), generator=generator)
    dtype = torch.float32 if args.tiny else torch.bfloat16
    results += results_of(name, random_model(shape, dtype, device), lambda T: ids[:T], args)

    args.out.mkdir(parents=True, exist_ok=True)
    report = markdown(document, results, beside_others(args, args.out))
    document["results"] = [
        result._asdict() | {"figures": result.figures.to_dict()} for result in results
    ]
    (args.out / "gpu.md").write_text(report)
    (args.out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    print(report)


if __name__ == "__main__":
    main()
