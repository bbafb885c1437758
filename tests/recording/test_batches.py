"""Several texts at once against the same texts one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from opened import tiny_importances, tiny_tracer
from oracle import assert_graph_agrees
from same_graph import assert_within
from tiny import FAMILIES, VOCAB, WINDOW, tiny_text
from transformers import LlamaConfig, LlamaForCausalLM
from unchecked import skip_closure_check

from ifr_fast import Recording, Tracer
from ifr_fast.recording.batches import batches, can_batch
from ifr_fast.scoring.scores import LayerScores
from ifr_fast.tokens import is_batch

LENGTHS = [9, 1, 16, 2, 14]  # some cross the window, some do not
THRESHOLD = 0.02
FEW = ["llama", "gpt2", "mistral", "gpt_neox", "gemma3", "qwen3_next", "bloom"]


def texts() -> list[torch.Tensor]:
    return [tiny_text(n, seed=i) for i, n in enumerate(LENGTHS)]


def padded(side: str) -> dict[str, torch.Tensor]:
    """The texts as a tokenizer pads them; padding would change scores if it were read."""
    ids = torch.full((len(LENGTHS), max(LENGTHS)), 13)
    mask = torch.zeros_like(ids)
    for row, keep, text in zip(ids, mask, texts(), strict=True):
        place = slice(0, len(text)) if side == "right" else slice(len(row) - len(text), None)
        row[place], keep[place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_same_scores(got: LayerScores, expected: LayerScores) -> None:
    T, H = len(got.rows), got.head_total.shape[1]
    for name in ("residual", "ffn", "head_total", "ffn_residual"):
        mine, theirs = getattr(got, name), getattr(expected, name)
        if theirs is not None:
            assert_within(mine, theirs)
    dense = []
    for scores in (got, expected):
        head, target, source, weight = scores.head_edges
        heads = torch.zeros(H, T, T)
        heads[head, target, source] = weight
        dense.append(heads)
    assert_within(*dense)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_are_those_of_one_by_one(family: str) -> None:
    tracer, some = tiny_tracer(family), texts()[: 5 if family in FEW else 3]
    for mode in ("full", "lean"):
        together = tracer.record(some, mode=mode)
        for recording, text in zip(together, some, strict=True):
            assert torch.equal(recording.token_ids, text)
            alone = tracer.record(text, mode=mode)
            torch.testing.assert_close(recording.logits, alone.logits, atol=1e-4, rtol=1e-4)
            of_alone = tracer.contributions(alone, keep=0.0)
            for got, expected in zip(
                tracer.contributions(recording, keep=0.0), of_alone, strict=True
            ):
                assert_same_scores(got, expected)


@pytest.mark.parametrize("family", FEW)
def test_graphs_match_the_oracle_on_either_side(family: str) -> None:
    tracer = tiny_tracer(family)
    oracles = [tiny_importances(family, n, seed=i) for i, n in enumerate(LENGTHS)]
    for batch in (padded("left"), padded("right"), texts()):
        graphs = tracer.trace(batch, threshold=THRESHOLD)
        routes = tracer.trace_all(batch, threshold=THRESHOLD)
        assert len(graphs) == len(routes) == len(LENGTHS)
        for graph, of_all, layers, text in zip(graphs, routes, oracles, texts(), strict=True):
            assert torch.equal(graph.token_ids, text)
            assert_graph_agrees(graph, layers)
            assert_graph_agrees(of_all[-1], layers)
            assert_graph_agrees(of_all[len(text) // 2], layers)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_value_changes_its_own_source_alone(
    family: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replacing v at one position of one text changes exactly what reads it, in that text."""
    # The closure check would rightly see the change.
    skip_closure_check(monkeypatch)
    tracer = tiny_tracer(family)
    layer, of, changed = tracer.decoder.n_layers - 1, 2, 8

    def weights(scale: float) -> list[torch.Tensor]:
        recordings = tracer.record(padded(side), mode="full")
        with torch.inference_mode():
            recordings[of].layers[layer].v[changed] *= scale  # in the batch's own tensor
        found = []
        for recording in recordings:
            (scores,) = tracer.contributions(recording, layers=[layer], keep=0.0)
            dense = torch.zeros(len(recording), len(recording))
            target, source, weight = scores.token_edges
            dense[target, source] = weight
            found.append(dense)
        return found

    before, after = weights(1), weights(-3)
    for b, (mine, theirs) in enumerate(zip(before, after, strict=True)):
        rows = (mine != theirs).any(-1).nonzero().squeeze(1).tolist()
        end = LENGTHS[of] if family == "llama" else changed + WINDOW
        assert rows == (list(range(changed, end)) if b == of else [])


def test_one_pass_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = tiny_tracer("llama")
    shapes = []
    forward = tracer.decoder.forward_batch
    monkeypatch.setattr(
        tracer.decoder, "forward_batch", lambda x: shapes.append(tuple(x.shape)) or forward(x)
    )
    recordings = tracer.record(texts(), mode="full")
    assert shapes == [(5, 16)]
    storages = {r.layers[0].v.untyped_storage().data_ptr() for r in recordings}
    assert len(storages) == 1  # views, not copies
    shapes.clear()
    tracer.trace(texts(), batch_size=2)
    assert shapes == [(2, 16), (2, 9)]  # by length; the last alone


