"""CSV tables whose text no spreadsheet runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pytest
from matplotlib.figure import Figure

from ifr_fast.circuits.report.tables import write_table
from ifr_fast.export.spreadsheets import cell
from ifr_fast.survey.analyses import Finding
from ifr_fast.survey.report import _save

FORMULAS = [
    *('=HYPERLINK("http://x")', "+1+cmd|'/c x'!A0", "-2+3", "@SUM(A1)", "=", "-"),
    *("\t=1", "\r=1", "\n=1", "\uff1d1"),
]
OTHERS = ["", "a=1", " =1", "'=1", "-0.25", "+3", "-1e-05", "12", "the", "猫 1/3"]


@pytest.mark.parametrize("text", FORMULAS)
def test_an_apostrophe_stands_before_a_formula(text: str) -> None:
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("text", OTHERS)
def test_other_text_and_numbers_stay_as_they_are(text: str) -> None:
    assert cell(text) == text


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_tables_of_circuits(tmp_path: Path) -> None:
    write_table(tmp_path / "table.csv", ["=name", "x"], [[text, -0.5] for text in FORMULAS])
    first, *rest = rows_of(tmp_path / "table.csv")
    assert first == ["'=name", "x"]
    assert rest == [[f"'{text}", "-0.5"] for text in FORMULAS]


def test_tables_of_a_survey(tmp_path: Path) -> None:
    texts = [*FORMULAS, None, "the"]
    table = pa.table(
        {
            "token": pa.array(texts).dictionary_encode(),
            "@word": pa.array(texts, pa.large_string()),
            "x": pa.array([-0.5] * len(texts), pa.float32()),
        }
    )
    _save(tmp_path, Finding("found", "", "", "", table, table, Figure()))
    first, *rest = rows_of(tmp_path / "tables" / "found.csv")
    assert first == ["token", "'@word", "x"]
    expected = [*(f"'{text}" for text in FORMULAS), "", "the"]
    assert rest == [[text, text, "-0.5"] for text in expected]
