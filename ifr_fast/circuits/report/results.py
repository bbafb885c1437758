"""What is measured, and what was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .. import cost as costs
from ..agreement import (
    Agreement,
)
from ..contrast import Components
from ..deletion import Curves
from ..faithfulness import (
    THRESHOLDS,
    Survival,
)
from ..patching import Effects
from ..published import Circuit
from ..tasks import TASKS, Task

if TYPE_CHECKING:
    pass


BY_SIZE = ", size"  # of an account that ranks by the size of its mean, whatever the sign


HEAD_SCORES = (
    "contrastive routes",
    "contrastive routes" + BY_SIZE,
    "contrastive routes, frequency",
    "plain routes",
    "plain routes, frequency",
    "attention",
    "contrastive attention",
)


INPUTS = {"all tokens": False, "last token kept": True}  # what deletion may reach


@dataclass(frozen=True)
class Settings:
    """What is measured, and how much of it."""

    task: str = "ioi"
    n_prompts: int = 50
    seed: int = 0
    threshold: float = 0.01  # of the routes that are compared with patching
    least: float = 0.02  # share of the clean-to-twin difference that makes a head positive
    patch_prompts: int | None = None  # the first so many are patched; None: all
    keep_prompts: int | None = None  # the first so many are ablated; None: all that are patched
    thresholds: tuple[float, ...] = THRESHOLDS  # of the graphs that are kept
    remove_thresholds: tuple[float, ...] = (0.01, 0.04)
    draws: int = 20  # of random graphs
    cost_prompts: int = 5  # that are patched position by position
    input_prompts: int = 20

    def check(self) -> None:
        """Raises ValueError for what cannot be measured."""
        if self.task not in TASKS:
            raise ValueError(f"--task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        asked = ("n_prompts", "draws", "cost_prompts", "input_prompts", "patch_prompts",
                 "keep_prompts")  # fmt: skip
        for name in asked:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.least < 1:
            raise ValueError(f"least: expected a number between 0 and 1, got {self.least}")


class Results(NamedTuple):
    """What a report tells of."""

    settings: Settings
    task: Task
    exact: dict[str, float]  # largest change of a logit
    cost: list[costs.Cost]
    accounts: dict[str, Tensor]  # [P, L * H]
    effects: dict[str, Effects]  # by direction
    agreements: dict[str, dict[str, Agreement]]  # by direction (or "published"), account
    sensitivity: dict[float, dict[str, float]]  # AUC against denoising, by `least`
    kept: Survival
    removed: Survival
    inputs: dict[str, dict[str, list[Curves]]]  # by INPUTS, method
    ffn: Components  # contrastive
    published: Circuit | None


def ranking(name: str, scores: Tensor) -> Tensor:
    """[N] what an account ranks heads by."""
    return scores.mean(0).abs() if name.endswith(BY_SIZE) else scores.mean(0)


def shares(effects: Effects) -> Tensor:
    """[P, L, H] effects in shares of the mean difference that there was."""
    return effects.heads / effects.gap
