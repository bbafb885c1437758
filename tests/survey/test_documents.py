"""Documents: labels, pieces that the model can read, and words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from survey_inputs import SMALL, save_tiny, sentence

from ifr_fast import Tracer
from ifr_fast.survey import Source, survey
from ifr_fast.survey.documents import Cutter, Document, Vocabulary
from ifr_fast.survey.inputs import Item, Reading


def test_labels_of_words_reach_their_tokens(tracer: Tracer, tmp_path: Path) -> None:
    words = ["the", "unbelievable", "cat", ".", "sat"]
    record = {"words": words, "pos": ["DT", "JJ", "NN", ".", None], "id": 7}
    spaced = {**record, "text": "the unbelievable cat. sat"}
    found = survey(
        [Source([record, spaced], "w")], tmp_path, model=tracer, label_by=["pos", "who=id"], **SMALL
    )
    rows = found.predictions.read("document", "token", "label_pos", "label_who")
    assert set(rows["label_who"]) == {"7"}
    for i, text in enumerate([" ".join(words), spaced["text"]]):
        mine = rows["document"] == i
        at = 0
        for token, label in zip(rows["token"][mine], rows["label_pos"][mine], strict=True):
            assert text[at : at + len(token)] == token
            at += len(token)
            last = text[at - 1]
            if last == " ":  # a space by itself is of no word
                assert label is None
                continue
            begun = [j for j in range(5) if sum(map(len, words[:j])) < len(
                text[:at].replace(" ", ""))]  # fmt: skip
            assert label == record["pos"][begun[-1]]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 300), st.integers(2, 40), st.integers(0, 2), st.booleans())
def test_each_token_is_predicted_once_however_it_is_cut(
    n: int, max_tokens: int, first: int, by_ids: bool
) -> None:
    ids = list(range(n))
    cutter = Cutter(Vocabulary(None, 1000), Reading(), max_tokens)
    if not by_ids and first:

        class Tokenizer:
            is_fast = False

            def __call__(self, text: str, **_: Any) -> dict[str, Any]:
                mask = [1] * first + [0] * n
                return {"input_ids": [900 + i for i in range(first)] + ids,
                        "special_tokens_mask": mask}  # fmt: skip

            def decode(self, ids: list[int], **_: Any) -> str:
                return str(ids[0])

            def convert_ids_to_tokens(self, i: int) -> str:
                return str(i)

        if max_tokens < first:
            return
        cutter = Cutter(Vocabulary(Tokenizer(), 1000), Reading(), max_tokens)
        pieces = list(cutter.documents(Item("x", "x", text="x")))
    else:
        pieces = list(cutter.documents(Item("x", "x", token_ids=ids)))
    predicted = []
    for piece in pieces:
        assert isinstance(piece, Document)
        assert len(piece.tokens.ids) - 1 <= max_tokens
        if not by_ids and first:
            assert piece.tokens.ids[:first].tolist() == [900 + i for i in range(first)]
        predicted += [i for i in piece.tokens.ids[1:].tolist() if i < 900]
    assert predicted == (ids if first and not by_ids else ids[1:])


def test_special_tokens_begin_every_piece(tmp_path: Path) -> None:
    tracer = Tracer.from_pretrained(save_tiny(tmp_path / "m", first=True))
    found = survey(
        Source([sentence(1, 60)], "c"), tmp_path / "out", model=tracer, max_tokens=30, **SMALL
    )
    rows = found.predictions.read("position", "token_id", "context")
    assert len(set(rows["context"])) > 3
    assert (rows["token_id"][rows["position"] == 0] == 0).all()
    assert rows["position"].max() == 29


def test_later_pieces_of_words(tracer: Tracer) -> None:
    vocabulary = Vocabulary(tracer.tokenizer, tracer.decoder.vocab_size)
    text = "the cat, isn't 北京 naïve 12"
    ids = np.array(tracer.tokenizer(text)["input_ids"])
    strings = vocabulary.strings(ids)
    tokens = vocabulary.tokens(np.append(ids, ids[-1:]))
    at = {i for i, later in enumerate(tokens.later_piece) if later}
    joined = [i for i in range(1, len(ids)) if strings[i - 1][-1:].isalpha()
              and strings[i][:1].isalpha()]  # fmt: skip
    assert set(joined) <= at
    assert "".join(s for s in strings if s != "\ufffd").startswith("the cat, isn't ")
    for i in at:  # no word goes on behind a space or a mark
        assert strings[i][0] == "\ufffd" or strings[i][0].isalpha()
        assert tokens.word[i] == tokens.word[i - 1]
    comma = strings.index(",")
    assert tokens.punctuation[comma]
    assert not tokens.later_piece[comma + 1]
    assert {s for s, p in zip(strings, tokens.punctuation, strict=True) if p} == {",", "'"}
