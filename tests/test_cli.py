"""The `ifr-fast` command: what it prints and writes, and how it fails."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from tiny import VOCAB, tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertLMHeadModel, PreTrainedTokenizerFast

import ifr_fast.cli
from ifr_fast import RouteGraph, Tracer, __version__

COMMAND = Path(sys.executable).with_name("ifr-fast")
# One token each. Terminals act on some of these, and rich on the brackets.
CHARACTERS = ["<unk>", *"abcdefghijklmnopqrstuvwxyz [/]0123456789:;m", "\x1b", "\n", "\r", "\x07",
              "\x9b", "\u202e"]  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m.role[:1] }}: {{ m.content }}\n{% endfor %}"


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 97 tokens, one a character, with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(path)
    vocabulary = {c: i for i, c in enumerate(CHARACTERS)}
    vocabulary |= {f"<{i}>": i for i in range(len(CHARACTERS), VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny_tracer(tiny_dir: Path) -> Tracer:
    return Tracer.from_pretrained(tiny_dir)


@pytest.fixture
def ifr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in this process."""

    def run(*args: Any, stdin: bytes = b"") -> Ran:
        monkeypatch.setenv("COLUMNS", "80")  # what is printed into a pipe is not to be wrapped
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        monkeypatch.setattr(sys, "argv", ["ifr-fast", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code: Any = 0
        try:
            ifr_fast.cli.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return Ran(code or 0, out, err)

    return run


@pytest.fixture
def trace(ifr: Any, tiny_dir: Path) -> Any:
    """Runs `trace` with the tiny model."""
    return lambda *args, **kwargs: ifr("trace", "--model", tiny_dir, *args, **kwargs)


def assert_one_error(ran: Ran, *words: str) -> None:
    assert ran.code == 2, ran
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in ran.err
    for word in words:
        assert word in lines[0]


def shell(*args: Any, cwd: Path | None = None, stdin: bytes = b"", **variables: str) -> Ran:
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    environment |= variables
    run = subprocess.run(
        [COMMAND, *map(str, args)],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env=environment,
        check=False,
    )
    return Ran(run.returncode, run.stdout.decode(), run.stderr.decode())


# The default model, in a process of its own


@pytest.mark.default_model
@pytest.mark.usefixtures("smol")  # so that the model is in the cache
def test_the_demonstration(tmp_path: Path) -> None:
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
    assert "".join(graph.tokens) == ifr_fast.cli.DEMO_TEXT
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


def test_failing_in_a_process_of_its_own(tmp_path: Path) -> None:
    ran = shell("trace", "--model", tmp_path / "missing", "--save", "out", cwd=tmp_path)
    assert_one_error(ran, "no directory", str(tmp_path / "missing"))
    assert list(tmp_path.iterdir()) == []


def test_version_in_a_process_of_its_own() -> None:
    assert shell("--version") == Ran(0, f"ifr-fast {__version__}\n", "")


def test_a_reader_that_stops_reading(tiny_dir: Path, tmp_path: Path) -> None:
    """`ifr-fast trace ... | head -0`: the files are whole, and nothing is complained about."""
    path = tmp_path / "out.json"
    for args in (["trace", "-m", tiny_dir, "some words", "--json", path], ["--version"]):
        reader, writer = os.pipe()
        os.close(reader)
        process = subprocess.Popen(
            [COMMAND, *map(str, args)], stdout=writer, stderr=subprocess.PIPE, text=True
        )
        os.close(writer)
        _, err = process.communicate()
        assert process.returncode == 1
        assert err == (f"wrote {path}\n" if "--json" in args else "")
    assert json.loads(path.read_text())["tokens"] == list("some words")


def test_a_terminal_that_cannot_show_everything(tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "caf\u00e9.json"
    ran = shell("trace", "-m", tiny_dir, "words", "--json", path, PYTHONIOENCODING="ascii")
    assert ran.code == 0, ran
    assert ran.out.startswith("after ?s?@4 the model predicts ")
    assert ran.err == f"wrote {tmp_path / 'caf?.json'}\n"
    assert json.loads(path.read_text())["tokens"] == list("words")
    ran = shell("trace", "-m", tmp_path / "caf\u00e9", "words", PYTHONIOENCODING="ascii")
    assert_one_error(ran, "caf?")


# In this process


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


def test_doctor(ifr: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = "a" * 90
    monkeypatch.setenv("IFR_FAST_CACHE", str(tmp_path / "models" / long))
    monkeypatch.delenv("IFR_FAST_IMPL", raising=False)
    ran = ifr("doctor")
    assert ran.code == 0
    assert ran.err == ""
    # A row is a line in a pipe, however long, so that it can be searched for.
    lines = [re.split(r"\s{2,}", line.rstrip(), maxsplit=1) for line in ran.out.splitlines()]
    assert [line for line in lines if len(line) != 2 or not line[0]] == []
    rows = dict(lines)
    assert rows["ifr-fast"] == __version__
    assert rows["torch"] == torch.__version__
    assert rows["cache"] == str(tmp_path / "models" / long)
    assert "fetched on first use" in rows["default model"]
    chosen = Tracer(tiny_model("llama")).impl
    assert rows["on cpu"].startswith(f"{chosen}, the fastest that can run here")
    assert "\x1b" not in ran.out
    asked = ifr("doctor", "--impl", "reference").out
    assert re.search(r"on cpu\s+reference, asked for", asked)
    assert not (tmp_path / "models").exists()
    assert_one_error(ifr("doctor", "--impl", "nonsense"), "--impl: expected one of auto")


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


def test_formats_are_written(
    trace: Any, tiny_tracer: Tracer, tiny_dir: Path, tmp_path: Path
) -> None:
    files = {kind: tmp_path / kind for kind in ("graphml", "dot", "parquet", "neuronpedia")}
    options = [x for kind, path in files.items() for x in (f"--{kind}", path)]
    ran = trace("some words", *options)
    assert ran.code == 0, ran
    assert sorted(tmp_path.iterdir()) == sorted(files.values())
    graph = tiny_tracer.trace("some words")
    assert files["graphml"].read_text() == graph.to_graphml()
    assert files["dot"].read_text() == graph.to_dot()
    assert files["neuronpedia"].read_text() == graph.to_neuronpedia(scan=tiny_dir.name.lower())
    assert pq.read_table(files["parquet"]).equals(graph.to_arrow("parts"))


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
    monkeypatch.setattr(ifr_fast.cli, "_open", lambda *_: tiny_tracer)
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


@pytest.mark.parametrize("name", ["x[bold]y.json", "a[/b].json", "a\x1b[31mb\nc.json"])
def test_paths_are_printed_as_they_are(trace: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    ran = trace("some words", "--json", path)
    assert ran.code == 0, ran
    assert json.loads(path.read_text())["tokens"] == list("some words")
    assert "\x1b" not in ran.err
    assert ran.err.splitlines() == [f"wrote {ifr_fast.cli.printable(str(path))}"]


def test_outputs_replace_what_was_there(trace: Any, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("before")
    assert trace("some words", "--json", path).code == 0
    assert json.loads(path.read_text())["tokens"] == list("some words")
    assert list(tmp_path.iterdir()) == [path]


def test_a_fifo_is_written_to(trace: Any, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    for option in ("--json", "--png", "--save"):
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 1 << 20)  # holds all that is written
        ran = trace("some words", option, path)
        assert stat.S_ISFIFO(path.stat().st_mode)
        assert ran.code == 0, ran
        content = os.read(reader, 1 << 20)
        os.close(reader)
        assert len(content) > 500
        if option == "--json":
            assert json.loads(content)["tokens"] == list("some words")
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_may_take_several_outputs() -> None:
    """Nothing is written here: code that replaced the device would harm the machine."""
    null = Path(os.devnull)
    chosen = ifr_fast.cli._check_outputs({"--json": null, "--html": null, "--png": None})
    assert chosen == [null, null]


def test_links_stay_and_lead_to_what_is_written(trace: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    real, link, dangling = folder / "real", tmp_path / "link", tmp_path / "dangling"
    real.write_text("before")
    link.symlink_to("folder/real")
    dangling.symlink_to(folder / "new")
    for path in (link, dangling):
        ran = trace("some words", "--json", path)
        assert ran.code == 0, ran
        assert path.is_symlink()
        assert json.loads(path.read_text())["tokens"] == list("some words")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "dangling", "folder", "link", "new", "real",
    ]  # fmt: skip
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    ran = trace("some words", "--json", loop)
    assert ran.code == 2
    assert "loop: cannot be written" in ran.err


@pytest.mark.parametrize("option", ["--json", "--save"])
def test_files_have_the_mode_that_others_get(
    trace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def toggled(mask: int) -> int:
        raise AssertionError("other threads would create files with this mask")

    path = tmp_path / "out"
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", toggled)
            assert trace("some words", option, path).code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    assert trace("some words", option, path).code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_one_path_for_two_outputs(trace: Any, tmp_path: Path) -> None:
    same, link = tmp_path / "same", tmp_path / "link"
    link.symlink_to(same)
    (tmp_path / "folder").mkdir()
    for other in (same, link, tmp_path / "folder" / ".." / "same"):
        ran = trace("some words", "--json", same, "--html", other)
        assert_one_error(ran, "--html", "--json", str(other))
    assert not same.exists()


def test_a_dash_writes_to_standard_output(ifr: Any, tiny_dir: Path, tiny_tracer: Tracer) -> None:
    """What is written there stands alone: nothing else is printed, no file is called '-'."""
    graph = tiny_tracer.trace("some words")
    for option, expected in (
        ("--json", graph.to_json()),
        ("--dot", graph.to_dot()),
        ("--graphml", graph.to_graphml()),
        ("--html", graph.to_html()),
    ):
        ran = ifr("trace", "-m", tiny_dir, "some words", option, "-")
        assert ran == Ran(0, expected, "")
    ran = shell("trace", "-m", tiny_dir, "some words", "--json", "-")
    assert ran == Ran(0, graph.to_json(), "")
    ran = ifr("generate", "-m", tiny_dir, "some words", "-n", 3, "--json", "-")
    assert (ran.code, ran.err) == (0, "")
    steps = list(tiny_tracer.generate("some words", max_new_tokens=3))
    written = [json.loads(line) for line in ran.out.splitlines()]
    assert [step["token_id"] for step in written] == [step.token_id for step in steps]
    ran = ifr("bench", "-m", tiny_dir, "-n", 8, "--repeat", 1, "--json", "-")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["subject"]["model"] == str(tiny_dir.name)
    assert not Path("-").exists()


def test_a_dash_beside_a_file(trace: Any, tiny_tracer: Tracer, tmp_path: Path) -> None:
    path = tmp_path / "graph"
    ran = trace("some words", "--json", "-", "--save", path)
    assert ran == Ran(0, tiny_tracer.trace("some words").to_json(), f"wrote {path}\n")
    assert RouteGraph.load(path).tokens == list("some words")
    assert_one_error(trace("abc", "--json", "-", "--dot", "-"), "--dot", "--json")


def test_a_full_standard_output(tiny_dir: Path) -> None:
    for more in ([], ["--json", "-"]):
        with open("/dev/full", "wb") as full:
            ran = subprocess.run(
                [COMMAND, "trace", "-m", tiny_dir, "some words", *more],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert ran.returncode == 2
        assert ran.stderr == "error: [Errno 28] No space left on device\n"


# Bad input


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([""], ["text: is empty"]),
        (["abc", "--position", "3"], ["position: expected -3 to 2, got 3"]),
        (["abc", "--position", "-4"], ["position: expected -3 to 2, got -4"]),
        (["abc", "--threshold", "-0.1"], ["threshold", "0 to 1", "-0.1"]),
        (["abc", "--threshold", "1.5"], ["threshold", "0 to 1", "1.5"]),
        (["abc", "--threshold", "nan"], ["threshold", "0 to 1", "nan"]),
        (["a" * 97], ["97 tokens", "96"]),
        (["abc", "--impl", "nonsense"], ["impl", "eager", "'nonsense'"]),
        (["abc", "--top-paths", "0"], ["--top-paths: expected at least 1, got 0"]),
        (["abc", "--file", "x"], ["text: give one of"]),
        (["abc", "--chat", "x"], ["text: give one of"]),
        (["-", "--file", "x"], ["text: give one of"]),
        (["--file", "missing.txt"], ["--file: missing.txt", "No such file"]),
        (["--file", "."], ["--file: . cannot be read", "directory"]),
        (["--file", "/dev/zero"], ["--file: /dev/zero has more than 64 MiB"]),
        (["--chat", "missing.json"], ["--chat: missing.json", "No such file"]),
        (["abc", "--recording", "."], ["--recording: .", "no file"]),
        (["abc", "--recording", "/dev/null"], ["--recording: /dev/null", "no file"]),
        (["abc", "--recording", "no/such"], ["--recording: no/such", "no directory"]),
        (["abc", "--recording", "o"], ["--recording: o", "another file"]),
        (["abc", "--max-memory", "9" * 400], ["--max-memory: expected a size"]),
        (["abc", "--model", ""], ["model: is empty"]),
    ],
    ids=lambda x: " ".join(x)[:40],
)
def test_bad_input(
    trace: Any, args: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = ["--json", "o.json", "--html", "o.html", "--png", "o.png", "--save", "o"]
    assert_one_error(trace(*outputs, *args), *words)
    assert list(tmp_path.iterdir()) == []


def test_standard_input_that_is_empty_or_broken(trace: Any, tmp_path: Path) -> None:
    assert_one_error(trace("-"), "text: is empty")
    assert_one_error(trace("-", stdin=b"caf\xe9"), "text: standard input is not UTF-8")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    assert_one_error(trace("--file", latin), "latin.txt is not UTF-8")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not JSON"),
        (b"{nope", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'"text"', "list of {role, content}"),
        (b'{"role": "user", "content": "a"}', "list of {role, content}"),
        (b'["a"]', "list of {role, content}"),
        (b"[]", "empty"),
        (b'[{"role": "user"}]', "role and content"),
        (b'[{"role": "user", "content": 3}]', "role and content"),
        (b'[{"role": "user", "content": "a"}, {}]', "role and content"),
        (b"[" * 100_000, "not JSON"),
    ],
    ids=lambda x: repr(x)[:30],
)
def test_bad_chat_files(trace: Any, tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    assert_one_error(trace("--chat", path), word)
    assert_one_error(trace("--chat", "-", stdin=content), word)


@pytest.mark.parametrize("option", ["--json", "--html", "--png", "--save", "--parquet", "--dot"])
def test_outputs_that_cannot_be_written(trace: Any, tmp_path: Path, option: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    good = ["--json", tmp_path / "good.json"] if option != "--json" else []
    for path in ("folder", "missing/out", "file/out"):
        ran = trace("abc", *good, option, tmp_path / path)
        assert_one_error(ran, option, str(tmp_path / path))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "module", "extra"),
    [("--parquet", "pyarrow.parquet", "tables"), ("--png", "matplotlib.figure", "plot")],
)
def test_a_missing_package_is_told_before_the_work(
    trace: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    module: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(ifr_fast.cli, "_open", lambda *_: pytest.fail("the model was opened"))
    ran = trace("abc", option, tmp_path / "out", "--json", tmp_path / "good")
    assert_one_error(ran, module.partition(".")[0], f"pip install 'ifr-fast[{extra}]'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="expected: root may write anywhere")
def test_a_folder_without_permission(trace: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    assert_one_error(trace("abc", "--json", folder / "out"), str(folder))


def test_a_full_disk(trace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    ran = trace("abc", "--json", tmp_path / "out.json")
    assert ran.code == 2
    assert ran.err.splitlines() == [
        f"error: {tmp_path / 'out.json'}: cannot be written (No space left on device)"
    ]
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_opened(ifr: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("x")
    encoder = tmp_path / "encoder"
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2,
                        num_attention_heads=4, intermediate_size=40)  # fmt: skip
    BertLMHeadModel(config).save_pretrained(encoder)
    poisoned = tmp_path / "poisoned"
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(poisoned)
    broken = tmp_path / "broken"
    tiny_model("llama").save_pretrained(broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    unconfigured = tmp_path / "unconfigured"
    unconfigured.mkdir()
    (unconfigured / "config.json").write_text("{broken")
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "nonsense"}')
    for path, words in {
        tmp_path / "missing": ["no directory"],
        empty: ["no config.json"],
        file: ["no directory"],
        encoder: ["later positions"],
        poisoned: ["model.layers.1.mlp.up_proj.weight", "NaN"],
        broken: ["cannot be loaded"],
        unconfigured: ["cannot be loaded"],
        unknown: ["cannot be loaded"],
    }.items():
        ran = ifr("trace", "--model", path, "abc", "--json", tmp_path / "out.json")
        assert_one_error(ran, "model: ", *words)
        assert not (tmp_path / "out.json").exists()


def test_an_encoder_without_a_language_model_head(ifr: Any, tmp_path: Path) -> None:
    """A directory that says of itself that it is no causal language model."""
    config = {"model_type": "vit", "architectures": ["ViTModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_one_error(ifr("trace", "--model", tmp_path, "abc"), "not a causal language model")


def test_text_for_a_model_without_a_tokenizer(ifr: Any, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert_one_error(ifr("trace", "--model", tmp_path, "abc"), "tokenizer")


def test_options_that_are_no_numbers(trace: Any) -> None:
    for option in ("--position", "--threshold", "--top-paths"):
        ran = trace("abc", option, "x")
        assert ran.code == 2
        assert ran.out == ""
        assert option in ran.err
        assert "Traceback" not in ran.err


# generate, and several positions


def test_generate_prints_and_writes_each_token(
    ifr: Any, tiny_dir: Path, tiny_tracer: Tracer, tmp_path: Path
) -> None:
    out = tmp_path / "steps.jsonl"
    options = ("-m", tiny_dir, "-n", 4, "-t", 0.05, "--json", out)
    ran = ifr("generate", "some words here", *options)
    assert ran.code == 0, ran.err
    steps = list(tiny_tracer.generate("some words here", max_new_tokens=4, threshold=0.05))
    printed = ran.out.splitlines()
    documents = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(printed) == len(documents) == len(steps)
    for line, document, step in zip(printed, documents, steps, strict=True):
        assert line.startswith(
            f"“{ifr_fast.cli.printable(step.token)}” ({step.probability:.2f})  from “"
        )
        best = int(step.graph.token_importance().argmax())
        assert f"@{best} {float(step.graph.token_importance()[best]):.2f}" in line
        assert document["token_id"] == step.token_id
        assert document["graph"] == json.loads(step.graph.to_json())


def test_generate_draws_by_seed(ifr: Any, tiny_dir: Path) -> None:
    def drawn(seed: int) -> str:
        ran = ifr("generate", "words", "-m", tiny_dir, "--temperature", 2, "--seed", seed, "-n", 6)
        assert ran.code == 0, ran.err
        return ran.out

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("-n", 0), "max_new_tokens"),
        (("--temperature", -1), "--temperature"),
        (("-k", 0), "--sources"),
        (("-t", 2), "threshold"),
        (("--temperature", "nan"), "--temperature"),
        (("--temperature", "inf"), "--temperature"),
        (("--seed", -1), "--seed"),
        (("--seed", 1 << 64), "--seed"),
    ],
)
def test_generate_refuses_bad_options(ifr: Any, tiny_dir: Path, options: Any, word: str) -> None:
    assert_one_error(ifr("generate", "words", "-m", tiny_dir, *options), word)


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


# Long texts


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

    monkeypatch.setattr("ifr_fast.prefill.prefill", recorded)
    monkeypatch.setattr("ifr_fast.tracer.record", recorded)
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
        patched.setattr("ifr_fast.prefill.prefill", interrupted)
        stopped = ifr(*command)
    assert stopped.code != 0
    assert "is gone on with by the same command" in stopped.err.replace("\n", " ")
    assert ifr(*command).code == 0


def test_budgets_are_kept_or_refused(ifr: Any, tiny_dir: Path) -> None:
    refused = ifr("trace", "abc", "--model", tiny_dir, "--max-memory", "1MB")
    assert refused.code == 2
    assert "recording 3 tokens takes" in refused.err
    wrong = ifr("trace", "abc", "--model", tiny_dir, "--max-memory", "much")
    assert wrong.code == 2
    assert "--max-memory: expected a size such as 8GB" in wrong.err
    assert ifr("trace", "abc", "--model", tiny_dir, "--max-memory", "1GB").code == 0


def test_plans_are_printed(ifr: Any, tiny_dir: Path) -> None:
    here = ifr("plan", 96, "--model", tiny_dir)
    assert here.code == 0, here.err
    assert "96 tokens, in one pass" in here.out
    assert "recording takes about" in here.out
    assert ifr("plan", 96, "--model", tiny_dir, "--max-memory", "1MB").code == 2
    on_paper = ifr("plan", 4096, "--config", tiny_dir, "--device-memory", "4GB")
    assert on_paper.code == 0, on_paper.err
    assert "fits into 4 GB" in on_paper.out
    refused = ifr("plan", 4096, "--config", tiny_dir, "--device-memory", "10MB")
    assert refused.code == 2
    for options in (
        ("--device-memory", "1GB"),
        ("--config", tiny_dir, "--max-memory", "1GB"),
        ("--config", tiny_dir / "none"),
        ("--config", tiny_dir, "--dtype", "int8"),
    ):
        assert ifr("plan", 96, *options).code == 2
    assert_one_error(ifr("plan", 97, "--model", tiny_dir), "tokens: 97", "context of 96")


def test_plans_on_paper_say_what_they_cannot_read(ifr: Any, tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{broken")
    for path in (tmp_path, tmp_path / "config.json"):
        assert_one_error(ifr("plan", 96, "--config", path), f"--config: {path}")
    for dtype in ("tensor", "float8_e5m2", "int8"):
        assert_one_error(ifr("plan", 96, "--config", tiny_dir, "--dtype", dtype), "--dtype")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--out", "file"), ("--out: file", "expected a folder")),
        (("--out", "new", "--threshold", "nan"), ("threshold", "nan")),
        (("--out", "new", "--model", "./missing"), ("no directory",)),
    ],
)
def test_circuits_refuses_bad_options_and_makes_no_folder(
    ifr: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: Any,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert_one_error(ifr("circuits", *options), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
