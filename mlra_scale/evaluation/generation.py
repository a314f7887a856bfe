"""Text from a model: transformers' own generation, with its cache of keys and values, over batches of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mlra_scale.data.tokenizer import LoadedTokenizer
from mlra_scale.evaluation import EvaluationError
from mlra_scale.evaluation.models import OpenedModel


@dataclass(frozen=True)
class GenerationOptions:
    """Options of generation.

    Attributes:
        max_new_tokens: Longest text, in tokens; the token that ends documents ends it earlier.
        num_samples: Texts per prompt.
        is_greedy: Whether the most probable token is always taken; otherwise tokens are sampled.
        temperature: Divides the logits before sampling.
        top_k: Sample from the k most probable tokens only; 0: from all.
        top_p: Sample from the fewest tokens that have this probability together; 1: from all.
        seed: Decides the texts, together with prompts, options and machine.
        batch_size: Texts that are generated at once.
        has_special_tokens: Whether the texts show tokens such as the one that ends documents.
    """

    max_new_tokens: int = 50
    num_samples: int = 1
    is_greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8
    has_special_tokens: bool = False


@dataclass(frozen=True)
class Text:
    """A prompt and its continuation of `num_tokens` tokens; has_ended: the model ended it, and not max_new_tokens."""

    prompt: str
    text: str
    num_tokens: int
    has_ended: bool


def generate(
    opened: OpenedModel, loaded: LoadedTokenizer, prompts: Sequence[str], options: GenerationOptions
) -> Iterator[Text]:
    """Yields num_samples continuations of every prompt, in order; an empty one means the beginning of a document.

    Raises:
        EvaluationError: An option has an impossible value, or a prompt is too long for the model.
    """
    _check(options)
    end = loaded.end_of_document_token
    encoded = [loaded.tokenizer.encode(prompt, add_special_tokens=False).ids or [end] for prompt in prompts]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if len(tokens) + options.max_new_tokens > opened.max_positions:
            raise EvaluationError(
                f"prompt {_shortened(prompt)} has {len(tokens)} tokens; with {options.max_new_tokens} new ones it is "
                f"longer than the {opened.max_positions} positions of the model: shorten it, or write fewer new tokens"
            )
    wanted = [
        (prompt, tokens) for prompt, tokens in zip(prompts, encoded, strict=True) for _ in range(options.num_samples)
    ]
    # A folder's generation_config.json may set penalties and lengths: only `options` must count.
    opened.module.generation_config = type(opened.module.generation_config)()
    device = opened.module.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        for first in range(0, len(wanted), options.batch_size):
            batch = wanted[first : first + options.batch_size]
            rows = _new_tokens(opened, [tokens for _, tokens in batch], end, options)
            for (prompt, _), tokens in zip(batch, rows, strict=True):
                has_ended = end in tokens
                tokens = tokens[: tokens.index(end) + 1] if has_ended else tokens
                shown = tokens[:-1] if has_ended and not options.has_special_tokens else tokens
                text = loaded.tokenizer.decode(shown, skip_special_tokens=not options.has_special_tokens)
                yield Text(prompt, text, len(tokens), has_ended)


def _new_tokens(
    opened: OpenedModel, prompts: Sequence[list[int]], end: int, options: GenerationOptions
) -> list[list[int]]:
    """Continues a batch of prompts; returns the new tokens, padded with `end` where a text ended early."""
    longest = max(map(len, prompts))
    # Padded on the left, so that all prompts end in the same column.
    tokens_BS = torch.full((len(prompts), longest), end)
    mask_BS = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BS[row, longest - len(prompt) :] = 1
    sampling = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    device = opened.module.device
    with torch.inference_mode():
        rows = opened.module.generate(
            inputs=tokens_BS.to(device),
            attention_mask=mask_BS.to(device),
            max_new_tokens=options.max_new_tokens,
            do_sample=not options.is_greedy,
            eos_token_id=end,
            pad_token_id=end,
            use_cache=True,
            **({} if options.is_greedy else sampling),
        )
    return [row[longest:].tolist() for row in rows]


def _check(options: GenerationOptions) -> None:
    for name, value, is_possible, remedy in (
        ("max_new_tokens", options.max_new_tokens, options.max_new_tokens >= 1, "1 or more"),
        ("num_samples", options.num_samples, options.num_samples >= 1, "1 or more"),
        ("batch_size", options.batch_size, options.batch_size >= 1, "1 or more"),
        ("temperature", options.temperature, 0.0 < options.temperature < float("inf"), "above 0 (or greedy)"),
        ("top_k", options.top_k, options.top_k >= 0, "1 or more, or 0 for all tokens"),
        ("top_p", options.top_p, 0.0 < options.top_p <= 1.0, "above 0 and at most 1"),
    ):
        if not is_possible:
            raise EvaluationError(f"{name} cannot be {value}; use {remedy}")


def _shortened(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else prompt[:37] + "...")
