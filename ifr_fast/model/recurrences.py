"""Linear attention and state spaces: the recurrences that some modules compute in place of softmax
attention, seen through the functions by which they compute them.

A recurrence of transformers is a function of a modeling file. While a model is watched, a function
of ours stands in its place there. It runs the model's own, and hands the attention handler a call
without queries and keys. The call's `recurrence` holds what the weights are made of, and the output
that the model's own function gave. In threads that watch no model, only the model's own runs.

Lightning attention (arXiv 2401.04658) is written out in its module's forward pass. It is seen
through the modules before and behind it: the projection that makes q, k and v, and the norm of its
output.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedArchitectureError
from ..kernels.contract import Pattern
from ..kernels.recurrences.gated_delta import GatedDelta
from ..kernels.recurrences.state_space import StateSpace
from .attention import AttentionCall, Recurrence
from .hooks import in_this_thread, marked
from .masks import causal_mask


class _Seen(NamedTuple):
    """What a recurrence function was called with."""

    v: Tensor  # [B, T, H, V]
    parts: tuple[Tensor, ...]  # [B, T, ...], the fields of `kind`
    kind: Callable[..., Pattern]


def _gated_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> _Seen:
    """The arguments of `torch_chunk_gated_delta_rule`, as its recurrence uses them."""
    if initial_state is not None:
        raise UnsupportedArchitectureError("model: a recurrence begins with a state of its own")
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k = (x.to(wide) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    group = value.shape[2] // key.shape[2]
    q, k = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in (q, k))
    g = g if g.ndim == 4 else g[..., None]  # one for each channel in Kimi delta attention
    return _Seen(value, (q * q.shape[-1] ** -0.5, k, g.to(wide), beta.to(wide)), GatedDelta)


def _state_space(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 0,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> _Seen:
    """The arguments of `mamba2_chunk_scan`, as its recurrence uses them."""
    if initial_states is not None:
        raise UnsupportedArchitectureError("model: a recurrence begins with a state of its own")
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = nn.functional.softplus(dt)
    dt = dt.clamp(*dt_limit).to(wide)
    skipped = torch.zeros_like(dt) if D is None else D.to(wide).expand(dt.shape).contiguous()
    parts = (C.to(wide), B.to(wide), A.to(wide) * dt, dt, skipped)
    return _Seen(hidden_states, parts, StateSpace)


# By the names of transformers' functions.
_RECURRENCES: dict[str, Callable[..., _Seen]] = {
    "torch_chunk_gated_delta_rule": _gated_delta,
    "chunk_kimi_delta_attention": _gated_delta,
    "mamba2_chunk_scan": _state_space,
}


def mixers(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that compute a recurrence."""
    found = _mixers.get(model)
    if found is None:
        found = _mixers[model] = [
            x for x in model.modules() if _functions_of(type(x).forward) or _is_lightning(x)
        ]
    return found


_mixers: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()


@functools.cache
def _functions_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of recurrence functions that a forward function of a class calls."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    names = () if code is None else code.co_names
    return tuple(name for name in _RECURRENCES if name in names)


@contextmanager
def recurrences_through(
    model: nn.Module, answer: Callable[[AttentionCall], Tensor], watched: Callable[[], bool]
) -> Iterator[None]:
    """Within, `answer` gives the output of each recurrence of `model`, in contexts where `watched`
    is true.
    """
    found = mixers(model)
    if not found:
        yield
        return
    with ExitStack() as stack:
        for mixer in found:
            if _is_lightning(mixer):
                for handle in _lightning(mixer, answer):
                    stack.callback(handle.remove)
                continue
            stack.callback(mixer.register_forward_pre_hook(in_this_thread(_enter)).remove)
        places = {
            (type(x).__module__, name) for x in found for name in _functions_of(type(x).forward)
        }
        for place in sorted(places):
            stack.enter_context(_replaced(*place, answer, watched))
        yield


