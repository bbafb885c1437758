"""Activation patching and ablation of every head and FFN block, one at a time.

Denoising runs the corrupted prompt with one component's output taken from the prompt's run. It
shows what the component is sufficient for. Noising runs the prompt with one component's output
taken from the corrupted prompt's run; ablation takes the component's mean over a reference corpus,
or zero. They show what the component is necessary for (Heimersheim & Nanda 2024, arXiv 2404.15255,
section 2). An effect is a change of the logit difference (LD). It is positive for a component that
serves the task:

    denoising          LD(corrupted prompt, patched) - LD(corrupted prompt)
    noising, ablation  LD(prompt) - LD(prompt, patched)

A component is patched at all positions at once, or at one position at a time. Runs begin at the
patched layer and position, with many variants in a batch (interventions.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_choice
from ..model.decoder import Decoder
from ..progress import progress
from ..recording.batches import can_batch
from .checkpoint import LayerPatches, SweepFolder
from .interventions import Observed, check_texts, observe, restarting, run, text_batches
from .tasks import Task

Direction = Literal["denoise", "noise"]
Positions = Literal["all", "each"]
Over = Literal["rest", "all", "texts"]
_ROWS = 4096  # rows in a batch of variants


class Activations(NamedTuple):
    """Values that replace the components' outputs, the same for every text.

    Position t takes row t, or the last row if there are fewer rows.
    """

    heads: Sequence[Tensor]  # [rows, H, V] of each layer
    ffn: Tensor  # [L, rows, D]

    def at(self, layer: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        """A layer's values for each of `n_tokens` positions: [T, H, V] and [T, D]."""
        rows = torch.arange(n_tokens).clamp(max=self.ffn.shape[1] - 1)
        return self.heads[layer][rows], self.ffn[layer][rows]

    def digest_into(self, digest: hashlib._Hash) -> None:
        """Updates a digest with all values."""
        for x in (*self.heads, self.ffn):
            digest.update(x.double().cpu().contiguous().numpy().tobytes())


@torch.inference_mode()
def mean_activations(
    decoder: Decoder, texts: Sequence[Sequence[int]], *, over: Over = "rest"
) -> Activations:
    """Means of every head's and FFN's output over a reference corpus of token ids.

    over: "rest" takes the mean over all positions except the first, which has its own mean (most
    models keep an attention sink there, with activations much larger than all others). "all" takes
    the mean over all positions. "texts" takes a mean at each position, over texts of equal length.
    """
    check_choice("over", over, ("rest", "all", "texts"))
    given = check_texts(decoder, texts)
    lengths = [len(text) for text in given]
    T = max(lengths)
    if over == "texts" and min(lengths) < T:
        raise ValueError(f"over: expected texts of one length, got {min(lengths)} to {T}")
    H, D = decoder.n_heads, decoder.d_model
    heads = [torch.zeros(T, H * V, dtype=torch.float64) for V in decoder.d_heads]
    ffn = [torch.zeros(T, D, dtype=torch.float64) for _ in decoder.blocks]
    count = torch.zeros(T, dtype=torch.float64)
    for together in text_batches(decoder, lengths):
        seen = observe(decoder, [given[i] for i in together])
        own = (torch.arange(seen.n_tokens) < seen.lengths[:, None]).double()  # [B, T]
        count[: seen.n_tokens] += own.sum(0)
        for total, of_layers in ((heads, seen.z), (ffn, seen.ffn)):
            for layer, x in enumerate(of_layers):
                summed = torch.einsum("btx,bt->tx", x.flatten(2).double().cpu(), own)
                total[layer][: seen.n_tokens] += summed
    groups = {"all": [T], "texts": [1] * T, "rest": [1, T - 1] if T > 1 else [1]}[over]
    like = decoder.blocks[0].bias

    def mean(total: Tensor) -> Tensor:
        parts = zip(total.split(groups), count.split(groups), strict=True)
        return torch.stack([part.sum(0) / n.sum() for part, n in parts]).to(like)

    return Activations(
        [mean(x).unflatten(-1, (H, -1)) for x in heads], torch.stack([mean(x) for x in ffn])
    )


