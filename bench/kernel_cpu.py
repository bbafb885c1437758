"""Times the native CPU kernel on a real model's own inputs, against that model's forward pass.

The unit is one warm plain forward pass of the same text in the same run (sdpa, inference mode, no
cache, one position's logits). Forward pass and scoring alternate; medians are printed, times in
units. `all rows` scores every position of every layer, `frontier` some rows of every layer, as one
route does. `extra MB` is the resident memory that scoring one layer adds at its peak, `listed` the
pairs per node with lin > 0 and a coordinate that can flip, `visited` the coordinates per node that
they visit, all pairs together. Stages are shares of the threads' time.

    python bench/kernel_cpu.py --model DIR --lengths 128 512 2048 8192
"""

from __future__ import annotations

import argparse
import ctypes
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ifr_fast.kernels.contract import LayerInputs
from ifr_fast.kernels.cpu import kernel


def text_ids(tokenizer_name: str, n_tokens: int) -> Tensor:
    """[1, T] tokens of English prose: the language reference that comes with Python."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    text = "\n".join(pydoc_data.topics.topics.values())[: 12 * n_tokens]
    return tokenizer(text, return_tensors="pt").input_ids[:, :n_tokens]


def capture(model: nn.Module, ids: Tensor) -> list[LayerInputs]:
    """Every layer's inputs, all rows, of a Llama-style model (sequential blocks)."""
    T = ids.shape[1]
    attention: list[tuple[Tensor, Tensor, Tensor, float]] = []
    resid_pre: list[Tensor] = []
    resid_mid: list[Tensor] = []

    def record(module, q, k, v, mask, scaling=None, **kwargs):  # type: ignore[no-untyped-def]
        attention.append(
            (q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), scaling)
        )
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)

    AttentionInterface.register("record", record)
    layers = model.model.layers
    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(lambda _, args: resid_pre.append(args[0][0])))
        hooks.append(
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, args: resid_mid.append(args[0][0])
            )
        )
    model.set_attn_implementation("record")
    with torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)
    model.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()

    inputs = []
    for i, layer in enumerate(layers):
        q, k, v, scale = attention[i]
        H, V = q.shape[1], v.shape[2]
        W_O = layer.self_attn.o_proj.weight.detach().T.reshape(H, V, -1).contiguous()
        inputs.append(LayerInputs(torch.arange(T), resid_pre[i], resid_mid[i], q, k, v, W_O, scale))
    return inputs


def some_rows(inputs: LayerInputs, rows: Tensor) -> LayerInputs:
    """The layer's inputs at these rows only."""
    return inputs._replace(
        rows=rows, resid_pre=inputs.resid_pre[rows], y=inputs.y[rows], q=inputs.q[rows]
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_extra_mb(run: Callable[[], object]) -> float:
    """Resident memory that `run` adds at its peak (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # otherwise memory freed before is reused and not counted
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    before = memory_mb("VmRSS")
    run()
    return memory_mb("VmHWM") - before


def memory_mb(field: str) -> float:
    """A field of the process status, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def forward(model: nn.Module, ids: Tensor) -> None:
    """The unit: one plain forward pass."""
    with torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="name or directory of a Llama-style model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--frontier", type=int, default=25, help="rows of a frontier")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--keep", type=float, default=0.01)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    args = parser.parse_args()

    def score(layers: list[LayerInputs]) -> list[kernel.Counters]:
        return [kernel.score_attention_counted(layer, args.keep)[1] for layer in layers]

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    columns = ["T", "threads", "unit s", "all rows", "frontier", "extra MB", "listed", "visited"]
    table = Table(*columns, *kernel.STAGES, title=f"{args.model}, {kernel.ISA or kernel.isas()[0]}")
    for T in args.lengths:
        ids = text_ids(args.model, T)
        layers = capture(model, ids)
        rows = torch.randperm(T, generator=torch.Generator().manual_seed(0))[: args.frontier]
        frontier = [some_rows(layer, rows.sort().values) for layer in layers]

        for n_threads in args.threads:
            torch.set_num_threads(n_threads)
            extra_mb = peak_extra_mb(partial(score, layers[-1:]))
            times: list[tuple[float, float, float]] = []
            for _ in range(args.repeat + 1):  # the first is the warm-up
                unit = seconds(partial(forward, model, ids))
                all_rows = seconds(partial(score, layers))
                times.append((unit, all_rows, seconds(partial(score, frontier))))
            unit, all_rows, route = (statistics.median(t) for t in zip(*times[1:], strict=True))
            counters = score(layers)
            stages = {s: sum(c.seconds[s] for c in counters) for s in kernel.STAGES}
            nodes = len(layers) * T
            table.add_row(
                str(T),
                str(n_threads),
                f"{unit:.2f}",
                f"{all_rows / unit:.3f}",
                f"{route / unit:.4f}",
                f"{extra_mb:.0f}",
                f"{sum(c.listed for c in counters) / nodes:.0f}",
                f"{sum(c.visited for c in counters) / nodes:.0f}",
                *(f"{stages[s] / sum(stages.values()):.0%}" for s in kernel.STAGES),
            )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
