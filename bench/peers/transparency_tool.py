"""The LM Transparency Tool's graphs by ifr_fast.compat, beside the tool's own way, in one run.

    build_full_graph(model, renormalizing_threshold=0.04)
    build_paths_to_predictions(graph, ..., starting_tokens, threshold=0)

on a text that the model has run on. The tool's way is published_tool.py in float32, which
follows its documentation: a tensor [T, T, H, D] a layer, and a Python loop over edges with
`.item()`. Attention weights and values are had before on that side, and not counted. Ours is a
`TransparentLlm` with parity=True, and one without; nothing is kept between rounds.

Before that, contributions of all parts of all layers are compared with the same arithmetic in
float64, ours and the float32 ones. No ratio is printed, and the exit status is 1, where ours are
farther off than 1e-5.

    python bench/peers/transparency_tool.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from ifr_fast.kernels.rows import attention_pattern
from ifr_fast.recording.layer_inputs import layer_inputs

TOLERANCE = 1e-5
THRESHOLD = 0.04
# Paths need another threshold: after the tool's renormalization an FFN and the stream past it weigh
# about 1 / T, and no path leads over them at 0.04.
PATH_THRESHOLD = 0.0


def layers_of(recording: Recording) -> list[Layer]:
    """Layers as the tool's model holds them after a run (the default model has no bias to fold)."""
    T, layers = len(recording), []
    for i in range(recording.decoder.n_layers):
        inputs, post, _ = layer_inputs(recording, i, torch.arange(T))
        assert post is not None
        H, H_kv = inputs.q.shape[1], inputs.v.shape[1]
        layers.append(
            Layer(
                inputs.resid_pre,
                inputs.y,
                post.y,
                post.ffn,
                attention_pattern(inputs, visible(inputs.rows, T, inputs.window)),
                inputs.v.repeat_interleave(H // H_kv, 1),
                inputs.W_O,
            )
        )
    return layers


def gaps(model: TransparentLlm, layers: list[Layer], every: int) -> tuple[float, float]:
    """Distance of our contributions, and of the float32 ones, from float64: the largest over
    all contributions of each `every`-th layer.
    """
    ours = theirs = 0.0

    def largest(x: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(x, exact, strict=True))

    for i in range(0, len(layers), every):
        layer = layers[i]
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


class Round(NamedTuple):
    """Seconds of a round, and its results."""

    full: float
    one_path: float
    all_paths: float
    n_edges: int


def timed_round(
    build: Callable[[], nx.DiGraph],
    paths: Callable[[nx.DiGraph, Sequence[int]], list[nx.DiGraph]],
    n_tokens: int,
) -> Round:
    full, graph = timed(build)
    one, _ = timed(lambda: paths(graph, [n_tokens - 1]))
    every, _ = timed(lambda: paths(graph, range(n_tokens)))
    return Round(full, one, every, graph.number_of_edges())


def medians(rounds: list[Round]) -> Round:
    return Round(*(statistics.median(column) for column in zip(*rounds, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=128, help="tokens")
    parser.add_argument("--repeat", type=int, default=9, help="rounds of ours")
    parser.add_argument("--slow-repeat", type=int, default=1, help="rounds of the tool's way")
    parser.add_argument("--check-every", type=int, default=1, help="compare each n-th layer")
    arguments = parser.parse_args()
    console = Console()

    tracer = Tracer.from_pretrained()
    T, L = arguments.length, tracer.decoder.n_layers
    token_ids = first_tokens(prose(), tracer.tokenizer, T)
    models = {parity: TransparentLlm.of(tracer, parity=parity) for parity in (True, False)}
    for model in models.values():
        model.run([token_ids])
    layers = layers_of(tracer.record(token_ids, mode="full"))
    of_ours, of_theirs = gaps(models[True], layers, arguments.check_every)
    agree = of_ours < TOLERANCE
    console.print(
        f"largest error of a contribution, against float64: ours {of_ours:.1e}, "
        f"the tool's way in float32 {of_theirs:.1e}"
    )

    rows: dict[str, Round] = {}
    for parity, model in models.items():
        rounds = [
            timed_round(
                lambda model=model: build_full_graph(model, 0, THRESHOLD),  # type: ignore[misc]
                lambda graph, starts: build_paths_to_predictions(
                    graph, L, T, starts, PATH_THRESHOLD
                ),
                T,
            )
            for _ in range(arguments.repeat + 1)
        ]
        rows["ours, parity" if parity else "ours"] = medians(rounds[1:])  # the first warms up
    rounds = [
        timed_round(
            lambda: published_tool.full_graph(map(published_tool.shares, layers), THRESHOLD),
            lambda graph, starts: published_tool.paths(graph, L, starts, PATH_THRESHOLD),
            T,
        )
        for _ in range(arguments.slow_repeat)
    ]
    rows["the tool's way"] = medians(rounds)

    at = machine(tracer.decoder.device)
    console.print(
        f"{T} tokens, threshold {THRESHOLD}; {at.processor}, {at.threads} threads, "
        f"torch {at.torch}, networkx {nx.__version__}, Python {at.python}"
    )
    table = Table()
    names = "", "full graph", "one path", "all paths", "edges", "ratio, one", "ratio, all"
    for name in names:
        table.add_column(name, justify="left" if not name else "right")
    theirs = rows["the tool's way"]
    for name, x in rows.items():
        ratios = ["", ""]
        if agree and x is not theirs:
            one = (theirs.full + theirs.one_path) / (x.full + x.one_path)
            every = (theirs.full + theirs.all_paths) / (x.full + x.all_paths)
            ratios = [f"{one:.0f}", f"{every:.0f}"]
        seconds = f"{x.full:.3f} s", f"{x.one_path:.4f} s", f"{x.all_paths:.3f} s"
        table.add_row(name, *seconds, str(int(x.n_edges)), *ratios)
    console.print(table)
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