def zero_activations(decoder: Decoder) -> Activations:
    """Zeros for every head's and FFN's output."""
    H, like = decoder.n_heads, decoder.blocks[0].bias
    return Activations(
        [like.new_zeros(1, H, V) for V in decoder.d_heads],
        like.new_zeros(decoder.n_layers, 1, decoder.d_model),
    )


@torch.inference_mode()
def ablated_logits(
    decoder: Decoder,
    texts: Sequence[Sequence[int]],
    values: Activations,
    heads: Tensor,
    ffn: Tensor,
) -> Tensor:
    """Logits [B, vocab] after the last token of each text, with `values` where a mask is True.

    heads: bool [B, L, H] or [B, L, H, T]. ffn: bool [B, L] or [B, L, T].
    """
    found: dict[int, Tensor] = {}
    lengths = [len(text) for text in texts]
    for together in text_batches(decoder, lengths):
        T = max(lengths[i] for i in together)
        of_heads, of_ffn = heads[together], ffn[together]
        if of_heads.ndim == 3:
            of_heads = of_heads[..., None]
        if of_ffn.ndim == 2:
            of_ffn = of_ffn[..., None]

        def edit_heads(layer: int, z: Tensor, of: Tensor = of_heads, T: int = T) -> Tensor:
            mask = of[:, layer, :, :T].transpose(1, 2)[..., None]  # [B, T or 1, H, 1]
            return torch.where(mask.to(z.device), values.at(layer, T)[0], z)

        def edit_ffn(layer: int, x: Tensor, of: Tensor = of_ffn, T: int = T) -> Tensor:
            mask = of[:, layer, :T, None]
            return torch.where(mask.to(x.device), values.at(layer, T)[1], x)

        logits = run(decoder, [texts[i] for i in together], heads=edit_heads, ffn=edit_ffn)
        found.update(zip(together, logits, strict=True))
    return torch.stack([found[i] for i in range(len(texts))])


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of patching or ablating each component, in units of the logit difference."""

    layers: list[int]  # the patched layers
    heads: Tensor  # [P, L, H], or [P, L, H, T], float64
    ffn: Tensor  # [P, L], or [P, L, T]
    prompt: Tensor  # [P] logit difference of the prompts
    against: Tensor  # [P] logit difference of the corrupted prompts; 0 for ablation
    runs: int  # number of variants
    passes: float  # their computation, in whole forward passes of their texts
    seconds: float  # their time, including earlier calls that this call resumed

    @property
    def gap(self) -> float:
        """The mean difference that patching could restore or remove."""
        return float((self.prompt - self.against).mean())

    def summed(self) -> Effects:
        """Effects at single positions, summed over positions."""
        if self.heads.ndim == 3:
            raise ValueError("effects: are of all positions at once; there is nothing to sum")
        return Effects(
            self.layers,
            self.heads.sum(-1),
            self.ffn.sum(-1),
            self.prompt,
            self.against,
            self.runs,
            self.passes,
            self.seconds,
        )


def patch(
    decoder: Decoder,
    task: Task,
    *,
    direction: Direction = "denoise",
    positions: Positions = "all",
    layers: Iterable[int] | None = None,
    ffn: bool = True,
    paired: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Effects:
    """Patches each head and FFN block between each prompt of `task` and its corrupted prompt.

    positions: "all" at once, or "each" by itself. layers: default all. ffn: whether FFN blocks
    are patched too; otherwise their effects are 0. paired: effects are measured against a run of
    the unchanged text in the same restarted batch, so that rounding cancels (`Observed.restart`);
    False is a little faster. checkpoint: a folder that keeps the results of each layer; after an
    interruption, the same call resumes there.
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction: expected 'denoise' or 'noise', got {direction!r}")
    return _sweep(decoder, task, direction, None, positions, layers, ffn, paired, checkpoint)


