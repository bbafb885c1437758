"""Token ids of a prompt and an answer, and the pieces of text that they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The method "flashtrace" leaves out these generated and prompt tokens, without their spaces, and
# blank tokens.
STOP_TOKENS = [",", "."]

_DEFAULT_GENERATE = {"max_new_tokens": 512, "do_sample": False}
_PROMPT_TEMPLATE = "Context:{context}\n\n\nQuery: {query}"


class Text(NamedTuple):
    """A prompt, in its chat template if there is one, and the generated tokens after it."""

    prompt_ids: list[int]
    generation_ids: list[int]
    user_prompt_indices: list[int]  # positions of the user's prompt among the ids
    user_prompt_tokens: list[str]
    generation_tokens: list[str]  # pieces of the decoded text, perhaps not as many as ids

    @property
    def token_ids(self) -> Tensor:
        """All token ids [T]."""
        return torch.tensor(self.prompt_ids + self.generation_ids)

    def at(self, generated: int) -> int:
        """The position of a generated token."""
        return len(self.prompt_ids) + generated

    def is_stop(self, generated: int) -> bool:
        """True if a generated token is left out, as are tokens without a piece of text."""
        tokens = self.generation_tokens
        return _is_stop(tokens[generated] if generated < len(tokens) else "")

    def kept(self) -> Tensor:
        """[T]: 0 at stop tokens of the user's and of the generated text, otherwise 1."""
        mask = torch.ones(len(self.prompt_ids) + len(self.generation_ids))
        for i, token in zip(self.user_prompt_indices, self.user_prompt_tokens, strict=True):
            if i < len(self.prompt_ids):
                mask[i] = not _is_stop(token)
        for i, token in enumerate(self.generation_tokens[: len(self.generation_ids)]):
            mask[self.at(i)] = not _is_stop(token)
        return mask

    def last_attributable(self, eos_token_id: int | list[int] | None) -> int:
        """The index of the last generated token, or of the one before if that ends the text or is
        a stop token; -1 if there is none.
        """
        last = len(self.generation_ids) - 1
        if last < 0:
            return -1
        ends = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
        tokens = self.generation_tokens
        if self.generation_ids[last] in ends or (last < len(tokens) and _is_stop(tokens[last])):
            return last - 1
        return last

    def project(self, x: Tensor) -> Tensor:
        """The columns of x [..., T] for the user's prompt, then those for generated tokens."""
        columns = self.user_prompt_indices + list(range(self.at(0), x.shape[-1]))
        return x[..., columns]


def _is_stop(token: str) -> bool:
    token = token.strip()
    return token == "" or token in STOP_TOKENS


def read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    target: str | None,
    *,
    use_chat_template: bool,
    generate_kwargs: dict[str, Any] | None,
) -> Text:
    """Tokenizes, and generates if `target` is None.

    The only special tokens are those of the chat template and the end-of-text token behind a
    target. Raises ValueError if the prompt is not found in the output of the template.
    """

    def tokens(text: str) -> tuple[list[int], list[str]]:
        """Token ids, and the piece of `text` that each stands for."""
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        return list(encoded["input_ids"]), [text[i:j] for i, j in encoded["offset_mapping"]]

    whole = user_prompt = prompt
    if use_chat_template:
        user_prompt = " " + prompt
        content = _PROMPT_TEMPLATE.format(context=user_prompt, query="")
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    user_ids, user_tokens = tokens(user_prompt)
    prompt_ids, _ = tokens(whole)
    if not user_ids or user_ids[0] not in prompt_ids:
        raise ValueError(
            "prompt: expected a text whose first token is among those that the model is given, "
            f"got {prompt!r}"
        )
    begin = prompt_ids.index(user_ids[0])  # its first occurrence, even if in the template
    if target is None:
        given = torch.tensor([prompt_ids], device=model.device)
        with torch.no_grad():
            output = model.generate(given, **(generate_kwargs or _DEFAULT_GENERATE))
        generation_ids = output[0, len(prompt_ids) :].tolist()
    else:
        generation_ids, _ = tokens(target + (tokenizer.eos_token or ""))
    if begin + len(user_ids) > len(prompt_ids) + len(generation_ids):
        raise ValueError(
            "prompt: expected no more tokens than the model is given behind the first occurrence "
            f"of its first one, got {prompt!r}"
        )
    decoded = tokenizer.decode(
        generation_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return Text(
        prompt_ids,
        generation_ids,
        list(range(begin, begin + len(user_ids))),
        user_tokens,
        tokens(decoded)[1],
    )
