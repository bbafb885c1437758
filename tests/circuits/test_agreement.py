"""ROC curves, rank correlations, precision and their intervals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_circuit import CIRCUIT, induction_model, induction_task
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from ifr_fast import Tracer, circuits
from ifr_fast.circuits import auc, contrastive
from ifr_fast.circuits.agreement import bootstrap, ranks, share_interval
from ifr_fast.circuits.published import GPT2_SMALL, as_mask, published_circuit

scored = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=8).filter(
    lambda rows: 0 < sum(hit for _, hit in rows) < len(rows)
)


@given(scored)
@settings(deadline=None, max_examples=30)
def test_roc_curves(rows):
    scores = torch.tensor([float(s) for s, _ in rows])
    hits = torch.tensor([hit for _, hit in rows])
    pairs = [(a > b) + (a == b) / 2 for a, p in rows for b, q in rows if p and not q]
    area = auc(scores, hits)
    assert math.isclose(area, sum(pairs) / len(pairs))
    assert math.isclose(area, roc_auc_score(hits, scores))
    false, true = circuits.roc_curve(scores, hits)
    assert (float(false[0]), float(true[0]), float(false[-1]), float(true[-1])) == (0, 0, 1, 1)
    assert math.isclose(float(torch.trapezoid(true, false)), area, abs_tol=1e-12)
    assert math.isclose(auc(-scores, hits), 1 - area, abs_tol=1e-12)
    for k in range(1, len(rows) + 1):  # the mean over all ways to break ties
        border = sorted((s for s, _ in rows), reverse=True)[k - 1]
        above = [p for s, p in rows if s > border]
        tied = [p for s, p in rows if s == border]
        ways = [sum(w) for w in itertools.combinations(tied, k - len(above))]
        expected = (sum(above) + sum(ways) / len(ways)) / k
        assert math.isclose(circuits.precision_at(scores, hits, k), expected)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=10))
@settings(deadline=None, max_examples=25)
def test_rank_correlation(rows):
    def rank(values):
        return [
            1 + sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values
        ]

    x, y = ([float(row[i]) for row in rows] for i in (0, 1))
    assert ranks(torch.tensor(x)).tolist() == rank(x)
    assert ranks(torch.tensor([y, x, x])).tolist() == [rank(y), rank(x), rank(x)]
    both = torch.tensor([rank(x), rank(y)], dtype=torch.float64)
    expected = 0.0
    if all(len(set(v)) > 1 for v in (x, y)):
        expected = float(torch.corrcoef(both)[0, 1])
        assert math.isclose(spearmanr(x, y).statistic, expected, abs_tol=1e-9)
    got = circuits.rank_correlation(torch.tensor(x), torch.tensor(y))
    assert math.isclose(got, expected, abs_tol=1e-9)


def test_bootstrap_intervals_cover():
    """Intervals of the mean of normal numbers: the textbook's width, and 95% hold the truth."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for i in range(60):
        x = torch.randn(40, generator=generator, dtype=torch.float64)
        found = bootstrap(lambda c, x=x: x[c].mean(-1), 40, draws=300, seed=i)
        assert math.isclose(found.value, float(x.mean()))
        assert abs((found.high - found.low) - 2 * 1.96 * float(x.std()) / 40**0.5) < 0.2
        held += found.low <= 0 <= found.high
    assert held >= 51
    nothing = bootstrap(lambda c: torch.where(c[:, 0] % 2 > 0, torch.nan, 1.0), 5, draws=50)
    assert (nothing.low, nothing.high) == (1, 1)


def test_intervals_of_shares():
    """The edges of Wilson's interval are z of their own standard errors away from the share."""
    for hits, n in ((0, 12), (7, 12), (50, 50), (48, 50)):
        found = share_interval(torch.arange(n) < hits)
        assert found.value == hits / n
        for edge in (found.low, found.high):
            error = (edge * (1 - edge) / n) ** 0.5
            at_the_end = edge in (0, 1) and edge == found.value
            assert at_the_end or abs(abs(edge - found.value) - 1.959964 * error) < 1e-6
    assert math.isnan(share_interval(torch.zeros(0, dtype=torch.bool)).value)


