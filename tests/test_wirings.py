"""Models whose residual stream is changed outside of their layers are refused: when they are
opened, and at the next text where a hook was added afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from tiny import tiny_model, tiny_text
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifr_fast import Tracer, UnsupportedArchitectureError
from ifr_fast.survey.sweep import sweep

T = 12
FAMILIES = ["llama", "gpt_neox", "gemma2", "gpt_neo", "mixtral"]
WITH_HELD_NORMS = [*FAMILIES, "bart", "minimax"]
Change = Callable[[Tensor], Tensor]


def halved(x: Tensor) -> Tensor:
    return x / 2


def shifted(x: Tensor) -> Tensor:
    """Every position gets the stream of the position before it."""
    return x.roll(1, dims=1)


def rolled(x: Tensor) -> Tensor:
    """Every position keeps its numbers, in other places."""
    return x.roll(1, dims=-1)


def averaged(x: Tensor) -> Tensor:
    n = torch.arange(1, x.shape[1] + 1).view(1, -1, 1)
    return x.cumsum(1) / n


def with_the_one_before(x: Tensor) -> Tensor:
    return x + 0.5 * x.roll(1, dims=1)


def moved(x: Tensor) -> Tensor:
    return x + 1e-3


def with_one_row_doubled(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, x.shape[1] // 2] *= 2
    return x


def with_two_rows_exchanged(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, [0, -1]] = x[:, [-1, 0]]
    return x


def with_one_coordinate_set(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 3] = 0
    return x


CHANGES = [
    halved,
    shifted,
    rolled,
    averaged,
    with_the_one_before,
    moved,
    with_one_row_doubled,
    with_two_rows_exchanged,
    with_one_coordinate_set,
]
MIXING = [shifted, averaged, with_the_one_before, with_two_rows_exchanged]


def before(module: nn.Module, change: Change, in_place: bool = False) -> None:
    """A hook that changes the hidden states which a module reads."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        new = change(x)
        if in_place:
            x.copy_(new)
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": new}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return next(x for x in model.modules() if isinstance(x, nn.ModuleList))


