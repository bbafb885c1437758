"""What must not go unnoticed: wrong decompositions, other masks, changed weights, hidden reads."""

import threading
import warnings

import pytest
import torch
from random_inputs import random_inputs
from tiny import tiny_model, tiny_text
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from ifr_fast import IfrError, Tracer, UnsupportedArchitectureError
from ifr_fast.graph import growth
from ifr_fast.graph.tables import LayerTable
from ifr_fast.kernels import eager
from ifr_fast.kernels.contract import EdgeList
from ifr_fast.model.masks import LazyMask
from ifr_fast.model.pretrained import load
from ifr_fast.routes import all_positions
from ifr_fast.scoring import layer as scoring_layer
from ifr_fast.scoring.closure import closure_errors


def _with_forward(model, change):
    """The model with `change(layer)` in place of each layer's forward."""
    for layer in model.model.layers:
        layer.forward = change(layer)
    return model


def _scaled_stream(scale):
    def change(layer):
        def forward(hidden_states, **kwargs):
            normed = layer.input_layernorm(hidden_states)
            attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
            mid = scale * hidden_states + attended
            return mid + layer.mlp(layer.post_attention_layernorm(mid))

        return forward

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scaled_stream_is_refused_in_any_dtype(dtype):
    for scale in (0.97, 0.8):
        model = _with_forward(tiny_model("llama", dtype=dtype), _scaled_stream(scale))
        with pytest.raises(UnsupportedArchitectureError, match=r"model\.layers\.0"):
            Tracer(model)
    Tracer(_with_forward(tiny_model("llama", dtype=dtype), _scaled_stream(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [1.02, "column"])
def test_a_wrong_output_map_does_not_close(dtype, wrong, monkeypatch):
    import ifr_fast.model.probing as module

    probed = module._probe_output_map

    def spoil(*args):
        W_O = probed(*args)
        if wrong == "column":
            W_O[:, :, 0] = 0
            return W_O
        return W_O * wrong

    monkeypatch.setattr(module, "_probe_output_map", spoil)
    with pytest.raises(UnsupportedArchitectureError, match="do not add up"):
        Tracer(tiny_model("gpt2", dtype=dtype))


@pytest.mark.parametrize("n_keys", range(1, 70))
def test_only_causal_and_sliding_masks_pass(n_keys):
    def chunked(b, h, q, k):
        return (k <= q) & (k // 16 == q // 16)

    def sliding(b, h, q, k):
        return (k <= q) & (k > q - 7)

    def plain(b, h, q, k):
        return k <= q

    def accepted(function, window):
        mask = LazyMask(function, torch.device("cpu"))
        return bool(mask.is_causal(n_keys, window))

    assert accepted(plain, None)
    assert accepted(sliding, 7)
    assert accepted(sliding, None) == (n_keys <= 7)
    assert not accepted(lambda b, h, q, k: q >= 0, None)
    mask = LazyMask(chunked, torch.device("cpu"))
    assert accepted(chunked, mask.window(n_keys)) == (n_keys <= 16)
    assert LazyMask(sliding, torch.device("cpu")).window(100) == 7


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    model = tiny_model("llama")
    kept = {k: v for k, v in model.state_dict().items() if ".layers.1.mlp" not in k}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match=r"model: .*lacks 3 weights, model\.layers\.1\.mlp"):
        load(tmp_path)


@pytest.mark.parametrize("mode", ["full", "lean"])
def test_weights_changed_after_opening_are_noticed(mode):
    model = tiny_model("llama")
    tracer = Tracer(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(-3)
    for position in (-1, 5, 0):
        with pytest.raises(IfrError, match="at layer 1 the parts"):
            tracer.trace(tracer.record(tiny_text(20), mode=mode), position=position, threshold=0.0)
    Tracer(model).trace(tiny_text(20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_closure_check_is_tight_from_both_sides(dtype):
    """What rounding leaves open is far below the limit; a layer that moves nothing is above it."""
    for family in ("llama", "mistral", "gpt2", "gpt_neox", "gemma2"):
        model = tiny_model(family, dtype=dtype)
        tracer = Tracer(model)
        for mode in ("full", "lean"):
            recording = tracer.record(tiny_text(40), mode=mode)
            for scores in tracer.contributions(recording):
                assert float(closure_errors(scores.closure).max()) < 0.3, family
    model = tiny_model("llama", dtype=dtype)
    tracer = Tracer(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    with pytest.raises(IfrError, match="at layer 1 the parts"):
        tracer.trace_all(tiny_text(20))


def test_threads_that_score_leave_the_warnings_alone():
    inputs = random_inputs(9, 41, 4, 2, 8, 6, 19)
    before = list(warnings.filters)

    def work():
        for _ in range(30):
            eager.score_attention(inputs, 0.01)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_a_recording_of_another_model_is_refused():
    recording = Tracer(tiny_model("llama", seed=1)).record(tiny_text(5))
    tracer = Tracer(tiny_model("llama"))
    for act in (tracer.trace, tracer.trace_all, tracer.contributions):
        with pytest.raises(ValueError, match=r"text: .*another Tracer"):
            act(recording)


def test_one_host_read_a_layer(monkeypatch):
    """Outside kernels and model, a trace reads each layer's frontier, and the result."""
    tracer = Tracer(tiny_model("llama"), impl="eager")
    recording = tracer.record(tiny_text(20))
    reads: list[str] = []
    inside = False
    scored = scoring_layer.score_layer

    def score_layer(*args):
        nonlocal inside
        inside = True
        try:
            return scored(*args)
        finally:
            inside = False

    def counting(name):
        original = getattr(Tensor, name)

        def method(self, *args, **kwargs):
            if not inside:
                reads.append(name)
            return original(self, *args, **kwargs)

        return method

    for module in ("routes.tracing", "scoring.frontier"):
        monkeypatch.setattr(f"ifr_fast.{module}.score_layer", score_layer)
    for name in ("cpu", "item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, counting(name))

    tracer.trace(recording, threshold=0.02)
    n_layers = tracer.decoder.n_layers
    assert reads.count("cpu") == n_layers + 2  # frontiers, the graph, the prediction's token ids
    reads.clear()
    tracer.trace_all(recording, threshold=0.02)
    assert reads == ["tolist"]  # the closure check


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_the_graph_is_grown_without_a_look_at_values(granularity):
    """On tensors without values: all that depends on them would raise."""
    T, H, N = 20, 4, 60
    with FakeTensorMode():
        table = LayerTable(
            rows=torch.arange(T),
            residual=torch.rand(T),
            ffn=torch.rand(T),
            ffn_residual=torch.rand(T),
            edges=EdgeList(
                torch.zeros(N, dtype=torch.int64),
                torch.zeros(N, dtype=torch.int64),
                torch.rand(N),
                torch.rand(N, H),
            ),
            unattributed=torch.zeros(T, dtype=torch.bool),
            ffn_unattributed=torch.zeros(T, dtype=torch.bool),
        )
        tables = [table, table._replace(ffn_residual=None, ffn_unattributed=None)]
        reached, grown = torch.zeros(T, dtype=torch.bool), []
        for layer, of in enumerate(tables):
            step, reached = growth.grow_layer(layer, of, reached, 0.04, granularity)
            grown.append(step)
        assert [len(x) for x in growth.packed_columns(grown)] == [6, 6, 4]
        routes = all_positions.Routes(
            ["a"] * T, torch.arange(T), 0.04, granularity, tables, lambda p: [], 0.04
        )
        assert routes.head_importance().shape == (T, 2, H)
        assert routes.head_frequency().shape == (2, H)
        with pytest.raises(DynamicOutputShapeException):
            reached.nonzero()


def test_threads_take_turns_with_a_model():
    model = tiny_model("llama")
    tracer = Tracer(model)
    before = model.config._attn_implementation
    expected = tracer.trace(tiny_text(12), threshold=0.02)
    failures: list[BaseException] = []

    def work():
        try:
            for _ in range(5):
                graph = tracer.trace(tiny_text(12), position=-1, threshold=0.02)
                assert torch.equal(graph.edges.source, expected.edges.source)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert model.config._attn_implementation == before
    assert torch.isfinite(model(tiny_text(4)[None]).logits).all()
