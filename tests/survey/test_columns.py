"""What a survey says of each prediction and head, against the float64 oracle of single texts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from definition import importances_by_definition
from hybrids import hybrid, hybrid_text
from oracle import LayerImportance, importances
from tiny import FAMILIES, VOCAB, account, tiny_model, tiny_text
from torch import Tensor

from ifr_fast import Tracer
from ifr_fast.graph.tables import EdgeKind
from ifr_fast.survey.columns import Columns, Tokens, score

THRESHOLDS = (0.01, 0.02, 0.05)
LENGTHS = (21, 9, 2, 14)  # tokens; some cross the tiny window; padding in every batch
TOLERANCE = 1e-5


def document(ids: Tensor, seed: int = 0) -> Tokens:
    """With made-up words and punctuation."""
    n = len(ids) - 1
    generator = np.random.default_rng(seed)
    later = generator.random(n) < 0.4
    later[:1] = False
    return Tokens(
        ids.numpy().astype(np.int32),
        generator.random(n) < 0.2,
        np.cumsum(~later).astype(np.int32),
        later,
    )


class Expected(NamedTuple):
    """A document's columns by definition, float64."""

    head_importance: np.ndarray  # [T, L, H]
    ffn_importance: np.ndarray  # [T, L]
    head_in: list[np.ndarray]  # [K] of [T, L, H]
    ffn_in: list[np.ndarray]  # [K] of [T, L]
    depth: list[np.ndarray]  # [K] of [T]


def expected(layers: list[LayerImportance]) -> Expected:
    """From dense importances, prediction by prediction, node by node."""
    L, H, T = len(layers), *layers[0].heads.shape[:2]
    head_importance, ffn_importance = np.zeros((T, L, H)), np.zeros((T, L))
    head_in = [np.zeros((T, L, H), bool) for _ in THRESHOLDS]
    ffn_in = [np.zeros((T, L), bool) for _ in THRESHOLDS]
    depth = [np.full(T, L) for _ in THRESHOLDS]
    dense = [layer.heads.numpy() for layer in layers]
    for p in range(T):
        for k, tau in enumerate(THRESHOLDS):
            flow, waiting = {p: 1.0}, np.zeros((L, T))
            for i in reversed(range(L)):
                layer, below = layers[i], np.zeros(T)
                source_layer = i if layer.made_by is None else layer.made_by
                for t, reaching in flow.items():
                    ffn, residual = float(layer.ffn[t]), float(layer.residual[t])
                    ffn *= ffn > tau
                    residual *= residual > tau
                    ffn_in[k][p, i] |= ffn > 0
                    if k == 0:
                        ffn_importance[p, i] += reaching * ffn
                    if layer.ffn_residual is None:
                        through = reaching
                        below[t] += reaching * (ffn + residual)
                    else:
                        passed = float(layer.ffn_residual[t])
                        through = reaching * (ffn + passed * (passed > tau))
                        below[t] += through * residual
                    if not through:
                        continue
                    of_heads = dense[i][:, t, : t + 1]  # [H, sources]
                    edges = of_heads.sum(0)
                    kept = edges > tau
                    waiting[source_layer, : t + 1] += through * edges * kept
                    head_in[k][p, i] |= ((of_heads > tau) & kept).any(1)
                    if k == 0:
                        head_importance[p, i] += through * (of_heads * kept).sum(1)
                    if kept[:t].any():
                        depth[k][p] = i
                flow = {j: x for j, x in enumerate((below + waiting[i]).tolist()) if x}
    return Expected(head_importance, ffn_importance, head_in, ffn_in, depth)


def head_columns(layers: list[LayerImportance], tokens: Tokens) -> dict[str, np.ndarray]:
    """The columns of heads/ by definition, [L, H, ...]."""
    keep = THRESHOLDS[0]
    L, H, T = len(layers), *layers[0].heads.shape[:2]
    found: dict[str, Any] = {
        name: np.zeros((L, H))
        for name in ("edge_mass", "first", "punctuation", "word_mass", "same_word", "edges")
    }
    found["by_offset"] = np.zeros((L, H, 33))
    found["mass"] = np.stack([layer.heads.sum((1, 2)).numpy() for layer in layers])
    for i, layer in enumerate(layers):
        dense = layer.heads.numpy()
        for t in range(T):
            weights = dense[:, t, : t + 1]  # [H, sources]
            weights = weights * (weights.sum(0) > keep)
            earlier = weights[:, :t]
            found["edge_mass"][i] += weights.sum(1)
            found["edges"][i] += (weights > keep).sum(1)
            for j in range(t + 1):
                found["by_offset"][i, :, min(t - j, 32)] += weights[:, j]
            if t > 0:
                found["first"][i] += weights[:, 0]
            found["punctuation"][i] += earlier[:, tokens.punctuation[:t]].sum(1)
            if tokens.later_piece[t]:
                found["word_mass"][i] += weights.sum(1)
                found["same_word"][i] += earlier[:, tokens.word[:t] == tokens.word[t]].sum(1)
    return found


