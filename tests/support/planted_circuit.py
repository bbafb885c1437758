"""A model whose circuit is known because it was written by hand: induction, [A] [B] ... [A] -> [B].

Two layers of three heads on a GPT-2. Its residual stream has a place for the token, one for the
position, one for what the token before was, one for what is to come, and one that nobody reads.

- 0.0 reads the position before and writes its token where "the token before" belongs.
- 1.1 looks for positions whose token before is the token here, and writes theirs as what comes;
  where there is none, it rests on the first token, and writes nothing.
- 0.2 and 1.0 are active at the last position whatever the text: they write much to where nobody
  reads.
- Everything else, FFN blocks among it, is small random weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ifr_fast.circuits import Prompt, Task

VOCAB, T, FIRST = 24, 14, 0  # all texts begin with the token FIRST
CIRCUIT = {(0, 0), (1, 1)}
ALWAYS_ACTIVE = {(0, 2), (1, 0)}
_HEADS, _WIDTH = 3, 32
_REST = 30  # where a head's width is not used otherwise
_TOKEN, _POSITION, _BEFORE, _NEXT, _JUNK = 0, 24, 40, 64, 88  # where each place begins
_D = _HEADS * _WIDTH


def induction_model() -> GPT2LMHeadModel:
    """The model, in float64."""
    generator = torch.Generator().manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=16,
        n_embd=_D,
        n_layer=2,
        n_head=_HEADS,
        n_inner=_D,
        tie_word_embeddings=False,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.002 * noise if name.endswith("weight") else 0 * noise)
        body = model.transformer
        body.wte.weight[:, _TOKEN : _TOKEN + VOCAB] += torch.eye(VOCAB)
        body.wpe.weight[:, _POSITION : _POSITION + 16] += torch.eye(16)
        model.lm_head.weight[:, _NEXT : _NEXT + VOCAB] += 4 * torch.eye(VOCAB)
        first, second = body.h[0].attn, body.h[1].attn
        # 0.0: the query of position t meets the key of t - 1.
        for t in range(1, 16):
            _reads(first, 0, "q", _POSITION + t, t, 3.0)
            _reads(first, 0, "k", _POSITION + t - 1, t, 3.0)
        for token in range(FIRST + 1, VOCAB):
            _reads(first, 0, "v", _TOKEN + token, token, 0.3)
            _writes(first, 0, token, _BEFORE + token, 1.0)
            # 1.1: the query of a token meets the key of what it stands before.
            _reads(second, 1, "q", _TOKEN + token, token, 3.0)
            _reads(second, 1, "k", _BEFORE + token, token, 3.0)
            _reads(second, 1, "v", _TOKEN + token, token, 0.3)
            _writes(second, 1, token, _NEXT + token, 3.0)
        # Without a match, 1.1 meets the first token's key.
        second.c_attn.bias[_WIDTH + _REST] += 12
        _reads(second, 1, "k", _TOKEN + FIRST, _REST, 1.0)
        # 0.2 and 1.0 lead from the last position to the first token.
        for head, attention in ((2, first), (0, second)):
            _reads(attention, head, "q", _POSITION + T - 1, 0, 3.0)
            _reads(attention, head, "k", _TOKEN + FIRST, 0, 3.0)
            _reads(attention, head, "v", _TOKEN + FIRST, 0, 0.3)
            for place in range(_JUNK, _D):
                _writes(attention, head, 0, place, 1.0)
    return model


def _reads(attention: torch.nn.Module, head: int, what: str, place: int, to: int, by: float):
    column = "qkv".index(what) * _D + head * _WIDTH + to
    attention.c_attn.weight[place, column] += by


def _writes(attention: torch.nn.Module, head: int, at: int, place: int, by: float) -> None:
    attention.c_proj.weight[head * _WIDTH + at, place] += by


def induction_task(n_prompts: int, seed: int = 0) -> Task:
    """Texts in which only the last token repeats an earlier one; corrupted texts repeat none."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for _ in range(n_prompts):
        shuffled: Tensor = 1 + torch.randperm(VOCAB - 1, generator=generator)
        ids, unused = [FIRST, *shuffled[: T - 2].tolist()], int(shuffled[T])
        at = int(torch.randint(1, T - 3, (1,), generator=generator))
        other = int(torch.randint(at + 2, T - 1, (1,), generator=generator))
        twin = list(ids)
        twin[at] = unused
        last = ids[at]
        prompts.append(
            Prompt(
                text=str(ids),
                twin=str(twin),
                token_ids=[*ids, last],
                twin_ids=[*twin, last],
                right=[ids[at + 1]],
                wrong=[ids[other]],
                references=[],
                template="induction",
                places={"A": at, "B": at + 1, "END": T - 1},
            )
        )
    return Task("induction", seed, prompts)
