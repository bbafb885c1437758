"""(c) Roles of heads, by the sources of the routes through them.

The edge mass of a head is the importance of the edges through it. A role names the place where
most of the edge mass comes from:

    own token        the position itself
    previous token, offset d   the position d before, 1 <= d <= 31
    subword merging  earlier pieces of the same word, into later pieces of words
    first token      position 0, into later positions
    punctuation      punctuation tokens, into later positions

The score of a role is that place's share of the head's edge mass (for subword merging, of the
mass into later pieces). It is compared with two baselines: the same share for all other heads
together, and the share for a head that reads all positions equally (known for offsets and the first
token).
A head has the role if, at the lower end of the score's interval, the score is at least `min_score`
and its odds are at least `min_lift` times those of either baseline.

Two roles have further conditions, because words and offsets overlap: the piece before a later
piece of a word belongs to the same word, so a previous-token head also scores as a merging head. A
merging head must therefore carry `min_selectivity` times as much into later pieces of words as into
other tokens, and it is then not named for an offset.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..schema import OFFSETS, Survey
from . import plots
from .finding import Finding
from .intervals import Floats, Interval, bootstrap
from .units import Units, add, units_of
from .wording import head_name, listed, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREVIOUS, OWN, SUBWORD, FIRST, PUNCTUATION = (
    "previous token",
    "own token",
    "subword merging",
    "first token",
    "punctuation",
)
_SUMS = ("rows", "mass", "edge_mass", "first", "punctuation", "word_mass", "same_word",
         "word_targets", "edges")  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """Conditions for a role."""

    min_score: float = 0.5  # share of the edge mass
    min_lift: float = 3.0  # odds of the score / odds of a baseline
    min_selectivity: float = 2.0  # of merging heads only
    min_mass: float = 0.1  # importance of the head / importance of the mean head
    min_listed: float = 0.25  # share of its importance that is in edges above `keep`
    min_edges: int = 50


class _Score(NamedTuple):
    """Evidence for one role, [L * H] each."""

    score: Interval
    others: Floats  # share for all other heads together
    uniform: Floats | None  # share for a head that reads all positions equally

    def lift(self) -> Floats:
        """Odds of the score's lower end, divided by the greater odds of the baselines."""
        baseline = self.others
        if self.uniform is not None:
            baseline = np.fmax(baseline, self.uniform)
        with np.errstate(divide="ignore", invalid="ignore"):
            return _odds(self.score.low) / _odds(baseline)

    def holds(self, rule: Rule) -> NDArray[np.bool_]:
        return (self.score.low >= rule.min_score) & (self.lift() >= rule.min_lift)


def offset_name(offset: int) -> str:
    """Name of the role of heads that read the position `offset` before."""
    return {0: OWN, 1: PREVIOUS}.get(offset, f"offset {offset}")


_ORDER = [*(offset_name(d) for d in range(OFFSETS - 1)), SUBWORD, FIRST, PUNCTUATION]