def final_norm(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder()
    names = ("norm", "ln_f", "final_layer_norm")
    return next(getattr(decoder, name) for name in names if hasattr(decoder, name))


def assert_refused(run: Callable[[], Any], match: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=match):
        run()


def assert_every_use_is_refused(tracer: Tracer, match: str) -> None:
    text = tiny_text(T)
    assert_refused(lambda: tracer.trace(text), match)
    assert_refused(lambda: tracer.trace_all(text), match)
    assert_refused(lambda: tracer.record(text, mode="lean"), match)
    assert_refused(lambda: tracer.trace([text, text[:-3]]), match)
    assert_refused(lambda: next(tracer.generate(text, max_new_tokens=2)), match)
    assert_refused(lambda: sweep(tracer.decoder, [text], 0.02, tracer.kernel), match)


@pytest.mark.parametrize("family", WITH_HELD_NORMS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_between_layers(change: Change, in_place: bool, family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    tracer = Tracer(model)
    tracer.trace(tiny_text(T))
    before(layers_of(model)[1], change, in_place)
    assert_every_use_is_refused(tracer, "is not entered with the residual stream that the layer")
    assert_refused(lambda: Tracer(model), "is not entered with the residual stream")


@pytest.mark.parametrize("family", WITH_HELD_NORMS)
def test_a_skip_from_the_first_layer(family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    tracer = Tracer(model)
    layers, kept = layers_of(model), list[Tensor]()

    def keep(x: Tensor) -> Tensor:
        kept[:] = [x]
        return x

    before(layers[0], keep)
    tracer.trace(tiny_text(T))
    before(layers[2], lambda x: x + kept[0] if kept[0].shape == x.shape else x)
    assert_every_use_is_refused(tracer, "is not entered with the residual stream that the layer")
    assert_refused(lambda: Tracer(model), "is not entered with the residual stream")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", CHANGES)
def test_before_the_final_norm(change: Change, family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    tracer = Tracer(model)
    before(final_norm(model), change)
    assert_every_use_is_refused(tracer, "no module reads what its last layer returned")
    assert_refused(lambda: Tracer(model), "no module reads what its last layer returned")


@pytest.mark.parametrize("family", WITH_HELD_NORMS)
@pytest.mark.parametrize("change", MIXING)
def test_embeddings_that_are_mixed(change: Change, family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    tracer = Tracer(model)
    tracer.trace(tiny_text(T))
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, __, x: change(x))
    assert_every_use_is_refused(tracer, "mixes the embeddings of several tokens")
    assert_refused(lambda: Tracer(model), "mixes the embeddings of several tokens")


@pytest.mark.parametrize("family", WITH_HELD_NORMS)
def test_a_hook_that_acts_in_decode_steps_alone(family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    tracer = Tracer(model)
    steps = tracer.generate(tiny_text(T), max_new_tokens=3, eos_token_id=[])
    next(steps)
    before(layers_of(model)[1], lambda x: x / 2 if x.shape[1] == 1 else x)
    assert_refused(lambda: next(steps), "is not entered with the residual stream")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_on_the_final_norm_that_acts_in_decode_steps_alone(family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    tracer = Tracer(model)
    steps = tracer.generate(tiny_text(T), max_new_tokens=3, eos_token_id=[])
    next(steps)
    before(final_norm(model), lambda x: x / 2 if x.shape[1] == 1 else x)
    assert_refused(lambda: next(steps), "the final norm is not entered with the residual stream")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_that_acts_at_another_length_alone(family: str) -> None:
    """Opening sees nothing of it, and every text is checked."""
    model = copy.deepcopy(tiny_model(family))
    before(layers_of(model)[1], lambda x: x / 2 if x.shape[1] == T else x)
    tracer = Tracer(model)
    tracer.trace(tiny_text(T + 1))
    assert_refused(lambda: tracer.trace(tiny_text(T)), "is not entered with the residual stream")


def after(module: nn.Module, change: Change) -> None:
    """A hook that changes what a module returns."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    module.register_forward_hook(hook)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("change", [shifted, averaged, with_the_one_before])
@pytest.mark.parametrize("place", ["layer", "mlp", "v_proj", "o_proj"])
def test_outputs_that_are_changed_after_opening(place: str, change: Change, family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    tracer = Tracer(model)
    tracer.trace(tiny_text(T))
    layer = layers_of(model)[1]
    at = {"layer": layer, "mlp": layer.mlp}.get(place)
    module = getattr(layer.self_attn, place) if at is None else at
    after(module, change)
    assert_every_use_is_refused(tracer, "model: ")


LONG = 15  # a length of no probe


def at_long_texts(change: Change) -> Change:
    return lambda x: change(x) if LONG <= x.shape[1] <= LONG + 2 else x


def with_large_rows_mixed(x: Tensor) -> Tensor:
    """The row with the largest first coordinate gets half of the row before it."""
    x, t = x.clone(), int(x[0, :, 0].argmax())
    x[:, t] += 0.5 * x[:, t - 1]
    return x


def assert_long_texts_are_refused(model: PreTrainedModel, match: str) -> None:
    text, tracer = tiny_text(LONG), Tracer(model)
    tracer.trace(tiny_text(LONG - 1))
    assert_refused(lambda: tracer.trace(text), match)
    assert_refused(lambda: tracer.trace_all(text), match)
    assert_refused(lambda: tracer.record(text, mode="lean"), match)
    assert_refused(lambda: tracer.trace([text, text[:-3]]), match)
    assert_refused(lambda: next(tracer.generate(text, max_new_tokens=2)), match)
    assert_refused(lambda: sweep(tracer.decoder, [tiny_text(LONG + 1)], 0.02, tracer.kernel), match)
    tracer.trace(tiny_text(LONG - 1))


def place_of(model: PreTrainedModel, place: str) -> nn.Module:
    layer = layers_of(model)[1]
    return layer if place == "layer" else layer.get_submodule(place)


IN_A_LAYER = ["layer", "mlp", "self_attn.v_proj", "self_attn.q_proj", "self_attn", "mlp.act_fn"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
@pytest.mark.parametrize("change", [averaged, with_large_rows_mixed])
@pytest.mark.parametrize("place", IN_A_LAYER)
def test_a_hook_in_a_layer_that_mixes_rows_at_one_length(
    place: str, change: Change, family: str
) -> None:
    model = copy.deepcopy(tiny_model(family))
    after(place_of(model, place), at_long_texts(change))
    assert_long_texts_are_refused(model, "at this text")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_a_hook_that_changes_large_outputs_of_a_layer(family: str) -> None:
    """It acts on some values alone, and each row as if it were alone."""
    model = copy.deepcopy(tiny_model(family))
    module = layers_of(model)[1]
    limit = float("inf")
    after(module, lambda x: torch.where(x[..., :1] > limit, 1.5 * x, x))
    tracer = Tracer(model)
    tracer.trace(tiny_text(LONG))
    limit = float(tracer.record(tiny_text(LONG), mode="full").resid_post(1)[:, 0].median())
    for use in (tracer.trace, tracer.trace_all):
        assert_refused(lambda use=use: use(tiny_text(LONG)), "not resid_mid plus what its FFN")  # type: ignore[misc]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_a_hook_on_a_layer_that_acts_in_decode_steps_alone(family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    after(layers_of(model)[1], lambda x: x / 2 if x.shape[1] == 1 else x)
    steps = Tracer(model).generate(tiny_text(T), max_new_tokens=3, eos_token_id=[])
    assert_refused(lambda: list(steps), "not resid_mid plus what its FFN")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [averaged, with_the_one_before, with_large_rows_mixed])
def test_embeddings_that_are_mixed_at_one_length(change: Change, family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    after(model.get_input_embeddings(), at_long_texts(change))
    assert_long_texts_are_refused(model, "at this text .* mixes the embeddings")


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox"])
def test_a_hook_that_steers_the_last_token_is_no_mixture(family: str) -> None:
    model = copy.deepcopy(tiny_model(family))

    def steered(x: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], x[:, -1:] + 0.1], 1)

    name = next(name for name in ("mlp", "block_sparse_moe") if hasattr(layers_of(model)[1], name))
    after(getattr(layers_of(model)[1], name), steered)
    for n in (1, 2, 3, LONG):
        Tracer(model).trace(tiny_text(n))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_first_layer_entered_with_other_rows(family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    tracer = Tracer(model)
    before(layers_of(model)[0], shifted)
    assert_every_use_is_refused(tracer, "model: ")


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_that_only_look_change_nothing(family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    tracer = Tracer(model)
    expected = tracer.trace(tiny_text(T), threshold=0.02)
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: None)
        module.register_forward_hook(lambda *_: None)
    got = tracer.trace(tiny_text(T), threshold=0.02)
    assert torch.equal(got.edges.weight, expected.edges.weight)
    assert torch.equal(
        Tracer(model).trace(tiny_text(T), threshold=0.02).edges.weight, got.edges.weight
    )


class Values(nn.Module):
    """A projection of values whose output is changed."""

    def __init__(self, own: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.own, self.change = own, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.own(x))


WITH_OTHER_POSITIONS = [
    with_the_one_before,
    averaged,
    shifted,
    lambda v: v + 0.1 * v.flip(1),
    lambda v: v + 0.01 * v.mean(1, keepdim=True),
    lambda v: torch.cat([v[:, :-1] + v[:, 1:], v[:, -1:]], 1),
]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen2"])
@pytest.mark.parametrize("change", WITH_OTHER_POSITIONS)
def test_values_that_hold_other_positions(change: Change, family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    attention = layers_of(model)[1].self_attn
    attention.v_proj = Values(attention.v_proj, change)
    assert_refused(lambda: Tracer(model), "its values hold what other positions or other layers")


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen2"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.02])
@pytest.mark.parametrize("source", ["first layer", "embeddings"])
def test_values_of_other_layers(source: str, share: float, family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    layers, kept = layers_of(model), list[Tensor]()
    last, first = layers[-1].self_attn, layers[0].self_attn

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        kept[:] = [output]

    if source == "first layer":
        first.v_proj.register_forward_hook(keep)
    else:
        model.get_input_embeddings().register_forward_hook(keep)

    def mixed(v: Tensor) -> Tensor:
        other = kept[0][..., : v.shape[-1]]
        if other.shape != v.shape:  # rows that are run alone
            other = other[:, -1:].expand_as(v)
        return (1 - share) * v + share * other

    last.v_proj = Values(last.v_proj, mixed)
    assert_refused(lambda: Tracer(model), "is not supported")


def test_a_prefix_of_keys_and_values() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_refused(lambda: Tracer(peft.get_peft_model(model, config)), "prompt perhaps|prefix")


@pytest.mark.parametrize("change", [halved, with_the_one_before])
@pytest.mark.parametrize("place", ["o_proj", "embeddings"])
def test_a_refused_hook_that_is_removed_leaves_nothing(place: str, change: Change) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    tracer = Tracer(model)
    expected, blocks = tracer.trace(tiny_text(T), threshold=0.02), tracer.decoder.blocks
    o_proj = layers_of(model)[1].self_attn.o_proj
    module = o_proj if place == "o_proj" else model.get_input_embeddings()
    handle = module.register_forward_hook(lambda _, __, x: change(x))
    if (place, change) != ("embeddings", halved):  # which is another embedding, and no mixture
        assert_refused(lambda: tracer.trace(tiny_text(T)), "model: ")
    handle.remove()
    got = tracer.trace(tiny_text(T), threshold=0.02)
    assert torch.equal(got.edges.weight, expected.edges.weight)
    assert all(mine is theirs for mine, theirs in zip(tracer.decoder.blocks, blocks, strict=True))