def unpacked(x: np.ndarray, *shape: int) -> np.ndarray:
    n = int(np.prod(shape))
    return np.unpackbits(x, axis=-1, count=n, bitorder="little").astype(bool).reshape(-1, *shape)


def ties(layers: list[LayerImportance]) -> bool:
    """Whether anything is so close to a threshold that rounding may decide."""
    for layer in layers:
        weights = [layer.residual, layer.ffn, layer.heads, layer.heads.sum(0)]
        weights += [] if layer.ffn_residual is None else [layer.ffn_residual]
        for x in weights:
            if any(bool(((x - tau).abs() < 1e-6).any()) for tau in THRESHOLDS):
                return True
    return False


def check(columns: Columns | None, layers: list[LayerImportance], tokens: Tokens) -> None:
    assert columns is not None
    L, H, T = len(layers), *layers[0].heads.shape[:2]
    got, want = columns.predictions, expected(layers)

    def close(x: np.ndarray, y: Any) -> None:
        np.testing.assert_allclose(x, np.asarray(y), atol=TOLERANCE, rtol=0)

    close(got["head_importance"].reshape(T, L, H), want.head_importance)
    close(got["ffn_importance"], want.ffn_importance)
    for i, layer in enumerate(layers):
        if layer.ffn_residual is None:
            assert np.isnan(got["residual_mid"][:, i]).all()
            close(got["residual_post"][:, i], layer.residual)
        else:
            close(got["residual_mid"][:, i], layer.residual)
            close(got["residual_post"][:, i], layer.ffn_residual)
    for k in range(len(THRESHOLDS)):
        assert np.array_equal(unpacked(got[f"head_in_{k}"], L, H), want.head_in[k])
        assert np.array_equal(unpacked(got[f"ffn_in_{k}"], L), want.ffn_in[k])
        assert np.array_equal(got[f"route_depth_{k}"], want.depth[k])
    for name, x in head_columns(layers, tokens).items():
        np.testing.assert_allclose(
            columns.heads[name].reshape(x.shape), x, atol=TOLERANCE * T, rtol=1e-4, err_msg=name
        )
    assert (columns.heads["rows"] == T).all()
    assert (columns.heads["word_targets"] == tokens.later_piece.sum()).all()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_columns_are_those_of_the_oracle(family: str, poisoned: None) -> None:
    """Batched and padded, of every family: windows, gates, post-norms, parallel blocks, ALiBi."""
    model = tiny_model(family).eval()
    tracer = Tracer(model)
    texts = [tiny_text(n, seed=40 + i) for i, n in enumerate(LENGTHS)]
    documents = [document(ids, seed=i) for i, ids in enumerate(texts)]
    found = score(tracer, documents, THRESHOLDS, 64)
    n_checked = 0
    for ids, tokens, columns in zip(texts, documents, found, strict=True):
        layers = [importances(layer) for layer in account(model, ids[:-1])]
        if not ties(layers):
            check(columns, layers, tokens)
            n_checked += 1
        with torch.inference_mode():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        at = ids[1:, None]
        np.testing.assert_allclose(
            columns.predictions["logit"], logits.gather(1, at)[:, 0], atol=1e-3, rtol=1e-4
        )
        np.testing.assert_allclose(
            columns.predictions["probability"],
            logits.softmax(-1).gather(1, at)[:, 0],
            atol=1e-4,
        )
    assert n_checked >= 2, "too many texts have ties"


@pytest.mark.parametrize("name", ["qwen3_next", "bamba"])
def test_columns_of_hybrids(name: str, poisoned: None) -> None:
    """Layers with fewer heads than others have columns of 0 for those that they lack."""
    model = hybrid(name)
    texts = [hybrid_text(n, seed=n) for n in (21, 9)]
    documents = [document(ids, seed=i) for i, ids in enumerate(texts)]
    found = score(Tracer(model), documents, THRESHOLDS, 64)
    n_checked = 0
    for ids, tokens, columns in zip(texts, documents, found, strict=True):
        layers = importances_by_definition(model, ids[:-1])
        H = max(len(layer.heads) for layer in layers)
        layers = [
            layer._replace(
                heads=torch.nn.functional.pad(layer.heads, (0, 0, 0, 0, 0, H - len(layer.heads)))
            )
            for layer in layers
        ]
        if not ties(layers):
            check(columns, layers, tokens)
            n_checked += 1
    assert n_checked > 0, "too many texts have ties"


