"""Texts as token ids of any library, and objects that are refused as texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

from ifr_fast.tokens import encode, is_batch


class StartsWithOne:
    """A tokenizer that puts a special token 1 in front."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(ord, text)]}


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([[3, 5]]),
        np.array([[3, 5]]),
        BatchEncoding({"input_ids": [3, 5], "attention_mask": [1, 1]}),
        BatchEncoding({"input_ids": [[3, 5]], "attention_mask": [[1, 1]]}),
        BatchEncoding({"input_ids": torch.tensor([[3, 5]]), "token_type_ids": [[0, 0]]}),
        BatchEncoding({"input_ids": np.array([[3, 5]])}),
        BatchEncoding({"input_ids": torch.tensor([3, 5])}),
        {"input_ids": [0, 3, 5, 0], "attention_mask": [0, 1, 1, 0]},
        {"input_ids": torch.tensor([[3, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])},
        {"input_ids": np.array([[0, 3, 5]]), "attention_mask": np.array([[0, 1, 1]])},
        [np.int64(3), np.int64(5)],
        [np.uint8(3), 5],
        np.array([3, 5]),
        np.array([3, 5], dtype=np.uint16),
        np.array([3, 5], dtype=np.int32)[::1],
        np.array([5, 3])[::-1],
        (3, 5),
        [torch.tensor(3), torch.tensor(5)],
        torch.tensor([3, 5], dtype=torch.int16),
    ],
    ids=repr,
)
def test_token_ids_of_other_libraries(ids: Any) -> None:
    encoded = encode(ids, None, None)
    assert encoded.dtype == torch.int64
    assert encoded.tolist() == [3, 5]


@pytest.mark.parametrize(
    "text",
    [
        [3, 5.0],
        [3, np.float32(5)],
        [True, False],
        [np.bool_(True)],
        [3, "5"],
        [3, [5]],
        np.array([3.0, 5.0]),
        np.array([True, False]),
        np.array([[3, 5], [3, 5]]),
        torch.tensor([[3, 5], [3, 5]]),
        {"input_ids": [3, 5.0]},
        {"input_ids": [3, True]},
        {"input_ids": 3},
        {"ids": [3, 5]},
        {},
        np.array(3),
        np.array(["a", "b"]),
        [1 << 70],
        bytearray(b"ab"),
        memoryview(b"ab"),
    ],
    ids=repr,
)
def test_other_objects_are_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"text: (expected|token ids must)"):
        encode(text, None, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        [],
        (),
        np.array([], dtype=np.int64),
        torch.tensor([]).long(),
        {"input_ids": []},
    ],
)
def test_empty_text_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="text: is empty; expected at least one token"):
        encode(text, StartsWithOne(), None)
    assert encode("a", StartsWithOne(), None).tolist() == [1, 97]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"input_ids": [[3, 5], [3, 5]]}, "expected a single text, got .* for 2"),
        ({"input_ids": [3, 5, 7], "attention_mask": [1, 0, 1]}, "hides tokens between others"),
        ({"input_ids": [3, 5], "attention_mask": [0, 0]}, "attention_mask .* keeps a token"),
        ({"input_ids": [3, 5], "attention_mask": [1]}, "attention_mask of shape"),
        ({"inputs": [3]}, "with input_ids, .* got one with inputs"),
        ({"input_ids": [1.5]}, "input_ids .* integers"),
        ({"input_ids": [True, False]}, "input_ids .* integers"),
    ],
)
def test_tokenizers_results_are_refused_by_their_reason(text: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"text: .*{words}"):
        encode(text, None, None)


# Conversations