def ablate(
    decoder: Decoder,
    task: Task,
    values: Activations,
    *,
    positions: Positions = "all",
    layers: Iterable[int] | None = None,
    ffn: bool = True,
    paired: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Effects:
    """Replaces each head and FFN block by `values`, one at a time; otherwise as `patch`."""
    return _sweep(decoder, task, "ablate", values, positions, layers, ffn, paired, checkpoint)


@torch.inference_mode()
def _sweep(
    decoder: Decoder,
    task: Task,
    direction: str,
    values: Activations | None,
    positions: Positions,
    layers: Iterable[int] | None,
    with_ffn: bool,
    paired: bool,
    checkpoint: str | os.PathLike[str] | None,
) -> Effects:
    if positions not in ("all", "each"):
        raise ValueError(f"positions: expected 'all' or 'each', got {positions!r}")
    L, H = decoder.n_layers, decoder.n_heads
    chosen = list(range(L)) if layers is None else sorted(set(layers))
    if not chosen or not all(0 <= layer < L for layer in chosen):
        raise ValueError(f"layers: expected some of 0 to {L - 1}, got {chosen}")
    lengths = [len(text) for text in task.texts]
    T = max(lengths) if positions == "each" else 1
    heads = torch.zeros(len(task), len(chosen), H, T, dtype=torch.float64)
    ffn = torch.zeros(len(task), len(chosen), T, dtype=torch.float64)
    prompt, against = (torch.zeros(len(task), dtype=torch.float64) for _ in range(2))
    kept = None if checkpoint is None else SweepFolder(
        Path(checkpoint),
        _identity(decoder, task, direction, values, positions, with_ffn, paired),
    )  # fmt: skip
    together = text_batches(decoder, lengths)
    runs, row_layers, n_rows, seconds = 0, 0, 0, 0.0
    with progress("patching", len(together) * len(chosen)) as show:
        for b, batch in enumerate(together):
            index, began = torch.tensor(batch), time.perf_counter()
            clean = observe(decoder, [task.texts[i] for i in batch])
            prompt[batch] = task.logit_difference(clean.logits, index).cpu()
            first = torch.zeros(len(batch), dtype=torch.int64)
            base, source = clean, None
            if values is None:
                corrupted = observe(decoder, [task.twins[i] for i in batch])
                against[batch] = task.logit_difference(corrupted.logits, index).cpu()
                base, source = (clean, corrupted) if direction == "noise" else (corrupted, clean)
                first = torch.tensor([task.prompts[i].first_difference for i in batch])

            def measure(logits: Tensor, texts: Tensor, index: Tensor = index) -> Tensor:
                return task.logit_difference(logits, index[texts]).cpu()

            seconds += time.perf_counter() - began
            own = (against if direction == "denoise" else prompt)[batch]
            sign = 1 if direction == "denoise" else -1
            for i, layer in enumerate(chosen):
                part = None if kept is None else kept.load(b, layer, batch)
                if part is None:
                    new = _values(base, source, values, layer)
                    part = _patch_layer(
                        base, layer, new, first, positions, with_ffn, paired, measure
                    )
                    if kept is not None:
                        kept.save(b, layer, batch, part)
                n = part.heads.shape[-1]
                heads[batch, i, :, :n] = sign * (part.heads - own[:, None, None])
                if with_ffn:
                    ffn[batch, i, :n] = sign * (part.ffn - own[:, None])
                runs, row_layers = runs + part.runs, row_layers + part.row_layers
                seconds += part.seconds
                show(b * len(chosen) + i + 1)
            n_rows += clean.n_tokens * len(batch)
    if positions == "all":
        heads, ffn = heads[..., 0], ffn[..., 0]
    passes = row_layers / (n_rows * L) * len(task)
    return Effects(chosen, heads, ffn, prompt, against, runs, passes, seconds)


def _values(
    base: Observed, source: Observed | None, values: Activations | None, layer: int
) -> tuple[Tensor, Tensor]:
    """The replacement z [B, T, H, V] and FFN output [B, T, D] of a layer."""
    if source is not None:
        return source.z[layer], source.ffn[layer]
    assert values is not None
    heads, ffn = values.at(layer, base.n_tokens)
    return heads.expand_as(base.z[layer]), ffn.expand_as(base.ffn[layer])


def _patch_layer(
    base: Observed,
    layer: int,
    new: tuple[Tensor, Tensor],
    first: Tensor,
    positions: Positions,
    with_ffn: bool,
    paired: bool,
    measure: Callable[[Tensor, Tensor], Tensor],
) -> LayerPatches:
    """Logit differences with each component of a layer replaced by `new`, which differs from the
    observed values from positions `first` [B] on.
    """
    decoder, began = base.decoder, time.perf_counter()
    B, T, H = base.n_texts, base.n_tokens, decoder.n_heads
    n_layers = decoder.n_layers - layer
    z, ffn = new
    every = torch.arange(B)
    own = measure(base.logits, every)
    runs, row_layers = 0, 0
    n_columns = T if positions == "each" else 1
    of_heads = own[:, None, None].repeat(1, H, n_columns)
    of_ffn = own[:, None].repeat(1, n_columns)
    if positions == "each":
        spans = [(t, t + 1) for t in range(int(first.min()), T)]
    else:
        spans = [(int(first.min()), T)]

    def count(texts: Tensor, begin: int, end: int) -> None:
        nonlocal runs, row_layers
        n = len(texts) + (len(texts.unique()) if paired and can_batch(decoder) else 0)
        longest = int(base.lengths[texts].max())
        runs += n
        row_layers += n * (min(end, longest) - begin + (longest - begin) * (n_layers - 1))

    with restarting(decoder):
        for begin, end in spans:
            differs = first < base.lengths.clamp(max=end)
            felt = (differs & base.feels(layer, every, begin, end)).nonzero().squeeze(1)
            column = begin if positions == "each" else 0
            size = max(1, _ROWS // (T - begin)) if can_batch(decoder) else 1
            # Texts of one length run together, so that none of them is padded.
            of_length = base.lengths[felt].unique_consecutive(return_counts=True)[1].tolist()
            for alike in felt.split(of_length):
                for texts, head in zip(
                    alike.repeat_interleave(H).split(size),
                    torch.arange(H).repeat(len(alike)).split(size),
                    strict=True,
                ):
                    n = torch.arange(len(texts))
                    changed = base.z[layer][texts, begin:end]
                    changed[n, :, head] = z[texts, begin:end][n, :, head]
                    logits = base.restart(layer, texts, begin, end, z=changed, paired=paired)
                    of_heads[texts, head, column] = measure(logits, texts)
                    count(texts, begin, end)
                for texts in alike.split(size) if with_ffn else ():
                    new_ffn = ffn[texts, begin:end]
                    logits = base.restart(layer, texts, begin, end, ffn=new_ffn, paired=paired)
                    of_ffn[texts, column] = measure(logits, texts)
                    count(texts, begin, end)
    return LayerPatches(of_heads, of_ffn, runs, row_layers, time.perf_counter() - began)


def _identity(
    decoder: Decoder,
    task: Task,
    direction: str,
    values: Activations | None,
    positions: str,
    with_ffn: bool,
    paired: bool,
) -> str:
    """A digest of everything that the results depend on."""
    digest = hashlib.sha256(decoder.fingerprint().encode())
    identity = [direction, positions, with_ffn, paired, task.texts, task.twins]
    identity += [[prompt.right, prompt.wrong] for prompt in task.prompts]
    digest.update(json.dumps(identity).encode())
    if values is not None:
        values.digest_into(digest)
    return digest.hexdigest()
