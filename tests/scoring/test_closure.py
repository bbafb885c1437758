"""The closure check sees every row that is scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opened import tiny_tracer
from tiny import tiny_model, tiny_text
from torch import Tensor, nn

from ifr_fast import IfrError, Tracer
from ifr_fast.scoring.closure import check_closed, check_closure, closure_errors

T = 40


class Bent(nn.Module):
    """An output projection that is another map at the rows of `bent` calls of T rows."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self.rows: list[int] = []

    def forward(self, z: Tensor) -> Tensor:
        out = self.own(z)
        if z.shape[1] == T and self.rows:
            out = out.clone()
            out[:, self.rows] = out[:, self.rows].abs()
        return out


@pytest.mark.parametrize("row", range(0, T, 3))
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_map_that_is_another_at_a_single_row_is_refused(family: str, row: int) -> None:
    model = tiny_model(family)
    layer = model.get_decoder().layers[1]
    attention = layer.self_attn if family == "llama" else layer.attention
    name = "o_proj" if family == "llama" else "dense"
    bent = Bent(getattr(attention, name))
    setattr(attention, name, bent)
    tracer = Tracer(model)
    text = tiny_text(T)
    tracer.trace_all(text)
    bent.rows = [row]
    with pytest.raises(IfrError, match="at layer 1 the parts that were scored do not add up"):
        tracer.trace_all(text)
    recording = tracer.record(text, mode="full")
    with pytest.raises(IfrError, match="at layer 1"):
        next(tracer.contributions(recording, layers=[1]))
    next(tracer.contributions(recording, layers=[2]))


def rows_that_close(n: int, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    resid_pre, bias = torch.randn(n, 24), torch.randn(24)
    parts = torch.randn(n, 5, 24)
    y = (resid_pre + parts.sum(1) + bias).to(dtype)
    signs = torch.where(y >= 0, 1.0, -1.0)
    linear = (signs * parts.sum(1)).sum(-1)
    return {"y": y, "resid_pre": resid_pre.to(dtype), "ffn": None, "bias": bias, "linear": linear}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_each_row(dtype: torch.dtype) -> None:
    rows = rows_that_close(9, dtype)
    errors = closure_errors(**rows)
    assert errors.shape == (9,)
    assert float(errors.max()) < 1
    rows["linear"] = rows["linear"].clone()
    rows["linear"][4] += 0.5 * rows["linear"][4].abs() + 1
    changed = closure_errors(**rows)
    assert float(changed[4]) > 1
    keep = torch.arange(9) != 4
    assert torch.equal(changed[keep], errors[keep])


def test_a_part_beside_attention_belongs_to_the_sum() -> None:
    rows = rows_that_close(6, torch.float32)
    ffn = torch.randn(6, 24)
    rows["linear"] = closure_linear(rows["y"], rows["resid_pre"], ffn, rows["bias"])
    assert float(closure_errors(**rows | {"ffn": ffn}).max()) < 1
    assert float(closure_errors(**rows).max()) > 1


def closure_linear(y: Tensor, resid_pre: Tensor, ffn: Tensor, bias: Tensor) -> Tensor:
    return (torch.where(y >= 0, 1.0, -1.0) * (y - resid_pre - ffn - bias)).sum(-1)


@pytest.mark.parametrize("bad", [1.5, float("inf"), float("nan")])
def test_the_layer_of_the_row_is_named(bad: float) -> None:
    fine = torch.tensor([0.1, 1.0])
    check_closure({3: fine, 5: fine})
    with pytest.raises(IfrError, match="at layer 5"):
        check_closure({3: fine, 5: torch.tensor([0.2, bad, 0.1])})
    with pytest.raises(IfrError, match="at layer 7"):
        check_closed(torch.tensor([0.2, bad]), [6, 7])


@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_a_poisoned_recording_is_noticed(family: str, layer: int, mode: str) -> None:
    """The model attended to other values and keys than those at the position that is changed."""
    tracer, text = tiny_tracer(family), tiny_text(12)
    for field, position in (("v", 11), ("k", 10)):
        recording = tracer.record(text, mode=mode)
        assert 11 in recording.checked_rows.tolist()
        cache = getattr(recording.layers[layer], field).clone()
        cache[position] = -3 * cache[position]
        setattr(recording.layers[layer], field, cache)
        for act in (
            lambda recording=recording: tracer.trace(recording, threshold=0.0),
            lambda recording=recording: tracer.trace_all(recording),
            lambda recording=recording: list(tracer.contributions(recording, layers=[layer])),
        ):
            with pytest.raises(IfrError, match=f"layer {layer} .*do not add up"):
                act()
