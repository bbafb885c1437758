"""Work of the plain forward pass, and of two other ways to score all pairs."""

from __future__ import annotations

from gpu_model.shapes import (
    BYTES,
    FLASH,
    GEMM,
    PEAK,
    Fractions,
    Model,
    Target,
    Work,
    causal_pairs,
)


def forward(model: Model, n_tokens: int) -> dict[str, tuple[Work, Fractions]]:
    """The plain forward pass of a text, head at one position; all elementwise work as if free."""
    T, D = n_tokens, model.D
    qkv = model.H * model.K + model.H_kv * (model.K + model.V)
    z = model.H * model.V
    activations = T * (D + qkv + z + D + D + 3 * model.ffn + D)  # in and out of the linear maps
    pairs = causal_pairs(T) * model.H
    return {
        "linear maps": (
            Work(
                matrix=2 * T * model.layer_parameters,
                memory=BYTES * (model.layer_parameters + activations),
                launches=4,
            ).times(model.L),
            GEMM,
        ),
        "attention": (
            Work(
                matrix=2 * pairs * (model.K + model.V),
                vector=4 * pairs,
                special=pairs,
                memory=BYTES * T * (qkv + z),
                launches=1,
            ).times(model.L),
            FLASH,
        ),
        "head": (
            Work(matrix=2 * D * model.vocab, memory=BYTES * D * model.vocab, launches=1),
            GEMM,
        ),
    }


def forward_seconds(model: Model, n_tokens: int, target: Target, *, at_peak: bool = False) -> float:
    """Seconds of the plain forward pass."""
    work = forward(model, n_tokens).values()
    return sum(w.seconds(target, PEAK if at_peak else fractions) for w, fractions in work)


def naive_l1(model: Model, n_tokens: int) -> Work:
    """One fused L1 kernel over all pairs, all layers: |y - alpha u| summed over D coordinates.

    Two operations a coordinate and pair (multiply-add; add of an absolute value), u formed once
    for each (head, key), weights alpha from one product; nothing else is counted.
    """
    pairs = causal_pairs(n_tokens) * model.H
    return Work(
        matrix=2 * n_tokens * model.output_parameters + 2 * pairs * model.K,
        vector=2 * pairs * model.D,
        special=pairs,
        launches=1,
    ).times(model.L)


def materializing(model: Model, n_tokens: int) -> Work:
    """All parts [T, T, H, D] of a layer, future keys included, written once and read once."""
    size = BYTES * n_tokens**2 * model.H * model.D
    return Work(matrix=size / BYTES, memory=2 * size, launches=2).times(model.L)
