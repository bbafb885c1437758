"""compat.flashtrace against the package itself, and against explicit parts in float64."""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hybrids import hybrid
from oracle import importances, proximity
from tiny import LayerAccount, account, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ifr_fast import IfrError, Tracer
from ifr_fast.compat.flashtrace import STOP_TOKENS, FlashTrace, TraceResult
from ifr_fast.compat.flashtrace.scores import IFRAggregate, Options, aggregate, token_matrix

RELATIVE = 1e-4  # relative to the largest score
PROMPTS = [
    (
        "Context: Mary went to the store. John, who was there, gave her a drink, and then left.\n"
        "Question: Who got a drink?",
        "John gave a drink to Mary.\n\nSo the answer is: Mary, at the store.",
    ),
    (
        "def area(width, height):\n    return width * height\n\nprint(area(3, 4))\n# prints",
        " 3 * 4, which is 12. The program prints 12.",
    ),
    (
        "Lyon lies on the Rhône; Paris, the capital of France, on the Seine. Which river flows "
        "through the capital? <b>Answer</b> in a word:",
        " The capital is Paris. It lies on the Seine.",
    ),
]
METHODS: list[dict[str, Any]] = [
    {"method": "ifr-span"},
    {"method": "ifr-span", "output_span": (2, 5)},
    {"method": "ifr-matrix"},
    {"method": "ifr-matrix", "output_span": (2, 5)},
    {"method": "flashtrace"},
    {"method": "flashtrace", "hops": 3, "output_span": (5, 7), "reasoning_span": (0, 4)},
    {"method": "flashtrace", "hops": 0, "output_span": (1, 1)},
]


@pytest.fixture(scope="module")
def package() -> ModuleType:
    try:
        package = importlib.import_module("flashtrace")
    except ModuleNotFoundError as error:
        pytest.skip(f"flashtrace is not installed: {error}")
    core = importlib.import_module("flashtrace.core")
    core.tqdm = functools.partial(core.tqdm, disable=True)
    return package


@contextmanager
def eagerly(model: PreTrainedModel) -> Iterator[None]:
    """The package needs attention weights, which only eager attention returns."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(before)


def traced_by(package: ModuleType, ours: FlashTrace, **call: Any) -> Any:
    names = ("use_chat_template", "generate_kwargs")
    with eagerly(ours.model):
        theirs = package.FlashTrace(
            ours.model, ours.tokenizer, **{name: getattr(ours, name) for name in names}
        )
        return theirs.trace(**call)


def assert_close(got: list[float], expected: list[float]) -> None:
    assert len(got) == len(expected)
    largest = max(map(abs, expected), default=0.0)
    assert got == pytest.approx(expected, rel=0, abs=RELATIVE * largest)


def assert_same(got: TraceResult, expected: Any) -> None:
    """Compares all of a result: texts, scores, hops, ratios, metadata."""
    assert got.prompt_tokens == expected.prompt_tokens
    assert got.generation_tokens == expected.generation_tokens
    assert_close(got.scores, expected.scores)
    top = [[item.index for item in of.topk_inputs(10)] for of in (got, expected)]
    assert top[0] == top[1]
    assert len(got.per_hop_scores) == len(expected.per_hop_scores)
    for mine, their in zip(got.per_hop_scores, expected.per_hop_scores, strict=True):
        assert_close(mine, their)
    assert got.thinking_ratios == pytest.approx(expected.thinking_ratios, abs=1e-4)
    for name in ("output_span", "reasoning_span", "method"):
        assert getattr(got, name) == getattr(expected, name)
    assert got.metadata.keys() == expected.metadata.keys()
    assert_alike(got.to_dict()["metadata"], expected.to_dict()["metadata"])


def assert_alike(got: Any, expected: Any) -> None:
    """Equal keys, lengths, strings and ints, and floats within rounding; notes may differ."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name in got.keys() - {"note"}:
            assert_alike(got[name], expected[name])
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for mine, their in zip(got, expected, strict=True):
            assert_alike(mine, their)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-3, abs=2e-4)
    else:
        assert got == expected


