"""compat.transformer_lens against explicit parts from the package's own cache, in float64."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
import torch
from oracle import TOLERANCE, assert_graph_agrees, importances
from same_graph import assert_same_graph
from tiny import VOCAB, LayerAccount, tiny_model, tiny_text
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ifr_fast import IfrError, LayerScores, RouteGraph, Tracer, UnsupportedArchitectureError
from ifr_fast.compat.transformer_lens import CachedRun

N_PROMPTS, T = 3, 17
RELATIVE = 1e-4  # of token scores, relative to the largest


def lens() -> ModuleType:
    try:
        module = importlib.import_module("transformer_lens")
    except ModuleNotFoundError as error:
        pytest.skip(f"transformer-lens is not installed: {error}")
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    return module


# Models


def native(**options: Any) -> Callable[..., nn.Module]:
    """A TransformerBridge around the package's own architecture."""

    def make(_: Any) -> nn.Module:
        lens()
        bridge = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
        config = importlib.import_module("transformer_lens.config").TransformerBridgeConfig
        fields = {
            "d_model": 36, "d_head": 6, "n_layers": 3, "n_ctx": 32, "n_heads": 6, "d_mlp": 52,
            "d_vocab": VOCAB, "act_fn": "gelu", "seed": 0, "architecture": "TransformerLensNative",
        }  # fmt: skip
        return louder(bridge.boot_native(config(**fields | options)))

    return make


