"""The report of a survey: what it writes, and that nothing in it can run or break out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import DOCS
from synthetic_survey import THRESHOLDS, H, L, made_up, write_survey
from typer.testing import CliRunner

import ifr_fast.survey.analyses
from ifr_fast.cli import app
from ifr_fast.survey.analyses import Finding, plots
from ifr_fast.survey.report import Report, report
from ifr_fast.survey.schema import Survey

EVIL = "<script>alert(1)</script> $x_1 & \"'"


def surveyed(path: Path) -> Survey:
    columns = made_up(16, 16)
    rng = np.random.default_rng(1)
    columns["token"] = rng.choice(
        np.array([EVIL, " the", " cat", ".", "\n"], object), len(columns["token"])
    )
    columns["corpus"] = np.where(columns["corpus"] == "odd", EVIL, "even").astype(object)
    columns["label_pos"][columns["label_pos"] == "DET"] = EVIL
    return write_survey(
        path, columns, n_layers=L, n_heads=H, thresholds=THRESHOLDS, labels=["pos"], name=EVIL
    )


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures: drawing them takes longer than all analyses."""

    def save(folder: Path, finding: Finding) -> bytes:
        folder.mkdir(parents=True, exist_ok=True)
        return b"<svg/>"

    monkeypatch.setattr("ifr_fast.survey.report._save", save)
    monkeypatch.setattr("sklearn.manifold.TSNE.fit_transform", lambda _, x: x[:, :2])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return report(surveyed(tmp_path_factory.mktemp("report") / "survey"))


def test_every_finding_has_its_files(written: Report) -> None:
    names = [finding.name for finding in written.findings]
    assert names == ["importance", "frequency", "roles", "bypass", "parts_of_speech",
                     "function_words", "domains"]  # fmt: skip
    assert written.omitted == {}
    folder = written.path.parent
    for finding in written.findings:
        svg = (folder / "figures" / f"{finding.name}.svg").read_text()
        assert svg.startswith("<?xml")
        png = (folder / "figures" / f"{finding.name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        lines = (folder / "tables" / f"{finding.name}.csv").read_text()
        assert lines.startswith(",".join(f'"{name}"' for name in finding.table.column_names))
        assert finding.table.num_rows > 0


def test_the_page_is_standalone_and_nothing_in_it_runs(written: Report) -> None:
    page = written.path.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "default-src 'none'" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(s.startswith(("data:image/svg+xml;base64,", "#")) for s in sources)
    for finding in written.findings:
        assert f'id="{finding.name}"' in page
        assert f'href="#{finding.name}"' in page


def test_whitespace_is_shown_in_tokens_and_not_in_names_of_classes(written: Report) -> None:
    page = written.path.read_text()
    assert "<bdi>class</bdi></td><td><bdi>other tokens</bdi>" in page
    assert "<bdi>token</bdi></td><td><bdi>·" in page


def test_the_same_survey_gives_the_same_report(written: Report, tmp_path: Path) -> None:
    again = report(written.path.parent.parent, tmp_path / "again")
    assert again.path.read_bytes() == written.path.read_bytes()
    for name in ("figures/roles.svg", "figures/parts_of_speech.svg", "tables/domains.csv"):
        ours, theirs = written.path.parent / name, again.path.parent / name
        assert ours.read_bytes() == theirs.read_bytes()


def test_what_cannot_be_computed_is_said(tmp_path: Path, no_pictures: None) -> None:
    columns = made_up(10, 12)
    columns["corpus"][:] = "one"
    del columns["label_pos"]
    survey = write_survey(
        tmp_path / "s", columns, n_layers=L, n_heads=H, thresholds=THRESHOLDS
    )  # fmt: skip
    written = report(survey)
    assert set(written.omitted) == {"Parts of speech", "Domains"}
    assert "no label 'pos'; it has none" in written.path.read_text().replace("&#x27;", "'")


def test_the_command(tmp_path: Path, no_pictures: None) -> None:
    columns = made_up(18, 16)
    columns["corpus"] = np.array(["a", "b", "c"], object)[columns["document"] % 3]
    survey = write_survey(
        tmp_path / "s", columns, n_layers=L, n_heads=H, thresholds=THRESHOLDS, labels=["pos"]
    )

    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, ["report", *map(str, arguments)])

    ran = run(survey.path, "--contrast", "b:c", "--threshold", "0.02", "--out", tmp_path / "out")
    assert ran.exit_code == 0, ran.output
    assert "Contrast of b with c" in ran.output
    assert "Domains: not computed" in ran.output  # but one corpus is left
    assert (tmp_path / "out" / "report.html").is_file()
    for arguments, message in (
        ([survey.path, "--contrast", "b"], "--contrast: expected FIRST:SECOND"),
        ([survey.path, "--contrast", "b:x"], "corpora: the survey has no corpus 'x'"),
        ([survey.path, "--label", "x"], "label: the survey has no label 'x'; it has pos"),
        ([survey.path, "--threshold", "0.5"], "threshold: expected one of 0.02, 0.04, got 0.5"),
        ([tmp_path], "no such file; expected a survey's directory"),
    ):
        failed = run(*arguments)
        assert failed.exit_code != 0
        assert message in str(failed.exception)


def test_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    columns = made_up(16, 16)
    columns["corpus"] = np.where(columns["corpus"] == "odd", "code", "prose").astype(object)
    write_survey(
        tmp_path / "DIR", columns, n_layers=L, n_heads=H, thresholds=THRESHOLDS, labels=["pos"]
    )
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "survey-report.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "survey-report.md", "exec"), {})
    assert (tmp_path / "roles.pdf").is_file()
    assert (tmp_path / "report" / "report.html").is_file()
    exported = set(ifr_fast.survey.analyses.__all__) - {"Finding", "NotApplicableError", "Rule"}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == exported
    help_ = CliRunner().invoke(app, ["report", "--help"], env={"COLUMNS": "200"}).output
    existing = set(re.findall(r"--\w[\w-]*", re.sub(r"\x1b\[[\d;]*m", "", help_)))
    assert set(re.findall(r"`(--\w[\w-]*)", page)) <= existing


def test_axes_of_what_is_counted_have_whole_numbers() -> None:
    with plots.figure(3, 2) as figure:
        left, right = figure.subplots(1, 2)
        plots.heads(left, np.zeros((3, 6)), title="heads", marked=[(2, 5)])
        right.plot([0, 1, 2], [0.1, 0.3, 0.2])
        plots.label(right, "layers", "layer", "share")
    for ticks in (left.get_xticks(), left.get_yticks(), right.get_xticks()):
        assert [float(tick).is_integer() for tick in ticks] == [True] * len(ticks)
    assert not all(float(tick).is_integer() for tick in right.get_yticks())