def head_roles(
    survey: Survey,
    corpora: Collection[str] | None = None,
    *,
    rule: Rule | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> Finding:
    """Finds heads that have a role, and the scores of every head; one row per head.

    If several roles fit, a head gets the one with the greatest score; subword merging precedes
    offsets.
    """
    rule = rule or Rule()
    units = units_of(survey, corpora, seed=seed)
    L, H = survey.n_layers, survey.n_heads
    sums = _head_sums(survey, units)
    judged = _judged(sums, rule)
    scores, selectivity = _scores(sums, seed, resamples)
    fits = {name: score.holds(rule) & judged for name, score in scores.items()}
    fits[SUBWORD] &= np.nan_to_num(selectivity.low) >= rule.min_selectivity
    roles: list[str | None] = []
    for i in range(L * H):
        found = [name for name, fit in fits.items() if fit[i]]
        if SUBWORD in found:
            found = [name for name in found if name in (SUBWORD, FIRST, PUNCTUATION)]
        found.sort(key=lambda name: -scores[name].score.value[i])
        roles.append(found[0] if found else None)
    table = _table(L, H, sums, judged, scores, selectivity, roles)
    return Finding(
        "roles",
        "Roles of heads",
        _statement(table, roles, judged, rule, H),
        "From the edges above "
        f"{survey.keep:g} into every position of {len(units.documents):,} documents, for "
        "whatever prediction. Each score is compared with that of all other "
        "heads together and, for offsets and the first token, with that of a head that reads all "
        "positions equally; a role needs, at the lower end of the 95% bootstrap interval over "
        f"documents, a score of {rule.min_score:g} and {rule.min_lift:g} times the odds of "
        "either. Heads are judged if they have "
        f"{rule.min_mass:g} times the mean head's importance, at least {percent(rule.min_listed)} "
        f"of it in listed edges, and {rule.min_edges} edges. A head that attends to a position "
        "but writes next to nothing from there, as attention sinks do, has no role by this "
        "measure: routes show what was carried, not where attention went.",
        table,
        _named(table, roles),
        _figure(L, H, sums, scores, roles),
    )


def _head_sums(survey: Survey, units: Units) -> dict[str, Floats]:
    """Sums of heads/ [U, L * H, ...], and `uniform` [U, OFFSETS + 1]: edge mass by offset, and from
    the first token, for a head with mass 1 per row that reads all positions equally.
    """
    L, H = survey.n_layers, survey.n_heads
    U, M = len(units), survey.n_layers * survey.n_heads
    sums = {name: np.zeros((U * M,)) for name in _SUMS}
    sums["by_offset"] = np.zeros((U * M, OFFSETS))
    uniform = np.zeros((U, OFFSETS + 1))
    columns = ["layer", "head", "by_offset", *_SUMS]
    for unit, part in units.parts(survey.heads, *columns):
        head = part["layer"].astype(np.int64) * H + part["head"]
        for name in (*_SUMS, "by_offset"):
            add(sums[name], unit * M + head, part[name])
        once = head == 0
        add(uniform, unit[once], _uniform(part["rows"][once].astype(np.int64)))
    by_head = {name: x.reshape(U, L * H, *x.shape[1:]) for name, x in sums.items()}
    return {**by_head, "uniform": uniform}


def _uniform(rows: NDArray[np.int64]) -> Floats:
    """Edge mass [N, OFFSETS + 1] of a uniform head in documents of `rows` targets.

    Target t gives 1 / (t + 1) to each of its sources, so offset d gets Σ_{t >= d} 1 / (t + 1), and
    position 0 gets Σ_{t >= 1} 1 / (t + 1).
    """
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, rows.max(initial=0) + 1))])
    d = np.arange(OFFSETS - 1)
    by_offset = harmonic[rows][:, None] - harmonic[np.minimum(d, rows[:, None])]
    beyond = np.maximum(rows - by_offset.sum(1), 0)
    first = np.maximum(harmonic[rows] - 1, 0)
    return np.column_stack([by_offset, beyond, first])


def _judged(sums: dict[str, Floats], rule: Rule) -> NDArray[np.bool_]:
    mass, listed_mass = sums["mass"].sum(0), sums["edge_mass"].sum(0)
    enough = mass >= rule.min_mass * mass.mean()
    visible = listed_mass >= rule.min_listed * mass
    return enough & visible & (mass > 0) & (sums["edges"].sum(0) >= rule.min_edges)


def _scores(
    sums: dict[str, Floats], seed: int, resamples: int
) -> tuple[dict[str, _Score], Interval]:
    """Evidence for every role, and the selectivity of heads for later pieces of words."""
    edge_mass = sums["edge_mass"]
    rows = sums["rows"][:, 0]

    def score(top: Floats, bottom: Floats, uniform: Floats | None = None) -> _Score:
        interval = bootstrap(top, bottom, seed=seed, resamples=resamples)
        tops, bottoms = top.sum(0), bottom.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            others = (tops.sum() - tops) / (bottoms.sum() - bottoms)
        share = None if uniform is None else np.full_like(others, uniform.sum() / rows.sum())
        return _Score(interval, np.nan_to_num(others), share)

    uniform = sums["uniform"]
    scores = {
        offset_name(d): score(sums["by_offset"][..., d], edge_mass, uniform[:, d])
        for d in range(OFFSETS - 1)
    }
    scores[SUBWORD] = score(sums["same_word"], sums["word_mass"])
    scores[FIRST] = score(sums["first"], edge_mass, uniform[:, -1])
    scores[PUNCTUATION] = score(sums["punctuation"], edge_mass)
    return scores, _selectivity(sums, seed, resamples)


