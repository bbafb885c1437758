"""Projections whose weights are packed (bitsandbytes, HQQ, quanto and the like), read exactly.

Such a projection has no derivative in forward mode, and many compute in one dtype alone. Its map is
read by feeding an identity through it, and a plain linear map stands in for it while the layer is
probed. Where it rounds what it reads (quantized activations) there is no map: the layer is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..errors import UnsupportedArchitectureError
from .attention import AttentionCall
from .block import TOLERANCE, relative_error
from .hooks import hooked, on_input
from .interface import overriding
from .modes import computing, is_packed, is_plain
from .probing import Probe, refuse

_READ_ROWS = 512  # rows of the identity that pass through a projection at once
_SCALE = 256.0  # of that identity; a bias then rounds little off the weights
_SPACING = 32  # of the large numbers in a test input; activations are not grouped finer
_COARSE = 0.6  # the part of a small change that is lost where activations are quantized


def check_packed(model: nn.Module, run: Callable[[], object]) -> None:
    """Raises UnsupportedArchitectureError if a model with packed weights cannot `run` in inference
    mode, in which texts are recorded.
    """
    packed = next((module for module in model.modules() if is_packed(module)), None)
    if packed is None:
        return
    try:
        with torch.inference_mode():
            run()
    except RuntimeError as error:
        raise UnsupportedArchitectureError(
            f"model: its weights ({type(packed).__name__}) cannot be used in torch.inference_mode "
            f"({error}); open the dequantized model (`model.dequantize()`)"
        ) from error


@contextmanager
def packed_as_plain(probe: Probe) -> Iterator[Container[nn.Module]]:
    """Within, plain maps stand in for the packed projections of the layer's attention output, so
    that it can be derived, and computed in float32. Yields those projections.

    Raises UnsupportedArchitectureError for a projection that rounds what it reads.
    """
    packed = [module for module in probe.module.modules() if is_packed(module)]
    with ExitStack() as stack:
        found = _projections(probe, packed) if packed else {}
        for module, x in found.items():
            plain_map = _plain_map(probe, module, x)
            stack.enter_context(computing(module, lambda _, f=plain_map: f))  # type: ignore[misc]
        yield found


def _projections(probe: Probe, packed: list[nn.Module]) -> dict[nn.Module, Tensor]:
    """The packed modules that read the attention output, each with what it reads."""
    found: dict[nn.Module, Tensor] = {}
    attended = False

    def answer(_: AttentionCall) -> Tensor:
        nonlocal attended
        attended = True
        return probe.z[None]

    def keep(module: nn.Module, x: Tensor) -> None:
        if attended:
            found[module] = x

    inside = [module for module in probe.attention.modules() if module in packed]
    handles = [on_input(m, lambda x, m=m: keep(m, x)) for m in inside]  # type: ignore[misc]
    with overriding(answer), hooked(*handles):
        probe.layer_call(probe.module, probe.resid_pre[None])
    return found


def _plain_map(probe: Probe, module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The map of a packed projection that reads `x` [..., n]; it takes any floating dtype."""
    n, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)

    def run(x: Tensor) -> Tensor:
        found: Tensor = module.forward(x[None])[0].to(wide)
        return found

    def rounds(error: float) -> NoReturn:
        name = next(name for name, each in probe.module.named_modules() if each is module)
        refuse(
            probe,
            f"its projection {name} ({type(module).__name__}) rounds what it reads, to quantized "
            f"activations or a narrower dtype (relative error {error:.1e}), so the parts of its "
            "output are not known; open the dequantized model (`model.dequantize()`)",
        )

    if not is_plain(x):
        rounds(1.0)
    bias = run(x.new_zeros(1, n))
    eye = torch.eye(n, dtype=x.dtype, device=x.device) * _SCALE
    weight = torch.cat([(run(part) - bias) / _SCALE for part in eye.split(_READ_ROWS)])

    rows = x.reshape(-1, n)
    error = relative_error(run(rows), rows.to(wide) @ weight + bias)
    if error > max(TOLERANCE, 2 * torch.finfo(x.dtype).eps):
        rounds(error)
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(2, (2, n), generator=generator) * 2 - 1).to(rows)
    large = torch.arange(n, device=x.device) % _SPACING == 0
    # Beside large numbers, int8 has no place for the first change, nor float8 for the second.
    before = torch.stack([signs[0] * large, signs[0]])
    change = torch.stack([signs[1] * ~large * (3 / 1024), signs[1] / 32])
    level = rows.abs().max().clamp(2**-8, 1).log2().floor().exp2()  # a power of two: exact
    moved = run((before + change) * level) - run(before * level)
    expected = (change * level).to(wide) @ weight
    error = relative_error(moved, expected)
    if error > _COARSE:
        rounds(error)
    return lambda x: nn.functional.linear(x.to(wide), weight.T, bias[0]).to(x.dtype)
