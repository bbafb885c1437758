"""Prompts of known tasks, each with a corrupted prompt that isolates what the task needs.

- Indirect object identification (Wang et al. 2022, arXiv 2211.00593, section 2): "When Mary and
  John went to the store, John gave a drink to" -> " Mary". The order is ABBA if the indirect object
  comes first and BABA if the subject does. In the corrupted prompt all three names are others and
  none is repeated (their p_ABC), or ("swap") the second subject is the indirect object.
- Greater-than (Hanna et al. 2023, arXiv 2305.00586, section 2): "The war lasted from the year 1732
  to the year 17" -> any later year. In the corrupted prompt the first year ends in 01.

Only names and years are used that the tokenizer at hand writes as single tokens in their places. If
it writes numbers digit by digit, the task asks for the year's tens instead: later tens are right,
earlier tens are wrong, and the same tens, which may be either, are not counted.

References are for mean ablation: texts of the same template with as many tokens, but with three
other names each, or with other years. Their mean at a position does not depend on the answer.

The logit difference of a prompt compares two sets of next tokens: logsumexp of the right tokens'
logits minus logsumexp of the wrong tokens' logits. That is a log odds ratio, and for single tokens
the usual difference of two logits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..arguments import check_choice, check_count, check_seed


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Mary John Tom James Dan Martin Amy Alice Mark Paul Anna Laura Sarah David Michael Robert "
    "William Richard Charles Thomas Daniel Matthew Anthony Steven Andrew Joshua Kevin Brian George "
    "Edward Ronald Timothy Jason Jeffrey Ryan Jacob Gary Nicholas Eric Jonathan Stephen Larry "
    "Justin Scott Brandon Benjamin Samuel Gregory Frank Alexander Raymond Patrick Jack Dennis "
    "Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Karen Nancy Lisa Margaret Sandra "
    "Ashley Kimberly Emily Donna Michelle Carol Amanda Melissa Deborah Stephanie Rebecca Sharon "
    "Cynthia Kathleen Angela Helen Anna Brenda Pamela Emma Nicole Samantha Katherine Christine "
    "Rachel Carolyn Janet Catherine Maria Heather Diane Ruth Julie Olivia Joyce Victoria Kelly"
)
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
OBJECTS = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")
# {A} and {B} are the names first mentioned, in this order; {S} is the name mentioned again.
IOI_TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {object} to",
    "Then, {A} and {B} went to the {place}. {S} gave a {object} to",
    "Then, {A} and {B} had a lot of fun at the {place}. {S} gave a {object} to",
    "Then, {A} and {B} were working at the {place}. {S} decided to give a {object} to",
    "Then, {A} and {B} were thinking about going to the {place}. {S} wanted to give a {object} to",
    "After {A} and {B} went to the {place}, {S} gave a {object} to",
    "While {A} and {B} were working at the {place}, {S} gave a {object} to",
    "Friends {A} and {B} found a {object} at the {place}. {S} gave it to",
)
EVENTS = _words(
    "war siege expedition campaign dispute conflict voyage famine reign rebellion treaty project "
    "study trial journey occupation plague construction investigation pilgrimage tour crisis "
    "alliance negotiation experiment marriage exhibition strike apprenticeship partnership"
)
YEAR_TEMPLATE = "The {event} lasted from the year {century}{year} to the year {century}"
_CENTURIES = range(11, 18)
_REFERENCES = 16  # references of each prompt
_ATTEMPTS = 60  # tries for each prompt, before the tokenizer is refused

Corruption = Literal["abc", "swap"]


@dataclass(frozen=True)
class Prompt:
    """One prompt and its corrupted prompt (`twin`), which has as many tokens."""

    text: str
    twin: str
    token_ids: list[int]
    twin_ids: list[int]
    right: list[int]  # next tokens that the task asks for
    wrong: list[int]
    references: list[list[int]]  # similar texts without the task, aligned token by token
    template: str
    places: dict[str, int]  # named positions

    @property
    def first_difference(self) -> int:
        """The first position where prompt and corrupted prompt differ; the number of tokens if
        they are the same.
        """
        pairs = zip(self.token_ids, self.twin_ids, strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.token_ids))


@dataclass(frozen=True)
class Task:
    """Prompts of one task, which is to predict the token after each prompt."""

    name: str
    seed: int
    prompts: list[Prompt]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of each prompt."""
        return [prompt.token_ids for prompt in self.prompts]

    @property
    def twins(self) -> list[list[int]]:
        """Token ids of each corrupted prompt."""
        return [prompt.twin_ids for prompt in self.prompts]

    def logit_difference(self, logits: Tensor, which: Tensor) -> Tensor:
        """Logit differences [N] float64 of logits [N, vocab] of the prompts `which` [N]."""
        right, wrong = (
            self._of(logits, which, [getattr(p, name) for p in self.prompts])
            for name in ("right", "wrong")
        )
        return right - wrong

    def probability(self, logits: Tensor, which: Tensor) -> Tensor:
        """Probabilities [N] float64 of all right tokens together."""
        right = self._of(logits, which, [p.right for p in self.prompts])
        return (right - logits.double().logsumexp(-1)).exp()

    def _of(self, logits: Tensor, which: Tensor, sets: list[list[int]]) -> Tensor:
        """[N] float64: logsumexp over the tokens that `sets` has for each row's prompt.

        No other logits are read, since patching passes one row for each variant.
        """
        widest = max(map(len, sets))
        tokens = torch.tensor([[*of, *[of[0]] * (widest - len(of))] for of in sets])[which]
        there = torch.tensor([[i < len(of) for i in range(widest)] for of in sets])[which]
        found = logits.gather(-1, tokens.to(logits.device)).double()
        return found.masked_fill(~there.to(logits.device), -torch.inf).logsumexp(-1)