def _is_lightning(module: nn.Module) -> bool:
    """True of MiniMax's lightning attention."""
    parts = ("slope_rate", "diagonal_decay", "act_fn", "qkv_proj", "norm", "out_proj", "head_dim")
    return all(hasattr(module, name) for name in parts)


def _lightning(mixer: Any, answer: Callable[[AttentionCall], Tensor]) -> Iterator[RemovableHandle]:
    """Hooks by which `answer` gives the output of a lightning attention,

    o_t = sum over j <= t of exp(-slope (t - j)) (q_t . k_j) v_j.
    """
    projected: list[Tensor] = []

    def keep(_: nn.Module, __: Any, qkv: Tensor) -> None:
        projected[:] = [qkv]

    def change(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (qkv,), (output, *rest) = projected, args
        d = mixer.head_dim
        qkv = mixer.act_fn(qkv).unflatten(-1, (-1, 3 * d))
        q, k, v = qkv.split(d, dim=3)  # [B, T, H, d]
        wide = torch.promote_types(v.dtype, torch.float32)
        ones = torch.ones(v.shape[:3], dtype=wide, device=v.device)
        a = -mixer.slope_rate.view(-1).to(wide) * ones
        seen = _Seen(v, (q.to(wide), k.to(wide), a, ones, torch.zeros_like(ones)), StateSpace)
        z = answer(_call(mixer, seen, output))
        return z.reshape(output.shape).to(output.dtype), *rest

    yield mixer.qkv_proj.register_forward_hook(in_this_thread(keep))
    yield mixer.norm.register_forward_pre_hook(in_this_thread(change))


def _enter(mixer: nn.Module, *_: Any) -> None:
    _mixer.set(mixer)


_mixer: ContextVar[nn.Module | None] = ContextVar("ifr_fast_mixer", default=None)
_lock = Lock()
_own: dict[tuple[str, str], Callable[..., Any]] = {}
_users: Counter[tuple[str, str]] = Counter()


@contextmanager
def _replaced(
    module: str, name: str, answer: Callable[[AttentionCall], Tensor], watched: Callable[[], bool]
) -> Iterator[None]:
    """Within, the function `name` of a modeling file is ours; threads may be within together."""
    place, namespace = (module, name), vars(sys.modules[module])
    with _lock:
        if not _users[place]:
            _own[place] = namespace[name]
            namespace[name] = _instead(_own[place], _RECURRENCES[name], answer, watched)
        _users[place] += 1
    try:
        yield
    finally:
        with _lock:
            _users[place] -= 1
            if not _users[place]:
                namespace[name] = _own.pop(place)


def _instead(
    own: Callable[..., Any],
    read: Callable[..., _Seen],
    answer: Callable[[AttentionCall], Tensor],
    watched: Callable[[], bool],
) -> Callable[..., Any]:
    @functools.wraps(own)
    def called(*args: Any, **kwargs: Any) -> Any:
        mixer = _mixer.get()
        if mixer is None or not watched():
            return own(*args, **kwargs)
        seen = read(*args, **kwargs)
        returned = own(*args, **kwargs)
        output = returned if isinstance(returned, Tensor) else returned[0]
        z = answer(_call(mixer, seen, output)).reshape(output.shape).to(output.dtype)
        return z if returned is output else (z, *returned[1:])

    return marked(called)


def _call(mixer: nn.Module, seen: _Seen, output: Tensor) -> AttentionCall:
    made_of = Recurrence(seen.parts, seen.kind, output.reshape(seen.v.shape))
    return call_of(mixer, seen.v, made_of)


def call_of(mixer: nn.Module, v: Tensor, made_of: Recurrence) -> AttentionCall:
    """The call of attention of a recurrence with values v [B, T, H, V]."""
    B, T, H, _ = v.shape
    none, v = v.new_empty(B, H, T, 0), v.transpose(1, 2)
    return AttentionCall(mixer, none, none, v, _mask(v.device), 1.0, None, None, None, made_of)


@functools.cache
def _mask(device: torch.device) -> Any:
    return causal_mask(None, device)
