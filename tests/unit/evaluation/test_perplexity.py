"""Perplexity against computations of its own: token by token, and with transformers' loss over labels."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlra_scale.evaluation import EvaluationError
from mlra_scale.evaluation.perplexity import Piece, Window, negative_log_likelihood, perplexity, windows
from tests.support.gpt2_folders import random_gpt2

POSITIONS, VOCABULARY = 32, 300


class Model:
    """A model as perplexity sees it; it counts the tokens that pass it."""

    vocab_size = VOCABULARY
    max_positions = POSITIONS

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.widths: list[int] = []

    def logits(self, tokens_BS: torch.Tensor, keep: int) -> torch.Tensor:
        self.widths.append(keep)
        return self.module(tokens_BS).logits[:, -keep:]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(random_gpt2(vocab_size=VOCABULARY))


def tokens_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def document(tokens: list[int], num_words: int = 0, num_bytes: int = 0) -> list[Piece]:
    return [Piece(tokens, num_words, num_bytes)]


def one_by_one(model: Model, tokens: list[int], window: int, stride: int) -> list[float]:
    """-ln p of every token but the first, each with a pass of its own over its context."""
    found = []
    for place in range(1, len(tokens)):
        begin = 0
        while place >= begin + window:
            begin += stride
        logits = model.module(torch.tensor([tokens[begin:place]])).logits[0, -1]
        found.append(-float(logits.detach().double().log_softmax(-1)[tokens[place]]))
    return found


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [(20, 32, 16), (32, 32, 16), (33, 32, 16), (90, 32, 16), (90, 32, 31), (90, 20, 7), (90, 33, 32), (9, 2, 1)],
)
def test_every_token_is_scored_once_with_its_context(model: Model, length: int, window: int, stride: int) -> None:
    tokens = tokens_of(length)
    result = perplexity(model, [document(tokens, 10, 50)], window, stride, batch_size=3)
    expected = one_by_one(model, tokens, window, stride)
    assert result.num_tokens == len(expected) == length - 1
    assert result.negative_log_likelihood == pytest.approx(sum(expected), rel=1e-6)
    assert result.token_perplexity == pytest.approx(math.exp(sum(expected) / (length - 1)), rel=1e-6)
    assert result.word_perplexity == pytest.approx(math.exp(sum(expected) / 10), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / 50, rel=1e-6)


@pytest.mark.parametrize(("length", "stride"), [(90, 16), (80, 24), (32, 8)])
def test_it_is_the_convention_of_the_hugging_face_guide(model: Model, length: int, stride: int) -> None:
    """Labels of -100 for tokens that an earlier window scored, and transformers' own loss over the rest."""
    tokens, total, count, scored = tokens_of(length, 1), 0.0, 0, 0
    for begin in range(0, length, stride):
        end = min(begin + POSITIONS, length)
        inputs = torch.tensor([tokens[begin:end]])
        labels = inputs.clone()
        labels[:, : max(0, scored - begin)] = -100
        num_labels = int((labels[:, 1:] != -100).sum())
        total += model.module(inputs, labels=labels).loss.item() * num_labels
        count, scored = count + num_labels, end
        if end == length:
            break
    result = perplexity(model, [document(tokens)], stride=stride)
    assert result.num_tokens == count
    assert result.negative_log_likelihood == pytest.approx(total, rel=1e-6)
    assert math.isnan(result.word_perplexity) and math.isnan(result.bits_per_byte)


def test_documents_and_batches_do_not_see_each_other(model: Model) -> None:
    texts = [tokens_of(length, seed) for seed, length in enumerate((40, 1, 7, 64, 2, 33))]
    alone = [sum(one_by_one(model, tokens, 32, 16)) for tokens in texts]
    for batch_size in (1, 2, 5, 64):
        result = perplexity(model, [document(tokens, 3, 7) for tokens in texts], batch_size=batch_size)
        assert result.negative_log_likelihood == pytest.approx(sum(alone), rel=1e-6)
        assert (result.num_documents, result.num_tokens) == (6, sum(map(len, texts)) - 6)
        assert (result.num_words, result.num_bytes) == (18, 42)


def test_a_start_token_scores_the_first_token_too(model: Model) -> None:
    texts = [tokens_of(40, 3), tokens_of(1, 4)]
    result = perplexity(model, map(document, texts), start_token=5)
    expected = sum(sum(one_by_one(model, [5, *tokens], 32, 16)) for tokens in texts)
    assert result.num_tokens == 41
    assert result.negative_log_likelihood == pytest.approx(expected, rel=1e-6)


def test_only_the_logits_that_are_needed_are_asked_for(model: Model) -> None:
    model.widths.clear()
    perplexity(model, [document(tokens_of(32 + 3 * 8))], window=32, stride=8)
    assert model.widths == [31, 8, 8, 8]


@given(
    pieces=st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12),
    size=st.integers(2, 9),
    data=st.data(),
)
def test_windows_do_not_depend_on_the_pieces(pieces: list[list[int]], size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size - 1))
    tokens = [token for piece in pieces for token in piece]
    found = list(windows(pieces, size, stride))
    assert found == list(windows([tokens], size, stride))
    # What is new in each, one after another, is everything but the first token.
    assert [token for window in found for token in window.tokens[-window.num_new :]] == tokens[1:]
    for number, window in enumerate(found):
        begin = number * stride
        assert window.tokens == tokens[begin : begin + size]
        assert 1 <= window.num_new < len(window.tokens)


def test_streams_are_not_held(model: Model) -> None:
    """A document that never ends gives its windows all the same."""

    def endless() -> object:
        while True:
            yield tokens_of(50)

    stream = windows(endless(), 32, 16)  # type: ignore[arg-type]
    assert len([next(stream) for _ in range(20)]) == 20


def test_what_cannot_be_is_told(model: Model) -> None:
    def refusal(*tokens: list[int], **options: int) -> str:
        with pytest.raises(EvaluationError) as error:
            perplexity(model, map(document, tokens), **options)
        return str(error.value)

    assert "use 2 to 33" in refusal([1, 2], window=34)
    assert "use 2 to 33" in refusal([1, 2], window=1)
    assert "use 1 to 31" in refusal([1, 2], window=32, stride=32)
    assert "use 1 to 32" in refusal([1, 2], window=33, stride=0)
    assert "nothing to score: 2 documents with 2 tokens" in refusal([1], [], [2])
    assert "has the token 300, but the model knows 300" in refusal([1, 300])


def test_logits_that_are_not_finite_are_an_error() -> None:
    module = random_gpt2(vocab_size=VOCABULARY)
    with torch.no_grad():
        module.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(EvaluationError, match="not finite"):
        perplexity(Model(module), [document(tokens_of(5))])


def test_half_precision_logits_are_summed_in_single_precision(model: Model) -> None:
    class Half(Model):
        def logits(self, tokens_BS: torch.Tensor, keep: int) -> torch.Tensor:
            return super().logits(tokens_BS, keep).bfloat16()

    batch = [Window(tokens_of(32), 31)]
    logits = Half(model.module).logits(torch.tensor([batch[0].tokens[:-1]]), 31)[0].double()
    expected = -logits.log_softmax(-1)[range(31), batch[0].tokens[1:]].sum().item()
    assert negative_log_likelihood(Half(model.module), batch) == pytest.approx(expected, rel=1e-6)
