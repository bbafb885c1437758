"""`ifr-fast circuits` and the folder that it writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from circuit_tasks import word_model, word_tokenizer, word_tracer
from typer.testing import CliRunner

from ifr_fast import circuits
from ifr_fast.circuits import Settings, Task, contrastive, patch
from ifr_fast.cli import app


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tokenizer = word_tokenizer()
    folder = tmp_path / "model"
    word_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", ["ioi", "greater-than"])
def test_the_command_writes_its_report(task, saved, tmp_path, monkeypatch):
    drawn = []

    def keep_name(figure, path):
        drawn.append(path.name)

    if task != "ioi":  # figures are made for both tasks; drawing them takes longest
        monkeypatch.setattr("ifr_fast.circuits.report.run.save_figure", keep_name)
    out = tmp_path / "out"
    arguments = ["circuits", "--task", task, "--model", str(saved), "--out", str(out), "-n", "4",
                 "--draws", "2", "--cost-prompts", "1", "--input-prompts", "2",
                 "--patch-prompts", "3", "--keep-threshold", "0.02",
                 "--keep-threshold", "0.04"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = (out / "report.md").read_text()
    for said in ("## Cost", "## Agreement", "## Keep-only", "## Remove-only", "## Input tokens"):
        assert said in report
    for picture in ("roc.png", "heads.png", "keep.png"):
        if task == "ioi":
            assert (out / picture).read_bytes().startswith(b"\x89PNG")
        else:
            assert picture in drawn
    document = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert max(document["exact"].values()) <= 1e-5
    if task == "ioi":  # in the other task, all heads have an effect or none has
        assert "Heads with an effect that they rank lowest" in report
    assert "The model solves" in report
    assert "over thresholds" in report
    cost = {(row["what"], row["prompts"]): row for row in document["cost"]}
    assert cost["routes", 4]["runs"] == 4
    each = cost["patching, heads at each position", 1]
    n_tokens = {len(p["text"].split()) for p in document["prompts"]}
    assert each["runs"] > cost["patching, heads", 1]["runs"] == 6
    assert each["runs"] <= 6 * (max(n_tokens) + 4)
    with (out / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    tracer = word_tracer()
    made = circuits.tasks.TASKS[task](tracer.tokenizer, 4)
    made = Task(made.name, made.seed, made.prompts[:3])
    effects = patch(tracer.decoder, made)
    routes = contrastive(tracer, made, threshold=0.01)
    for row in rows:
        at = int(row["layer"]), int(row["head"])
        expected = float(effects.heads.mean(0)[at]) / effects.gap
        assert float(row["denoise"]) == pytest.approx(expected, abs=1e-3, rel=1e-3)
        expected = float(routes.heads.mean(0)[at])
        assert float(row["contrastive routes"]) == pytest.approx(expected, abs=1e-5)
    # Saved stages are not computed again, so seconds are the same.
    monkeypatch.setattr("ifr_fast.circuits.report.run.save_figure", keep_name)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "results.json").read_text())["cost"] == document["cost"]


def test_the_command_refuses_what_it_does_not_know(tmp_path):
    result = CliRunner().invoke(app, ["circuits", "--task", "chess", "--out", str(tmp_path)])
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == "task: expected 'ioi' or 'greater-than', got 'chess'"
    with pytest.raises(ValueError, match="draws: expected at least 1, got 0"):
        Settings(draws=0).check()
