"""A text whose characters are split, in every picture, page and table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from survey_inputs import save_tiny

from ifr_fast import Tracer
from ifr_fast.characters import next_tokens
from ifr_fast.recording.predictions import likeliest
from ifr_fast.routes.route_graph import RouteGraph
from ifr_fast.survey.documents import Cutter, Document, Vocabulary
from ifr_fast.survey.inputs import Item, Reading

TEXT = "a 猫 até 🎉"
TOKENS = [
    *("a", " ", "猫 1/3", "猫 2/3", "猫 3/3", " ", "at", "é 1/2", "é 2/2", " "),
    *("🎉 1/4", "🎉 2/4", "🎉 3/4", "🎉 4/4"),
]


@pytest.fixture(scope="module")
def byte_tracer(tmp_path_factory: pytest.TempPathFactory) -> Tracer:
    return Tracer.from_pretrained(save_tiny(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def split(byte_tracer: Tracer) -> RouteGraph:
    return byte_tracer.trace(TEXT, threshold=0.0)


def test_the_graph_and_its_formats_name_the_character(split: RouteGraph) -> None:
    assert split.tokens == TOKENS
    assert json.loads(split.to_json())["tokens"] == TOKENS
    assert list(split.to_pandas("tokens")["token"]) == TOKENS
    assert set(split.to_arrow("parts")["source_token"].to_pylist()) == set(TOKENS)
    for text in (split.to_dot(), split.to_graphml()):
        assert all(f">{token}<" in text or f'"{token}"' in text for token in TOKENS[2:5])
        assert "\ufffd" not in text
    drawn = {text.get_text() for text in split.plot().axes[0].texts}
    assert {"é 1/2", "é 2/2"} <= drawn  # é is in every font


def test_the_prompt_of_an_attribution_graph_is_the_text(split: RouteGraph) -> None:
    document = json.loads(split.to_neuronpedia())
    assert document["metadata"]["prompt"] == TEXT
    assert document["metadata"]["prompt_tokens"] == TOKENS
    labels = {node["clerp"] for node in document["nodes"]}
    assert {'Emb: "猫 1/3"', 'Emb: "🎉 4/4"'} <= labels


def test_all_ways_to_record_a_text_agree(byte_tracer: Tracer, tmp_path: Path) -> None:
    ids = byte_tracer.record(TEXT).token_ids
    byte_tracer.record(ids, path=tmp_path / "text.ifr")
    assert byte_tracer.load_recording(tmp_path / "text.ifr").tokens == TOKENS
    assert [x.tokens for x in byte_tracer.record([ids, ids])] == [TOKENS, TOKENS]
    assert byte_tracer.trace_all(ids, threshold=0.1).tokens == TOKENS


def test_predictions_are_read_behind_their_text(byte_tracer: Tracer) -> None:
    """Whatever byte may follow two of 猫, it is named by the character that it would complete."""
    ids = byte_tracer.record(TEXT).token_ids[:4]  # that end with two of the three of 猫
    tokenizer = byte_tracer.tokenizer
    assert tokenizer is not None
    for last in "猫", "é":
        end = tokenizer(last)["input_ids"][-1]
        logits = torch.full((1, 300), -1.0).index_fill(1, torch.tensor([end]), 1.0)
        ((best, *_),) = likeliest(logits, tokenizer, [ids])
        spelled = tokenizer.decode([*ids.tolist()[2:], end])
        assert best == (f"{spelled} 3/3", end, best.probability)
    step = next(iter(byte_tracer.generate(ids, max_new_tokens=1)))
    routes = byte_tracer.trace_all(ids, threshold=0.1)
    expected = [p.token for p in byte_tracer.trace(ids).predictions]
    for found in (step.graph, routes[3]):
        assert [p.token for p in found.predictions] == expected


def test_lenses_read_behind_their_text(byte_tracer: Tracer) -> None:
    recording = byte_tracer.record(TEXT)
    tokenizer, vocabulary = byte_tracer.tokenizer, byte_tracer.decoder.vocab_size
    position = TOKENS.index("猫 2/3")
    expected = next_tokens(torch.arange(vocabulary), recording.token_ids[: position + 1], tokenizer)
    assert "猫 3/3" in expected
    read = byte_tracer.logit_lens(recording, (0, "post", position), k=vocabulary).predictions
    promoted = byte_tracer.promoted_tokens(recording, layer=1, position=position, k=vocabulary)
    for tokens in (read, promoted.promoted):
        assert {t.token_id: t.token for t in tokens} == dict(enumerate(expected))


def test_documents_of_a_survey_carry_the_labels(byte_tracer: Tracer) -> None:
    vocabulary = Vocabulary(byte_tracer.tokenizer, byte_tracer.decoder.vocab_size)
    [document] = Cutter(vocabulary, Reading(), 100).documents(Item("a", "b", text=TEXT))
    assert isinstance(document, Document)
    assert document.strings == TOKENS
