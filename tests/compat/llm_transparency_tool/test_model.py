"""TransparentLlm against the models themselves."""

from __future__ import annotations

import math
from typing import Any

import networkx as nx
import pytest
import torch
from opened import tiny_tracer
from tiny import account, tiny_model, tiny_text
from torch import Tensor
from transparency_cases import TOLERANCE, attention_contributions, close, largest_gap, opened, ran

from ifr_fast import IfrError, Tracer, UnsupportedArchitectureError
from ifr_fast.compat import llm_transparency_tool as tool
from ifr_fast.compat.llm_transparency_tool import TransparentLlm, build_full_graph
from ifr_fast.compat.llm_transparency_tool import build_paths_to_predictions as build_paths


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: tool.get_contributions(torch.ones(2, 3), torch.ones(4)), "whole"),
        (
            lambda: tool.get_contributions_with_one_off_part(
                torch.ones(2, 3), torch.ones(2), torch.ones(3)
            ),
            "one_off",
        ),
        (
            lambda: tool.apply_threshold_and_renormalize(0.1, torch.ones(2, 3), torch.ones(3)),
            "c_residual",
        ),
        (lambda: build_paths(nx.DiGraph(), 1, 3, [3], 0.1), "starting_tokens"),
        (lambda: build_paths(nx.DiGraph(), 1, 3, [0], 0.1), "n_layers"),
        (lambda: TransparentLlm(device="tpu"), "device"),
        (lambda: ran("llama", 4).residual_in("1"), "layer"),
        (lambda: ran("llama", 4).attention_matrix(0, 0, 6), "head"),
        (lambda: build_full_graph(ran("llama", 4), 1), "batch_i"),
        (lambda: build_full_graph(ran("llama", 4), 0, math.nan), "renormalizing_threshold"),
    ],
)
def test_wrong_arguments_are_named(call: Any, names: str) -> None:
    with pytest.raises(ValueError, match=f"^{names}: "):
        call()


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "qwen2", "gemma2", "gemma4", "granite", "gpt_neox"]
)
def test_methods_agree_with_the_model(family: str, parity: bool) -> None:
    token_ids = tiny_text(20)
    reasons = {"gpt_neox": "parallel", "gemma4": "not affine"}  # Gemma 4 norms its values
    if family in reasons and parity:
        with pytest.raises(ValueError, match=rf"^parity: .*{reasons[family]}"):
            TransparentLlm(hf_model=tiny_model(family).eval(), parity=True)
        return
    ours = ran(family, 20, parity)
    made = ours.tracer.model
    assert ours.tokens().tolist() == [token_ids.tolist()]
    assert ours.batch_size() == 1
    info = ours.model_info()
    assert (info.n_layers, info.n_heads, info.d_model, info.d_vocab) == (3, 6, 36, 97)
    assert info.n_params_estimate == made.num_parameters()
    with torch.no_grad():
        logits = made(token_ids[None]).logits
    close(ours.logits(), logits)
    for i, x in enumerate(account(made, token_ids)):
        close(ours.residual_in(i)[0], x.resid_pre)
        close(ours.residual_out(i)[0], x.resid_post)
        close(ours.ffn_out(i)[0], x.ffn)
        parts = ours.decomposed_attn(0, i)
        assert parts.shape == (20, 20, 6, 36)
        assert parts.triu(1).numel() > 0
        for h in range(6):
            close(ours.attention_matrix(0, i, h), x.pattern[h])
            close(ours.attention_output_per_head(0, i, 7, h), parts[7, :, h].sum(0))
        added = ours.attention_output(0, i, 7)
        if x.resid_mid is None:
            with pytest.raises(ValueError, match="parallel block"):
                ours.residual_after_attn(i)
        else:
            close(ours.residual_after_attn(i)[0], x.resid_mid)
            close(added, (x.resid_mid - x.resid_pre)[7])
        if not parity:
            bias = ours.tracer.decoder.blocks[i].bias
            close(parts[7].sum((0, 1)) + bias, added)
    close(ours.unembed(ours.residual_out(2)[0, 7], normalize=True), logits[0, 7])
    close(ours.unembed(ours.tracer.record(token_ids).states[7], normalize=False), logits[0, 7])
    assert ours.tokens_to_strings(token_ids[:2]) == [f"<{i}>" for i in token_ids[:2].tolist()]


