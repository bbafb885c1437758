"""A model's own float64 run of a text, by the names of its modules, for drill-downs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from opened import tiny_tracer
from tiny import LayerAccount, account, tiny_text
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifr_fast import Tracer

T = 13
LAYER = 1


class Names(NamedTuple):
    """Names of a family's modules."""

    layers: str
    down: str  # in a layer: the FFN's down projection
    norm: str | None  # before the head
    head: str
    after: str | None = None  # in a layer: a norm after the FFN


NAMES = {
    "llama": Names("model.layers", "mlp.down_proj", "model.norm", "lm_head"),
    "llama-bias": Names("model.layers", "mlp.down_proj", "model.norm", "lm_head"),
    "gpt2": Names("transformer.h", "mlp.c_proj", "transformer.ln_f", "lm_head"),
    "phi": Names("model.layers", "mlp.fc2", "model.final_layernorm", "lm_head"),
    "gpt_neox": Names(
        "gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm", "lm_head"
    ),
    "gemma2": Names(
        "model.layers", "mlp.down_proj", "model.norm", "lm_head", "post_feedforward_layernorm"
    ),
    "gemma4": Names("model.layers", "", "model.norm", "lm_head"),
    "opt": Names("model.decoder.layers", "fc2", "model.decoder.final_layer_norm", "lm_head"),
    "granite": Names("model.layers", "mlp.down_proj", "model.norm", "lm_head"),
    "qwen3_next": Names("model.layers", "", "model.norm", "lm_head"),
    "bloom": Names("transformer.h", "mlp.dense_4h_to_h", "transformer.ln_f", "lm_head"),
    "opt-post_norm": Names("model.decoder.layers", "fc2", None, "lm_head"),
    "openai-gpt": Names("transformer.h", "mlp.c_proj", None, "lm_head"),
    "bart": Names("model.decoder.layers", "fc2", None, "lm_head"),
    "doge": Names("model.layers", "mlp.down_proj", "model.norm", "lm_head"),
    "beam": Names(
        "model.layers", "mlp.down_proj", "model.norm", "lm_head", "post_feedforward_layernorm"
    ),
    "minimax": Names("model.layers", "", "model.norm", "lm_head"),
}
WITH_NEURONS = [family for family in NAMES if NAMES[family].down]


class Oracle:
    """A model's own float64 run of a text."""

    def __init__(self, model: PreTrainedModel, names: Names, text: Tensor) -> None:
        seen: dict[Any, Any] = {}
        # account() runs a float64 copy of the model, which has a copy of each hook.
        handles = [
            model.register_forward_hook(lambda of, _, out: seen.update(model=of, out=out)),
        ]
        for i, layer in enumerate(model.get_submodule(names.layers) if names.down else ()):
            down = layer.get_submodule(names.down)
            handles.append(
                down.register_forward_hook(
                    lambda _, args, out, i=i: seen.update({(i, "a"): args[0], (i, "out"): out})
                )
            )
        try:
            self.layers: list[LayerAccount] = account(model, text)
        finally:
            for handle in handles:
                handle.remove()
        self.model: PreTrainedModel = seen.pop("model")
        for module in self.model.modules():
            module._forward_hooks.clear()
        self.norm = nn.Identity() if names.norm is None else self.model.get_submodule(names.norm)
        self.unembedding: Tensor = self.model.get_submodule(names.head).weight.detach()
        self.logits: Tensor = seen.pop("out").logits[0]
        self.final = self.layers[-1].resid_post
        self.seen = {key: x.reshape(len(text), -1) for key, x in seen.items()}
        self.names = names

    @torch.no_grad()
    def lens(self, x: Tensor) -> Tensor:
        """Logits of residual streams [R, D], by the configuration and the modules."""
        logits = self.norm(x) @ self.unembedding.T
        config = self.model.config
        logits = logits / getattr(config, "logits_scaling", 1.0)
        head = self.model.get_submodule(self.names.head)
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def direct(
        self, part: Tensor, position: int, layer: int = LAYER, *, by_head: bool = False
    ) -> Tensor:
        """The logits that `part`, which `layer` adds to the stream, adds at a position, with the
        norm held, by the norms' formulas. by_head: whether attention adds it.
        """

        def passed(part: Tensor, on: Callable[[Tensor], Tensor] | None) -> Tensor:
            if on is None:
                return part
            rows = torch.zeros_like(self.final)
            rows[position] = part
            return on(rows)[position]

        for i, following in enumerate(self.layers[layer:]):
            if i > 0:
                part = passed(part, following.to_mid)
            if i > 0 or by_head:
                part = passed(part, following.to_post)
            part = part * following.scale
        if isinstance(self.norm, nn.Identity):
            return part @ self.unembedding.T
        x, weight = self.final[position], self.norm.weight
        eps = next(
            getattr(self.norm, name)
            for name in ("eps", "variance_epsilon")
            if hasattr(self.norm, name)
        )
        if isinstance(self.norm, nn.LayerNorm):
            part, x = part - part.mean(), x - x.mean()
        elif float(self.norm(torch.full_like(x, 2.0))[0]) == pytest.approx(1 + float(weight[0])):
            weight = 1 + weight
        normed = part / (x.square().mean() + eps).sqrt() * weight
        return normed @ self.unembedding.T / getattr(self.model.config, "logits_scaling", 1.0)

    def head(self, layer: int, head: int, position: int) -> Tensor:
        """[T, D]: the output of a head from each source."""
        of = self.layers[layer]
        v = of.v[:, head]
        if of.gate is not None:
            v = v * of.gate[position, head]
        parts = of.pattern[head, position, :, None] * (v @ of.W_O[head])
        return parts if of.after is None else parts * of.after[position]

    def neurons(self, layer: int) -> Tensor:
        """[T, F, D]: the output of each neuron."""
        down = self.model.get_submodule(self.names.layers)[layer].get_submodule(self.names.down)
        W = down.weight.detach()
        W = W if type(down).__name__ == "Conv1D" else W.T
        parts = self.seen[layer, "a"][..., None] * W
        to_out = self.layers[layer].to_out
        if to_out is not None:
            return to_out(parts.transpose(0, 1)).transpose(0, 1)
        if self.names.after is not None:  # the norm after, held
            return parts * (self.layers[layer].ffn / self.seen[layer, "out"])[:, None]
        return parts * getattr(self.model.config, "residual_multiplier", 1.0)

    def before_ffn(self, layer: int) -> Tensor:
        of = self.layers[layer]
        if of.to_post is not None:
            return of.to_post(of.resid_mid)
        return of.resid_pre if of.resid_mid is None else of.resid_mid


class Case(NamedTuple):
    tracer: Tracer
    oracle: Oracle
    text: Tensor


@cache
def case(family: str) -> Case:
    tracer, text = tiny_tracer(family), tiny_text(T)
    return Case(tracer, Oracle(tracer.model, NAMES[family], text), text)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest number."""
    assert got.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    assert float((got.double() - expected).abs().max()) < tolerance * scale
