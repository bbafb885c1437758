"""Shapes of models, ceilings of GPUs, and the work of a launch in them.

A kernel's time on a target is the largest of its ceilings, times the fraction of them that such a
kernel may hope for (GEMM, FLASH, KERNELS, NAIVE).
"""

from __future__ import annotations

from typing import NamedTuple

EXTENSIONS = ("low", "mid", "high")
THRESHOLD = 0.04
BYTES = 2  # of a bfloat16
FILLED = 0.75  # of a line's room for candidates, as the search for where they end aims at
LAUNCH_SECONDS = 5e-6  # from one small kernel's start to the next one's
READ_SECONDS = 20e-6  # the host waits for a number from the device
RECORDED_TOKENS = 32768  # a full recording of Llama-3-8B, log-sum-exp included, fits into 80 GB


class Model(NamedTuple):
    """Shapes of a Llama-style model; all linear maps without bias."""

    name: str
    L: int
    D: int
    H: int
    H_kv: int
    K: int
    V: int
    ffn: int
    vocab: int

    @property
    def layer_parameters(self) -> int:
        """Parameters of the linear maps of one layer."""
        attention = (
            self.D * (self.H * self.K + self.H_kv * (self.K + self.V)) + self.output_parameters
        )
        return attention + 3 * self.D * self.ffn

    @property
    def output_parameters(self) -> int:
        """Parameters of W_O."""
        return self.H * self.V * self.D


SMOLLM2 = Model("SmolLM2-135M", 30, 576, 9, 3, 64, 64, 1536, 49152)
LLAMA_8B = Model("Llama-3-8B", 32, 4096, 32, 8, 128, 128, 14336, 128256)
LLAMA_70B = Model("Llama-3-70B", 80, 8192, 64, 8, 128, 128, 28672, 128256)


class Target(NamedTuple):
    """One GPU's ceilings, a second, as its vendor has them."""

    name: str
    arch: int | str  # as Triton names it
    matrix: float  # bfloat16 FLOP, dense, float32 sums
    fp32: float  # FLOP on vector units; a fused multiply-add is two
    memory: float  # bytes
    source: str

    @property
    def vector(self) -> float:
        """Operations on vector units."""
        return self.fp32 / 2

    @property
    def special(self) -> float:
        """Exponentials: 16 a clock for 128 vector lanes."""
        return self.vector / 8

    @property
    def shared(self) -> float:
        """Bytes from the last cache: 64 a clock for 128 vector lanes."""
        return self.vector / 2


TARGETS = {
    target.name: target
    for target in (
        Target("A100", 80, 312e12, 19.5e12, 2.039e12,
               "NVIDIA A100 80GB SXM datasheet; NVIDIA A100 architecture whitepaper"),
        Target("H100", 90, 989.4e12, 66.9e12, 3.35e12,
               "NVIDIA H100 SXM datasheet; NVIDIA H100 architecture whitepaper"),
        Target("H200", 90, 989.4e12, 66.9e12, 4.8e12,
               "NVIDIA H200 SXM datasheet"),
        Target("MI300X", "gfx942", 1307.4e12, 163.4e12, 5.3e12,
               "AMD Instinct MI300X data sheet; AMD CDNA 3 white paper"),
        Target("B200", 100, 2250e12, 80e12, 8e12,
               "NVIDIA Blackwell architecture technical brief (HGX B200, 1,000 W)"),
    )
}  # fmt: skip


class Fractions(NamedTuple):
    """Fractions of a target's ceilings that a kind of kernel may hope for."""

    matrix: float
    vector: float
    special: float
    memory: float
    shared: float


# Cautious estimates: the forward pass gets the speed of the vendors' best libraries, and the naive
# kernel that of a loop of its arithmetic alone. Our kernels get the speed of tiled Triton kernels
# that work between their products. Their vector operations are counted as written, although
# compilers fuse or share some.
GEMM = Fractions(0.7, 0.5, 0.8, 0.9, 0.5)


FLASH = Fractions(0.6, 0.5, 0.8, 0.9, 0.5)
KERNELS = Fractions(0.5, 0.6, 0.6, 0.7, 0.4)
NAIVE = Fractions(0.6, 0.8, 0.8, 0.9, 0.5)
PEAK = Fractions(1, 1, 1, 1, 1)


class Work(NamedTuple):
    """Work of one launch, or of several together."""

    matrix: float = 0  # FLOP
    vector: float = 0  # operations
    special: float = 0  # exponentials
    memory: float = 0  # bytes to and from device memory
    shared: float = 0  # bytes that programs ask the caches for
    launches: float = 0

    def times(self, n: float) -> Work:
        """n times the work."""
        return Work(*(n * x for x in self))

    def plus(self, other: Work) -> Work:
        """The sum of both."""
        return Work(*(x + y for x, y in zip(self, other, strict=True)))

    def ceilings(self, target: Target, fractions: Fractions) -> dict[str, float]:
        """Seconds by what they are spent on."""
        return {
            "matrix": self.matrix / (target.matrix * fractions.matrix),
            "vector": self.vector / (target.vector * fractions.vector),
            "special": self.special / (target.special * fractions.special),
            "memory": self.memory / (target.memory * fractions.memory),
            "shared": self.shared / (target.shared * fractions.shared),
            "launch": self.launches * LAUNCH_SECONDS,
        }

    def seconds(self, target: Target, fractions: Fractions) -> float:
        """The largest."""
        return max(self.ceilings(target, fractions).values())


def causal_pairs(n_tokens: int) -> int:
    """(row, visible key) of a text."""
    return n_tokens * (n_tokens + 1) // 2
