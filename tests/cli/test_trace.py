"""`ifr-fast trace`: what it reads and prints."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Ran, assert_one_error, shell

from ifr_fast import RouteGraph, Tracer, __version__
from ifr_fast.cli import options
from ifr_fast.cli.options import DEMO_TEXT
from ifr_fast.model.pretrained import default_model


@pytest.mark.default_model
def test_the_demonstration(tmp_path: Path) -> None:
    """The default model, in a process of its own."""
    default_model()  # fetches it, with a bar of its progress
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "html", "png", "save")}
    ran = shell("trace", *(x for kind, path in files.items() for x in (f"--{kind}", path)))
    assert ran.code == 0, ran.err
    first, *_ = ran.out.splitlines()
    assert first == "after “ to”@13 the model predicts “ Mary” (0.92)"
    assert "\x1b" not in ran.out + ran.err
    assert "\r" not in ran.out + ran.err
    assert ran.err.splitlines() == [f"wrote {path}" for path in files.values()]
    graph = RouteGraph.load(files["save"])
    assert graph.predictions[0].token == " Mary"
    assert "".join(graph.tokens) == DEMO_TEXT
    assert graph.threshold == 0.04
    document = json.loads(files["json"].read_text())
    assert document["tokens"] == graph.tokens
    assert document["edges"]["weight"] == graph.edges.weight.tolist()
    assert files["html"].read_text().lower().startswith("<!doctype html>")
    assert files["png"].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in files.values()}
    # The strongest routes, with the weights of the graph.
    routes = re.findall(r"^  ( *\d\.\d{3})  (.*@\d+)$", ran.out, re.MULTILINE)
    expected = graph.top_routes(5)
    assert [float(weight) for weight, words in routes if "layer" in words] == pytest.approx(
        [route.weight for route in expected], abs=5e-4
    )
    assert "“ Mary”@1 → layer 23 head" in ran.out
    tokens = [(words, float(weight)) for weight, words in routes if "layer" not in words]
    importance = graph.token_importance()
    for words, weight in tokens:
        position = int(words.rpartition("@")[2])
        assert words == f"“{graph.tokens[position]}”@{position}"
        assert weight == pytest.approx(float(importance[position]), abs=5e-4)
    assert len(tokens) == 6


def test_help(ifr: Any) -> None:
    for args, words in (
        ((), ["trace", "doctor", "--version"]),
        (("--help",), ["trace", "doctor", "--version"]),
        (("trace", "--help"), ["--threshold", "--position", "--top-paths", "--html", "--chat"]),
        (("doctor", "--help"), ["--impl"]),
    ):
        ran = ifr(*args)
        assert ran.code == (0 if args else 2)
        text = ran.out + ran.err
        for word in words:
            assert word in text
        assert "Traceback" not in text
    assert ifr("--version") == Ran(0, f"ifr-fast {__version__}\n", "")


def test_text_from_an_argument_a_file_and_stdin(trace: Any, tmp_path: Path) -> None:
    text = "the store gave\na drink\n"
    file = tmp_path / "text.txt"
    file.write_text(text)
    given = trace("--save", tmp_path / "a", "--", text)
    assert given.code == 0, given
    assert RouteGraph.load(tmp_path / "a").tokens == list(text)
    assert trace("--file", file).out == given.out
    assert trace("-", stdin=text.encode()).out == given.out
    assert given.out.startswith("after “\\n”@22 the model predicts ")


def test_chat_messages_from_a_file_and_stdin(trace: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a drink"}, {"role": "assistant", "content": "no"}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(messages))
    given = trace("--chat", file, "--save", tmp_path / "graph")
    assert given.code == 0, given
    assert "".join(RouteGraph.load(tmp_path / "graph").tokens) == "u: a drink\na: no\n"
    assert trace("--chat", "-", stdin=file.read_bytes()).out == given.out


def test_options_reach_the_graph(trace: Any, tiny_tracer: Tracer, tmp_path: Path) -> None:
    path = tmp_path / "graph"
    for impl, granularity in (("eager", "head"), ("reference", "token")):
        ran = trace("some words here", "--position", "-3", "--threshold", "0.1", "--save", path,
                    "--granularity", granularity, "--impl", impl)  # fmt: skip
        assert ran.code == 0, ran
        graph = RouteGraph.load(path)
        expected = tiny_tracer.trace(
            "some words here", position=12, threshold=0.1, granularity=granularity
        )
        assert (graph.position, graph.threshold, graph.granularity) == (12, 0.1, granularity)
        assert torch.equal(graph.edges.source, expected.edges.source)
        assert torch.equal(graph.head_edges.head, expected.head_edges.head)
        torch.testing.assert_close(graph.edges.weight, expected.edges.weight, atol=1e-5, rtol=0)
        assert f"{len(graph.edges.layer)} edges above 0.1 among 15 tokens and 3 layers" in ran.out
        assert ran.out.startswith("after “e”@12 the model predicts ")


@pytest.mark.parametrize("k", [1, 3])
def test_as_many_routes_as_asked_for(trace: Any, tiny_tracer: Tracer, k: int) -> None:
    ran = trace("some words", "--top-paths", k, "--threshold", "0.02")
    block = ran.out.split("strongest routes")[1].split("most important tokens")[0]
    printed = [float(line.split()[0]) for line in block.splitlines()[1:] if line.strip()]
    expected = tiny_tracer.trace("some words", threshold=0.02).top_routes(k)
    assert printed == pytest.approx([route.weight for route in expected], abs=5e-4)
    assert len(printed) == k


def test_heads_and_ffn_blocks_are_ranked_by_their_importance(
    trace: Any, tiny_tracer: Tracer
) -> None:
    ran = trace("some words", "--threshold", "0.02")
    block = ran.out.split("most important heads and FFN blocks")[1]
    found = re.findall(r"(\d\.\d{3})  layer (\d+) (?:head (\d+)|FFN)$", block, re.MULTILINE)
    graph = tiny_tracer.trace("some words", threshold=0.02)
    heads, ffn = graph.head_importance(), graph.ffn_importance()
    assert len(found) == 8
    for weight, layer, head in found:
        expected = heads[int(layer), int(head)] if head else ffn[int(layer)]
        assert float(weight) == pytest.approx(float(expected), abs=5e-4)
    best = torch.cat([heads.flatten(), ffn]).sort(descending=True).values[:8]
    assert [float(w) for w, _, _ in found] == pytest.approx(best.tolist(), abs=5e-4)


def test_one_token_is_enough(trace: Any) -> None:
    ran = trace("a")
    assert ran.code == 0, ran
    assert "“a”@0 stays at its position" in ran.out


def test_nothing_above_the_threshold(trace: Any) -> None:
    ran = trace("some words", "--threshold", "1")
    assert ran.code == 0, ran
    assert "0 edges above 1 " in ran.out
    assert len(ran.out.splitlines()) == 3  # no headings over nothing


@pytest.mark.parametrize(
    ("given", "position"), [("1,3", [1, 3]), ("-3:", slice(-3, None)), ("0:9:4", slice(0, 9, 4))]
)
def test_several_positions(
    trace: Any, tiny_tracer: Tracer, tmp_path: Path, given: str, position: Any
) -> None:
    out = tmp_path / "span.json"
    ran = trace("some words here", "--position", given, "--json", out, "--html", tmp_path / "h")
    assert ran.code == 0, ran.err
    expected = tiny_tracer.trace("some words here", position=position)
    assert json.loads(out.read_text()) == json.loads(expected.to_json())
    assert expected.span is not None
    assert f"{len(expected.span.positions)} predictions" in ran.out
    for i in expected.span.positions:
        assert f"@{i} " in ran.out


@pytest.mark.parametrize("given", ["", "x", "1,", ":::", "1:2:0", "1.5", "99,1", "50:60"])
def test_positions_that_are_none(trace: Any, given: str) -> None:
    assert_one_error(trace("some words", "--position", given), "position")


def test_control_characters_do_not_reach_the_terminal(trace: Any, tmp_path: Path) -> None:
    text = "a\x1b[31m\x9b1m\r\n\x07\u202eb[/]["
    ran = trace("-", "--threshold", "0", "--save", tmp_path / "graph", stdin=text.encode())
    assert ran.code == 0, ran
    assert RouteGraph.load(tmp_path / "graph").tokens == list(text)
    for character in "\x1b\x9b\r\x07\u202e":
        assert character not in ran.out
    assert "“\\x1b”@1" in ran.out
    assert "“[”@" in ran.out
    for line in ran.out.splitlines():
        assert line.isprintable()


def test_predictions_are_as_harmless(
    ifr: Any, tiny_tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tiny_tracer.trace("some words")
    hostile = [p._replace(token="\x1b]0;x\x07\n[bold]") for p in graph.predictions]
    monkeypatch.setattr(options, "open_tracer", lambda *_: tiny_tracer)
    monkeypatch.setattr(
        type(tiny_tracer), "trace",
        lambda *_, **__: dataclasses.replace(graph, predictions=hostile),
    )  # fmt: skip
    ran = ifr("trace")
    assert ran.code == 0, ran
    assert "\x1b" not in ran.out
    assert "predicts “\\x1b]0;x\\x07\\n[bold]” (" in ran.out


def test_errors_quote_what_they_are_given_as_harmlessly(ifr: Any, tmp_path: Path) -> None:
    name = tmp_path / "no\x1b[31m[red][/b] \nmodel"
    ran = ifr("trace", "--model", name)
    assert_one_error(ran, "no\\x1b[31m[red][/b] \\nmodel")
    assert "\x1b" not in ran.err


def test_a_recording_is_kept_and_read(
    ifr: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.safetensors"
    options = ("--model", tiny_dir, "--recording", path)
    first = ifr("trace", "abc abc abd", *options)
    assert first.code == 0, first.err
    assert path.is_file()

    def recorded(*_: Any, **__: Any) -> None:
        raise AssertionError("recorded again")

    monkeypatch.setattr("ifr_fast.recording.prefill.prefill", recorded)
    monkeypatch.setattr("ifr_fast.recording.recorder.record", recorded)
    again = ifr("trace", *options)
    assert (again.code, again.out) == (0, first.out)
    other = ifr("trace", *options, "--position", 3)
    assert other.code == 0
    assert other.out != first.out
    wrong = ifr("trace", "another text", *options)
    assert wrong.code == 2
    assert "another text" in wrong.err


def test_an_interrupted_recording_says_how_to_go_on(
    ifr: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.safetensors"
    command = ("trace", "abc abc abd", "--model", tiny_dir, "--recording", path)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ifr_fast.recording.prefill.prefill", interrupted)
        stopped = ifr(*command)
    assert stopped.code != 0
    assert "run the same command again to resume" in stopped.err.replace("\n", " ")
    assert ifr(*command).code == 0


def test_budgets_are_kept_or_refused(ifr: Any, tiny_dir: Path) -> None:
    refused = ifr("trace", "abc", "--model", tiny_dir, "--max-memory", "1MB")
    assert refused.code == 2
    assert "recording 3 tokens takes" in refused.err
    wrong = ifr("trace", "abc", "--model", tiny_dir, "--max-memory", "much")
    assert wrong.code == 2
    assert "--max-memory: expected a size such as 8GB" in wrong.err
    assert ifr("trace", "abc", "--model", tiny_dir, "--max-memory", "1GB").code == 0