# Against the package, on the default model


@pytest.fixture(scope="module")
def smol_trace(smol: Tracer) -> FlashTrace:
    return FlashTrace(smol.model, smol.tokenizer)


@pytest.mark.default_model
@pytest.mark.parametrize("text", range(len(PROMPTS)))
@pytest.mark.parametrize("call", METHODS, ids=lambda call: "-".join(map(str, call.values())))
def test_the_default_model_as_the_package(
    package: ModuleType, smol_trace: FlashTrace, text: int, call: dict[str, Any]
) -> None:
    prompt, target = PROMPTS[text]
    call = {"prompt": prompt, "target": target, **call}
    assert_same(smol_trace.trace(**call), traced_by(package, smol_trace, **call))


@pytest.mark.default_model
def test_a_chat_template_and_a_generation_as_the_package(package: ModuleType, smol: Tracer) -> None:
    """The template's text around the prompt takes part, but is not shown."""
    options: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}
    ours = FlashTrace(smol.model, smol.tokenizer, use_chat_template=True, generate_kwargs=options)
    call = {"prompt": "Name the capital of France, in a word.", "method": "flashtrace"}
    got = ours.trace(**call)
    assert_same(got, traced_by(package, ours, **call))
    assert "".join(got.prompt_tokens) == " " + call["prompt"]
    assert len(got.generation_tokens) == 7


@pytest.mark.default_model
@pytest.mark.parametrize(("method", "threshold"), [("ifr-span", 1.0), ("ifr-matrix", 0.05)])
def test_a_renorm_threshold_as_the_package(
    package: ModuleType, smol_trace: FlashTrace, method: str, threshold: float
) -> None:
    """Proximities within rounding of the threshold may fall on either side: wider tolerance."""
    prompt, target = PROMPTS[0]
    call = {"prompt": prompt, "target": target, "method": method, "renorm_threshold": threshold}
    got, expected = smol_trace.trace(**call), traced_by(package, smol_trace, **call)
    without = smol_trace.trace(**call | {"renorm_threshold": None})
    largest = max(expected.scores)
    assert got.scores == pytest.approx(expected.scores, rel=0, abs=1e-3 * largest)
    assert got.scores != pytest.approx(without.scores, rel=0, abs=1e-2 * largest)


# Against the package, where values have biases and norms an epsilon that is felt


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, w0 to w93, for two punctuation marks and for the end of a text."""
    vocabulary = {f"w{i}": i for i in range(94)} | {",": 94, ".": 95, "</s>": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="</s>")


@pytest.mark.parametrize("method", ["ifr-span", "ifr-matrix", "flashtrace"])
@pytest.mark.parametrize("name", ["qwen3_5", "bamba"])
def test_linear_attention(package: ModuleType, name: str, method: str) -> None:
    """The package opens no model with other layers; ours sums what a token's parts are."""
    ours = FlashTrace(hybrid(name), word_tokenizer())
    call = {"prompt": PROMPT, "target": TARGET, "method": method}
    with pytest.raises(AttributeError):
        traced_by(package, ours, **call)
    got = ours.trace(**call)
    assert len(got.scores) == len(got.prompt_tokens)
    assert all(0 <= score <= 2 * ours.tracer.decoder.n_layers for score in got.scores)
    if method != "ifr-span":
        return
    recording, tracer = ours.tracer.record(torch.arange(20)), ours.tracer
    expected = torch.zeros(20)
    for scores in tracer.contributions(recording, rows=[19], keep=0.0):
        edges = scores.token_edges
        expected.index_add_(0, edges.source.long(), edges.weight.float())
    whole = aggregate(tracer, recording, 19, 20, Options(parity=False))
    torch.testing.assert_close(whole.token_importance_total, expected, rtol=0, atol=1e-5)


PROMPT, TARGET = "w5 w17 , w9 w33 w60 w2 . w17 w41", " w8 w17 , w72 w9 w30 . w11 "


