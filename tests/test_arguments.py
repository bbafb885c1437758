"""Wrong values for every parameter of the public methods: an answer, or one error that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_values import bad_values, parameters, refused_otherwise
from opened import tiny_tracer
from tiny import tiny_text

from ifr_fast import Tracer, circuits
from ifr_fast.arguments import check_unicode
from ifr_fast.benchmark import measure
from ifr_fast.circuits.report import Settings
from ifr_fast.compat import eap_ig, flashtrace, llm_transparency_tool
from ifr_fast.survey import survey

T = 6


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Functions, and arguments that they take."""
    folder = tmp_path_factory.mktemp("files")
    tracer = tiny_tracer("llama")
    text = tiny_text(T)
    recording, graph, routes = tracer.record(text), tracer.trace(text), tracer.trace_all(text)
    of = {"text": recording}
    (folder / "graph").touch()
    llm = llm_transparency_tool.TransparentLlm.of(tracer)
    llm.run([text.tolist()])
    components = eap_ig.Graph.from_model(tracer)
    scores = {"scores": torch.tensor([1.0, 2]), "positive": torch.tensor([True, False])}
    one = {"prompt": recording, "max_new_tokens": 1}
    functions: dict[str, tuple[Any, dict[str, Any]]] = {
        "record": (tracer.record, {"text": text}),
        "record batch": (tracer.record, {"text": [text]}),
        "load_recording": (tracer.load_recording, {"path": folder / "missing"}),
        "plan": (tracer.plan, {"n_tokens": T}),
        "trace": (tracer.trace, of),
        "trace_all": (tracer.trace_all, of),
        "generate": (tracer.generate, one),
        "sample": (tracer.generate, {**one, "do_sample": True}),
        "contributions": (tracer.contributions, of),
        "contribution_map": (tracer.contribution_map, {**of, "layer": 0}),
        "logit_lens": (tracer.logit_lens, {**of, "nodes": (0, "mid", 0)}),
        "promoted_tokens": (tracer.promoted_tokens, {**of, "layer": 0}),
        "promoted_tokens of a head": (tracer.promoted_tokens, {**of, "layer": 0, "head": 0}),
        "neurons": (tracer.neurons, {**of, "layer": 0}),
        "likeliest": (tracer.likeliest, {}),
        "compare": (graph.compare, {"other": graph}),
        "prune": (graph.prune, {}),
        "graph.reach": (graph.reach, {}),
        "routes_from": (graph.routes_from, {}),
        "steps": (graph.steps, {}),
        "graph.save": (graph.save, {}),
        "graph.load": (graph.load, {}),
        "to_parquet": (graph.to_parquet, {"path": folder / "parquet"}),
        "to_pandas": (graph.to_pandas, {}),
        "to_arrow": (graph.to_arrow, {}),
        "to_neuronpedia": (graph.to_neuronpedia, {}),
        "top_paths": (graph.top_paths, {}),
        "top_routes": (graph.top_routes, {}),
        "routes.at": (routes.at, {}),
        "routes.predict": (routes.predict, {}),
        "routes.reach": (routes.reach, {}),
        "routes.save": (routes.save, {}),
        "routes.load": (routes.load, {}),
        "recording.save": (recording.save, {}),
        "components": (circuits.components, {"graphs": [graph]}),
        "contrastive": (
            lambda **k: circuits.contrastive(tracer, [text], against=[text], **k),
            dict.fromkeys(("position", "threshold", "granularity", "measure", "batch_size")),
        ),
        "mean_activations": (
            lambda **k: circuits.mean_activations(tracer.decoder, **{"texts": [text], **k}),
            dict.fromkeys(("texts", "over")),
        ),
        "precision_at": (lambda k: circuits.precision_at(**scores, k=k), {}),
        "mean_interval": (lambda seed: circuits.mean_interval(torch.ones(3), seed=seed), {}),
        "Settings": (lambda **k: Settings(**k).check(), vars(Settings())),
        "survey": (
            lambda **k: _checked_survey(folder, tracer, **k),
            dict.fromkeys(
                ("thresholds", "label_by", "text_field", "split", "max_tokens", "batch_tokens",
                 "window_tokens", "engine", "workers", "resume", "strict", "model_options")
            ),
        ),
        "decomposed_ffn_out": (llm.decomposed_ffn_out, {"batch_i": 0, "layer": 0, "pos": 0}),
        "attention_matrix": (llm.attention_matrix, {"batch_i": 0, "layer": 0, "head": 0}),
        "tokens_to_strings": (llm.tokens_to_strings, {}),
        "unembed": (llm.unembed, {"t": torch.zeros(36), "normalize": True}),
        "run": (llm.run, {}),
        "build_full_graph": (llm_transparency_tool.build_full_graph, {"model": llm}),
        "TransparentLlm.of": (llm_transparency_tool.TransparentLlm.of, {"tracer": tracer}),
        "apply_threshold": (components.apply_threshold, {"threshold": 0.1}),
        "apply_topn": (components.apply_topn, {"n": 1}),
        "apply_greedy": (components.apply_greedy, {"n_edges": 1}),
        "to_json": (components.to_json, {}),
        "from_json": (components.from_json, {}),
        "from_model": (components.from_model, {}),
        "measure": (
            lambda **k: measure(tracer, **{"token_ids": text, "repeat": 1, **k}),
            dict.fromkeys(("token_ids", "threshold")),
        ),
    }  # fmt: skip
    return functions