def _selectivity(sums: dict[str, Floats], seed: int, resamples: int) -> Interval:
    """Edge mass per later piece of a word, divided by edge mass per other target."""
    inside = sums["word_mass"], sums["word_targets"]
    outside = sums["edge_mass"] - inside[0], sums["rows"] - inside[1]
    # Both ratios are bootstrapped together: each sample draws the same documents for both.
    U = len(inside[0])
    times = np.random.default_rng(seed).multinomial(U, np.full(U, 1 / U), size=resamples)
    drawn = np.concatenate([np.ones((1, U)), times.astype(np.float64)])
    with np.errstate(divide="ignore", invalid="ignore"):
        rate_in = (drawn @ inside[0]) / (drawn @ inside[1])
        rate_out = np.maximum(drawn @ outside[0], 0) / (drawn @ outside[1])
        ratios = rate_in / rate_out
        # A head with all mass inside words exceeds any ratio; a head without mass has none.
        finite = np.nan_to_num(ratios, nan=0.0, posinf=np.finfo(np.float64).max)
        low, high = np.percentile(finite, [2.5, 97.5], axis=0)
    return Interval(ratios[0], low, high)


def _odds(x: Floats) -> Floats:
    x = np.clip(x, 0, 1)
    with np.errstate(divide="ignore"):
        return x / (1 - x)


def _best_offset(scores: dict[str, _Score]) -> NDArray[np.int64]:
    """Offset of at least 2 with the greatest score, [M]."""
    shares = np.stack([scores[offset_name(d)].score.value for d in range(2, OFFSETS - 1)])
    return np.nan_to_num(shares, nan=-1).argmax(0) + 2


