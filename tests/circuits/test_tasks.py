"""Prompts of the tasks, for tokenizers that write words and numbers in several ways."""

from __future__ import annotations

import math

import pytest
import torch
from circuit_tasks import word_tokenizer
from transformers import PreTrainedTokenizerFast

from ifr_fast import circuits
from ifr_fast.circuits import Prompt, Task
from ifr_fast.circuits.tasks import IOI_TEMPLATES, NAMES


def test_ioi_prompts():
    tokenizer = word_tokenizer()
    task = circuits.ioi(tokenizer, 60, seed=3)
    assert len({p.text for p in task.prompts}) == 60
    assert {p.template[:4] for p in task.prompts} == {"ABBA", "BABA"}
    assert len({p.template[6:] for p in task.prompts}) == len(IOI_TEMPLATES)
    for p in task.prompts:
        words = tokenizer.convert_ids_to_tokens(p.token_ids)
        io, s = (tokenizer.convert_ids_to_tokens(x)[0] for x in (p.right, p.wrong))
        assert [words[p.places[k]] for k in ("IO", "S1", "S2")] == [io, s, s]
        assert words.count(io) == 1
        assert words.count(s) == 2
        assert p.places["S2"] > max(p.places["IO"], p.places["S1"])
        assert (p.places["IO"] < p.places["S1"]) == p.template.startswith("ABBA")
        names = [w for w in tokenizer.convert_ids_to_tokens(p.twin_ids) if w in NAMES]
        assert len(set(names)) == 3
        assert not {io, s} & set(names)
        assert len(p.twin_ids) == len(p.token_ids) == p.places["END"] + 1
        assert p.token_ids[: p.first_difference] == p.twin_ids[: p.first_difference]
        assert p.first_difference == min(p.places["IO"], p.places["S1"])
        for reference in p.references:
            assert len(reference) == len(p.token_ids)
            assert not {p.right[0], p.wrong[0]} & set(reference)
    again = circuits.ioi(tokenizer, 60, seed=3)
    assert again == task
    assert circuits.ioi(tokenizer, 60, seed=4) != task


def test_the_swapped_corrupted_prompt_asks_for_the_other_name():
    task = circuits.ioi(word_tokenizer(), 10, twin="swap")
    for p in task.prompts:
        assert p.first_difference == p.places["S2"]
        assert p.twin_ids[p.places["S2"]] == p.right[0]
        assert sum(a != b for a, b in zip(p.token_ids, p.twin_ids, strict=True)) == 1


def test_names_of_several_tokens_are_left_out():
    but = ("Mary", "Stephanie", "Robert")
    tokenizer = word_tokenizer(but=but)
    assert len(tokenizer(" Mary")["input_ids"]) == 2
    task = circuits.ioi(tokenizer, 200, names=(*but, *NAMES[:12]))
    assert not any(name in p.text + p.twin for p in task.prompts for name in but)
    with pytest.raises(ValueError, match="of 4 names 2 are single tokens"):
        circuits.ioi(tokenizer, 1, names=("Mary", "Robert", "Paul", "Anna"))


def numbers(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    return [int(token) for token in tokenizer.convert_ids_to_tokens(ids)]


def test_greater_than_in_pairs_of_digits():
    tokenizer = word_tokenizer()
    task = circuits.greater_than(tokenizer, 20)
    for p in task.prompts:
        year = int(tokenizer.convert_ids_to_tokens(p.token_ids)[p.places["YY"]])
        right, wrong = (numbers(tokenizer, ids) for ids in (p.right, p.wrong))
        assert right == list(range(year + 1, 100))
        assert wrong == list(range(year + 1))
        assert tokenizer.convert_ids_to_tokens(p.twin_ids)[p.places["YY"]] == "01"
        assert len(p.references) == 16
        assert p.token_ids not in p.references


def test_greater_than_digit_by_digit_asks_for_tens():
    tokenizer = word_tokenizer(digits=r"\d")
    task = circuits.greater_than(tokenizer, 10)
    for p in task.prompts:
        tens = int(tokenizer.convert_ids_to_tokens(p.token_ids)[p.places["YY"]])
        right, wrong = (numbers(tokenizer, ids) for ids in (p.right, p.wrong))
        assert right == list(range(tens + 1, 10))
        assert wrong == list(range(tens))
    with pytest.raises(ValueError, match="0 of 1 prompts could be made"):
        circuits.greater_than(word_tokenizer(digits=r"\d{3}|\d"), 1)


def test_logit_difference_and_probability():
    prompts = [
        Prompt("a", "b", [1], [2], right, wrong, [], "", {})
        for right, wrong in (([3], [5]), ([0, 1], [2, 3, 4]))
    ]
    task = Task("made up", 0, prompts)
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    which = torch.tensor([0, 1, 1, 0, 1])
    p = logits.double().softmax(-1)
    for got, chance, row, i in zip(
        task.logit_difference(logits, which), task.probability(logits, which), p, which, strict=True
    ):
        right, wrong = (float(row[x].sum()) for x in (prompts[i].right, prompts[i].wrong))
        assert math.isclose(float(got), math.log(right / wrong), rel_tol=1e-9)
        assert math.isclose(float(chance), right, rel_tol=1e-9)