def test_predictions_are_those_of_single_traces() -> None:
    """50 predictions; and the aggregates over them."""
    tracer = Tracer(tiny_model("llama"))
    ids = tiny_text(51, seed=3)
    (columns,) = score(tracer, [document(ids)], THRESHOLDS, 512)
    assert columns is not None
    L, H = tracer.decoder.n_layers, tracer.decoder.n_heads
    graphs = [[tracer.trace(ids, position=t, threshold=tau) for t in range(50)]
              for tau in THRESHOLDS]  # fmt: skip
    heads = torch.stack([graph.head_importance() for graph in graphs[0]])
    ffns = torch.stack([graph.ffn_importance() for graph in graphs[0]])
    got = columns.predictions
    np.testing.assert_allclose(got["head_importance"].reshape(50, L, H), heads, atol=1e-6)
    np.testing.assert_allclose(got["ffn_importance"], ffns, atol=1e-6)
    for k, tau in enumerate(THRESHOLDS):
        within = np.zeros((50, L, H), bool)
        depth = np.full(50, L)
        for t, graph in enumerate(graphs[k]):
            layer, head, _, _, weight = graph.head_edges
            strong = weight > tau
            within[t, layer[strong], head[strong]] = True
            edges = graph.edges
            moves = (edges.kind == EdgeKind.ATTENTION) & (edges.target != edges.source)
            if moves.any():
                depth[t] = int(edges.layer[moves].min())
        mine = unpacked(got[f"head_in_{k}"], L, H)
        assert np.array_equal(mine, within)
        np.testing.assert_allclose(mine.mean(0), within.mean(0))
        assert np.array_equal(got[f"route_depth_{k}"], depth)


def test_thresholds_hold_different_graphs() -> None:
    """The test texts are such that the columns differ by threshold, and are not all alike."""
    tracer = Tracer(tiny_model("llama"))
    (columns,) = score(tracer, [document(tiny_text(21, seed=40))], THRESHOLDS, 64)
    assert columns is not None
    counts = [np.unpackbits(columns.predictions[f"head_in_{k}"]).sum() for k in range(3)]
    assert counts[0] > counts[1] > counts[2] > 0


def test_numbers_do_not_depend_on_neighbours() -> None:
    """Batch composition, padding and order change results by rounding alone."""
    tracer = Tracer(tiny_model("mistral"))
    texts = [document(tiny_text(n, seed=n), seed=n) for n in (30, 5, 17, 2, 30, 11)]
    together = score(tracer, texts, THRESHOLDS, 10_000)
    for tokens, columns in zip(texts, together, strict=True):
        (alone,) = score(tracer, [tokens], THRESHOLDS, 1)
        for got, want in ((columns.predictions, alone.predictions), (columns.heads, alone.heads)):
            for name, x in want.items():
                if x.dtype == np.float32:
                    np.testing.assert_allclose(got[name], x, atol=2e-5, rtol=1e-4, equal_nan=True)
                else:
                    assert (got[name] != x).mean() < 0.01, name


def test_long_documents_are_walked_in_column_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer(tiny_model("llama"))
    texts = [document(tiny_text(40, seed=1)), document(tiny_text(25, seed=2))]
    whole = score(tracer, texts, THRESHOLDS, 512)
    monkeypatch.setattr("ifr_fast.survey.walk._FLOW_ELEMENTS", 400)
    blocks = score(tracer, texts, THRESHOLDS, 512)
    for a, b in zip(whole, blocks, strict=True):
        for name in ("head_importance", "ffn_importance"):
            np.testing.assert_allclose(a.predictions[name], b.predictions[name], atol=1e-6)


def test_a_document_that_overflows_leaves_the_others(recwarn: pytest.WarningsRecorder) -> None:
    """Its numbers mean nothing and are not given; those of its batch are untouched."""
    model = tiny_model("llama")
    tracer = Tracer(model)
    bad = VOCAB - 1
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("inf")
    texts = [tiny_text(12, seed=i).clamp(max=bad - 1) for i in range(3)]
    texts[1][4] = bad
    found = score(tracer, [document(x) for x in texts], THRESHOLDS, 512)
    assert found[1] is None
    for i in (0, 2):
        assert found[i] is not None
        assert np.isfinite(found[i].predictions["head_importance"]).all()


@pytest.mark.parametrize("impl", ["eager", "reference", "triton"])
def test_implementations_agree(impl: str) -> None:
    """Those of GPUs too, which pad their lists of edges (here in Triton's interpreter)."""
    if impl == "triton":
        pytest.importorskip("triton", reason="expected: there is no Triton for this system")
    model = tiny_model("llama")
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    texts = [document(tiny_text(n, seed=n), seed=n) for n in (6, 3)]
    found = [
        score(Tracer(model.to(place), impl=chosen), texts, THRESHOLDS, 64)
        for chosen, place in (("auto", "cpu"), (impl, device))
    ]
    for mine, theirs in zip(*found, strict=True):
        assert mine is not None
        assert theirs is not None
        for got, want in ((theirs.predictions, mine.predictions), (theirs.heads, mine.heads)):
            for name, x in want.items():
                if x.dtype == np.float32:
                    np.testing.assert_allclose(got[name], x, atol=1e-4, rtol=1e-4, err_msg=name)
                else:
                    assert np.array_equal(got[name], x), name
