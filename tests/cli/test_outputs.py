"""The files that `ifr-fast trace` writes."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from command import Ran, assert_one_error

from ifr_fast import RouteGraph, Tracer
from ifr_fast.cli import options
from ifr_fast.cli.files import check_outputs
from ifr_fast.progress import printable


def test_formats_are_written(
    trace: Any, tiny_tracer: Tracer, tiny_dir: Path, tmp_path: Path
) -> None:
    files = {kind: tmp_path / kind for kind in ("graphml", "dot", "parquet", "neuronpedia")}
    written = [x for kind, path in files.items() for x in (f"--{kind}", path)]
    ran = trace("some words", *written)
    assert ran.code == 0, ran
    assert sorted(tmp_path.iterdir()) == sorted(files.values())
    graph = tiny_tracer.trace("some words")
    assert files["graphml"].read_text() == graph.to_graphml()
    assert files["dot"].read_text() == graph.to_dot()
    assert files["neuronpedia"].read_text() == graph.to_neuronpedia(scan=tiny_dir.name.lower())
    assert pq.read_table(files["parquet"]).equals(graph.to_arrow("parts"))


def test_a_folder_of_attribution_graphs(
    trace: Any, tiny_tracer: Tracer, tiny_dir: Path, tmp_path: Path
) -> None:
    folder, scan = tmp_path / "graphs", tiny_dir.name.lower()
    for text in ("some words", "other words", "some words"):
        ran = trace(text, "--neuronpedia-folder", folder)
        assert (ran.code, ran.err) == (0, f"wrote {folder}\n")
    assert {x.name for x in folder.iterdir()} == {
        *("some-words.json", "other-words.json", "graph-metadata.json")
    }
    expected = tiny_tracer.trace("some words").to_neuronpedia(scan=scan)
    assert (folder / "some-words.json").read_text() == expected
    listed = json.loads((folder / "graph-metadata.json").read_text())["graphs"]
    assert [graph["slug"] for graph in listed] == ["other-words", "some-words"]

    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, tmp_path / "none" / "graphs", "-"):
        assert_one_error(trace("some words", "--neuronpedia-folder", path), "--neuronpedia-folder")
    both = ("--json", tmp_path / "x", "--neuronpedia-folder", tmp_path / "x")
    assert_one_error(trace("some words", *both), "--json already writes")
    assert not (tmp_path / "x").exists()
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["x[bold]y.json", "a[/b].json", "a\x1b[31mb\nc.json"])
def test_paths_are_printed_as_they_are(trace: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    ran = trace("some words", "--json", path)
    assert ran.code == 0, ran
    assert json.loads(path.read_text())["tokens"] == list("some words")
    assert "\x1b" not in ran.err
    assert ran.err.splitlines() == [f"wrote {printable(str(path))}"]


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
    chosen = check_outputs({"--json": null, "--html": null, "--png": None})
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
    """Nothing else is printed, and no file is called '-'."""
    graph = tiny_tracer.trace("some words")
    for option, expected in (
        ("--json", graph.to_json()),
        ("--dot", graph.to_dot()),
        ("--graphml", graph.to_graphml()),
        ("--html", graph.to_html()),
    ):
        ran = ifr("trace", "-m", tiny_dir, "some words", option, "-")
        assert ran == Ran(0, expected, "")
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
    monkeypatch.setattr(options, "open_tracer", lambda *_: pytest.fail("the model was opened"))
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