def held(recordings: list[Recording], *names: str) -> int:
    """Bytes that these tensors of all layers keep alive; with resid_pre, the final states too."""
    tensors = [getattr(layer, name) for r in recordings for layer in r.layers for name in names]
    if "resid_pre" in names:
        tensors += [x for r in recordings for x in (r.resid_final, r.states)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "llama", "gpt2", "deepseek_v3"])
def test_lean_recordings_hold_what_was_planned(family: str) -> None:
    """The padding of a batch is held too: its recordings are views of the pass's tensors."""
    tracer = tiny_tracer(family)
    plan = tracer.plan(max(LENGTHS))
    together = tracer.record(texts(), mode="lean")
    assert held(together, "k", "v") == len(LENGTHS) * plan.kv_bytes
    assert held(together, "resid_pre", "k", "v") == len(LENGTHS) * plan.lean_bytes
    assert {recording.nbytes for recording in together} == {len(LENGTHS) * plan.lean_bytes}
    for text in texts():
        plan, alone = tracer.plan(len(text)), tracer.record(text, mode="lean")
        assert held([alone], "k", "v") == plan.kv_bytes
        assert alone.nbytes == plan.lean_bytes


def test_full_recordings_hold_the_log_sum_exp_of_single_ones() -> None:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=50,
        max_position_embeddings=96,
    )
    torch.manual_seed(0)
    tracer = Tracer(LlamaForCausalLM(config).eval())
    for got, text in zip(tracer.record(texts(), mode="full"), texts(), strict=True):
        alone = tracer.record(text, mode="full")
        for mine, theirs in zip(got.layers, alone.layers, strict=True):
            assert mine.log_sum_exp.shape == (len(text), 6)
            torch.testing.assert_close(mine.log_sum_exp, theirs.log_sum_exp, atol=1e-5, rtol=1e-5)
    lean = tracer.record(texts(), mode="lean")
    assert all(layer.log_sum_exp is None for recording in lean for layer in recording.layers)


def test_batches_hold_every_text_once_and_keep_to_their_size() -> None:
    decoder = tiny_tracer("llama").decoder
    for size in (None, 1, 2, 3, 100):
        found = list(batches(decoder, LENGTHS, size))
        assert sorted(i for of in found for i in of) == list(range(len(LENGTHS)))
        assert max(map(len, found)) <= (size or 5)
    assert [len(of) for of in batches(decoder, [4096] * 5, None)] == [2, 2, 1]


def test_families_outside_the_interface_run_one_by_one() -> None:
    alone = {name for name in FAMILIES if not can_batch(tiny_tracer(name).decoder)}
    own = {"bloom", "codegen", "falcon", "falcon-new", "gpt_neo", "gptj", "mpt", "openai-gpt"}
    assert alone == own


def test_texts_of_other_rotary_frequencies_are_kept_apart() -> None:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=50,
        max_position_embeddings=12,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    tracer = Tracer(model)
    assert list(batches(tracer.decoder, LENGTHS, None)) == [[2], [4], [0, 3, 1]]


def test_what_is_a_batch() -> None:
    for text in ("text", [1, 2], tiny_text(3), list(tiny_text(3)), np.array([1, 2]), [], None,
                 [{"role": "user", "content": "x"}], [1, "a"], b"ab", range(3),
                 {"input_ids": [1, 2]}, {"input_ids": tiny_text(3)[None]},
                 {"messages": [{"role": "user", "content": "x"}]}):  # fmt: skip
        assert not is_batch(text), text
    for batch in (["a"], ["a", "b"], [[1], [2, 3]], [tiny_text(3)], ([1], [2]), [np.array([1])],
                  [[{"role": "user", "content": "x"}]], {"input_ids": [[1]]},
                  {"input_ids": torch.stack([tiny_text(3)] * 2)}, [{"input_ids": [1]}] * 2,
                  [{"messages": []}]):  # fmt: skip
        assert is_batch(batch), batch


def test_positions_and_options_reach_every_text() -> None:
    tracer = tiny_tracer("llama")
    batch = [tiny_text(5), tiny_text(9)]
    for graph, text in zip(
        tracer.trace(batch, position=[1, -1], threshold=0.1, granularity="head"), batch, strict=True
    ):
        alone = tracer.trace(text, position=[1, -1], threshold=0.1, granularity="head")
        assert graph.starts == alone.starts
        assert graph.granularity == "head"
        torch.testing.assert_close(
            graph.token_importance(), alone.token_importance(), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("batch", "options", "words"),
    [
        ([[1, 2], []], {}, "text 1: .*empty"),
        ([[1, 2], [VOCAB]], {}, "text 1: .*token ids"),
        (["a", "b"], {}, "text 0: .*no tokenizer"),
        ([[1, 2]], {"position": 2}, "position: expected -2 to 1"),
        ([[1, 2]], {"batch_size": 0}, "batch_size"),
        ({"ids": [[1]]}, {}, "input_ids"),
        ({"input_ids": [[1, 2], ["a"]]}, {}, "text: .*integers for one text or several"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, {}, "attention_mask"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, {}, "between others"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, {}, "attention_mask"),
        ({"input_ids": [[1, 2]], "attention_mask": []}, {}, "text: "),
    ],
)
def test_bad_batches_are_refused(batch: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_tracer("llama").trace(batch, **options)