def tiny(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny_model(family, dtype=dtype)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.05
    return model


@cache
def opened(family: str) -> FlashTrace:
    """A tiny model, opened once for all tests that change neither model nor tokenizer."""
    return FlashTrace(tiny(family), word_tokenizer())


@pytest.mark.parametrize("family", ["llama-bias", "qwen2", "qwen3", "mistral", "mixtral"])
@pytest.mark.parametrize("call", METHODS[::2], ids=lambda call: str(call["method"]))
def test_other_models_as_the_package(
    package: ModuleType, family: str, call: dict[str, Any]
) -> None:
    ours = opened(family)
    call = {"prompt": PROMPT, "target": TARGET, **call}
    assert_same(ours.trace(**call), traced_by(package, ours, **call))


def test_without_parity_values_are_the_models_own(package: ModuleType) -> None:
    model, tokenizer = tiny("qwen2"), word_tokenizer()
    call = {"prompt": PROMPT, "target": TARGET, "method": "ifr-matrix"}
    ours = FlashTrace(model, tokenizer, parity=False)
    theirs = traced_by(package, ours, **call)
    apart = torch.tensor(ours.trace(**call).scores) - torch.tensor(theirs.scores)
    assert float(apart.abs().max()) > 0.01 * max(theirs.scores)


# Against the oracle: what there is no package for, and where it is float32 itself


def span_scores(layers: list[LayerAccount], weights: Tensor) -> Tensor:
    """Token scores [T] of the sum of all rows by `weights` [T], from explicit parts."""
    scores = torch.zeros(len(weights), dtype=torch.float64)
    for layer in layers:
        parts = torch.einsum("hts,shv,hvd->tshd", layer.pattern, layer.v, layer.W_O)
        if layer.gate is not None:
            gated = torch.einsum("hts,shv,thv->tshv", layer.pattern, layer.v, layer.gate)
            parts = torch.einsum("tshv,hvd->tshd", gated, layer.W_O)
        if layer.after is not None:
            parts = parts * layer.after[:, None, None]
        y = weights @ (layer.resid_post if layer.resid_mid is None else layer.resid_mid)
        pairs = proximity(torch.einsum("t,tshd->shd", weights, parts), y)
        pre = layer.resid_pre if layer.to_mid is None else layer.to_mid(layer.resid_pre)
        total = pairs.sum() + proximity(weights @ pre, y)
        if layer.resid_mid is None:
            total = total + proximity(weights @ layer.ffn, y)
        scores += pairs.sum(1) / total
    return scores


def assert_ffn_shares(found: IFRAggregate, layers: list[LayerAccount]) -> None:
    """The FFN's share of the plain sum of the span's rows, and the stream's."""
    for of, layer in zip(found.per_layer, layers, strict=True):
        if layer.resid_mid is None:
            continue
        passed = layer.resid_mid if layer.to_post is None else layer.to_post(layer.resid_mid)
        post, mid, ffn = (x[4:].sum(0) for x in (layer.unscaled, passed, layer.ffn))
        shares = proximity(ffn, post), proximity(mid, post)
        assert of.e_ffn == pytest.approx(float(shares[0] / sum(shares)), abs=1e-4)
        assert of.e_resid_ffn == pytest.approx(float(shares[1] / sum(shares)), abs=1e-4)


FAMILIES = [
    "llama-bias", "gemma2", "gemma4", "gpt_neox", "mistral", "gpt_oss", "qwen3_next",
    "bart", "bert", "doge", "minimax",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("impl", ["cpu", "eager"])
def test_any_model_as_every_part_formed(family: str, impl: str) -> None:
    """The package has no norms and gates behind attention, windows, sinks or parallel blocks."""
    model = tiny_model(family)
    ours = FlashTrace(model, word_tokenizer(), parity=False, impl=impl)
    ids = torch.tensor(ours.tokenizer(PROMPT + TARGET)["input_ids"])
    layers, T = account(model, ids), len(ids)
    expected = sum(importances(layer).heads.sum(0) for layer in layers)
    got = token_matrix(ours.tracer, ours.tracer.record(ids), 4, T, Options(parity=False))
    torch.testing.assert_close(got.double(), expected[4:], rtol=0, atol=1e-4)

    weights = torch.rand(T - 4, generator=torch.Generator().manual_seed(0))
    weights[2] = 0
    of_all = torch.cat([torch.zeros(4), weights / weights.sum()]).double()
    for mode in ("full", "lean"):
        recording = ours.tracer.record(ids, mode=mode)
        options = Options(parity=False)
        found = aggregate(ours.tracer, recording, 4, T, options, weights)
        torch.testing.assert_close(
            found.token_importance_total.double(), span_scores(layers, of_all), rtol=0, atol=1e-4
        )
        assert_ffn_shares(found, layers)
        plain = aggregate(ours.tracer, recording, 4, T, options)
        torch.testing.assert_close(
            plain.token_importance_total.double(),
            span_scores(layers, (of_all > -1).double() * (torch.arange(T) >= 4)),
            rtol=0,
            atol=1e-4,
        )


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_other_implementations_give_the_same(impl: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton")
    model, tokenizer = tiny("llama"), word_tokenizer()
    if impl == "triton":  # interpreted, one layer takes seconds
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    for method in ("ifr-span",) if impl == "triton" else ("ifr-span", "ifr-matrix"):
        call = {"prompt": "w5 w17 , w9", "target": " w8", "method": method}
        got, expected = (
            FlashTrace(model, tokenizer, impl=of).trace(**call) for of in (impl, "eager")
        )
        assert_close(got.scores, expected.scores)


def test_layer_results_sum_to_one_and_to_their_totals() -> None:
    ours = opened("qwen2")
    found = ours.trace(prompt=PROMPT, target=TARGET, method="ifr-span").metadata["ifr"]["aggregate"]
    assert isinstance(found, IFRAggregate)
    assert len(found.per_layer) == ours.tracer.decoder.n_layers
    for layer in found.per_layer:
        assert layer.e_resid_attn + float(layer.e_attn_tokens.sum()) == pytest.approx(1, abs=1e-5)
        assert float(layer.head_importance.sum()) == pytest.approx(
            float(layer.e_attn_tokens.sum()), abs=1e-5
        )
        assert layer.e_ffn + layer.e_resid_ffn == pytest.approx(1, abs=1e-5)
    total = sum(layer.e_attn_tokens for layer in found.per_layer)
    torch.testing.assert_close(found.token_importance_total, total)


# What else users see


def test_nothing_generated() -> None:
    """One target is only an end of text, and one is empty."""
    ours = FlashTrace(tiny("llama"), word_tokenizer())
    result = ours.trace(prompt=PROMPT, target="")
    assert result.generation_tokens == ["</s>"]
    assert result.scores == [0.0] * 10
    ours.tokenizer.eos_token = None
    for method in ("ifr-span", "ifr-matrix", "flashtrace"):
        result = ours.trace(prompt=PROMPT, target="", method=method)
        assert result.scores == [0.0] * 10
        assert result.generation_tokens == []


def test_a_span_of_stop_tokens_alone_scores_nothing() -> None:
    ours = opened("llama")
    span = {"output_span": (0, 1), "reasoning_span": (0, 1)}
    result = ours.trace(prompt=PROMPT, target=" , . w5", hops=2, **span)
    assert result.scores == [0.0] * 10
    assert result.thinking_ratios == [0.0] * 3


def test_stop_tokens_are_the_users_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = opened("llama")
    comma = ours.trace(prompt=PROMPT, target=TARGET).scores[2]
    assert comma == 0
    monkeypatch.setattr("ifr_fast.compat.flashtrace.text.STOP_TOKENS", ["."])
    assert ours.trace(prompt=PROMPT, target=TARGET).scores[2] > 0
    assert STOP_TOKENS == [",", "."]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"method": "ifr"}, "method: expected one of flashtrace, ifr-span, ifr-matrix, got 'ifr'"),
        ({"output_span": (3, 2)}, r"output_span: expected first and last from 0 to 7, got \(3, 2"),
        (
            {"output_span": (0, 8)},
            "output_span: .* from 0 to 7",
        ),  # the end of text is not part of an answer
        ({"output_span": (0, 9), "method": "ifr-span"}, "output_span: .* from 0 to 8"),
        ({"output_span": (-1, 2), "method": "ifr-matrix"}, "output_span: .* from 0 to 8"),
        ({"reasoning_span": (0, 50)}, "reasoning_span: .* from 0 to 7"),
        ({"prompt": ""}, "prompt: expected a text .* got ''"),
    ],
)
def test_arguments_that_are_wrong(call: dict[str, Any], message: str) -> None:
    ours = opened("llama")
    with pytest.raises(ValueError, match=message):
        ours.trace(**{"prompt": PROMPT, "target": TARGET, **call})


