"""bench/launch.py; no test depends on time."""

from __future__ import annotations

from typing import Any

import launch


def test_both_ways_launch_with_the_same_arguments() -> None:
    seen: list[dict[str, Any]] = []

    class Noted(launch.StandIn):
        def run(self, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
            by_name = dict(zip(self.arg_names, args, strict=False)) | named
            seen.append({name: id(value) for name, value in by_name.items()} | {"grid": grid})

    launches = launch.layer_launches()
    assert len(launches) > 15
    for x in launches:
        x = x._replace(kernel=Noted(x.kernel))
        for way in (launch.merging, launch.picking):
            way(x)()
        former, now = seen[-2:]
        assert former == now


def test_measures() -> None:
    assert launch.measure(2).keys() == {"before", "launcher", "stand-in"}