def test_agreement_of_scores_with_effects():
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(30, dtype=torch.float64)
    truth[:6] = torch.tensor([0.5, -0.4, 0.3, 0.2, 0.15, -0.1])
    effects = truth + 0.01 * torch.randn(20, 30, generator=generator)
    good = truth.abs() + 0.02 * torch.randn(20, 30, generator=generator)
    found = circuits.agreement(good, effects, least=0.05, ks=(3, 6, 99), draws=200)
    assert (found.n_positive, found.n_components) == (6, 30)
    assert found.auc.value == found.precision[6].value == 1
    assert list(found.precision) == [3, 6]
    blind = torch.randn(20, 30, generator=generator)
    poor = circuits.agreement(blind, effects, least=0.05, draws=200)
    assert poor.auc.low < poor.auc.value < poor.auc.high < 1
    # The same draws one at a time: the AUC of a draw's means, with positives of that draw.
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for chosen in torch.randint(20, (200, 20), generator=generator):
        size = effects[chosen].mean(0).abs()
        drawn.append(auc(blind[chosen].mean(0), size >= 0.05))
    expected = torch.tensor(drawn, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975]).double()
    )
    assert [poor.auc.low, poor.auc.high] == pytest.approx(expected.tolist(), abs=1e-9)
    # The same with effects in shares of the gap, whose mean belongs to the draw too.
    gap = 4 + 3 * torch.rand(20, generator=generator, dtype=torch.float64)
    shared = circuits.agreement(blind, effects, least=0.05 / 4.7, gap=gap, draws=200)
    generator, drawn = torch.Generator().manual_seed(0), []
    for chosen in torch.randint(20, (200, 20), generator=generator):
        size = (effects[chosen].mean(0) / gap[chosen].mean()).abs()
        drawn.append(auc(blind[chosen].mean(0), size >= 0.05 / 4.7))
    expected = torch.tensor(drawn, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975]).double()
    )
    assert [shared.auc.low, shared.auc.high] == pytest.approx(expected.tolist(), abs=1e-9)
    assert shared.n_positive == int((effects.mean(0).abs() / gap.mean() >= 0.05 / 4.7).sum())
    with pytest.raises(ValueError, match=r"gap: expected \[20\], got \[3\]"):
        circuits.agreement(good, effects, least=0.05, gap=gap[:3])
    undefined = circuits.agreement(good, effects, least=9, draws=20)
    assert math.isnan(undefined.auc.value)
    with pytest.raises(ValueError, match="scores: expected"):
        circuits.agreement(good[:, :5], effects, least=0.05)


def test_published_heads_are_compared_when_the_model_is_theirs():
    """A stand-in replaces the published circuit, since CI downloads no GPT-2."""
    for name in GPT2_SMALL:
        assert published_circuit("ioi", name)["name mover"] == ((9, 9), (9, 6), (10, 0))
        assert published_circuit("greater-than", name) is not None
    assert published_circuit("ioi", None) is published_circuit("ioi", "gpt2-medium") is None
    assert published_circuit("induction", "gpt2") is None
    assert int(as_mask(published_circuit("ioi", "gpt2"), 12, 12).sum()) == 26
    stand_in = {"previous token": ((0, 0),), "induction": ((1, 1),)}
    mask = as_mask(stand_in, 2, 3)
    assert {tuple(x) for x in mask.nonzero().tolist()} == CIRCUIT
    tracer, task = Tracer(induction_model()), induction_task(6)
    routes = contrastive(tracer, task)
    found = circuits.agreement_with(routes.heads.flatten(1), mask.flatten(), ks=(2,), draws=50)
    assert found.auc.value == found.precision[2].value == 1
    with pytest.raises(ValueError, match="expected 2 layers of 3 heads, got induction"):
        as_mask({"induction": ((5, 5),)}, 2, 3)