def bridged(family: str, *, folded: bool = False) -> Callable[..., nn.Module]:
    """A TransformerBridge around a Hugging Face model, as it is or with its weights processed."""

    def make(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
        lens()
        bridge = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
        model, path = tiny_model(family), tmp_path_factory.mktemp(family)
        model.save_pretrained(path)  # nothing is loaded from a hub: its configuration is read here
        word_tokenizer().save_pretrained(path)
        found = bridge.boot_transformers(str(path), hf_model=model, device="cpu")
        if folded:
            found.enable_compatibility_mode()
        return found

    return make


def hooked(**options: Any) -> Callable[..., nn.Module]:
    """A HookedTransformer, which TransformerLens 4 does not have."""

    def make(_: Any) -> nn.Module:
        package = lens()
        if int(metadata.version("transformer-lens").split(".")[0]) >= 4:
            pytest.skip("expected: HookedTransformer is gone from TransformerLens 4")
        fields = {
            "d_model": 36, "d_head": 6, "n_layers": 3, "n_ctx": 32, "n_heads": 6, "d_mlp": 52,
            "d_vocab": VOCAB, "act_fn": "gelu", "seed": 0,
        }  # fmt: skip
        config = package.HookedTransformerConfig(**fields | options)
        return louder(package.HookedTransformer(config))

    return make


def louder(model: nn.Module) -> nn.Module:
    """Scales weights so that attention is not uniform, and sets nonzero biases."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", pad_token="w3", unk_token="w0"
    )


ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 6, "n_key_value_heads": 2}
MODELS = {
    "native": native(),
    "native-rms-rotary-gqa": native(normalization_type="RMS", gated_mlp=True, **ROTARY),
    "native-attention-only": native(attn_only=True),
    "bridge-gpt2": bridged("gpt2"),
    "bridge-gpt2-folded": bridged("gpt2", folded=True),
    "bridge-llama": bridged("llama"),
    "bridge-qwen2": bridged("qwen2"),
    "bridge-gpt-neox": bridged("gpt_neox"),
    "bridge-gpt-neox-folded": bridged("gpt_neox", folded=True),
    "bridge-gemma2": bridged("gemma2"),
    "hooked": hooked(),
    "hooked-rms-rotary-gqa": hooked(normalization_type="RMS", gated_mlp=True, **ROTARY),
    "hooked-parallel": hooked(parallel_attn_mlp=True),
    "hooked-attention-only": hooked(attn_only=True),
    "hooked-local": hooked(
        use_local_attn=True, window_size=5, attn_types=["global", "local", "local"]
    ),
    "hooked-alibi": hooked(positional_embedding_type="alibi"),
    "hooked-results": hooked(use_attn_result=True, use_split_qkv_input=True),
}
WITH_HUGGING_FACE = {
    "bridge-llama": "llama",
    "bridge-gpt-neox": "gpt_neox",
    "bridge-gemma2": "gemma2",
}

_made: dict[str, nn.Module] = {}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    if name not in _made:
        _made[name] = MODELS[name](tmp_path_factory)
    return _made[name]


# The oracle


def account(model: nn.Module, cache: Any) -> list[LayerAccount]:
    """Each layer of the package's cache in float64; parts add up to the cached activations."""
    layers = []
    for i in range(model.cfg.n_layers):

        def of(name: str, i: int = i) -> Tensor | None:
            key = f"blocks.{i}.{name}"
            return cache[key][0].double() if key in set(cache) else None

        attention = model.blocks[i].attn
        pattern, z, attn_out = of("attn.hook_pattern"), of("attn.hook_z"), of("hook_attn_out")
        W_O = attention.W_O.detach().double()
        b_O = getattr(attention, "b_O", None)
        v = of("attn.hook_v")
        v = v.repeat_interleave(len(W_O) // v.shape[1], dim=1)
        result = torch.einsum("thv,hvd->thd", z, W_O)  # its hook_result
        added = result.sum(1) + (0 if b_O is None else b_O.detach().double())
        after = attn_out / added if of("ln1_post.hook_scale") is not None else None
        if after is None:
            torch.testing.assert_close(added, attn_out, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            torch.einsum("hts,shv->thv", pattern, v), z, rtol=1e-4, atol=1e-4
        )
        pre, post, ffn = of("hook_resid_pre"), of("hook_resid_post"), of("hook_mlp_out")
        mid = pre + attn_out
        parallel = ffn is not None and not torch.allclose(mid + ffn, post, atol=1e-3)
        assert not parallel
        in_parallel = getattr(model.cfg, "parallel_attn_mlp", False)
        layers.append(
            LayerAccount(
                resid_pre=pre,
                resid_mid=None if in_parallel else mid,
                resid_post=post,
                ffn=torch.zeros_like(post) if ffn is None else ffn,
                pattern=pattern,
                v=v,
                W_O=W_O,
                gate=None,
                after=after,
            )
        )
    return layers


def ran(model: nn.Module, seed: int) -> tuple[Tensor, Tensor, Any]:
    ids = tiny_text(T, seed)
    with torch.no_grad():
        logits, cache = model.run_with_cache(ids[None])
    return ids, logits, cache


def dense(scores: LayerScores) -> Tensor:
    """Token edges as a matrix [T, T]."""
    matrix = torch.zeros(T, T, dtype=torch.float64)
    edges = scores.token_edges
    matrix[edges.target, edges.source] = edges.weight.double()
    return matrix


@pytest.mark.parametrize("seed", range(N_PROMPTS))
def test_scores_are_those_of_every_part(model: nn.Module, seed: int) -> None:
    ids, logits, cache = ran(model, seed)
    layers = [importances(layer) for layer in account(model, cache)]
    run = CachedRun(model, ids, cache, logits)
    total, expected_total = torch.zeros(T, T).double(), torch.zeros(T, T).double()
    for scores in run.contributions(keep=0):
        expected = layers[scores.layer]
        tokens = dense(scores)
        heads = expected.heads
        for got, wanted in (
            (scores.residual, expected.residual),
            (scores.ffn, expected.ffn),
            (scores.head_total, heads.sum(2).T),
            (tokens, heads.sum(0)),
        ):
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=TOLERANCE)
        total, expected_total = total + tokens, expected_total + heads.sum(0)
    # Token scores of the last position agree relative to the largest, and so do the top 10.
    got, wanted = total[-1], expected_total[-1]
    assert float((got - wanted).abs().max()) < RELATIVE * float(wanted.max())
    top = wanted.topk(10)
    if float((top.values[:-1] - top.values[1:]).min()) > 2 * TOLERANCE:  # no ties
        assert got.topk(10).indices.tolist() == top.indices.tolist()
    # Even with ties, our ten have the same scores by the package.
    found = wanted[got.topk(10).indices]
    torch.testing.assert_close(found, top.values, rtol=0, atol=2 * TOLERANCE)


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_graphs_are_those_of_every_part(model: nn.Module, granularity: Any) -> None:
    ids, logits, cache = ran(model, 7)
    layers = [importances(layer) for layer in account(model, cache)]
    run = CachedRun(model, ids, cache, logits)
    routes = run.trace_all(threshold=0.02, granularity=granularity)
    for position in (0, 6, T - 1):
        graph = run.trace(position=position, threshold=0.02, granularity=granularity)
        assert_graph_agrees(graph, layers)
        assert_same_graph(routes[position], graph)
    probabilities = logits[0, -1].softmax(-1)
    first = graph.predictions[0]
    assert first.token_id == int(probabilities.argmax())
    assert first.probability == pytest.approx(float(probabilities.max()), abs=1e-6)


# Against Tracer, which opens the same model by itself


@pytest.mark.parametrize("name", WITH_HUGGING_FACE)
def test_a_bridge_gives_the_graphs_of_the_model_in_it(model: nn.Module, name: str) -> None:
    ids = tiny_text(T, 1)
    tracer = Tracer(tiny_model(WITH_HUGGING_FACE[name]))
    expected = tracer.trace(ids, position=[3, -1], threshold=0.02)
    graph = CachedRun.of(model, ids).trace(position=[3, -1], threshold=0.02)
    got = {tuple(x) for x in zip(*(c.tolist() for c in graph.edges[:4]), strict=True)}
    assert got == {tuple(x) for x in zip(*(c.tolist() for c in expected.edges[:4]), strict=True)}
    torch.testing.assert_close(graph.edges.weight, expected.edges.weight, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        graph.token_importance(), expected.token_importance(), rtol=0, atol=1e-4
    )


# What users hand over


@pytest.fixture
def plain(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    if "native" not in _made:
        _made["native"] = MODELS["native"](tmp_path_factory)
    return _made["native"]


def test_every_form_of_a_run(plain: nn.Module) -> None:
    ids, logits, cache = ran(plain, 2)
    expected = CachedRun(plain, ids, cache, logits).trace(threshold=0.02)
    both = torch.stack([tiny_text(T, 5), ids])
    with torch.no_grad():
        of_both = plain.run_with_cache(both)
    squeezed = {name: x[0] for name, x in cache.items()}
    runs = [
        CachedRun.of(plain, ids),
        CachedRun.of(plain, ids[None]),
        CachedRun(plain, ids[None], dict(cache.items()), logits[0]),
        CachedRun(plain, ids, squeezed, logits),
        CachedRun(plain, both, of_both[1], of_both[0], batch_item=1),
        CachedRun(plain, ids, cache, logits, impl="eager"),
        CachedRun(plain, ids, cache, logits, impl="reference"),
    ]
    for run in runs:
        graph = run.trace(threshold=0.02)
        assert graph.tokens == [f"<{i}>" for i in ids.tolist()]
        assert torch.equal(graph.edges.source, expected.edges.source)
        torch.testing.assert_close(graph.edges.weight, expected.edges.weight, rtol=0, atol=2e-5)
    assert CachedRun(plain, ids, cache).trace().predictions == []
    assert isinstance(RouteGraph.to_json(expected), str)


def test_a_pattern_that_a_hook_changed_is_what_is_explained(plain: nn.Module) -> None:
    """A hook hides position 4 from all heads of layer 1, so nothing is read there."""
    ids = tiny_text(T, 3)

    def hide(pattern: Tensor, hook: Any) -> Tensor:
        pattern = pattern.clone()
        pattern[..., 4] = 0
        return pattern

    with torch.no_grad(), plain.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", hide)]):
        logits, cache = plain.run_with_cache(ids[None])
    pattern, v, z = (cache[f"blocks.1.attn.hook_{x}"][0] for x in ("pattern", "v", "z"))
    assert not bool(pattern[..., 4].any())
    if torch.allclose(torch.einsum("hts,shv->thv", pattern, v), z, atol=1e-5):
        run = CachedRun(plain, ids, cache, logits)
        found = {scores.layer: dense(scores) for scores in run.contributions(keep=0)}
        assert not bool(found[1][:, 4].any())
        assert bool(found[2][5:, 4].any())
    else:  # TransformerLens 3 caches it, but its native model does not use it
        with pytest.raises(UnsupportedArchitectureError, match=r"blocks\.1"):
            CachedRun(plain, ids, cache, logits)


@pytest.mark.parametrize("name", ["native", "bridge-gpt-neox", "bridge-gemma2"])
@pytest.mark.parametrize("entry", ["attn.hook_v", "hook_resid_mid", "hook_resid_post"])
def test_what_does_not_add_up_is_refused(model: nn.Module, name: str, entry: str) -> None:
    """A cached activation is changed, so the parts do not add up."""
    ids, logits, cache = ran(model, 3)
    parallel = name == "bridge-gpt-neox"
    changed = dict(cache.items())
    if parallel and entry == "hook_resid_mid":
        assert f"blocks.1.{entry}" not in changed
        return
    changed[f"blocks.1.{entry}"] = 1.1 * changed[f"blocks.1.{entry}"]
    if entry == "hook_resid_post" and not parallel:
        CachedRun(model, ids, changed, logits)  # no sum of parts is compared with this entry
        return
    with pytest.raises(UnsupportedArchitectureError, match=r"blocks\.1: its parts do not add up"):
        CachedRun(model, ids, changed, logits)


def test_a_residual_multiplier(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Granite scales attention's output by a factor before the residual stream."""
    lens()
    model = bridged("granite")(tmp_path_factory)
    ids, logits, cache = ran(model, 3)
    assert tiny_model("granite").config.residual_multiplier != 1
    expected = Tracer(tiny_model("granite")).trace(ids, threshold=0.02)
    graph = CachedRun(model, ids, cache, logits).trace(threshold=0.02)
    torch.testing.assert_close(graph.edges.weight, expected.edges.weight, rtol=0, atol=2e-5)


def test_arguments_that_are_wrong(plain: nn.Module) -> None:
    ids, logits, cache = ran(plain, 3)
    entries = dict(cache.items())

    def refused(message: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match=message):
            CachedRun(plain, *args, **kwargs)

    del entries["blocks.2.attn.hook_pattern"]
    refused(r"cache: has no blocks\.2\.attn\.hook_pattern", ids, entries)
    refused(r"cache: blocks\.0\.\w+ has 17 positions, expected 16", ids[1:], cache)
    refused("batch_item: expected -1 to 0, got 1", ids, cache, batch_item=1)
    refused("logits: expected those of 17 tokens, got 3", ids, cache, logits[:, :3])
    run = CachedRun(plain, ids, cache)
    for call, message in (
        (lambda: run.trace(threshold=2), "threshold"),
        (lambda: run.trace(position=17), "position"),
        (lambda: run.contributions(rows=[17]), "rows: expected -17 to 16"),
        (lambda: run.contributions(layers=[]), "layers: is empty"),
        (lambda: run.contributions(keep=-1), "keep"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert issubclass(UnsupportedArchitectureError, IfrError)
