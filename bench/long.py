"""One route of a long text: memory, and time beside the recording's.

The default model's rotary base is scaled so that its positions reach as far as the text; what it
then predicts is of no interest here. The recording lies in a file mapped into memory, and a run
that is interrupted is gone on with by the same command.

    python bench/long.py --tokens 32768 --recording long.safetensors
    python bench/long.py --tokens 16384 --recording long.safetensors --all all-routes
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ifr_fast import Tracer
from ifr_fast.benchmark import THRESHOLD, first_tokens, prose

TRAINED = 8192  # tokens of context
HEAD_DIM = 64
ROPE_THETA = 100_000


class Watch:
    """The process's memory at its peak while something runs, in bytes (Linux)."""

    def __init__(self) -> None:
        self.peak = {"RssAnon": 0, "VmRSS": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.peak:
                    self.peak[name] = max(self.peak[name], int(value.split()[0]) * 1024)


def open_scaled(n_tokens: int, impl: str) -> Tracer:
    """The default model with a rotary base for `n_tokens` positions ("NTK-aware" scaling)."""
    factor = max(1.0, n_tokens / TRAINED)
    theta = ROPE_THETA * factor ** (HEAD_DIM / (HEAD_DIM - 2))
    return Tracer.from_pretrained(
        impl=impl,
        max_position_embeddings=max(TRAINED, n_tokens),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--recording", type=Path, help="file to keep it in; default: in memory")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--all", type=Path, help="also all routes, layer by layer into this folder")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    args = parser.parse_args()

    tracer = open_scaled(args.tokens, args.impl)
    plan = tracer.plan(args.tokens, mode="lean", path=args.recording)
    with Watch() as watch:
        time.sleep(0.2)
    libraries = watch.peak["VmRSS"] - plan.weights_bytes - plan.maps_bytes
    console = Console(highlight=False, soft_wrap=True)
    console.print(str(plan))
    token_ids = first_tokens(prose(), tracer.tokenizer, args.tokens)
    figures: dict[str, Any] = {
        "tokens": args.tokens,
        "planned": dict(plan.lines()) | {"seconds": plan.seconds},
    }

    def measured(name: str, job: Any) -> Any:
        with Watch() as watch:
            start = time.perf_counter()
            result = job()
            seconds = time.perf_counter() - start
        figures[name] = {"seconds": seconds, **watch.peak}
        console.print(
            f"{name}: {seconds:.2f} s, resident at most {watch.peak['VmRSS'] / 1e9:.2f} GB, of "
            f"which private {watch.peak['RssAnon'] / 1e9:.2f} GB"
        )
        return result

    recording = measured(
        "recording", lambda: tracer.record(token_ids, mode="lean", path=args.recording)
    )
    figures["recording_bytes"] = recording.nbytes
    for name in ("one route", "one route, again"):
        graph = measured(name, lambda: tracer.trace(recording, threshold=THRESHOLD))
    ratio = figures["one route"]["seconds"] / figures["recording"]["seconds"]
    console.print(
        f"{len(graph.edges.layer)} edges; the route takes {ratio:.4f} of the recording's time"
    )
    # The system may take back pages of a mapped file; only private memory must stay.
    mapped = args.recording is not None
    peak = max(
        figures[name]["RssAnon" if mapped else "VmRSS"] for name in ("recording", "one route")
    )
    figures["libraries"] = libraries
    if not mapped:
        held = plan.weights_bytes + plan.recording_bytes
        of_plan = (peak - libraries) / plan.total_bytes
        console.print(
            f"resident {peak / held:.2f} x (weights + recording), and without Python and its "
            f"libraries ({libraries / 1e9:.2f} GB) {of_plan:.2f} x the plan"
        )
    if args.all is not None:
        routes = measured(
            "all routes",
            lambda: tracer.trace_all(recording, threshold=THRESHOLD, checkpoint=args.all),
        )
        console.print(f"{sum(len(table.edges.row) for table in routes.layers)} edges")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