def _checked_survey(folder: Path, tracer: Tracer, **options: Any) -> None:
    """A survey whose options are all that can be wrong, but for an input that is not there."""
    try:
        survey(folder / "missing", folder / "out", model=tracer, **options)
    except ValueError as error:
        if not str(error).startswith("inputs: "):
            raise


NAMES = [
    "record", "record batch", "load_recording", "plan", "trace", "trace_all", "generate", "sample",
    "contributions", "contribution_map", "logit_lens", "promoted_tokens",
    "promoted_tokens of a head", "neurons", "likeliest", "compare", "prune", "graph.reach",
    "routes_from", "steps", "graph.save", "graph.load", "to_parquet", "to_pandas", "to_arrow",
    "to_neuronpedia", "top_paths", "top_routes", "routes.at", "routes.predict", "routes.reach",
    "routes.save", "routes.load", "recording.save", "components", "contrastive",
    "mean_activations", "precision_at", "mean_interval", "Settings", "survey",
    "decomposed_ffn_out", "attention_matrix", "tokens_to_strings", "unembed", "run",
    "build_full_graph", "TransparentLlm.of", "apply_threshold", "apply_topn", "apply_greedy",
    "to_json", "from_json", "from_model", "measure",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_wrong_values_are_refused_by_name(
    calls: dict[str, tuple[Any, dict[str, Any]]],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(calls) == NAMES
    function, given = calls[name]
    varied = parameters(function) or list(given)
    found = {
        (parameter, what): wrong
        for parameter in varied
        for what, value in bad_values().items()
        if (wrong := refused_otherwise(function, given, parameter, value)) is not None
    }
    assert found == {}


IDS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.trace(IDS, position=[0, 1], position_weights=[1e308, 1e308]),
         r"position_weights: .* got \[1e\+308, 1e\+308\]"),
        (lambda t: t.trace(IDS.to("meta")), r"text: expected token ids .* int64, on meta"),
        (lambda t: t.trace(IDS.to_sparse()), r"text: expected token ids .* torch.sparse_coo"),
        (lambda t: t.trace(IDS * 1j), r"text: expected token ids .* complex64"),
        (lambda t: t.trace({1, 2}), r"text: expected a string, token ids or messages"),
        (lambda t: t.trace(IDS, position={0}), r"position: expected .*, got {0}"),
        (lambda t: t.trace(IDS, position={0: 1}), r"position: expected .*, got {0: 1}"),
        (lambda t: t.trace(IDS, batch_size=-5), r"batch_size: expected at least 1, got -5"),
        (lambda t: t.record(IDS, batch_size=0), r"batch_size: expected at least 1, got 0"),
        (lambda t: t.trace(IDS, add_special_tokens=1), r"add_special_tokens: expected True or Fa"),
        (lambda t: t.plan("8"), r"n_tokens: expected an int, got '8'"),
        (lambda t: t.plan(10**30), r"n_tokens: expected at most 2147483647"),
        (lambda t: t.plan(8, max_memory=10**5000), r"max_memory: expected a size such as 8GB"),
        (lambda t: t.contributions(IDS, keep="0.1"), r"keep: expected a number from 0 to 1"),
        (lambda t: t.contributions(IDS, keep=True), r"keep: expected a number from 0 to 1"),
        (lambda t: t.contributions(IDS, rows=IDS.to("meta")), r"rows: .* on meta"),
        (lambda t: t.generate(IDS, do_sample=True, temperature="1"), r"temperature: .* got '1'"),
        (lambda t: t.generate(IDS, do_sample=True, temperature=10**400), r"temperature: expected"),
        (lambda t: t.generate(IDS, do_sample="x"), r"do_sample: expected True or False, got 'x'"),
        (lambda t: t.generate(IDS, do_sample=True, top_k=True), r"top_k: expected an int"),
        (lambda t: t.generate(IDS, eos_token_id=["x"]), r"eos_token_id: expected an int, got 'x'"),
        (lambda t: t.generate(IDS, eos_token_id=10**6), "eos_token_id: expected at most "),
        (lambda t: t.generate(IDS, eos_token_id=[0, -1]), "eos_token_id: expected at least 0"),
        (lambda t: t.generate(IDS, generator=3), r"generator: expected a torch.Generator"),
        (lambda t: t.trace(IDS).top_paths(10**21), r"k: expected at most 2147483647"),
        (lambda t: t.trace(IDS, position=10**5000), r"position: expected -3 to 2, got a int"),
        (lambda t: Tracer(t.model, "tokenizer"), r"tokenizer: expected a transformers tokenizer"),
        (lambda t: Tracer(t.model, impl=["cpu"]), r"impl: expected one of auto, reference"),
    ],
)  # fmt: skip
def test_messages(call: Callable[[Tracer], Any], message: str) -> None:
    tracer = tiny_tracer("llama")
    with pytest.raises(ValueError, match="^" + message):
        _first(call(tracer))


