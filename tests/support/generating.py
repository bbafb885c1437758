"""A short prompt and the options of generation from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ifr_fast.generation.steps import GenerationStep

PROMPT = 5  # shorter than the window, which is crossed on the way
NEW = 9
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "threshold": 0.02, "eos_token_id": []}


def whole(prompt: Tensor, steps: list[GenerationStep]) -> Tensor:
    """The prompt and the tokens that followed."""
    return torch.cat([prompt, torch.tensor([step.token_id for step in steps])])
