"""A tiny GPT-2 whose heads are written by hand, so that their functions are known.

The residual stream is cut into planes. A token marks what it is and whether it begins a word, a
position where it is; planted heads read these marks and write what they find into planes of
their own.

    layer 0 head 1   previous token: reads the token at t - 1
    layer 0 head 3   merges subwords: at a later piece of a word reads the piece before; elsewhere
                     it looks at the beginning of the text, whose token has no mark to carry
    layer 1 head 0   sink: reads the first position from every position
    layer 1 head 2   offset 3: reads the token at t - 3

The others are decoys. One reads all earlier tokens that are the same as its own, the rest attend
and write at random; FFN blocks are random.
"""

from __future__ import annotations

import random

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

PREVIOUS, SUBWORD, SINK, OFFSET_3, SAME = (0, 1), (0, 3), (1, 0), (1, 2), (1, 1)
STEMS = ["car", "house", "light", "stone"]
SUFFIXES = ["pet", "ing", "ness"]
WHOLE = ["of", "red", "old"]
TOKENS = ["<s>", *(f" {word}" for word in (*STEMS, *WHOLE)), *SUFFIXES]
V, L, H, K, T_MAX = len(TOKENS), 2, 4, 72, 64
D = H * K

_POSITION, _TOKEN = slice(0, T_MAX), slice(T_MAX, T_MAX + V)
_BEGINS, _LEVEL = T_MAX + V, T_MAX + V + 1  # the level makes a token's marks sum to 0
_OWN = {
    head: slice(_LEVEL + 1 + i * V, _LEVEL + 1 + (i + 1) * V)
    for i, head in enumerate((PREVIOUS, SUBWORD, SINK, OFFSET_3, SAME))
}
_SHARP = 12.0  # scale of queries and keys: a softmax gives all weight to the key that is sought
_LOUD = 2.0  # scale of a planted head's output
_BEGINNING = T_MAX  # coordinate of queries and keys, after those of positions


def planted_tokenizer() -> PreTrainedTokenizerFast:
    """Words have one piece or more; the first begins with a space. Texts begin with <s>."""
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="<s>"))
    pieces = "|".join(sorted(TOKENS[1:], key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<s>")


def planted_texts(n: int, seed: int = 0) -> list[str]:
    """Random texts of about 45 tokens; half of the words have two or three pieces."""
    draw = random.Random(seed)

    def word() -> str:
        if draw.random() < 0.5:
            return draw.choice(WHOLE + STEMS)
        return draw.choice(STEMS) + "".join(draw.choices(SUFFIXES, k=draw.choice((1, 1, 2))))

    return ["".join(f" {word()}" for _ in range(draw.randint(20, 26))) for _ in range(n)]


@torch.no_grad()
def planted_model(seed: int = 0) -> GPT2LMHeadModel:
    """The model; its decoys and FFN blocks are drawn with `seed`."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=V, n_embd=D, n_layer=L, n_head=H, n_positions=T_MAX, n_inner=48,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    model.transformer.wte.weight[:] = _token_marks()
    model.transformer.wpe.weight.zero_()
    model.transformer.wpe.weight[:, _POSITION] = torch.eye(T_MAX)
    model.transformer.wpe.weight[:, _LEVEL] = -1
    for layer, block in enumerate(model.transformer.h):
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            linear.bias.zero_()
        block.mlp.c_fc.weight.normal_(0, 0.1)
        block.mlp.c_proj.weight.normal_(0, 0.01)
        q, k, v = block.attn.c_attn.weight.view(D, 3, H, K).unbind(1)  # [D, H, K] each
        o = block.attn.c_proj.weight.view(H, K, D)
        for head in range(H):
            maps = (q[:, head], k[:, head], v[:, head], o[head])
            if (layer, head) in _OWN:
                _plant((layer, head), *maps)
            else:
                for weights in maps:
                    weights.normal_(0, 0.02)
    return model


def _token_marks() -> Tensor:
    """[V, D]; the first token, <s>, has none."""
    marks = torch.zeros(V, D)
    marks[:, _TOKEN] = torch.eye(V)
    marks[:, _BEGINS] = torch.tensor([float(token.startswith(" ")) for token in TOKENS])
    marks[:, _LEVEL] = -marks.sum(1)
    marks[0] = 0
    return marks


def _plant(head: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
    """Writes one head: q, k and v are [D, K] and take the stream, o [K, D] gives to it."""
    for weights in (q, k, v, o):
        weights.zero_()
    positions, same = torch.arange(T_MAX), torch.eye(V)
    if head == SAME:
        q[_TOKEN, :V] = k[_TOKEN, :V] = _SHARP * same
    elif head == SINK:
        q[_LEVEL, 0] = -_SHARP  # all tokens have this mark
        k[0, 0] = _SHARP
    else:
        offset = 3 if head == OFFSET_3 else 1
        q[positions[offset:], positions[:-offset]] = _SHARP
        k[positions, positions] = _SHARP
    if head == SUBWORD:  # at the beginning of a word, three times the offset's score
        q[_BEGINS, _BEGINNING] = 3 * _SHARP
        k[0, _BEGINNING] = _SHARP
    if head == SINK:
        v[0, 0] = 1
        o[0, _OWN[head]] = _LOUD / 15
    else:
        v[_TOKEN, :V] = same
        o[:V, _OWN[head]] = _LOUD * same