def _table(
    L: int,
    H: int,
    sums: dict[str, Floats],
    judged: NDArray[np.bool_],
    scores: dict[str, _Score],
    selectivity: Interval,
    roles: list[str | None],
) -> pa.Table:
    M = L * H
    best = _best_offset(scores)
    of_best = [scores[offset_name(int(d))] for d in best]
    chosen = [None if role is None else scores[role] for role in roles]
    mass, edge_mass = sums["mass"].sum(0), sums["edge_mass"].sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        visible = edge_mass / mass
        per_row = mass / sums["rows"].sum(0)
    columns: dict[str, object] = {
        "layer": pa.array([i // H for i in range(M)], pa.int16()),
        "head": pa.array([i % H for i in range(M)], pa.int16()),
        "role": pa.array(roles, pa.string()),
        "score": [None if s is None else float(s.score.value[i]) for i, s in enumerate(chosen)],
        "low": [None if s is None else float(s.score.low[i]) for i, s in enumerate(chosen)],
        "high": [None if s is None else float(s.score.high[i]) for i, s in enumerate(chosen)],
        "other_heads": [None if s is None else float(s.others[i]) for i, s in enumerate(chosen)],
        "uniform": [
            None if s is None or s.uniform is None else float(s.uniform[i])
            for i, s in enumerate(chosen)
        ],
        "judged": judged,
        "importance": per_row,
        "listed": visible,
        "edges": pa.array(sums["edges"].sum(0).astype(np.int64)),
        "own": scores[OWN].score.value,
        "previous": scores[PREVIOUS].score.value,
        "best_offset": pa.array(best, pa.int16()),
        "at_best_offset": [float(s.score.value[i]) for i, s in enumerate(of_best)],
        "subword": scores[SUBWORD].score.value,
        "selectivity": selectivity.value,
        "first": scores[FIRST].score.value,
        "punctuation": scores[PUNCTUATION].score.value,
    }
    return pa.table(columns)


def _named(table: pa.Table, roles: list[str | None]) -> pa.Table:
    """Heads that have a role, by role, the most important first."""
    mass = table["importance"].to_numpy()
    named = [i for i, role in enumerate(roles) if role is not None]
    order = sorted(named, key=lambda i: (_ORDER.index(str(roles[i])), -mass[i]))
    return table.take(pa.array(order, pa.int64()))


def _statement(
    table: pa.Table, roles: list[str | None], judged: NDArray[np.bool_], rule: Rule, H: int
) -> str:
    columns = table.to_pydict()
    lines = []
    mass = float(np.nansum(columns["importance"])) or 1.0
    named = [i for i, role in enumerate(roles) if role is not None]
    for role in _ORDER:
        having = sorted(
            (i for i in named if roles[i] == role), key=lambda i: -columns["importance"][i]
        )
        if not having:
            continue
        share = sum(columns["importance"][i] for i in having) / mass
        heads = listed(
            [f"{head_name(i // H, i % H)} ({number(columns['score'][i])})" for i in having], 12
        )
        lines.append(
            f"{_plural(role, len(having))}: {heads}; with {percent(share)} of all heads' "
            "importance."
        )
    missing = [role for role in (PREVIOUS, SUBWORD, FIRST, PUNCTUATION) if role not in roles]
    if missing:
        lines.append(f"No head qualifies as {_or(missing)} head.")
    lines.append(
        f"{int(judged.sum())} of {len(roles)} heads carry enough to be judged; {len(named)} of "
        f"them have a role."
    )
    return "\n".join(lines)


def _plural(role: str, n: int) -> str:
    kind = {FIRST: "first-token sink", PUNCTUATION: "punctuation sink"}.get(role, role)
    return f"{kind[0].upper()}{kind[1:]} head{'s' if n > 1 else ''}"


def _or(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} or {items[-1]}"


def _figure(
    L: int, H: int, sums: dict[str, Floats], scores: dict[str, _Score], roles: list[str | None]
) -> Figure:
    best = _best_offset(scores)
    other = np.array([scores[offset_name(int(d))].score.value[i] for i, d in enumerate(best)])
    offsets = {offset_name(d) for d in range(2, OFFSETS - 1)}
    maps = [
        ("a  Previous token", scores[PREVIOUS].score.value, {PREVIOUS}),
        ("b  Best other offset, 2 to 31", other, offsets),
        ("c  Earlier pieces of the word", scores[SUBWORD].score.value, {SUBWORD}),
        ("d  First token", scores[FIRST].score.value, {FIRST}),
        ("e  Punctuation", scores[PUNCTUATION].score.value, {PUNCTUATION}),
    ]
    with plots.figure(7.2, 5.2) as figure:
        panels = figure.subplots(2, 3).reshape(-1)
        for axes, (title, values, having) in zip(panels, maps, strict=False):
            marked = [(i // H, i % H) for i, role in enumerate(roles) if role in having]
            plots.heads(axes, values.reshape(L, H), title=title, limits=(0, 1), marked=marked)
        by_offset = sums["by_offset"].sum(0)
        kinds = [role for role in dict.fromkeys(roles) if role is not None]
        for color, role in zip(plots.GROUPS, kinds[: len(plots.GROUPS)], strict=False):
            profile = by_offset[[i for i, r in enumerate(roles) if r == role]].sum(0)
            panels[5].plot(profile[:-1] / (profile.sum() or 1), color=color, label=role, lw=1)
        everyone = by_offset.sum(0)
        panels[5].plot(
            everyone[:-1] / (everyone.sum() or 1), ":", color=plots.INK, label="all heads"
        )
        plots.label(panels[5], "f  Where from", "offset", "share of edge mass")
        panels[5].set_ylim(0, 1.02)
        panels[5].legend(fontsize=6.5)
    return figure