def test_residual_connections_that_are_not_plain_are_refused() -> None:
    for family in ("bert", "doge"):
        with pytest.raises(UnsupportedArchitectureError, match="norms or weights on its residual"):
            TransparentLlm.of(tiny_tracer(family))


def test_a_batch_is_padded_on_the_right() -> None:
    texts = [tiny_text(9), tiny_text(15, seed=1)]
    both, alone = (opened("qwen2", True).copy() for _ in range(2))
    both.run([x.tolist() for x in texts])
    assert both.batch_size() == 2
    assert both.tokens().shape == (2, 15)
    assert both.residual_in(1)[0, 9:].abs().max() == 0
    for i, text in enumerate(texts):
        alone.run([text])
        n = len(text)
        close(both.residual_out(1)[i, :n], alone.residual_out(1)[0])
        close(both.logits()[i, :n], alone.logits()[0])
        close(both.attention_matrix(i, 1, 2)[:n, :n], alone.attention_matrix(0, 1, 2))
        close(both.decomposed_attn(i, 1)[:n, :n], alone.decomposed_attn(0, 1) + 0.0)
        mine, expected = (
            x[0] for x in (attention_contributions_of(both, i), attention_contributions(alone, 1))
        )
        torch.testing.assert_close(mine[:n, :n], expected, atol=TOLERANCE, rtol=0)
        graph = build_full_graph(both, i, 0.04)
        assert largest_gap(graph, build_full_graph(alone, 0, 0.04)) < TOLERANCE
        assert len(build_paths(graph, 3, 15, range(15), 0.0)) == 15


def attention_contributions_of(of: TransparentLlm, batch_i: int) -> tuple[Tensor, Tensor]:
    found = tool.get_attention_contributions(
        of.residual_in(1)[batch_i][None],
        of.residual_after_attn(1)[batch_i][None],
        of.decomposed_attn(batch_i, 1)[None],
        parity=True,
    )
    return found[0][0], found[1][0]


def test_copies_have_their_own_state() -> None:
    ours = opened("llama").copy()
    with pytest.raises(RuntimeError, match="call `run` first"):
        ours.tokens()
    other = ours.copy()
    other.run([tiny_text(5)])
    with pytest.raises(IfrError):
        ours.batch_size()
    assert other.tokens().shape == (1, 5)


def test_another_precision_leaves_the_given_model_alone() -> None:
    made = tiny_model("llama").eval()
    ours = TransparentLlm("tiny", made, None, "cpu", torch.float64)
    assert ours.tracer.model.dtype == torch.float64
    assert made.dtype == torch.float32
    assert TransparentLlm("tiny", made, None, "cpu", torch.float32).tracer.model is made


@pytest.mark.default_model
def test_sentences_of_the_default_model(smol: Tracer) -> None:
    text = "When Mary and John went to the store, John gave a drink to"
    ours, theirs = (TransparentLlm.of(smol, parity=parity) for parity in (False, True))
    for of in (ours, theirs):
        of.run(text)
    assert ours.tokens_to_strings(ours.tokens()[0])[:2] == ["When", " Mary"]
    assert theirs.tokens().shape[1] == ours.tokens().shape[1] + 1
    assert theirs.tokens()[0, 0] == smol.tokenizer.bos_token_id
    best = int(ours.unembed(ours.residual_out(29)[0, -1], normalize=True).argmax())
    assert ours.tokens_to_strings(torch.tensor([best])) == [" Mary"]
    neurons = ours.decomposed_ffn_out(0, 20, -1)
    assert neurons.shape == (1536, 576)
    close(neurons.sum(0), ours.ffn_out(20)[0, -1])