def _first(found: Any) -> None:
    if isinstance(found, Iterator):
        list(islice(found, 1))


def test_large_weights_that_have_a_sum() -> None:
    tracer = tiny_tracer("llama")
    graph = tracer.trace(IDS, position=[0, 1], position_weights=[1e307, 3e307])
    assert graph.starts == {0: 0.25, 1: 0.75}


def test_halves_of_characters() -> None:
    assert check_unicode("text", "caf\u00e9 \U0001f389") == "caf\u00e9 \U0001f389"
    for text in ("caf\udce9", "caf\ud83c"):  # a byte that is not UTF-8; half an emoji
        with pytest.raises(ValueError, match=r"text: character 3 is .* half of a character"):
            check_unicode("text", text)


def test_targets_and_options_of_flashtrace() -> None:
    face: Any = object.__new__(flashtrace.FlashTrace)
    for options, message in [
        ({"target": 3}, "target: expected a string, got 3"),
        ({"prompt": b"x"}, "prompt: expected a string"),
        ({"target": "x", "hops": "2"}, "hops: expected an int, got '2'"),
        ({"target": "x", "output_span": 3}, "output_span: expected a sequence, got 3"),
        ({"target": "x", "output_span": (1, 2, 3)}, r"output_span: expected \(first, last\)"),
        ({"target": "x", "renorm_threshold": "x"}, "renorm_threshold: expected a number"),
        ({"target": "x", "method": 3}, "method: expected one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            face.trace(**{"prompt": "a prompt", **options})
