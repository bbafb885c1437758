"""Deletion and insertion curves, by hand and against FlashTrace."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from circuit_tasks import word_tracer

from ifr_fast import circuits
from ifr_fast.circuits.inputs import deletion_groups, insertion_area, mass_left, rise_and_mas


def test_deletion_groups_and_mass():
    attribution = torch.tensor([0.1, 0.5, 0.2, 0.0, 0.2])
    assert deletion_groups(attribution, range(5), 2) == [[1, 2, 4], [0, 3]]
    assert deletion_groups(attribution, [0, 3, 4]) == [[4], [0], [3]]
    left = mass_left(attribution, [[1, 2, 4], [0, 3]])
    torch.testing.assert_close(left, torch.tensor([1, 0.1, 0]).double(), atol=1e-6, rtol=0)
    nothing = mass_left(torch.zeros(4), [[0], [1, 2], [3]])
    torch.testing.assert_close(nothing, torch.tensor([1, 2 / 3, 1 / 3, 0]).double())


def test_rise_mas_and_insertion_by_hand():
    scores = torch.tensor([-1.0, -3.0, -2.0, -5.0])
    # Normalized: 1, 1/2, 3/4, 0. Never rising: 1, 1/2, 1/2, 0. Area: (1/2 + 1/2 + 1/2) / 3.
    left = torch.tensor([1, 0.5, 0.25, 0])
    # With the distance from the mass left: 1, 1/2, 3/4, 0.
    rise, mas = rise_and_mas(scores, left)
    assert math.isclose(rise, 0.5)
    assert math.isclose(mas, (0.5 + 0.5 + 0.75) / 3)
    assert rise_and_mas(torch.tensor([1.0, 3.0, 1.0]), left[:3]) == (0.5, 0.5)
    # Rising: 0, 1/2, 1/2, 1.
    assert math.isclose(insertion_area(torch.tensor([-5.0, -3.0, -4.0, -1.0])), 0.5)


@pytest.mark.skipif(
    importlib.util.find_spec("flashtrace") is None, reason="expected: flashtrace is not installed"
)
def test_rise_and_mas_are_those_of_flashtrace():
    from flashtrace.improved import faithfulness_test_skip_tokens

    tracer = word_tracer()
    generator = torch.Generator().manual_seed(0)
    n = 23
    ids = torch.randint(1, len(tracer.tokenizer), (n,), generator=generator)

    class Encoding:
        """A stand-in for a tokenizer: the tokens of any prompt are `ids`."""

        eos_token = ""

        def __call__(self, text, **_):
            found = ids if text == " prompt" else ids[:1]
            return type("Encoded", (), {"input_ids": found[None]})

    class Evaluator:
        device = torch.device("cpu")
        tokenizer = Encoding()

        def _ensure_pad_token_id(self):
            return 0

        def format_prompt(self, prompt):
            return prompt

        def compute_logprob_response_given_prompt(self, prompt_ids, _):
            return circuits.run(tracer.decoder, [prompt_ids[0]]).log_softmax(-1)[:, 5]

    evaluator = Evaluator()
    for seed in range(3):
        attribution = torch.rand(n, generator=torch.Generator().manual_seed(seed))
        among = [t for t in range(n) if t % 5]
        expected = faithfulness_test_skip_tokens(
            evaluator,
            attribution[None],
            "prompt",
            "target",
            keep_prompt_token_indices=among,
            user_prompt_indices=list(range(n)),
            k=7,
        )
        groups = deletion_groups(attribution, among, 7)
        texts = [ids]
        for group in groups:
            text = texts[-1].clone()
            text[group] = 0
            texts.append(text)
        scores = circuits.run(tracer.decoder, texts).log_softmax(-1)[:, 5]
        got = rise_and_mas(scores, mass_left(attribution, groups))
        assert got == pytest.approx(expected[:2], abs=1e-5)
