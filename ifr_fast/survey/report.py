"""A survey's report: one standalone page, and its figures and tables as files beside it.

    report.html           makes no network request; its policy forbids them
    figures/NAME.{svg,png}
    tables/NAME.csv       all rows; the page shows an excerpt

Corpus names, labels and tokens are data: the page escapes them, and no script runs on it.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable, Collection, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv

from .._version import __version__
from ..arguments import check_fraction, check_path, check_seed
from ..errors import IfrError
from ..export.labels import visible
from ..export.spreadsheets import cell
from ..progress import progress
from ..storage.files import whole_file, write_text
from .analyses import (
    Finding,
    NotApplicableError,
    bypass,
    contrast,
    domains,
    frequency,
    function_words,
    head_roles,
    importance,
    parts_of_speech,
)
from .analyses.plots import styled
from .analyses.units import units_of
from .schema import Survey

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 200  # resolution of PNG files, and of rasterized points in SVG files
_PROBLEMS = 50  # problems on the page; more are only counted
_TOKENS = ("token", "next_token")  # columns whose whitespace is made visible


class Report(NamedTuple):
    """Result of `report`."""

    path: Path  # report.html
    findings: list[Finding]
    omitted: dict[str, str]  # analyses that do not apply to this survey, and why


def report(
    survey: Survey | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    corpora: Collection[str] | None = None,
    label: str | None = None,
    threshold: float | None = None,
    contrasts: Sequence[tuple[str, str]] = (),
    seed: int = 0,
) -> Report:
    """Runs every analysis of a survey and writes the report.

    out: directory of the report; default: report/ in the survey's. corpora: corpora to analyse;
    default: all that are not in `contrasts`. label: label that holds parts of speech; default:
    "pos", or the only label. threshold: threshold at which frequencies are compared; default: 0.04
    or the nearest. contrasts: pairs of corpora to compare, in which each document is a prompt.

    Raises FormatError for a directory that holds no survey, and ValueError for a label,
    threshold or corpus that this survey does not have.
    """
    check_seed("seed", seed)
    if threshold is not None:
        check_fraction("threshold", threshold)
    survey = survey if isinstance(survey, Survey) else Survey.open(check_path("survey", survey))
    folder = survey.path / "report" if out is None else check_path("out", out)
    if label is not None and label not in survey.labels:
        there = ", ".join(survey.labels) or "none"
        raise ValueError(f"label: the survey has no label {label!r}; it has {there}")
    if corpora is None and contrasts:
        apart = {name for pair in contrasts for name in pair}
        corpora = set(units_of(survey).corpora) - apart or None
    analyses = _analyses(survey, corpora, label, threshold, contrasts, seed)
    findings: list[Finding] = []
    omitted: dict[str, str] = {}
    with progress("analysing", len(analyses)) as show:
        for i, (title, analysis) in enumerate(analyses):
            try:
                findings.append(analysis())
            except NotApplicableError as error:
                omitted[title] = str(error)
            show(i + 1)
    images = {finding.name: _save(folder, finding) for finding in findings}
    path = folder / "report.html"
    write_text(path, _page(survey, findings, omitted, images))
    return Report(path, findings, omitted)


def pairs(given: Sequence[str]) -> list[tuple[str, str]]:
    """Parses pairs of corpora, each given as 'FIRST:SECOND'."""
    found = []
    for text in given:
        first, colon, second = text.partition(":")
        if not (first and colon and second):
            raise ValueError(f"--contrast: expected FIRST:SECOND, two corpora, got {text!r}")
        found.append((first, second))
    return found


def _analyses(
    survey: Survey,
    corpora: Collection[str] | None,
    label: str | None,
    threshold: float | None,
    contrasts: Sequence[tuple[str, str]],
    seed: int,
) -> list[tuple[str, Callable[[], Finding]]]:
    if label is None and survey.labels:
        label = "pos" if "pos" in survey.labels else survey.labels[0]
        label = None if label != "pos" and len(survey.labels) > 1 else label
    speech = label or "pos"

    def of_function_words() -> Finding:
        if label is not None:
            try:
                return function_words(survey, corpora, label=label, threshold=threshold, seed=seed)
            except NotApplicableError:  # the label holds no parts of speech
                pass
        return function_words(survey, corpora, threshold=threshold, seed=seed)

    return [
        ("Importance of blocks and heads", lambda: importance(survey, corpora, seed=seed)),
        ("How often heads are active", lambda: frequency(survey, corpora, seed=seed)),
        ("Roles of heads", lambda: head_roles(survey, corpora, seed=seed)),
        ("Tokens that pass blocks by", lambda: bypass(survey, corpora, seed=seed)),
        ("Parts of speech", lambda: parts_of_speech(survey, corpora, label=speech, seed=seed)),
        ("Function words and content words", of_function_words),
        ("Domains", lambda: domains(survey, corpora, threshold=threshold, seed=seed)),
        *(
            (f"Contrast of {a} with {b}", lambda a=a, b=b: contrast(survey, a, b, seed=seed))
            for a, b in contrasts
        ),
    ]


def _save(folder: Path, finding: Finding) -> bytes:
    """Writes the figure and the table of a finding; returns the SVG."""
    try:
        for name in ("figures", "tables"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IfrError(f"{folder}: cannot be written ({error.strerror})") from error
    with styled():
        svg = _svg(finding.figure)
        with whole_file(folder / "figures" / f"{finding.name}.svg") as temporary:
            temporary.write_bytes(svg)
        with whole_file(folder / "figures" / f"{finding.name}.png") as temporary:
            finding.figure.savefig(temporary, format="png", dpi=_DPI)
    with whole_file(folder / "tables" / f"{finding.name}.csv") as temporary:
        csv.write_csv(_cells(finding.table), temporary)
    return svg


def _cells(table: pa.Table) -> pa.Table:
    """The table with text that is no formula to a spreadsheet."""
    columns = []
    for column in table.columns:
        of = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if pa.types.is_string(of) or pa.types.is_large_string(of):
            texts = [None if x is None else cell(x) for x in column.to_pylist()]
            column = pa.chunked_array([pa.array(texts, pa.string())])
        columns.append(column)
    return pa.table(columns, names=[cell(name) for name in table.column_names])


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=_DPI, metadata={"Date": None})
    return buffer.getvalue()


# The page


def _page(
    survey: Survey, findings: list[Finding], omitted: dict[str, str], images: dict[str, bytes]
) -> str:
    here = resources.files(__package__)
    name = str(survey.model.get("name", "a model"))
    sections = "\n".join(_section(i + 1, f, images[f.name]) for i, f in enumerate(findings))
    fields = {
        "title": escape(f"Information flow routes in {name}"),
        "style": here.joinpath("report.css").read_text("utf-8"),
        "lead": "Activity of the model's components over whole corpora, measured by the "
        "information flow routes of its predictions.",
        "facts": _facts(survey),
        "contents": "".join(
            f'<li><a href="#{escape(f.name)}">{escape(f.title)}</a></li>' for f in findings
        ),
        "corpora": _corpora(survey),
        "findings": sections,
        "rest": _rest(survey, omitted),
    }
    page = here.joinpath("report.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: fields[m[1]], page)


def _facts(survey: Survey) -> str:
    facts = {
        "model": str(survey.model.get("name", "unknown")),
        "components": f"{survey.n_layers} layers of {survey.n_heads} heads and an FFN block",
        "thresholds": ", ".join(f"{x:g}" for x in survey.thresholds),
        "survey": str(survey.path.name)
        + ("" if survey.complete else " (incomplete: results so far)"),
        "made by": f"ifr-fast {__version__}",
    }
    return "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())


def _corpora(survey: Survey) -> str:
    rows: dict[str, list[float]] = {}
    seen: dict[str, set[int]] = {}
    for part in survey.predictions.parts("document", "corpus", "probability"):
        for name in np.unique(part["corpus"].astype(str)).tolist():
            mine = part["corpus"] == name
            total = rows.setdefault(name, [0.0, 0.0])
            likely = np.log(np.maximum(part["probability"][mine].astype(np.float64), 1e-30))
            total[0] += int(mine.sum())
            total[1] += float(likely.sum())
            seen.setdefault(name, set()).update(np.unique(part["document"][mine]).tolist())
    table = pa.table(
        {
            "corpus": sorted(rows),
            "documents": [len(seen[name]) for name in sorted(rows)],
            "predictions": [int(rows[name][0]) for name in sorted(rows)],
            "perplexity": [float(np.exp(-rows[n][1] / rows[n][0])) for n in sorted(rows)],
        }
    )
    problems = len(survey.problems)
    note = f"<p>{problems:,} problems with the input are listed at the end.</p>" if problems else ""
    return _html_table(table, "Corpora") + note


def _section(number: int, finding: Finding, svg: bytes) -> str:
    paragraphs = "".join(
        f"<p>{escape(line)}</p>" for line in finding.statement.splitlines() if line
    )
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    small = ' class="small"' if finding.figure.get_figwidth() < 5 else ""
    shown, of = finding.excerpt.num_rows, finding.table.num_rows
    caption = f"{shown:,} of {of:,} rows; all of them in tables/{finding.name}.csv"
    return (
        f'<section id="{escape(finding.name)}">\n'
        f"<h2>{number}. {escape(finding.title)}</h2>\n{paragraphs}\n"
        f'<figure{small}><img src="{source}" alt="{escape(finding.title)}"></figure>\n'
        f"{_html_table(finding.excerpt, caption)}\n"
        f'<p class="method">{escape(finding.method)}</p>\n</section>'
    )


def _rest(survey: Survey, omitted: dict[str, str]) -> str:
    text = ""
    if omitted:
        items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in omitted.items())
        text += f'<section id="omitted"><h2>Not computed</h2><dl>{items}</dl></section>\n'
    problems = survey.problems
    if problems:
        items = "".join(f"<li>{escape(str(problem))}</li>" for problem in problems[:_PROBLEMS])
        more = len(problems) - _PROBLEMS
        items += f"<li>and {more:,} more</li>" if more > 0 else ""
        text += (
            '<section id="problems"><h2>Problems with the input</h2>'
            f'<ul class="problems">{items}</ul></section>\n'
        )
    return text


def _html_table(table: pa.Table, caption: str) -> str:
    numeric = {field.name: not pa.types.is_string(field.type) for field in table.schema}

    def kind(name: str) -> str:
        return ' class="number"' if numeric[name] else ""

    head = "".join(
        f"<th{kind(name)}>{escape(name.replace('_', ' '))}</th>" for name in table.column_names
    )
    body = ""
    for row in table.to_pylist():
        tokens = () if row.get("kind") == "class" else _TOKENS  # a class is no token
        cells = (f"<td{kind(k)}>{_cell(v, is_token=k in tokens)}</td>" for k, v in row.items())
        body += f"<tr>{''.join(cells)}</tr>"
    return (
        f'<div class="table"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any, *, is_token: bool) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "–" if np.isnan(value) else f"{value:.3g}".replace("inf", "∞")
    text = visible(value) if is_token else str(value)
    return f"<bdi>{escape(text)}</bdi>"
