"""Text from a model: the tokens that a loop without cache and batch would take, and what is shown of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from mlra_scale.evaluation import EvaluationError
from mlra_scale.evaluation.generation import GenerationOptions, generate
from mlra_scale.evaluation.models import OpenedModel, open_model
from tests.support.gpt2_folders import gpt2_folder, tokenizer

PROMPTS = ["A window slides", "Low", "", "three ways to count the same text"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    folder = gpt2_folder(tmp_path_factory.mktemp("model") / "gpt2", n_positions=64)
    # What a folder says about generation does not count.
    GenerationConfig(max_length=3, do_sample=True, temperature=9.0, repetition_penalty=3.0).save_pretrained(folder)
    return open_model(folder, device="cpu")


def texts(opened: OpenedModel, prompts: list[str], **options: Any) -> list[str]:
    return [item.text for item in generate(opened, tokenizer(), prompts, GenerationOptions(**options))]


def greedy_tokens(opened: OpenedModel, prompt: str, count: int) -> list[int]:
    """Token by token over the whole text so far."""
    tokens = tokenizer().tokenizer.encode(prompt).ids or [0]
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(opened.module(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-count:]


def test_greedy_batches_of_unlike_prompts_are_what_each_prompt_gives_alone(opened: OpenedModel) -> None:
    expected = [tokenizer().tokenizer.decode(greedy_tokens(opened, prompt, 20)) for prompt in PROMPTS]
    for batch_size in (1, 3, 8):
        assert texts(opened, PROMPTS, is_greedy=True, max_new_tokens=20, batch_size=batch_size) == expected


def test_the_seed_decides_what_is_drawn(opened: OpenedModel) -> None:
    state = torch.get_rng_state()
    first = texts(opened, PROMPTS, seed=1, num_samples=3, max_new_tokens=20)
    assert len(first) == 12 and len(set(first)) > 8
    assert texts(opened, PROMPTS, seed=1, num_samples=3, max_new_tokens=20) == first
    assert texts(opened, PROMPTS, seed=2, num_samples=3, max_new_tokens=20) != first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_narrow_drawing_is_greedy(opened: OpenedModel, narrow: dict[str, Any]) -> None:
    greedy = texts(opened, PROMPTS, is_greedy=True, max_new_tokens=10)
    assert texts(opened, PROMPTS, max_new_tokens=10, **narrow) == greedy
    assert texts(opened, PROMPTS, max_new_tokens=10) != greedy


def test_drawing_follows_the_probabilities(opened: OpenedModel) -> None:
    """All tokens count without top_k and top_p: the shares of first tokens are those of the softmax."""
    count = 2000
    options = GenerationOptions(max_new_tokens=1, num_samples=count, temperature=0.7, batch_size=500)
    drawn = [item.text for item in generate(opened, tokenizer(), ["Low"], options)]
    logits = opened.module(torch.tensor([tokenizer().tokenizer.encode("Low").ids])).logits[0, -1]
    likely = (logits / 0.7).softmax(-1)
    token = int(likely.argmax())
    share = sum(text == tokenizer().tokenizer.decode([token]) for text in drawn) / count
    assert share == pytest.approx(float(likely[token]), abs=4 * (0.25 / count) ** 0.5)


def test_a_text_ends_with_its_end_token(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, end = PROMPTS[3], tokenizer().end_of_document_token
    kept = greedy_tokens(opened, prompt, 20)
    # The model now says "end" where it used to say its fifth token.
    place = next(number for number in range(4, 20) if kept[number] not in kept[:number])
    head = opened.module.lm_head.weight
    changed = head.clone()
    changed[[end, kept[place]]] = head[[kept[place], end]]
    monkeypatch.setattr(opened.module.lm_head, "weight", torch.nn.Parameter(changed, requires_grad=False))
    options = GenerationOptions(is_greedy=True, max_new_tokens=20)
    (found,) = generate(opened, tokenizer(), [prompt], options)
    assert (found.text, found.num_tokens, found.has_ended) == (
        tokenizer().tokenizer.decode(kept[:place]),
        place + 1,
        True,
    )
    shown = texts(opened, [prompt], is_greedy=True, max_new_tokens=20, has_special_tokens=True)
    assert shown == [found.text + "<|endoftext|>"]


def test_what_cannot_be_is_told(opened: OpenedModel) -> None:
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens cannot be 0"),
        ({"num_samples": 0}, "num_samples cannot be 0"),
        ({"batch_size": -1}, "batch_size cannot be -1"),
        ({"temperature": 0.0}, "temperature cannot be 0.0; use above 0"),
        ({"temperature": float("nan")}, "temperature cannot be nan"),
        ({"top_k": -1}, "top_k cannot be -1"),
        ({"top_p": 1.5}, "top_p cannot be 1.5"),
        ({"max_new_tokens": 64}, "longer than the 64 positions of the model"),
    ):
        with pytest.raises(EvaluationError, match=message):
            texts(opened, ["A window"], **options)


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    folder = gpt2_folder(tmp_path / "gpt2", has_tokenizer=False)
    with pytest.raises(EvaluationError, match="holds no tokenizer"):
        open_model(folder).tokenizer()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        open_model(folder)
