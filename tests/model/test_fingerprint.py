"""A model's fingerprint changes with what its forward pass reads, and with nothing else."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from opened import tiny_tracer
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, tiny_model, tiny_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from ifr_fast import Tracer
from ifr_fast.model.fingerprint import fingerprint
from ifr_fast.model.hooks import user_hooks

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONHASHSEED"}
STRENGTH = 1.0
DIRECTION = torch.ones(36)
DIRECTIONS = {0: torch.ones(36)}
OPTIONS = SimpleNamespace(factor=1.0)
HALVE = functools.partial(torch.mul, torch.ones(1), 0.5)
CODER = nn.Linear(1, 1)


def add_one(x: Tensor) -> Tensor:
    return x + 1


def put(x: Tensor, at: Any, value: float) -> None:
    with torch.no_grad():
        x[at] = value


def scale_in_place(model: nn.Module) -> None:
    model.model.layers[1].self_attn.scaling *= 1.001


EDITS: dict[str, Callable[[Any], Any]] = {
    "one number": lambda m: put(m.model.layers[2].mlp.up_proj.weight, (5, 7), 0.123),
    "one column": lambda m: put(m.model.layers[0].self_attn.q_proj.weight, (slice(None), 3), 0.1),
    "one embedding row": lambda m: put(m.model.embed_tokens.weight, 41, 0.1),
    "behind autograd's back": lambda m: put(m.model.norm.weight.data, 0, 2.0),
    "rotary frequencies": lambda m: put(m.model.rotary_emb.inv_freq, 1, 0.5),
    "a scale": scale_in_place,
    "an epsilon": lambda m: setattr(m.model.norm, "variance_epsilon", 0.1),
    "the configuration": lambda m: setattr(m.config, "rms_norm_eps", 0.1),
    "another module": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.ReLU()),
    "a replaced method": lambda m: setattr(
        m.model.layers[0].mlp, "forward", lambda x: torch.zeros_like(x)
    ),
    "a hook": lambda m: m.model.layers[1].register_forward_hook(lambda *_: None),
    "a pre-hook": lambda m: m.model.layers[1].register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_every_edit_is_seen(edit: Callable[[Any], Any]) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == before == fingerprint(tiny_model("llama"))
    edit(model)
    assert fingerprint(model) != before


def test_a_hook_on_all_modules_is_seen() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert fingerprint(model) != before
    finally:
        handle.remove()
    assert fingerprint(model) == before


class Gate(nn.Module):
    """An activation with a factor that torch does not list."""

    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid() * self.factor


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


class Leaky:
    slope = 0.1

    def __call__(self, x: Tensor) -> Tensor:
        return self.slope * x


class Steep(Leaky):
    slope = 0.2


@dataclasses.dataclass
class Options:
    factor: float


def linear(weight: float) -> nn.Module:
    layer = nn.Linear(1, 1, bias=False)
    put(layer.weight, (0, 0), weight)
    return layer


def act(x: Any) -> Callable[[Any], None]:
    """Puts an activation into a layer, as a plain attribute where it is no module."""

    def edit(model: Any) -> None:
        mlp = model.model.layers[1].mlp
        del mlp.act_fn
        mlp.act_fn = x

    return edit


def on(place: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(place), name, value)


def parametrized(factor: float) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        layer = model.model.layers[1].mlp.up_proj
        nn.utils.parametrize.register_parametrization(layer, "weight", Gate(torch.tensor(factor)))

    return edit


ATTENTION = "model.layers.1.self_attn"
# Pairs of edits that differ in one setting.
SETTINGS: dict[str, list[Callable[[Any], None]]] = {
    "a lambda": [act(lambda x: x * 1.0), act(lambda x: x * 2.0)],
    "a partial": [act(functools.partial(torch.mul, other=f)) for f in (1.0, 2.0)],
    "an object with slots": [act(Slotted(1.0)), act(Slotted(2.0))],
    "a setting of a class": [act(Leaky()), act(Steep())],
    "a tensor that is no buffer": [act(Gate(torch.tensor(f))) for f in (1.0, 2.0)],
    "an array": [act(Gate(np.array([f]))) for f in (1.0, 2.0)],
    "a number of numpy": [act(Gate(np.float32(f))) for f in (1.0, 2.0)],
    "tensors in a list": [act(Gate([torch.tensor(f)])) for f in (1.0, 2.0)],
    "a module in a list": [act(Gate([linear(f)])) for f in (1.0, 2.0)],
    "a data class": [act(Gate(Options(f))) for f in (1.0, 2.0)],
    "a parametrization": [parametrized(1.0), parametrized(2.0)],
    "an integer": [on("model.rotary_emb", "attention_scaling", f) for f in (1, 2)],
    "a switch": [on(ATTENTION, "is_causal", f) for f in (True, False)],
    "no float any more": [on(ATTENTION, "scaling", torch.tensor(f)) for f in (1.0, 2.0)],
    "a layer's own configuration": [
        on(ATTENTION, "config", tiny_model("llama").config.__class__(rope_theta=f))
        for f in (1.0, 2.0)
    ],
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_are_told_apart(kind: str) -> None:
    found = []
    for edit in (*SETTINGS[kind], *SETTINGS[kind]):
        model = tiny_model("llama")
        edit(model)
        found.append(fingerprint(model))
    assert found[:2] == found[2:]
    assert len(set(found)) == 2


NOT_A_NUMBER = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
# Pairs of buffers that differ.
BUFFERS: dict[str, tuple[Tensor, Tensor]] = {
    "of no dimension": (torch.tensor(1.0), torch.tensor(2.0)),
    "empty": (torch.empty(0, 3), torch.empty(0, 4)),
    "not a number": (NOT_A_NUMBER[:1], NOT_A_NUMBER[1:]),
    "the sign of zero": (torch.zeros(1), -torch.zeros(1)),
    "float8": (torch.ones(1).to(torch.float8_e4m3fn), torch.zeros(1).to(torch.float8_e4m3fn)),
    "sparse": (torch.eye(3).to_sparse(), 2 * torch.eye(3).to_sparse()),
    "sparse rows": (torch.eye(3).to_sparse_csr(), torch.eye(3).flip(0).to_sparse_csr()),
    "conjugate": (torch.tensor([1j]), torch.tensor([1j]).conj()),
}


@pytest.mark.parametrize("pair", BUFFERS.values(), ids=BUFFERS.keys())
def test_buffers_of_every_kind_count(pair: tuple[Tensor, Tensor]) -> None:
    found = []
    for x in (*pair, *pair):
        model = tiny_model("llama")
        model.model.register_buffer("extra", x)
        found.append(fingerprint(model))
    assert found[:2] == found[2:]
    assert len(set(found)) == 2


def test_what_stands_in_place_of_a_library_s_code_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    own = modeling_llama.LlamaMLP.forward, modeling_llama.apply_rotary_pos_emb

    @functools.wraps(own[0])
    def forward(self: Any, x: Tensor) -> Tensor:
        return 2 * own[0](self, x)

    def turned(*args: Any) -> Any:
        return own[1](*args)

    found = {fingerprint(model)}
    for place, name, x in (
        (modeling_llama.LlamaMLP, "forward", forward),
        (modeling_llama, "apply_rotary_pos_emb", turned),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, x)
            found.add(fingerprint(model))
    assert len(found) == 3
    assert fingerprint(model) in found


def test_saving_and_moving_change_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    del model.tiny_family  # which is not saved
    before = fingerprint(model)
    model.save_pretrained(tmp_path)
    model.config.use_cache = False
    assert fingerprint(model) == before
    for options in ({}, {"dtype": torch.float32}, {"attn_implementation": "eager"}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert fingerprint(loaded) == before
    assert fingerprint(pickle.loads(pickle.dumps(model))) == before
    assert fingerprint(cpu_offload(copy.deepcopy(model))) == before


class Steering:
    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, *_: Any) -> None:
        return None

    def method(self, *_: Any) -> None:
        return None


def steer(strength: float, direction: Tensor) -> Callable[..., Any]:
    return lambda *_: strength * direction


def reads_globals(*_: Any) -> Any:
    inner = [x * STRENGTH for x in (1, 2)]
    return (inner, add_one(DIRECTION), DIRECTIONS[0], OPTIONS.factor, HALVE(), CODER(DIRECTION))


HOOKS: dict[str, list[Callable[[], Callable[..., Any]]]] = {
    "closures": [
        lambda: steer(1.0, torch.ones(3)),
        lambda: steer(2.0, torch.ones(3)),
        lambda: steer(1.0, torch.zeros(3)),
    ],
    "partials": [
        lambda: functools.partial(steer, 1.0),
        lambda: functools.partial(steer, 2.0),
        lambda: functools.partial(steer, strength=2.0),
    ],
    "objects": [lambda: Steering(1.0), lambda: Steering(2.0)],
    "methods": [lambda: Steering(1.0).method, lambda: Steering(2.0).method],
    "defaults": [lambda: lambda *_, a=1: a, lambda: lambda *_, a=2: a],
    "constants": [lambda: lambda *_: 1, lambda: lambda *_: 2],
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_told_apart_by_what_they_read(kind: str) -> None:
    found = []
    for make in (*HOOKS[kind], *HOOKS[kind]):
        model = tiny_model("llama")
        model.model.layers[0].register_forward_hook(make())
        found.append(fingerprint(model))
    n = len(HOOKS[kind])
    assert found[:n] == found[n:]
    assert len(set(found)) == n


def test_globals_that_a_hook_reads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(reads_globals)
    before = fingerprint(model)
    assert fingerprint(model) == before
    for name, value in (
        ("STRENGTH", 2.0),
        ("DIRECTION", torch.zeros(36)),
        ("DIRECTIONS", {0: torch.zeros(36)}),
        ("OPTIONS", SimpleNamespace(factor=2.0)),
        ("HALVE", functools.partial(torch.mul, torch.ones(1), 0.25)),
        ("CODER", nn.Linear(1, 1)),
        ("add_one", steer),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(globals(), name, value)
            assert fingerprint(model) != before, name


def test_adapters_are_told_apart() -> None:
    def adapted() -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        model = get_peft_model(tiny_model("llama"), config)
        model.add_adapter("other", config)
        return model

    model = adapted()
    base = model.get_base_model()
    found = {"default": fingerprint(base)}
    assert fingerprint(adapted().get_base_model()) == found["default"]
    model.set_adapter("other")
    found["other"] = fingerprint(base)
    with model.disable_adapter():
        found["none"] = fingerprint(base)
    model.set_adapter("default")
    assert fingerprint(base) == found["default"]
    for module in base.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 2
    found["stronger"] = fingerprint(base)
    found["plain"] = fingerprint(tiny_model("llama"))
    assert len(set(found.values())) == len(found)


def test_half_precision_and_a_moved_head_are_told_apart() -> None:
    model = tiny_model("llama")
    untied = copy.deepcopy(model)
    put(untied.lm_head.weight, (0, 0), 0.5)
    assert len({fingerprint(m) for m in (model, untied, copy.deepcopy(model).bfloat16())}) == 3


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_use_does_not_change_it(family: str) -> None:
    tracer = tiny_tracer(family)
    before = tracer.decoder.fingerprint()
    for n in (20, 5):  # lengths that move a rotary table of dynamic length
        tracer.trace(tiny_text(n), threshold=0.1)
    tracer.model.train()
    tracer.model.eval()
    assert tracer.decoder.fingerprint() == before


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotary_table_that_follows_the_text_does_not_count(kind: str) -> None:
    model = tiny_model("llama")
    rotary = model.model.rotary_emb
    rotary.rope_type = kind
    before = fingerprint(model)
    put(rotary.inv_freq, 1, 0.5)
    assert fingerprint(model) == before
    put(model.model.norm.weight, 1, 0.5)
    assert fingerprint(model) != before


def test_processes_agree() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/support')\n"
        "from tiny import tiny_model\n"
        "from ifr_fast.model.fingerprint import fingerprint\n"
        "model = tiny_model('llama')\n"
        "model.model.layers[0].extra = {'b', 'a', 'c'}\n"
        "model.model.layers[0].register_forward_hook(lambda *_: {'x', 'y', 'z'})\n"
        "print(fingerprint(model))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": str(seed), **ENVIRONMENT},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(found) == 1


def test_offloaded_weights_count() -> None:
    offloaded = cpu_offload(tiny_model("llama"))
    assert any(x.is_meta for x in offloaded.parameters())
    found = Tracer(offloaded).decoder.fingerprint()
    assert fingerprint(offloaded) == found
    other = tiny_model("llama")
    put(other.model.layers[2].mlp.up_proj.weight, (5, 7), 0.123)
    assert fingerprint(cpu_offload(other)) != found


def test_hooks_of_transformers_own_are_no_hooks_of_users() -> None:
    """It leaves hooks on modules where hidden states were once asked for."""
    model, ids = tiny_model("llama").eval(), tiny_text(9)
    tracer = Tracer(model)
    before, recording = tracer.decoder.fingerprint(), tracer.record(ids, mode="full")
    model(input_ids=ids[None], output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.modules())
    assert list(user_hooks(model)) == []
    assert tracer.decoder.fingerprint() == before
    again = tracer.record(ids, mode="full")
    assert torch.equal(again.layers[1].resid_mid, recording.layers[1].resid_mid)