def test_weights_that_changed_are_noticed() -> None:
    ours = FlashTrace(tiny("llama"), word_tokenizer())
    with torch.no_grad():
        ours.model.get_submodule("model.layers.1.self_attn.o_proj").weight.mul_(1.5)
    for method in ("ifr-span", "ifr-matrix", "flashtrace"):
        with pytest.raises(IfrError, match="layer 1"):
            ours.trace(prompt=PROMPT, target=TARGET, method=method)


@pytest.mark.parametrize("row", [-2, -3, -4])
def test_a_map_that_is_another_at_one_row_is_noticed(row: int) -> None:
    ours = FlashTrace(tiny("llama"), word_tokenizer())
    projection = ours.model.get_submodule("model.layers.1.self_attn.o_proj")
    seen: list[torch.Tensor] = []
    own = projection.forward

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return own(x)

    projection.forward = watched
    ours.trace(prompt=PROMPT, target=TARGET, method="ifr-matrix")
    at = next(x for x in seen if x.shape[1] > 4)[0, row]

    def bent(x: torch.Tensor) -> torch.Tensor:
        alike = (x - at).norm(dim=-1, keepdim=True) < 1e-4 * at.norm()
        return torch.where(alike, own(x).abs(), own(x))

    projection.forward = bent
    with pytest.raises(IfrError, match="layer 1"):
        ours.trace(prompt=PROMPT, target=TARGET, method="ifr-matrix")


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama").train()
    FlashTrace(model, word_tokenizer()).trace(prompt=PROMPT, target=TARGET)
    assert model.training
    assert not any(
        module._forward_hooks for module in model.modules() if isinstance(module, nn.Module)
    )


