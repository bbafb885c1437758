"""Flow through the layers of a graph, against every path listed one by one."""

from __future__ import annotations

import pytest
import torch
from graphs import any_routes, random_table, share_values
from hypothesis import given, settings
from hypothesis import strategies as st
from listed_paths import listed_importances
from tiny import tiny_text
from torch import Tensor

from ifr_fast import RouteGraph, Routes, Tracer
from ifr_fast.graph.flow import (
    LayerFlow,
    component_importances,
    flow_down,
    flow_up,
    head_frequencies,
    thresholded,
)
from ifr_fast.graph.tables import Granularity, LayerTable
from ifr_fast.kernels.contract import EdgeList

EXACT = {"atol": 1e-13, "rtol": 1e-13}
FLOAT32 = {"atol": 0, "rtol": 1e-6}
thresholds = st.sampled_from([0.0, 1 / 16, 3 / 16, 0.3])


def test_importances_are_sums_over_all_paths(small: RouteGraph) -> None:
    tokens, heads, ffn = listed_importances(small)
    assert (tokens > 0).sum() > 2
    torch.testing.assert_close(small.token_importance().double(), tokens, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(small.head_importance().double(), heads, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(small.ffn_importance().double(), ffn, atol=1e-7, rtol=1e-6)
    assert small.token_importance().dtype == torch.float32


def test_nothing_is_lost_without_a_threshold(tracer: Tracer, granularity: Granularity) -> None:
    """Each node's importances sum to 1, so all that leaves the prediction reaches a token."""
    for position in (0, 1, 19):
        graph = tracer.trace(
            tiny_text(20), position=position, threshold=0.0, granularity=granularity
        )
        importance = graph.token_importance()
        assert float(importance.sum()) == pytest.approx(1, abs=1e-4)
        assert (importance[position + 1 :] == 0).all()
        # A layer's parts carry all that comes in; in a parallel block they sum to 1 together.
        of_layer = graph.head_importance().sum(-1) + graph.ffn_importance()
        assert (of_layer < 2 + 1e-4).all()
        if graph.parallel.all():
            assert (of_layer < 1 + 1e-4).all()


@st.composite
def flows(draw: st.DrawFn) -> list[LayerFlow]:
    """Layers of any threshold and granularity, float64."""
    T, L, H = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    options = draw(thresholds), draw(st.sampled_from(["token", "head"]))
    tables = [random_table(draw, T, H, generator, torch.float64) for _ in range(L)]
    tables = share_values(draw, tables)
    return [LayerFlow.of(table, *options, torch.float64) for table in tables]


@settings(deadline=None, max_examples=50)
@given(flows(), st.integers(0, 99), st.integers(1, 3))
def test_flows_down_and_up_are_adjoint(layers: list[LayerFlow], seed: int, P: int) -> None:
    """<up(x), y> = <x, down(y)> at every node, for one flow y and for P at once. Where attention
    reads a lower layer, flow passes the nodes between by: then at the ends.
    """
    all_own = all(layer.value_layer is None for layer in layers)
    generator = torch.Generator().manual_seed(seed)
    N = len(layers[0].ffn)
    x = torch.rand(N, generator=generator, dtype=torch.float64)
    y = torch.rand(N, P, generator=generator, dtype=torch.float64)
    rising = list(flow_up(layers, x))
    inner = rising[-1][1] @ y
    numbers = []
    for number, post, mid, pre in flow_down(layers, y):
        numbers.append(number)
        below = rising[number - 1][1] if number else x
        if all_own:
            torch.testing.assert_close(rising[number][1] @ post, inner, **EXACT)
            torch.testing.assert_close(rising[number][0] @ mid, inner, **EXACT)
        if all_own or number == 0:
            torch.testing.assert_close(below @ pre, inner, **EXACT)
    assert numbers == list(reversed(range(len(layers))))
    alone = [list(flow_down(layers, column)) for column in y.T]
    for step, together in enumerate(flow_down(layers, y)):
        for got, *of_each in zip(together[1:], *(of[step][1:] for of in alone), strict=True):
            torch.testing.assert_close(got, torch.stack(of_each, 1), **EXACT)


def joined(tables: list[LayerTable]) -> LayerTable:
    """One table of the nodes of several texts of T positions each."""
    T = len(tables[0].ffn)

    def cat(name: str) -> Tensor | None:
        columns = [getattr(table, name) for table in tables]
        return None if columns[0] is None else torch.cat(columns)

    edges = [
        table.edges._replace(row=table.edges.row + b * T, source=table.edges.source + b * T)
        for b, table in enumerate(tables)
    ]
    together = EdgeList(*(torch.cat(columns) for columns in zip(*edges, strict=True)))
    rows = torch.arange(len(tables) * T)
    apart = ("rows", "edges", "value_layer")
    of_all = {name: cat(name) for name in LayerTable._fields if name not in apart}
    read = tables[0].value_layer
    return LayerTable(rows=rows, edges=together, value_layer=read, **of_all)


@settings(deadline=None, max_examples=40)
@given(any_routes(), st.integers(1, 3), thresholds, st.sampled_from([1, 7, 1000]))
def test_importances_of_several_texts_are_those_of_their_graphs(
    routes: Routes, B: int, threshold: float, max_elements: int
) -> None:
    T = len(routes)
    generator = torch.Generator().manual_seed(B)

    def other(table: LayerTable) -> LayerTable:
        """The table of another text: the same edges with other weights."""

        def scaled(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            return x * torch.randint(0, 3, (len(x),), generator=generator) / 2

        factor = torch.randint(0, 3, (len(table.edges.row),), generator=generator) / 2
        edges = table.edges
        return table._replace(
            residual=scaled(table.residual),
            ffn=scaled(table.ffn),
            ffn_residual=scaled(table.ffn_residual),
            edges=edges._replace(
                weight=edges.weight * factor, head_weight=edges.head_weight * factor[:, None]
            ),
        )

    texts = [routes.layers, *([other(table) for table in routes.layers] for _ in range(B - 1))]
    layers = [
        LayerFlow.of(joined(list(of_layer)), threshold, routes.granularity, torch.float64)
        for of_layer in zip(*texts, strict=True)
    ]
    head, ffn = component_importances(layers, B, max_elements)
    assert head.shape == (B, T, routes.n_layers, routes.n_heads)
    assert ffn.shape == (B, T, routes.n_layers)
    for b, tables in enumerate(texts):
        of_text = Routes(
            routes.tokens, routes.token_ids, threshold, routes.granularity, tables,
            routes.predict, 0.0,
        )  # fmt: skip
        frequency = torch.zeros(routes.n_layers, routes.n_heads, dtype=torch.float64)
        for t in range(T):
            graph = of_text[t]
            torch.testing.assert_close(head[b, t].float(), graph.head_importance(), **FLOAT32)
            torch.testing.assert_close(ffn[b, t].float(), graph.ffn_importance(), **FLOAT32)
            # A head is in a graph where one of its edges exceeds the threshold by itself.
            alone = graph.head_edges.weight > threshold
            frequency[graph.head_edges.layer[alone], graph.head_edges.head[alone]] += 1
        alone = [LayerFlow.of(x, threshold, routes.granularity, torch.float64) for x in tables]
        got = head_frequencies(alone, max_elements)
        torch.testing.assert_close(got, frequency / T, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parallel", [False, True])
def test_a_node_is_reached_however_little_of_the_flow_it_gets(
    dtype: torch.dtype, parallel: bool
) -> None:
    """Through 60 layers, products of weights of 1e-30 underflow and counts of paths overflow."""
    T, L, H = 7, 60, 2
    generator = torch.Generator().manual_seed(3)
    layers, boolean = [], []
    for _ in range(L):
        edge = (torch.rand(T, T, generator=generator) < 0.3).tril(-1)
        residual, ffn, passed = torch.rand(3, T, generator=generator) < 0.95
        row, source = edge.nonzero(as_tuple=True)
        none = torch.zeros(T, dtype=torch.bool)
        table = LayerTable(
            torch.arange(T),
            1e-30 * residual,
            1e-30 * ffn,
            None if parallel else 1e-30 * passed,
            EdgeList(row, source, torch.full((len(row),), 1e-30), torch.full((len(row), H), 5e-31)),
            none,
            None if parallel else none,
        )
        layers.append(LayerFlow.of(table, 0.0, "token", dtype).connected())
        if parallel:
            boolean.append(((residual | ffn).diag() | edge).double())
        else:
            boolean.append((ffn | passed).double()[:, None] * (residual.diag() | edge).double())
    plain, reaching = torch.eye(T, dtype=torch.float64), []
    for matrix in boolean:
        plain = (matrix @ plain > 0).double()
        reaching.append(plain)
    assert 0 < plain.sum() < T * T
    for source in range(T):
        start = torch.zeros(T, dtype=dtype)
        start[source] = 1
        for got, expected in zip(flow_up(layers, start, saturated=True), reaching, strict=True):
            assert torch.equal(got[1] > 0, expected[:, source] > 0)
            assert got[1].max() <= 2
    *_, (_, _, _, bottom) = flow_down(layers, torch.eye(T, dtype=dtype), saturated=True)
    assert torch.equal((bottom > 0).T, plain > 0)
    assert bottom.max() <= 1


@settings(deadline=None, max_examples=60)
@given(st.data(), thresholds, st.sampled_from(["token", "head"]))
def test_a_threshold_keeps_the_same_of_arrays_as_of_tensors(
    data: st.DataObject, threshold: float, granularity: Granularity
) -> None:
    table = random_table(
        data.draw, 4, 2, torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )

    def numpy(x: Tensor | None) -> object:
        return None if x is None else x.numpy()

    of_arrays = LayerTable(*(map(numpy, table._replace(edges=None))))._replace(
        edges=EdgeList(*map(numpy, table.edges))
    )
    kept = thresholded(table, threshold, granularity)
    of_array = thresholded(of_arrays, threshold, granularity)
    for name in ("residual", "ffn", "ffn_residual"):
        mine, theirs = getattr(kept, name), getattr(of_array, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            whole = getattr(table, name)
            assert torch.equal(mine, torch.where(whole > threshold, whole, 0.0))
            assert mine.numpy().tobytes() == theirs.tobytes()
    for mine, theirs in zip(kept.edges, of_array.edges, strict=True):
        assert mine.dtype == torch.from_numpy(theirs).dtype
        assert mine.numpy().tobytes() == theirs.tobytes()
    weight, head_weight = kept.edges.weight, kept.edges.head_weight
    alone = table.edges.head_weight > threshold
    if granularity == "head":
        assert torch.equal(head_weight, table.edges.head_weight * alone)
    else:
        of_edge = table.edges.weight > threshold
        assert torch.equal(weight, table.edges.weight * of_edge)
        assert torch.equal(head_weight, table.edges.head_weight * of_edge[:, None])
    torch.testing.assert_close(weight, head_weight.sum(-1), atol=1e-6, rtol=0)
