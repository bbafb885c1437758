"""Measured numbers of pairs that need a correction, and of coordinates that they visit.

A pair is a (row, head, visible key). It needs a correction where lin > 0 and some coordinate's
breakpoint is below its a (docs/design.md, section 3.1); those coordinates are its visits. Counted
exactly, by sorting the breakpoints of every (row, head), with a from values' norms, and with a from
their reach (kernels/triton/reach.py); and once more by the native kernel, which has norms, and
whose buckets of breakpoints may only add visits.

The design's bound on a row's visits is

    sum_h D f_h(0) sum_j a[h, j],    a = alpha |v|,

f_h the density of the row's breakpoints |y_i| / rho_i near 0, here that of the lowest LOW of them.

- `real`: the default model on prose, rows drawn from the whole text, every layer.
- `random`: Llama-style models of one width each, random weights, the last of two layers. All
  weights are normal. The embedding has variance 1, Wq and Wk are such that scores have standard
  deviation SCORE_STD (attention that is not uniform), v has variance 1, and W_O is scaled, layer by
  layer, until attention's share |z W_O|_rms / |resid_mid|_rms is the given one.
- `frontier`: rows that one route scores, layer by layer, on the default model.

    python bench/counts.py --json bench/gpu_model/counts.json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ifr_fast import Tracer
from ifr_fast.benchmark import THRESHOLD, first_tokens, machine, prose
from ifr_fast.kernels.breakpoints import (
    ROUND_UP,
    breakpoints,
    column_norms,
    signs,
    value_space_signs,
)
from ifr_fast.kernels.contract import LayerInputs, visible
from ifr_fast.kernels.cpu import kernel
from ifr_fast.kernels.rows import attention_pattern
from ifr_fast.recording.layer_inputs import layer_inputs
from ifr_fast.recording.recording import RecordingMode
from ifr_fast.scoring.layer import score_layer

LOW = 0.05  # of the breakpoints of a (row, head) give the density near 0
BLOCK_ELEMENTS = 1 << 24  # of [H, R, max(S, D)] counted at once
SCORE_STD = 3.0  # of random models' attention scores
CANDIDATES = (32, 64, 128, 256)  # room of a (row, head)'s list of coordinates, for the tiers
TILES = (16, 32, 64)  # pairs taken at once
MARKS = (16, 32, 32)  # lines, words, keys in a word: pairs marked, made lists of at once
VOCAB = 4096  # of random models: ids of the real text, modulo this


class Tier(NamedTuple):
    """Means per row, summed over heads: pairs whose coordinates fit a list, and the others.

    The list is that of a (row, head): the coordinates of its smallest breakpoints. It is taken to
    be three quarters full, as the GPU kernel's search for where it ends aims at.
    """

    candidates: int  # the list's room
    light_lines: float  # (row, head) with any
    light: float
    light_tiles: list[float]  # of TILES pairs each, those of one (row, head) together
    heavy: float
    steps: float  # most light pairs, and most heavy ones, in a word of MARKS


class Pairs(NamedTuple):
    """Pairs that need a correction: means per row, over the rows counted of one layer."""

    listed: float  # with lin > 0 and a coordinate to visit
    at_least_8: float
    at_least_64: float
    visited: float  # coordinates of all listed pairs
    candidates: float  # coordinates some listed pair of a (row, head) visits, summed over heads
    by_size: list[float]  # listed pairs by visits: 1, 2-3, 4-7, 8-15, ...
    visits_by_size: list[float]  # their visits
    tiers: list[Tier]  # for CANDIDATES


class Counts(NamedTuple):
    """Counts: means per row, over the rows counted of one layer."""

    pairs: float
    by_norm: Pairs  # a = alpha |v|
    by_reach: Pairs  # a = alpha reach
    native_visited: float  # by_norm.visited by the native kernel's buckets
    bound: float  # sum_h D f_h(0) sum_j a, of norms
    edges: float  # to tokens, with weight above THRESHOLD
    share: float  # |attention's output|_rms / |y|_rms


class Tally:
    """Sums `Pairs` over blocks of rows."""

    def __init__(self, D: int) -> None:
        self.D, self.n_sizes = D, D.bit_length()
        self.totals = dict.fromkeys(
            ("listed", "at_least_8", "at_least_64", "visited", "candidates"), 0.0
        )
        self.by_size, self.visits_by_size = torch.zeros(self.n_sizes), torch.zeros(self.n_sizes)
        self.tiers = [[0.0] * (4 + len(TILES)) for _ in CANDIDATES]

    def add(self, n: Tensor) -> None:
        """Coordinates to visit, [H, R, S]."""
        for name, least in (("listed", 1), ("at_least_8", 8), ("at_least_64", 64)):
            self.totals[name] += float((n >= least).sum())
        self.totals["visited"] += float(n.sum())
        self.totals["candidates"] += float(n.amax(-1).sum())
        found = n[n > 0]
        size = torch.frexp(found.float()).exponent.long() - 1
        self.by_size += torch.bincount(size, minlength=self.n_sizes)
        self.visits_by_size += torch.bincount(size, weights=found.double(), minlength=self.n_sizes)
        for room, tier in zip(CANDIDATES, self.tiers, strict=True):
            is_heavy = n > room * 3 // 4 if room < self.D else torch.zeros_like(n, dtype=torch.bool)
            is_light = (n > 0) & ~is_heavy
            steps = most_in_a_word(is_light) + most_in_a_word(is_heavy)
            light = is_light.sum(-1)  # [H, R]
            tiles = [float(torch.ceil(light / size).sum()) for size in TILES]
            lines, pairs = float((light > 0).sum()), float(light.sum())
            found_here = (lines, pairs, *tiles, float(is_heavy.sum()), steps)
            tier[:] = [x + y for x, y in zip(tier, found_here, strict=True)]

    def means(self, R: int) -> Pairs:
        """Means per row."""
        return Pairs(
            **{name: value / R for name, value in self.totals.items()},
            by_size=(self.by_size / R).tolist(),
            visits_by_size=(self.visits_by_size / R).tolist(),
            tiers=[
                Tier(room, lines / R, light / R, [x / R for x in tiles], heavy / R, steps / R)
                for room, (lines, light, *tiles, heavy, steps) in zip(
                    CANDIDATES, self.tiers, strict=True
                )
            ],
        )


def values_reach(x: LayerInputs, rho: Tensor) -> Tensor:
    """Reach [H, S]; x in float32, rho [H, D]."""
    found = []
    for h, W in enumerate(x.W_O):
        u = x.v[:, h * x.v.shape[1] // len(x.W_O)] @ W
        found.append((u.abs() / rho[h].clamp(min=torch.finfo(u.dtype).tiny)).amax(1))
    return torch.stack(found)


def count(inputs: LayerInputs) -> Counts:
    """Counts one layer's rows (LayerInputs without row_scale or value_gate)."""
    if inputs.row_scale is not None or inputs.value_gate is not None:
        raise ValueError("inputs: models with row_scale or value_gate are not counted")
    x = inputs.to(torch.float32)
    (R, H, _), (S, H_kv, _), D = x.q.shape, x.v.shape, x.y.shape[1]
    rho = column_norms(x.W_O)
    v = x.v.permute(1, 2, 0).repeat_interleave(H // H_kv, 0)  # [H, V, S]
    v_norm, reach = torch.linalg.vector_norm(v, dim=1), values_reach(x, rho)
    by_norm, by_reach = Tally(D), Tally(D)
    pairs = bound = 0.0
    shares = []
    block = max(1, BLOCK_ELEMENTS // (H * max(S, D)))
    for start in range(0, R, block):
        of = slice(start, start + block)
        b = x._replace(rows=x.rows[of], y=x.y[of], q=x.q[of], resid_pre=x.resid_pre[of])
        mask = visible(b.rows, S, b.window)
        alpha = attention_pattern(b, mask)  # [H, R, S]
        lin = torch.matmul(value_space_signs(b.W_O, signs(b.y)), v).mul_(alpha)
        points = breakpoints(b.y, rho).sort(-1).values  # [H, R, D]
        pairs += float(mask.sum()) * H
        for tally, size in ((by_norm, v_norm), (by_reach, reach)):
            a = alpha * size[:, None]
            tally.add(torch.searchsorted(points, a * ROUND_UP).mul_(lin > 0))  # [H, R, S]
        low = math.ceil(LOW * D)
        density = low / D / points[..., low - 1]  # [H, R]
        bound += D * float((density * torch.einsum("hrs,hs->hr", alpha, v_norm)).double().sum())
        z = torch.matmul(alpha, v.transpose(1, 2)).transpose(0, 1)  # [R, H, V]
        moved = z.flatten(1) @ b.W_O.flatten(0, 1)
        shares.append(moved.square().mean(-1).sqrt() / b.y.square().mean(-1).sqrt())
    scores, native = kernel.score_attention_counted(inputs, THRESHOLD)
    return Counts(
        pairs=pairs / R,
        by_norm=by_norm.means(R),
        by_reach=by_reach.means(R),
        native_visited=native.visited / R,
        bound=bound / R,
        edges=len(scores.edges.row) / R,
        share=float(torch.cat(shares).mean()),
    )


def most_in_a_word(m: Tensor) -> float:
    """The largest number of bits set in a word of a mask [H, R, S], summed over blocks of MARKS."""
    heads, words, keys = MARKS
    x = torch.nn.functional.pad(m, (0, -m.shape[2] % (words * keys), 0, 0, 0, -m.shape[0] % heads))
    x = x.unflatten(2, (-1, words, keys)).sum(-1).unflatten(0, (-1, heads))
    return float(x.amax((1, 4)).sum())


def mean(values: list[Any]) -> Any:
    """Mean over layers of numbers, or of tuples and lists of them."""
    first = values[0]
    if isinstance(first, (int, float)):
        return sum(values) / len(values)
    columns = [mean(list(column)) for column in zip(*values, strict=True)]
    return type(first)(*columns) if isinstance(first, (Counts, Pairs, Tier)) else columns


def some_rows(n_tokens: int, n_rows: int) -> Tensor:
    """Rows [n_rows] of a text, one drawn from each of as many stretches of it."""
    stretch = n_tokens // n_rows
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(stretch, (n_rows,), generator=generator)
    return n_tokens - stretch * torch.arange(n_rows, 0, -1) + drawn


@torch.inference_mode()
def count_layers(tracer: Tracer, token_ids: Tensor, n_rows: int, layers: list[int]) -> list[Counts]:
    """Counts some rows of some layers of a text, token ids [T], from a lean recording."""
    recording = tracer.record(token_ids, mode=RecordingMode.LEAN)
    rows = some_rows(len(token_ids), n_rows)
    found = []
    with tracer._replaying(recording):
        for layer in layers:
            found.append(count(layer_inputs(recording, layer, rows)[0]))
    return found


def shape_of(tracer: Tracer) -> dict[str, int]:
    """D, H, H_kv and V of a model."""
    decoder, config = tracer.decoder, tracer.model.config
    H_kv = config.num_key_value_heads
    return {"D": decoder.d_model, "H": decoder.n_heads, "H_kv": H_kv, "V": decoder.d_heads[0]}


def random_tracer(D: int, H: int, H_kv: int, V: int, share: float, ids: Tensor) -> Tracer:
    """A Llama-style model of two layers with random weights, as the module says."""
    torch.manual_seed(D + H)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=H,
        num_key_value_heads=H_kv,
        head_dim=V,
        intermediate_size=D,
        max_position_embeddings=len(ids),
        initializer_range=D**-0.5,
        attn_implementation="sdpa",
    )
    return Tracer(random_llama(config, share, ids), None, impl="cpu")


def random_llama(
    config: LlamaConfig,
    share: float,
    ids: Tensor,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A model with random weights, as the module says; ids: the text that attention's share is
    measured on. The configuration's initializer_range is D^-1/2.
    """
    with torch.device(device or "cpu"):
        model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(config.hidden_size**0.5)
        seen: list[float] = []
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight.mul_(SCORE_STD**0.5)  # q . k / sqrt(K) has that deviation
        for layer in model.model.layers:
            hooks = [
                layer.register_forward_pre_hook(
                    lambda _, args: seen.append(float(args[0].square().mean().sqrt()))
                ),
                layer.self_attn.register_forward_hook(
                    lambda _, __, out: seen.append(float(out[0].square().mean().sqrt()))
                ),
            ]
            seen.clear()
            model(ids[None], use_cache=False, logits_to_keep=1)
            for hook in hooks:
                hook.remove()
            before, moved = seen
            # The share is moved / sqrt(before^2 + moved^2), as both are nearly independent.
            layer.self_attn.o_proj.weight.mul_(share / (1 - share**2) ** 0.5 * before / moved)
    return model


def frontier_rows(tracer: Tracer, token_ids: Tensor, positions: list[int]) -> list[list[int]]:
    """Rows scored by one route in each layer, bottom first; one list a position."""
    recording = tracer.record(token_ids, mode=RecordingMode.LEAN)
    found = []
    for position in positions:
        rows = [0] * tracer.decoder.n_layers

        def counted(recording, layer, chosen, keep, impl, rows=rows):  # type: ignore[no-untyped-def]
            rows[layer] = len(chosen)
            return score_layer(recording, layer, chosen, keep, impl)

        with mock.patch("ifr_fast.tracer.score_layer", counted):
            tracer.trace(recording, position=position, threshold=THRESHOLD)
        found.append(rows)
    return found


def real_models(tracer: Tracer, lengths: dict[int, int]) -> list[dict[str, Any]]:
    """Counts of the default model, by length and the number of rows a layer."""
    found = []
    for n_tokens, n_rows in lengths.items():
        ids = first_tokens(prose(), tracer.tokenizer, n_tokens)
        layers = count_layers(tracer, ids, n_rows, list(range(tracer.decoder.n_layers)))
        found.append(
            {
                "model": "SmolLM2-135M-Instruct",
                **shape_of(tracer),
                "T": n_tokens,
                "rows": n_rows,
                "mean": rounded(mean(layers)),
                "visited_by_layer": [round(c.by_norm.visited) for c in layers],
                "bound_by_layer": [round(c.bound) for c in layers],
                "share_by_layer": [round(c.share, 3) for c in layers],
            }
        )
    return found


class RandomModel(NamedTuple):
    """A random model, and the text it is counted on."""

    D: int
    H: int
    H_kv: int
    V: int
    share: float
    T: int
    rows: int


WIDTHS = [
    *(RandomModel(64 * H, H, H, 64, 0.3, 512, 24) for H in (4, 8, 16, 32)),
    *(RandomModel(128 * H, H, H, 128, 0.3, 512, 16) for H in (4, 8, 16, 32)),
    *(RandomModel(1024, H, H, 1024 // H, 0.3, 512, 16) for H in (4, 32)),
    RandomModel(4096, 32, 8, 128, 0.3, 512, 16),
    RandomModel(4096, 32, 8, 128, 0.15, 512, 16),
    *(RandomModel(1024, 16, 16, 64, share, 512, 24) for share in (0.1, 0.2, 0.6)),
    *(RandomModel(1024, 16, 16, 64, 0.3, T, 24) for T in (128, 2048)),
]


def random_models(tracer: Tracer, models: list[RandomModel]) -> list[dict[str, Any]]:
    """Counts of each random model's last layer, on the default tokenizer's ids modulo VOCAB."""
    found = []
    for m in models:
        ids = first_tokens(prose(), tracer.tokenizer, m.T) % VOCAB
        model = random_tracer(m.D, m.H, m.H_kv, m.V, m.share, ids)
        found.append(m._asdict() | {"mean": rounded(count_layers(model, ids, m.rows, [1])[0])})
    return found


def frontiers(tracer: Tracer, lengths: list[int], n_positions: int) -> list[dict[str, Any]]:
    """Rows a layer of routes from positions in the text's last half, the last one among them."""
    found = []
    for n_tokens in lengths:
        ids = first_tokens(prose(), tracer.tokenizer, n_tokens)
        positions = [n_tokens - 1 - i * n_tokens // (2 * n_positions) for i in range(n_positions)]
        rows = frontier_rows(tracer, ids, positions)
        by_layer = [round(sum(of) / len(of), 1) for of in zip(*rows, strict=True)]
        totals = [sum(of) for of in rows]
        found.append(
            {
                "T": n_tokens,
                "threshold": THRESHOLD,
                "positions": positions,
                "rows_by_layer": by_layer,
                "rows_of_route": totals,
            }
        )
    return found


def rounded(value: Any) -> Any:
    """The value for the file: four digits, fields by name."""
    if isinstance(value, (int, float)):
        return float(f"{value:.4g}")
    if isinstance(value, (Counts, Pairs, Tier)):
        return {name: rounded(x) for name, x in value._asdict().items()}
    return [rounded(x) for x in value]


def main() -> None:
    """Parses the arguments, counts, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--quick", action="store_true", help="T = 128 and two narrow random models")
    args = parser.parse_args()

    console = Console(stderr=True)
    tracer = Tracer.from_pretrained(impl="cpu")
    quick = args.quick
    console.print("the default model")
    real = real_models(tracer, {128: 24} if quick else {128: 128, 512: 128, 2048: 64, 8192: 16})
    console.print("frontiers")
    frontier = frontiers(tracer, [128] if quick else [512, 2048, 8192], 2 if quick else 6)
    console.print("random models")
    random = random_models(tracer, WIDTHS[:2] if quick else WIDTHS)
    on = machine(tracer.decoder.device)
    document = {
        "command": "python bench/counts.py --json bench/gpu_model/counts.json",
        "text": "first T tokens of pydoc_data.topics",
        "versions": {name: getattr(on, name) for name in ("python", "torch", "transformers")},
        "low": LOW,
        "score_std": SCORE_STD,
        "tiles": TILES,
        "real": real,
        "random": random,
        "frontier": frontier,
    }
    args.json.write_text(dumps(document) + "\n")


def dumps(document: dict[str, Any]) -> str:
    """JSON with an entry of a list to a line."""
    lines = []
    for name, value in document.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(entry) for entry in value)
            lines.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}"


if __name__ == "__main__":
    main()