@pytest.mark.parametrize("method", ["ifr-span", "ifr-matrix", "flashtrace"])
def test_a_page_of_each_method(method: Any, tmp_path: Path) -> None:
    ours = opened("llama")
    result = ours.trace(prompt=PROMPT, target=TARGET, method=method, output_span=(1, 2))
    result.to_html(tmp_path / "trace.html")
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert f"{result.topk_inputs(1)[0].score:.6f}</td>" in page
    assert page.count("<h2>Hop") == len(result.per_hop_scores)
    assert "&quot;sink_span_absolute&quot;: [" in page


def test_files(tmp_path: Path) -> None:
    tokens = ["<script>alert(1)</script>", "&amp;", "\n", "Rhône"]
    result = TraceResult(
        tokens, ["."], [0.5, 0.0, 0.25, 0.25], [[1.0, 0, 0, 0]], method="<i>", metadata={}
    )
    result.to_json(tmp_path / "trace.json")
    read = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    assert read == result.to_dict()
    assert read["top_inputs"][1] == {"index": 2, "token": "\n", "score": 0.25}
    assert result.topk_inputs(-1) == []
    result.to_html(str(tmp_path / "trace.html"))
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&amp;amp;" in page
    assert re.search(r'title="3: 0.250000"[^>]*>Rhône', page)
    assert "http" not in page.replace("http-equiv", "")