STRINGS = (
    "{% for t in tools or [] %}tool {{ t.function.name }}|{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}call {{ c.function.name }}{% endfor %}|{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{% if p.type == 'text' %}"
    "{{ p.text }}{% endif %}{% endfor %}|{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [TOOL]}
USER = {"role": "user", "content": "a b"}
ANSWER = {"role": "assistant", "content": "c"}


def in_characters(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a character, which puts <s> in front."""
    characters = ["<s>", "<unk>", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    made.chat_template = template
    return made


def shown(text: Any, template: str | None = STRINGS) -> str:
    assert not is_batch(text)
    ids = encode(text, in_characters(template), None).tolist()
    return "".join(in_characters(None).convert_ids_to_tokens(ids))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([USER], "user: a b|assistant: "),
        ({"messages": [USER]}, "user: a b|assistant: "),
        ({"messages": [USER], "tools": [TOOL]}, "tool look|user: a b|assistant: "),
        ([USER, ANSWER], "user: a b|assistant: c|assistant: "),
        (
            {"messages": [USER, ANSWER], "continue_final_message": True},
            "user: a b|assistant: c",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a "},
                                          {"type": "text", "text": "b"}]}],
            "user: a b|assistant: ",
        ),
        ([USER, CALL], "user: a b|assistant: call look|assistant: "),
        ([USER, {k: v for k, v in CALL.items() if k != "content"}],
         "user: a b|assistant: call look|assistant: "),
    ],
)  # fmt: skip
def test_conversations(text: Any, expected: str) -> None:
    assert shown(text) == expected


def test_templates_of_parts_get_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert shown([{"role": "user", "content": parts}], PARTS) == "user: ab|"
    with pytest.raises(ValueError, match="text: the chat template leaves out content"):
        shown([{"role": "user", "content": parts}], "{{ messages[0].role }}")


@pytest.mark.parametrize(
    ("text", "what"),
    [({"messages": [USER], "tools": [TOOL]}, "the tools"), ([USER, CALL], "tool_calls")],
)
def test_what_a_template_leaves_out_is_warned_of(
    text: Any, what: str, recwarn: pytest.WarningsRecorder
) -> None:
    shown(text)
    assert not recwarn.list
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    with pytest.warns(UserWarning, match=f"text: the chat template leaves out {what}"):
        shown(text, template)


def test_a_template_that_cannot_do_without_calls_reads_them(
    recwarn: pytest.WarningsRecorder,
) -> None:
    template = (
        "{% for m in messages %}{{ m.content or m.tool_calls[0].function.name }}|{% endfor %}"
    )
    assert shown([USER, CALL], template) == "a b|look|"
    assert not recwarn.list


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 0 .* 'image'"),
        ([USER, {"role": "user", "content": ["a"]}], "message 1 has a part of type 'str'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0 has a part"),
        ([{"role": "user", "content": None}], "messages with role and content"),
        ([{"role": "user", "content": None, "tool_calls": []}], "messages with role and content"),
        ([{"content": None, "tool_calls": [TOOL]}], "messages with role and content"),
        ({"messages": []}, "is empty"),
        ({"messages": "a"}, "messages: expected a list"),
        ({"messages": ["a"]}, "messages: expected a list"),
        ({"messages": [USER], "tools": TOOL}, "tools: expected a list"),
        ({"messages": [USER], "temperature": 1}, "a conversation holds .*; got temperature"),
        ({"messages": [USER], "continue_final_message": 1}, "continue_final_message: .* got 1"),
        ({"messages": [CALL], "continue_final_message": True}, "continue_final_message: the last"),
    ],
)
def test_conversations_that_are_refused(text: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"text: .*{words}"):
        shown(text)


def test_a_template_that_raises_is_one_error() -> None:
    template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"text: .*cannot render .*System role not supported"):
        shown([USER], template)
    with pytest.raises(ValueError, match="text: the chat template cannot render"):
        shown([USER], "{{ messages[0].nothing.more }}")


def test_two_first_tokens_are_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = in_characters(None)
    tokenizer("<s>")
    assert encode("a", tokenizer, None).tolist()[0] == 0
    assert not [w for w in recwarn if "begins with two" in str(w.message)]
    with pytest.warns(UserWarning, match=r"text: begins with two <s>.*add_special_tokens=False"):
        assert encode("<s>a", tokenizer, None).tolist()[:2] == [0, 0]
    assert encode("<s>a", tokenizer, False).tolist()[0] == 0
