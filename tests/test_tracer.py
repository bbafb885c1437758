"""The arguments of a Tracer's methods: what they take, and what they refuse in clear words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from opened import tiny_tracer
from same_graph import assert_same_bits
from tiny import VOCAB, tiny_text
from transformers import BatchEncoding

from ifr_fast import Tracer


@pytest.fixture
def llama() -> Tracer:
    """A model that no test changes."""
    return tiny_tracer("llama")


@pytest.mark.parametrize("position", [20, -21, 10**9, True, False, 3.0, None, "3", [[3]], [20]])
def test_positions_out_of_range_are_refused(llama: Tracer, position: Any) -> None:
    with pytest.raises(ValueError, match=r"position: expected .*-20 to 19, got"):
        llama.trace(tiny_text(20), position=position)
    with pytest.raises(ValueError, match=r"position: expected .*-20 to 19, got"):
        llama.trace(llama.record(tiny_text(20)), position=position)


@pytest.mark.parametrize("threshold", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_thresholds_out_of_range_are_refused(llama: Tracer, threshold: float) -> None:
    for act in (llama.trace, llama.trace_all):
        with pytest.raises(ValueError, match="threshold: expected a number from 0 to 1"):
            act(tiny_text(5), threshold=threshold)
    with pytest.raises(ValueError, match="keep: expected a number from 0 to 1"):
        llama.contributions(tiny_text(5), keep=threshold)


@pytest.mark.parametrize("threshold", ["0.1", None])
def test_thresholds_that_are_no_numbers_are_refused(llama: Tracer, threshold: Any) -> None:
    with pytest.raises(ValueError, match="threshold: expected a number from 0 to 1"):
        llama.trace(tiny_text(5), threshold=threshold)


@pytest.mark.parametrize("granularity", ["heads", "", None, "TOKEN"])
def test_granularities_are_two(llama: Tracer, granularity: Any) -> None:
    for act in (llama.trace, llama.trace_all):
        with pytest.raises(ValueError, match="granularity: expected 'token' or 'head'"):
            act(tiny_text(5), granularity=granularity)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ([], "is empty"),
        (torch.empty(0, dtype=torch.int64), "is empty"),
        ("words", "no tokenizer"),
        ("", "no tokenizer|is empty"),
        ([1.5, 2.0], "expected .* token ids"),
        ([1, "a"], "expected .* token ids"),
        (["a", 3], "expected .* token ids"),
        ([True, False], "expected .* token ids"),
        ([1, None], "expected .* token ids"),
        (torch.tensor([1.0, 2.0]), "expected token ids"),
        (torch.tensor([True, False]), "expected token ids"),
        (torch.tensor([[1, 2], [3, 4]]), r"shape \[T\], got .* \[2, 2\]"),
        (torch.tensor(3), "expected token ids"),
        ([VOCAB], f"from 0 to {VOCAB - 1}"),
        ([3, -1], f"from 0 to {VOCAB - 1}"),
        ([2**40], f"from 0 to {VOCAB - 1}"),
        ([2**70], "token ids"),
        ([[1, 2], 3], "expected .* token ids"),
        ([{"role": "user", "content": "hello"}], "no tokenizer"),
        ([{"role": "user"}, 3], "expected"),
        (b"\x01\x02", "expected a string"),
        (3, "expected"),
        (None, "expected"),
        ([0] * 97, "97 tokens.* 96"),
    ],
    ids=repr,
)
def test_other_objects_than_texts_are_refused(llama: Tracer, text: Any, reason: str) -> None:
    for act in (llama.trace, llama.trace_all, llama.record, llama.contributions):
        with pytest.raises(ValueError, match=f"text: .*({reason})"):
            act(text)


def test_a_text_may_have_any_form(llama: Tracer) -> None:
    ids = tiny_text(9)
    expected = llama.trace(ids)
    assert expected.tokens == [f"<{i}>" for i in ids.tolist()]
    for text in (ids.tolist(), tuple(ids.tolist()), ids.int(), llama.record(ids)):
        assert_same_bits(llama.trace(text), expected)
    assert len(llama.trace([3] * 96).tokens) == 96


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", [20]),
        ("rows", [-21]),
        ("rows", [1.0]),
        ("rows", [True]),
        ("rows", []),
        ("rows", torch.tensor([25])),
        ("layers", [3]),
        ("layers", [-4]),
        ("layers", ["0"]),
    ],
    ids=repr,
)
def test_rows_and_layers_out_of_range_are_refused(llama: Tracer, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: "):
        llama.contributions(tiny_text(20), **{name: value})


def test_rows_and_layers_may_be_named_in_any_order(llama: Tracer) -> None:
    text = tiny_text(20)
    every = {scores.layer: scores for scores in llama.contributions(text, keep=0.02)}
    assert list(every) == [2, 1, 0]
    rows = torch.tensor([-1, 3, 3, 0])
    some = list(llama.contributions(text, rows=rows, layers=[0, -1], keep=0.02))
    assert [scores.layer for scores in some] == [2, 0]
    for scores in some:
        assert scores.rows.tolist() == [0, 3, 19]
        whole = every[scores.layer]
        torch.testing.assert_close(scores.residual, whole.residual[scores.rows])
        among = torch.isin(whole.token_edges.target, scores.rows)
        assert torch.equal(scores.token_edges.source, whole.token_edges.source[among])
        assert torch.equal(scores.token_edges.target, whole.token_edges.target[among])
        assert (scores.token_edges.weight > 0.02).all()
        assert (scores.head_edges.weight > 0.02).all()


def test_there_are_two_modes(llama: Tracer) -> None:
    assert llama.record(tiny_text(3), mode="lean").mode == "lean"
    with pytest.raises(ValueError, match=r"mode: expected .*'fast'"):
        llama.record(tiny_text(3), mode="fast")


def test_a_tokenizers_result_is_a_text_everywhere(llama: Tracer) -> None:
    ids = tiny_text(9)
    flat = BatchEncoding({"input_ids": ids.tolist(), "attention_mask": [1] * 9})
    row = BatchEncoding({"input_ids": ids[None], "attention_mask": torch.ones(1, 9)})
    expected = llama.trace(ids)
    steps = [step.token_id for step in llama.generate(ids, max_new_tokens=2, eos_token_id=[])]
    for text in (flat, row, ids[None], ids[None].numpy()):
        assert torch.equal(llama.record(text).token_ids, ids)
        assert torch.equal(llama.trace(text).edges.weight, expected.edges.weight)
        found = llama.trace_all(text)[-1]
        assert torch.equal(found.edges.source, expected.edges.source)
        made = llama.generate(text, max_new_tokens=2, eos_token_id=[])
        assert [step.token_id for step in made] == steps
        assert next(iter(llama.contributions(text))).rows.tolist() == list(range(9))
        assert llama.contribution_map(text, layer=0).shape == (9, 9)
    assert [len(graph.tokens) for graph in llama.trace([flat, {"input_ids": [3]}])] == [9, 1]
    both = BatchEncoding({"input_ids": [[1, 2], [3]]})
    assert len(llama.trace(both)) == 2
    with pytest.raises(ValueError, match="expected a single text, got a tokenizer's result for 2"):
        llama.generate(both)


@pytest.mark.default_model
def test_chat_messages(smol: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    expected = smol.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert smol.record(messages).token_ids.tolist() == expected
    for bad in ([{"role": "user"}], [{"content": "Hi"}], [{"role": "user", "content": 3}]):
        with pytest.raises(ValueError, match="text: expected messages with role and content"):
            smol.record(bad)
    monkeypatch.setattr(smol.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="text: this tokenizer has no chat template"):
        smol.record(messages)


@pytest.mark.default_model
def test_special_tokens_are_the_tokenizers_unless_told(smol: Tracer) -> None:
    with pytest.raises(ValueError, match="text: is empty"):
        smol.trace("")
    plain = smol.tokenizer("Paris")["input_ids"]
    assert smol.record("Paris").token_ids.tolist() == plain
    without = smol.tokenizer("Paris", add_special_tokens=False)["input_ids"]
    assert smol.record("Paris", add_special_tokens=False).token_ids.tolist() == without
