"""The LM Transparency Tool's graphs by ifr_fast.compat, beside the tool's own way, in one run.

    build_full_graph(model, renormalizing_threshold=0.04)
    build_paths_to_predictions(graph, ..., starting_tokens, threshold=0.04)

on a text that the model has run on. The tool's way is bench/published_tool.py in float32, which
follows its documentation: a tensor [T, T, H, D] a layer, and a Python loop over edges with
`.item()`. Attention weights and values are had before on that side, and not counted. Ours is a
`TransparentLlm` with parity=True, and one without; nothing is kept between rounds.

Before that, contributions of all parts of all layers are compared with the same arithmetic in
float64, ours and the float32 ones. No ratio is printed, and the exit status is 1, where ours are
farther off than 1e-5.

    python bench/transparency_tool.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
import published_tool
import torch
from published_tool import Layer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ifr_fast import Recording, Tracer
from ifr_fast.benchmark import first_tokens, machine, prose
from ifr_fast.compat.llm_transparency_tool import (
    TransparentLlm,
    build_full_graph,
    build_paths_to_predictions,
    get_attention_contributions,
    get_mlp_contributions,
)
from ifr_fast.kernels.contract import visible
from ifr_fast.kernels.eager import attention_pattern
from ifr_fast.recording import layer_inputs

TOLERANCE = 1e-5
THRESHOLD = 0.04


def layers_of(recording: Recording) -> list[Layer]:
    """What the tool's model holds after a run. (No bias to fold: the default model has none.)"""
    T, layers = len(recording), []
    for i in range(recording.decoder.n_layers):
        inputs, resid_post = layer_inputs(recording, i, torch.arange(T))
        assert resid_post is not None
        H, H_kv = inputs.q.shape[1], inputs.v.shape[1]
        layers.append(
            Layer(
                inputs.resid_pre,
                inputs.y,
                resid_post,
                resid_post - inputs.y,
                attention_pattern(inputs, visible(inputs.rows, T, inputs.window)),
                inputs.v.repeat_interleave(H // H_kv, 1),
                inputs.W_O,
            )
        )
    return layers


def gaps(model: TransparentLlm, layers: list[Layer]) -> tuple[float, float]:
    """How far ours, and the float32 ones, are from float64: the largest of all contributions."""
    ours = theirs = 0.0

    def largest(x: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(x, exact, strict=True))

    for i, layer in enumerate(layers):
        exact = published_tool.shares(layer.to(torch.float64))
        mid = model.residual_after_attn(i)
        attention = get_attention_contributions(
            model.residual_in(i), mid, model.decomposed_attn(0, i)[None], parity=True
        )
        ffn = get_mlp_contributions(mid, model.residual_out(i), model.ffn_out(i), parity=True)
        ours = max(ours, largest([x[0] for x in (*attention, *ffn)], exact))
        theirs = max(theirs, largest(published_tool.shares(layer), exact))
    return ours, theirs


def timed(job: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = job()
    return time.perf_counter() - begin, found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=128, help="tokens")
    parser.add_argument("--repeat", type=int, default=9, help="rounds of ours")
    parser.add_argument("--slow-repeat", type=int, default=1, help="rounds of the tool's way")
    parser.add_argument("--skip-check", action="store_true", help="no comparison, and no ratio")
    arguments = parser.parse_args()
    console = Console()

    tracer = Tracer.from_pretrained()
    T, L = arguments.length, tracer.decoder.n_layers
    token_ids = first_tokens(prose(), tracer.tokenizer, T)
    models = {parity: TransparentLlm.of(tracer, parity=parity) for parity in (True, False)}
    for model in models.values():
        model.run([token_ids])
    layers = layers_of(tracer.record(token_ids, mode="full"))
    agree = False
    if not arguments.skip_check:
        ours, theirs = gaps(models[True], layers)
        agree = ours < TOLERANCE
        console.print(
            f"largest error of a contribution, against float64: ours {ours:.1e}, "
            f"the tool's way in float32 {theirs:.1e}"
        )

    rows: dict[str, tuple[float, float, float, nx.DiGraph]] = {}
    for parity, model in models.items():
        rounds = []
        for _ in range(arguments.repeat + 1):
            full, graph = timed(lambda: build_full_graph(model, 0, THRESHOLD))  # noqa: B023
            one, _ = timed(lambda: build_paths_to_predictions(graph, L, T, [T - 1], THRESHOLD))  # noqa: B023
            every, _ = timed(lambda: build_paths_to_predictions(graph, L, T, range(T), THRESHOLD))  # noqa: B023
            rounds.append((full, one, every))
        columns = zip(*rounds[1:], strict=True)  # the first warms up
        full, one, every = (statistics.median(x) for x in columns)
        rows["ours, parity" if parity else "ours"] = (full, one, every, graph)
    rounds = []
    for _ in range(arguments.slow_repeat):
        full, graph = timed(
            lambda: published_tool.full_graph(map(published_tool.shares, layers), THRESHOLD)
        )
        one, _ = timed(lambda: published_tool.paths(graph, L, [T - 1], THRESHOLD))  # noqa: B023
        every, _ = timed(lambda: published_tool.paths(graph, L, range(T), THRESHOLD))  # noqa: B023
        rounds.append((full, one, every))
    full, one, every = (statistics.median(x) for x in zip(*rounds, strict=True))
    rows["the tool's way"] = (full, one, every, graph)

    at = machine(tracer.decoder.device)
    console.print(
        f"{T} tokens, threshold {THRESHOLD}; {at.processor}, {at.threads} threads, "
        f"torch {at.torch}, networkx {nx.__version__}, Python {at.python}"
    )
    table = Table()
    names = "", "full graph", "one path", "all paths", "edges", "ratio, one", "ratio, all"
    for name in names:
        table.add_column(name, justify="left" if not name else "right")
    for name, (a, b, c, graph) in rows.items():
        ratios = ["", ""]
        if agree and name != "the tool's way":
            ratios = [f"{(full + one) / (a + b):.0f}", f"{(full + every) / (a + c):.0f}"]
        table.add_row(
            name, f"{a:.3f} s", f"{b:.4f} s", f"{c:.3f} s", str(graph.number_of_edges()), *ratios
        )
    console.print(table)
    return 0 if agree or arguments.skip_check else 1


if __name__ == "__main__":
    raise SystemExit(main())
