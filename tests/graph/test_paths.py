"""The heaviest paths and routes of a graph, against every path listed one by one."""

from __future__ import annotations

from collections import defaultdict

import pytest
from listed_paths import edges_of, head_edges_of, paths

from ifr_fast import RouteGraph
from ifr_fast.graph.tables import EdgeKind


def test_top_paths_are_the_heaviest_of_all(small: RouteGraph) -> None:
    every = sorted(paths(small), key=lambda path: -path[0])
    assert len(every) > 20
    listed = {tuple(steps): weight for weight, steps in every}
    for k in (1, 2, 7, 20):
        found = small.top_paths(k)
        assert len(found) == k
        weights = [path.weight for path in found]
        assert weights == pytest.approx([weight for weight, _ in every[:k]], rel=1e-12)
        assert weights == sorted(weights, reverse=True)
        assert len({tuple(path.steps) for path in found}) == k
        for path in found:
            assert listed[tuple(path.steps)] == pytest.approx(path.weight, rel=1e-12)
            assert path.steps[0].target == small.position
            for upper, lower in zip(path.steps, path.steps[1:], strict=False):
                assert upper.source == lower.target
                read = upper.kind == EdgeKind.ATTENTION
                pre = small.source_layers[upper.layer] if read else upper.layer
                assert lower.layer in (upper.layer, pre - 1)
            last = path.steps[-1]
            assert (small.source_layers[last.layer] if last.kind == 0 else last.layer) == 0
    everything = small.top_paths(10 * len(every))
    assert {tuple(path.steps) for path in everything} == set(listed)


def test_top_routes_sum_the_paths_that_hop_alike(small: RouteGraph) -> None:
    classes: dict[tuple[tuple[int, int, int], ...], float] = defaultdict(float)
    for weight, steps in paths(small):
        hops = tuple(
            (s.layer, s.target, s.source)
            for s in steps
            if s.target != s.source or (s.kind == 0 and small.source_layers[s.layer] != s.layer)
        )
        classes[hops] += weight
    every = sorted(classes.values(), reverse=True)
    assert len(every) > 5
    found = small.top_routes(10 * len(every))
    assert [route.weight for route in found] == pytest.approx(every, rel=1e-9)
    attention = {
        (s.layer, s.target, s.source): s.weight
        for s in edges_of(small)
        if s.kind == EdgeKind.ATTENTION
    }
    heads: dict[tuple[int, int, int], dict[int, float]] = defaultdict(dict)
    for layer, head, target, source, weight in head_edges_of(small):
        heads[layer, target, source][head] = weight
    for route in found:
        hops = tuple((hop.layer, hop.target, hop.source) for hop in route.hops)
        assert classes.pop(hops) == pytest.approx(route.weight, rel=1e-9)
        assert route.source == (hops[-1][2] if hops else small.position)
        for hop, key in zip(route.hops, hops, strict=True):
            assert hop.weight == pytest.approx(attention[key], rel=1e-5)
            assert dict(hop.heads) == heads[key]
            assert [w for _, w in hop.heads] == sorted(heads[key].values(), reverse=True)
    assert not classes
    top = small.top_routes(3)
    assert [route.weight for route in top] == pytest.approx(every[:3], rel=1e-9)


@pytest.mark.parametrize("k", [0, -1])
def test_at_least_one_path_is_to_be_asked_for(small: RouteGraph, k: int) -> None:
    with pytest.raises(ValueError, match=r"k: expected at least 1"):
        small.top_paths(k)
    with pytest.raises(ValueError, match=r"k: expected at least 1"):
        small.top_routes(k)
