"""Interventions against the model's own modules hooked by name, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from opened import tiny_tracer
from tiny import FAMILIES, tiny_model, tiny_text
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifr_fast.circuits import (
    Activations,
    ablated_logits,
    intervening,
    mean_activations,
    observe,
    restarting,
    run,
    zero_activations,
)
from ifr_fast.errors import UnsupportedArchitectureError
from ifr_fast.model.decoder import Decoder
from ifr_fast.model.opening import open_decoder
from ifr_fast.recording.batches import can_batch

LENGTHS = (13, 9, 11)  # a sliding window of 7 is crossed
EXACT = 1e-12  # of float64 logits near 1
ROUNDED = 1e-6  # where a model computes some of it in float32 whatever its dtype


def texts_for(decoder: Decoder) -> list[Tensor]:
    texts = [tiny_text(n, seed=n) for n in LENGTHS]
    return texts if can_batch(decoder) else texts[:1]


def opened(family: str, dtype: torch.dtype = torch.float64) -> tuple[PreTrainedModel, Decoder]:
    model = tiny_model(family, dtype=dtype).eval()
    return model, open_decoder(model)


def plainly(model: PreTrainedModel, texts: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(input_ids=text[None]).logits[0, -1] for text in texts])


def other(text: Tensor) -> Tensor:
    """A text that begins like another and goes on otherwise."""
    return torch.cat([text[:4], (text[4:] + 1) % 97])


@pytest.mark.parametrize("family", sorted(f for f, of in FAMILIES.items() if of.made_by is None))
def test_restarting_gives_what_a_whole_run_gives(family):
    """In every family, in float64: a head and an FFN at one position, at the bottom and higher."""
    model, decoder = opened(family)
    texts = texts_for(decoder)
    of = torch.arange(len(texts))
    seen, source = observe(decoder, texts), observe(decoder, [other(text) for text in texts])
    tolerance = ROUNDED if (seen.logits - plainly(model, texts)).abs().max() > EXACT else EXACT
    assert (seen.logits - plainly(model, texts)).abs().max() < ROUNDED
    for layer, t, head in ((0, 6, 2), (1, 8, 3)):
        z = seen.z[layer][:, t : t + 1].clone()
        z[:, :, head] = source.z[layer][:, t : t + 1, head]
        ffn = source.ffn[layer][:, t : t + 1]

        def edit(at: int, x: Tensor, layer: int = layer, t: int = t, z: Tensor = z) -> Tensor:
            x = x.clone()
            if at == layer:
                x[:, t : t + 1] = z
            return x

        def edit_ffn(at: int, x: Tensor, layer: int = layer, t: int = t, y: Tensor = ffn) -> Tensor:
            x = x.clone()
            if at == layer:
                x[:, t : t + 1] = y
            return x

        with restarting(decoder):
            got = seen.restart(layer, of, t, t + 1, z=z)
            got_ffn = seen.restart(layer, of, t, t + 1, ffn=ffn)
            own = seen.restart(layer, of, t, t + 1, z=seen.z[layer][:, t : t + 1], paired=False)
            alone = seen.restart(layer, of, t, t + 1, z=z, paired=False)
            shortest = of[-1:] if len(of) < 2 else of[1:2]
            trimmed = seen.restart(layer, shortest, t, t + 1, z=z[shortest], paired=False)
        expected, expected_ffn = run(decoder, texts, heads=edit), run(decoder, texts, ffn=edit_ffn)
        assert (expected - seen.logits).abs().max() > 1e-5
        assert (expected_ffn - seen.logits).abs().max() > 1e-5
        limit = max(tolerance, 1e-6 if "moe" in family or "deepseek" in family else 0)
        assert (got - expected).abs().max() < limit
        assert (got_ffn - expected_ffn).abs().max() < limit
        # Not paired, for paired it is no change whatever a restart computes.
        assert (own - seen.logits).abs().max() < limit
        assert (alone - expected).abs().max() < limit
        assert (trimmed - expected[shortest]).abs().max() < limit


def patched_by_hand(
    model: PreTrainedModel, text: Tensor, layer: int, change: dict[str, Callable[[Tensor], Tensor]]
) -> Tensor:
    """Logits with what enters a layer's output projection ("heads") or leaves its FFN ("ffn")
    changed by hooks on the modules of these names.
    """
    family = FAMILIES[model.tiny_family]
    block = model.get_submodule(family.layers)[layer]
    handles = []
    if "heads" in change:
        projection = block.get_submodule(f"{family.attention}.{family.out}")

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (change["heads"](args[0].clone()), *args[1:])

        handles.append(projection.register_forward_pre_hook(before))
    if "ffn" in change:
        handles.append(block.mlp.register_forward_hook(lambda _, __, x: change["ffn"](x.clone())))
    try:
        return plainly(model, [text])[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gptj"])
def test_patches_are_those_of_hooks_on_the_modules_themselves(family):
    model, decoder = opened(family)
    text, twin = tiny_text(12, seed=1), other(tiny_text(12, seed=1))
    seen, source = observe(decoder, [text]), observe(decoder, [twin])
    V = decoder.d_heads[0]
    layer, t, head = 1, 7, 3
    taken: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            taken[name] = x.clone()
            return x

        return look

    patched_by_hand(model, twin, layer, {"heads": keep("heads"), "ffn": keep("ffn")})
    wanted = taken["heads"].view(1, 12, -1, V)
    torch.testing.assert_close(source.z[layer], wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(source.ffn[layer], taken["ffn"].view(1, 12, -1), atol=1e-6, rtol=0)

    def put_head(x: Tensor) -> Tensor:
        x.view(1, 12, -1, V)[:, t, head] = wanted[:, t, head]
        return x

    def put_ffn(x: Tensor) -> Tensor:
        x.view(1, 12, -1)[:, t] = taken["ffn"].view(1, 12, -1)[:, t]
        return x

    z = seen.z[layer][:, t : t + 1].clone()
    z[:, :, head] = source.z[layer][:, t : t + 1, head]
    of = torch.zeros(1, dtype=torch.int64)
    with restarting(decoder):
        got = seen.restart(layer, of, t, t + 1, z=z)[0]
        got_ffn = seen.restart(layer, of, t, t + 1, ffn=source.ffn[layer][:, t : t + 1])[0]
    expected = patched_by_hand(model, text, layer, {"heads": put_head})
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    expected = patched_by_hand(model, text, layer, {"ffn": put_ffn})
    torch.testing.assert_close(got_ffn, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_own_activations_change_no_logit(family):
    """In float32, whole and restarted, everything at once and piece by piece."""
    model, decoder = opened(family, torch.float32)
    texts = texts_for(decoder)
    seen, plain = observe(decoder, texts), plainly(model, texts)
    whole = run(decoder, texts, heads=lambda i, _: seen.z[i], ffn=lambda i, _: seen.ffn[i])
    assert (whole - plain).abs().max() <= 1e-5
    of = torch.arange(len(texts))
    with restarting(decoder):
        for layer in range(decoder.n_layers):
            for begin, end in ((0, 13), (5, 6), (8, 13)):
                z, ffn = seen.z[layer][:, begin:end], seen.ffn[layer][:, begin:end]
                for paired in (True, False):
                    for got in (
                        seen.restart(layer, of, begin, end, z=z, paired=paired),
                        seen.restart(layer, of, begin, end, ffn=ffn, paired=paired),
                    ):
                        assert (got - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_an_effect_does_not_leak_into_others_of_its_batch(family):
    """Every other variant has heads set to 100; those between have their own activations."""
    _, decoder = opened(family, torch.float32)
    seen = observe(decoder, texts_for(decoder))
    of = torch.arange(3).repeat_interleave(2)
    changed = torch.tensor([True, False]).repeat(3)
    for paired in (True, False):
        for layer, t in ((0, 4), (1, 7)):
            z = seen.z[layer][of, t : t + 1]
            z[changed] = 100
            with restarting(decoder):
                got = seen.restart(layer, of, t, t + 1, z=z, paired=paired) - seen.logits[of]
            assert got[~changed].abs().max() <= 1e-5
            assert (got[changed].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_ablating_nothing_is_the_plain_model(family):
    _, decoder = opened(family, torch.float32)
    texts = texts_for(decoder)
    L, H = decoder.n_layers, decoder.n_heads
    nothing = torch.zeros(len(texts), L, H, dtype=torch.bool)
    for values in (zero_activations(decoder), mean_activations(decoder, texts)):
        got = ablated_logits(decoder, texts, values, nothing, nothing[:, :, 0])
        # Sums of several threads round apart by an ulp or two.
        torch.testing.assert_close(got, run(decoder, texts), atol=1e-6, rtol=1e-6)
        some = nothing.clone()
        some[:, 1, 2] = True
        changed = ablated_logits(decoder, texts, values, some, nothing[:, :, 0])
        assert (changed - got).abs().max() > 1e-3


def test_ablating_everything_leaves_the_embeddings_alone():
    """A residual stream to which nothing is added: head(norm(embedding))."""
    model, decoder = opened("llama")
    text = tiny_text(9)
    L, H = decoder.n_layers, decoder.n_heads
    everything = torch.ones(1, L, H, dtype=torch.bool)
    got = ablated_logits(
        decoder, [text], zero_activations(decoder), everything, everything[:, :, 0]
    )
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(model.model.embed_tokens(text[-1:])))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_ablation_by_position_touches_no_other():
    _, decoder = opened("llama")
    text = tiny_text(10)
    seen = observe(decoder, [text])
    L, H = decoder.n_layers, decoder.n_heads
    heads = torch.zeros(1, L, H, 10, dtype=torch.bool)
    ffn = torch.zeros(1, L, 10, dtype=torch.bool)
    heads[0, 1, 4, 6] = True
    ffn[0, 2, 8] = True
    values = mean_activations(decoder, [tiny_text(7, seed=5), tiny_text(12, seed=6)])

    def edit(layer: int, z: Tensor) -> Tensor:
        z = z.clone()
        if layer == 1:
            z[0, 6, 4] = values.heads[1][1, 4]
        return z

    def edit_ffn(layer: int, x: Tensor) -> Tensor:
        x = x.clone()
        if layer == 2:
            x[0, 8] = values.ffn[2, 1]
        return x

    got = ablated_logits(decoder, [text], values, heads, ffn)
    torch.testing.assert_close(got, run(decoder, [text], heads=edit, ffn=edit_ffn))
    assert not torch.equal(got, seen.logits)


def test_means_are_the_means():
    _, decoder = opened("gpt2")
    texts = [tiny_text(n, seed=n) for n in (5, 9, 7)]
    alone = [observe(decoder, [text]) for text in texts]
    pooled = torch.cat([one.z[1][0] for one in alone]).mean(0)
    rest = torch.cat([one.z[1][0, 1:] for one in alone]).mean(0)
    first = torch.stack([one.ffn[2][0, 0] for one in alone]).mean(0)
    over_all = mean_activations(decoder, texts, over="all")
    torch.testing.assert_close(over_all.heads[1][0], pooled)
    apart = mean_activations(decoder, texts)
    torch.testing.assert_close(apart.heads[1][1], rest)
    torch.testing.assert_close(apart.ffn[2, 0], first)
    assert torch.equal(apart.at(1, 4)[0][2], apart.heads[1][1])
    alike = [tiny_text(6, seed=n) for n in range(3)]
    by_position = mean_activations(decoder, alike, over="texts")
    expected = torch.stack([observe(decoder, [x]).z[0][0] for x in alike]).mean(0)
    torch.testing.assert_close(by_position.heads[0], expected)
    with pytest.raises(ValueError, match="over: expected texts of one length, got 5 to 9"):
        mean_activations(decoder, texts, over="texts")
    with pytest.raises(ValueError, match="texts: is empty"):
        mean_activations(decoder, [])


def hooks_of(model: nn.Module) -> list[int]:
    return [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom"])
def test_hooks_are_gone_also_when_an_exception_flies(family):
    model, decoder = opened(family, torch.float32)
    model.train()
    text = tiny_text(8)
    attention = model.config._attn_implementation
    forwards = [module.forward for module in (block.module for block in decoder.blocks)]
    before = hooks_of(model)

    def fail(layer: int, x: Tensor) -> Tensor:
        if layer == 1:
            raise RuntimeError("on purpose")
        return x

    def check() -> None:
        assert hooks_of(model) == before
        assert model.config._attn_implementation == attention
        assert [block.module.forward for block in decoder.blocks] == forwards
        assert all(module.training for module in model.modules())

    for edits in ({"heads": fail}, {"ffn": fail}):
        with pytest.raises(RuntimeError, match="on purpose"):
            run(decoder, [text], **edits)
        check()
        with pytest.raises(RuntimeError), intervening(decoder, **edits):
            model(input_ids=text[None])
        check()
    seen = observe(decoder, [text])
    check()
    wrong = torch.zeros(1, 1, 2, 2)
    for what in ("z", "ffn"):
        with pytest.raises(RuntimeError), restarting(decoder):
            seen.restart(0, torch.zeros(1, dtype=torch.int64), 3, 4, **{what: wrong})
        check()
    expected = plainly(model.eval(), [text])
    torch.testing.assert_close(run(decoder, [text]), expected, atol=1e-5, rtol=1e-5)


def test_others_may_run_the_model_within():
    """`intervening` is for whoever calls the model, in any way it can be called."""
    model, decoder = opened("llama", torch.float32)
    ids = torch.stack([tiny_text(8), tiny_text(8, seed=3)])
    plain = plainly(model, list(ids))
    with torch.no_grad(), intervening(decoder, heads=lambda _, z: torch.zeros_like(z)):
        without = model(input_ids=ids, use_cache=False).logits[:, -1]
    everything = torch.ones(2, decoder.n_layers, decoder.n_heads, dtype=torch.bool)
    expected = ablated_logits(
        decoder, list(ids), zero_activations(decoder), everything, ~everything[:, :, 0]
    )
    torch.testing.assert_close(without, expected, atol=1e-5, rtol=1e-5)
    assert (without - plain).abs().max() > 0.01


def test_models_without_batches_say_so():
    _, decoder = opened("bloom", torch.float32)
    with pytest.raises(ValueError, match="takes one text at a time, got 2"):
        run(decoder, [tiny_text(5), tiny_text(5)])
    zero = zero_activations(decoder)
    assert isinstance(zero, Activations)
    nothing = torch.zeros(2, decoder.n_layers, decoder.n_heads, dtype=torch.bool)
    both = [tiny_text(5), tiny_text(6)]
    got = ablated_logits(decoder, both, zero, nothing, nothing[:, :, 0])
    torch.testing.assert_close(got, torch.cat([run(decoder, [text]) for text in both]))


def test_runs_of_shared_keys_are_not_restarted() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="shares keys and values between layers"):
        observe(tiny_tracer("gemma4_shared").decoder, [tiny_text(5)])
