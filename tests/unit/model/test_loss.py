"""The head's loss against torch's own cross entropy in float64, in one process; tests/distributed has it over ranks."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mlra_scale.model import head_chunks, loss
from mlra_scale.model.loss import head_loss

TOKENS, WIDTH, ROWS, PADDING = 23, 8, 40, 5


@pytest.fixture(params=[1, 4, 100], ids=lambda tokens: f"{tokens}-tokens-a-chunk")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(head_chunks, "CHUNK_NUMBERS", {"cpu": request.param * ROWS})
    yield request.param


def context_of(z_loss: float) -> Any:
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)  # has no means to communicate
    return SimpleNamespace(model=SimpleNamespace(z_loss=z_loss), tensor_group=group)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    bias = torch.zeros(ROWS, dtype=dtype)
    bias[-PADDING:] = float("-inf")
    targets = torch.randint(ROWS - PADDING, (1, TOKENS), generator=generator)
    return hidden, weight, bias, targets


def expected(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    copies = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = torch.nn.functional.linear(copies[0], copies[1], bias.double()).flatten(0, 1)
    mean = torch.nn.functional.cross_entropy(logits, targets.flatten())
    total = mean + z_loss * logits.logsumexp(-1).square().mean()
    total.backward()
    gradients = [copy.grad for copy in copies]
    assert gradients[0] is not None and gradients[1] is not None
    return total.detach(), gradients[0], gradients[1]


def assert_near(found: torch.Tensor | None, wanted: torch.Tensor, tolerance: float) -> None:
    assert found is not None
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
)
def test_loss_and_gradients(chunks: int, dtype: torch.dtype, tolerance: float, z_loss: float) -> None:
    hidden, weight, bias, targets = inputs(dtype)
    wanted, hidden_gradient, weight_gradient = expected(hidden, weight, bias, targets, z_loss)
    found = head_loss(context_of(z_loss), hidden, weight, bias, targets, is_training=True)
    assert found.dtype == torch.float32
    assert_near(found, wanted, tolerance)
    (3.0 * found).backward()
    assert_near(hidden.grad, 3.0 * hidden_gradient, tolerance)
    assert_near(weight.grad, 3.0 * weight_gradient, tolerance)
    assert weight.grad is not None and not weight.grad[-PADDING:].any()


def test_without_padding(chunks: int) -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    wanted, *_ = expected(hidden, weight, torch.zeros(ROWS), targets, 0.0)
    assert_near(head_loss(context_of(0.0), hidden, weight, None, targets, True), wanted, 1e-6)


def test_a_validation_loss_has_no_z_loss_and_forms_no_gradients(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = inputs(torch.float32)
    wanted, *_ = expected(hidden, weight, bias, targets, 0.0)
    monkeypatch.setattr(loss._Head, "gradient", None)
    with torch.no_grad():
        found = head_loss(context_of(0.5), hidden, weight, bias, targets, is_training=False)
    assert_near(found, wanted, 1e-6)


def test_scores_of_single_targets(chunks: int) -> None:
    hidden, weight, bias, targets = inputs(torch.float32)
    with torch.no_grad():
        logits = torch.nn.functional.linear(hidden, weight, bias).double()
    is_likely, is_scored = torch.arange(TOKENS) % 2 == 0, torch.arange(TOKENS) % 3 > 0
    targets = torch.where(is_likely, logits.argmax(dim=-1), targets)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    is_first = logits.argmax(dim=-1) == targets
    assert is_first.any() and not is_first.all()
    given = targets.where(is_scored, torch.tensor(loss.NO_TARGET))
    found, found_first = loss.head_scores(context_of(0.5), hidden, weight, bias, given)
    assert_near(found, wanted.where(is_scored, torch.tensor(0.0)).view_as(found), 1e-6)
    assert torch.equal(found_first, is_first | ~is_scored) and found.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equally_likely_tokens_the_first_is_the_most_likely(chunks: int, dtype: torch.dtype) -> None:
    hidden = torch.ones(1, 4, 2, dtype=dtype)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.5, 1.5]], dtype=dtype)  # logits 1, 2, 2, 2
    _, is_first = loss.head_scores(context_of(0.0), hidden, weight, None, torch.tensor([[0, 1, 2, 3]]))
    assert is_first.tolist() == [[False, True, False, False]]


def test_small_probabilities_do_not_vanish_in_fp16() -> None:
    # Of 4,096 tokens' mean, a probability of 1e-5 has a gradient of 2e-9, which is zero in fp16; times the loss scale
    # it is not.
    hidden = torch.zeros(1, 4096, 2, dtype=torch.float16)
    hidden[..., 0] = 1.0
    hidden.requires_grad_()
    weight = torch.tensor([[11.5, 0.0], [0.0, 0.0]], dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(1, 4096, dtype=torch.int64)
    head_loss(context_of(0.0), hidden, weight, None, targets, True).mul(2.0**16).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[1, 0].item() / 2**16, 1.01e-5, rtol=0.02, atol=0.0)


def test_chunks_cover_all_tokens_once(chunks: int) -> None:
    for num_tokens in (1, 7, 100, 101):
        slices = head_chunks.chunks(num_tokens, head_chunks.num_chunks(num_tokens, ROWS, "cpu", is_fp16=False))
        assert [index for piece in slices for index in range(piece.start, piece.stop)] == list(range(num_tokens))
        sizes = [piece.stop - piece.start for piece in slices]
        assert max(sizes) <= chunks and max(sizes) - min(sizes) <= 1
