"""The plan for a model that is not at hand, from its configuration alone."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..arguments import check_count
from ..errors import UnsupportedArchitectureError, first_line
from ..model.attention import AttentionCall, may_sum
from ..model.hooks import LayerCall, StopForward
from ..model.interface import attention_through, uses_interface
from .plan import Place, Plan, Room, make_plan
from .sizes import LayerSizes, Sizes


def _end_at_attention(layer: torch.nn.Module) -> None:
    """Makes a layer return its input after its attention is called: experts need real numbers."""
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, _ = LayerCall.of(args, kwargs)
        with suppress(StopForward):
            own(*args, **kwargs)
        return hidden

    layer.forward = forward


def plan_for(
    config: PreTrainedConfig,
    n_tokens: int,
    *,
    device_memory: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    place: Place | None = None,
) -> Plan:
    """The plan for a model that is not loaded, from its configuration. device_memory: memory of the
    device in bytes; None: unlimited.

    Raises UnsupportedArchitectureError if its attention cannot be seen without weights.
    """
    n_tokens = check_count("n_tokens", n_tokens)
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except Exception as error:  # a configuration raises whatever it meets
        raise ValueError(f"config: no model can be made of it: {first_line(error)}") from error
    layers: list[LayerSizes] = []
    text_config = model.config.get_text_config()
    D = text_config.hidden_size
    maps = 0

    def answer(call: AttentionCall) -> Tensor:
        nonlocal maps
        (_, H, _, K), (_, H_kv, _, V) = call.q.shape, call.v.shape
        sums = H if may_sum(K, V) else 0
        layers.append(LayerSizes(H_kv * K, H_kv * V, H * K, 0, H, sums))
        maps += H * V * D * dtype.itemsize
        raise StopForward

    stacks = [x for x in model.modules() if isinstance(x, torch.nn.ModuleList)]
    stack = next((x for x in stacks if len(x) == text_config.num_hidden_layers), stacks[0])
    for layer in stack:
        _end_at_attention(layer)
    ids = torch.zeros(1, 7, dtype=torch.long, device="meta")
    why = ""
    try:
        if uses_interface(model):
            with torch.inference_mode(), attention_through(model, answer):
                model.get_decoder()(
                    input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
                )
    except (RuntimeError, IndexError, ValueError) as error:
        why = f" ({error})"
    if len(layers) != len(stack):
        raise UnsupportedArchitectureError(
            f"config: the attention of {type(model).__name__} cannot be seen without its weights"
            + why
        )
    widths = [max(x.shape[-2:]) for x in stack.parameters() if x.ndim > 1]
    weights = sum(p.nbytes for p in model.parameters())
    sizes = Sizes(
        tuple(layers),
        D,
        max(widths),
        dtype.itemsize,
        weights,
        maps,
        torch.device(device),
        True,
    )
    there = None if device_memory is None else max(0, device_memory - weights - maps)
    return make_plan(sizes, n_tokens, Room(there, None, None), place=place)