def ioi(
    tokenizer: PreTrainedTokenizerBase,
    n_prompts: int,
    *,
    seed: int = 0,
    twin: Corruption = "abc",
    templates: Sequence[str] = IOI_TEMPLATES,
    names: Sequence[str] = NAMES,
    places: Sequence[str] = PLACES,
    objects: Sequence[str] = OBJECTS,
) -> Task:
    """Prompts of indirect object identification, ABBA and BABA equally likely.

    twin: the corrupted prompt; "abc" has three other names and repeats none, "swap" replaces the
    second subject by the indirect object. Raises ValueError if fewer than six names are single
    tokens.
    """
    check_choice("twin", twin, ("abc", "swap"))
    single = [name for name in dict.fromkeys(names) if _is_single(tokenizer, name)]
    if len(single) < 6:
        raise ValueError(
            f"tokenizer: of {len(names)} names {len(single)} are single tokens; the task needs 6"
        )

    def draw(rng: random.Random) -> Prompt | None:
        template, order = rng.choice(templates), rng.choice(("ABBA", "BABA"))
        io, s = rng.sample(single, 2)
        first, second = (io, s) if order == "ABBA" else (s, io)
        given = {"place": rng.choice(places), "object": rng.choice(objects)}

        def unrelated() -> str:
            a, b, c = rng.sample([name for name in single if name not in (io, s)], 3)
            return template.format(A=a, B=b, S=c, **given)

        text = template.format(A=first, B=second, S=s, **given)
        swapped = template.format(A=first, B=second, S=io, **given)
        other = unrelated() if twin == "abc" else swapped
        right, wrong = (_next(tokenizer, text, " " + name) for name in (io, s))
        ids, twin_ids = tokenizer(text)["input_ids"], tokenizer(other)["input_ids"]
        if len(right) != 1 or len(wrong) != 1 or len(ids) != len(twin_ids):
            return None
        twice = [i for i, x in enumerate(ids) if x == wrong[0]]
        once = [i for i, x in enumerate(ids) if x == right[0]]
        if len(twice) != 2 or len(once) != 1:  # a name that begins the text may be another token
            return None
        spots = {"IO": once[0], "S1": twice[0], "S2": twice[1], "END": len(ids) - 1}
        like = [tokenizer(unrelated())["input_ids"] for _ in range(_REFERENCES)]
        if any(len(x) != len(ids) for x in like):
            return None
        kind = f"{order}: {template}"
        return Prompt(text, other, ids, twin_ids, right, wrong, like, kind, spots)

    return Task("ioi", seed, _drawn(draw, n_prompts, seed))


def greater_than(
    tokenizer: PreTrainedTokenizerBase,
    n_prompts: int,
    *,
    seed: int = 0,
    events: Sequence[str] = EVENTS,
    template: str = YEAR_TEMPLATE,
) -> Task:
    """Prompts of the greater-than task.

    Raises ValueError if the tokenizer writes years neither in pairs of digits nor in single digits.
    """

    def draw(rng: random.Random) -> Prompt | None:
        century, event = rng.choice(_CENTURIES), rng.choice(events)
        year = rng.randrange(2, 99)
        text, other = (
            template.format(event=event, century=century, year=f"{y:02}") for y in (year, 1)
        )
        ids, twin_ids = tokenizer(text)["input_ids"], tokenizer(other)["input_ids"]
        if len(ids) != len(twin_ids) or ids == twin_ids:
            return None
        pairs = [_next(tokenizer, text, f"{y:02}") for y in range(100)]
        if all(len(found) == 1 for found in pairs):
            units, own = [found[0] for found in pairs], year
            wrong = units[: own + 1]
        elif all(len(found) == 2 for found in pairs):
            units, own = [found[0] for found in pairs[::10]], year // 10
            wrong = units[:own]
        else:
            return None
        right = units[own + 1 :]
        if not right or not wrong or len(set(units)) != len(units):
            return None
        differing = next(i for i, (a, b) in enumerate(zip(ids, twin_ids, strict=True)) if a != b)
        spots = {"YY": differing, "END": len(ids) - 1}
        years = rng.sample([y for y in range(2, 99) if y != year], _REFERENCES)
        like = [
            tokenizer(template.format(event=event, century=century, year=f"{y:02}"))["input_ids"]
            for y in years
        ]
        if any(len(x) != len(ids) for x in like):
            return None
        return Prompt(text, other, ids, twin_ids, right, wrong, like, template, spots)

    return Task("greater-than", seed, _drawn(draw, n_prompts, seed))


TASKS: dict[str, Callable[..., Task]] = {"ioi": ioi, "greater-than": greater_than}


def _drawn(draw: Callable[[random.Random], Prompt | None], n: int, seed: int) -> list[Prompt]:
    """The first n different prompts that `draw` returns."""
    n = check_count("n_prompts", n)
    rng = random.Random(check_seed("seed", seed))

    def attempts() -> Iterator[Prompt]:
        seen = set()
        for _ in range(_ATTEMPTS * n):
            prompt = draw(rng)
            if prompt is not None and prompt.text not in seen:
                seen.add(prompt.text)
                yield prompt

    prompts = list(islice(attempts(), n))
    if len(prompts) < n:
        raise ValueError(
            f"tokenizer: {len(prompts)} of {n} prompts could be made of single tokens with it"
        )
    return prompts


def _next(tokenizer: PreTrainedTokenizerBase, text: str, addition: str) -> list[int]:
    """The tokens that `addition` appends to those of `text`; none if it changes these."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    longer = tokenizer(text + addition, add_special_tokens=False)["input_ids"]
    return longer[len(ids) :] if longer[: len(ids)] == ids else []


def _is_single(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    return len(_next(tokenizer, "with", " " + name)) == 1
