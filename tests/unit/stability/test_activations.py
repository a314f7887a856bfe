"""The numbers of a probe against plain fp64 softmax, and that ranks' shares add up to the whole."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mlra_scale.config import BatchPlan
from mlra_scale.model import probe
from mlra_scale.model.probe import Heads
from mlra_scale.stability.activations import Tally, micro_batches_for, number_below
from tests.support.oracle import activations_of

SATURATION = 0.9


def random_heads(block: int = 0, samples: int = 3, heads: int = 4, size: int = 9, masked: bool = False) -> Heads:
    generator = torch.Generator().manual_seed(block)
    q, k = (2.0 * torch.randn(samples, heads, size, 6, generator=generator) for _ in range(2))
    if not masked:
        return Heads(block, q, k, None)
    documents = torch.tensor([[0, 1, 1, 2, 2, 2, 2, 3, 4]])[:, :size].expand(samples, -1)
    return Heads(block, q, k, (documents[:, :, None] == documents[:, None, :]).tril().unsqueeze(1))


def naive_logits(heads: Heads) -> torch.Tensor:
    size = heads.q_BNSH.size(2)
    mask = torch.ones(size, size, dtype=torch.bool).tril() if heads.mask_B1SS is None else heads.mask_B1SS
    logits = heads.q_BNSH.double() @ heads.k_BNSH.double().transpose(-1, -2) / math.sqrt(heads.q_BNSH.size(-1))
    return logits.masked_fill(~mask, -math.inf)


def assert_entries_close(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(value), rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("at_once", [1, 2 * 9**2, 2**25])
@pytest.mark.parametrize("masked", [False, True])
def test_the_numbers_are_those_of_plain_softmax(monkeypatch: pytest.MonkeyPatch, masked: bool, at_once: int) -> None:
    monkeypatch.setattr(probe, "LOGITS_AT_ONCE", at_once)
    tally, blocks = Tally(2), [random_heads(block, masked=masked) for block in range(2)]
    generator = torch.Generator().manual_seed(9)
    # A mean that is large beside the spread, as a residual stream has it.
    hidden = [50.0 + (place + 1) * torch.randn(3, 9, 8, generator=generator) for place in range(3)]
    for place, hidden_BSD in enumerate(hidden):
        tally.add_hidden(place, hidden_BSD)
    for heads in blocks:
        tally.begin(heads.block)
        tally.add_heads(heads, 3, SATURATION)
    expected = activations_of([naive_logits(heads) for heads in blocks], hidden, SATURATION)
    assert min(expected["saturated_share"]) > 0.0 and expected["max_saturated_share"] < 1.0, "the case shows nothing"
    assert_entries_close(tally.values(num_heads=4), expected)


def test_shares_of_ranks_add_up_to_the_whole() -> None:
    """Two data ranks with other samples and two tensor ranks with other heads; one sample is not to be counted."""
    heads, hidden = random_heads(samples=4), torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(9))
    alone = Tally(1)
    for place in range(2):
        alone.add_hidden(place, hidden[:3])
    alone.begin(0)
    alone.add_heads(heads, 3, SATURATION)
    total = torch.zeros(1, dtype=torch.float64)
    tallies = [Tally(1, 4, rank) for rank in range(4)]
    for data_rank, counted in ((0, 2), (1, 1)):
        for tensor_rank in range(2):
            tally = tallies[2 * data_rank + tensor_rank]
            mine = (slice(2 * data_rank, 2 * data_rank + 2), slice(2 * tensor_rank, 2 * tensor_rank + 2))
            tally.begin(0)
            tally.add_heads(Heads(0, heads.q_BNSH[mine], heads.k_BNSH[mine], None), counted, SATURATION)
            for place in range(2) if tensor_rank == 0 else ():
                tally.add_hidden(place, hidden[2 * data_rank : 2 * data_rank + counted])
            total = total + tally.packed
    tallies[0].packed.copy_(total)
    assert_entries_close(tallies[0].values(4), alone.values(4))


def test_rows_without_a_choice_do_not_count_as_saturated() -> None:
    tally, q = Tally(1), torch.zeros(1, 2, 3, 4)
    every_key_a_document = torch.eye(3, dtype=torch.bool)[None, None]
    tally.add_hidden(0, torch.zeros(1, 3, 4))
    tally.begin(0)
    tally.add_heads(Heads(0, q, q, every_key_a_document), 1, SATURATION)
    values = tally.values(2)
    assert values["saturated_share"] == [0.0] and values["attention_entropy"] == [0.0]
    tally.add_heads(Heads(0, q, q, None), 1, 0.4)  # of three rows one has no choice; 1/2 > 0.4 > 1/3
    assert tally.values(2)["saturated_share"] == [0.5]


def test_weights_that_underflow_have_no_entropy_and_only_negative_logits_a_largest_one() -> None:
    tally, q = Tally(1), torch.tensor([[[[30.0], [30.0]]]])
    tally.add_hidden(0, torch.zeros(1, 2, 1))
    tally.begin(0)
    tally.add_heads(Heads(0, q, torch.tensor([[[[-30.0], [30.0]]]]), None), 1, SATURATION)
    values = tally.values(1)
    assert values["attention_entropy"] == [0.0] and values["saturated_share"] == [1.0]
    assert values["largest_logit"] == [900.0]
    tally, ones = Tally(1, 2, 1), torch.ones(1, 1, 3, 4)
    tally.add_hidden(0, ones[0])
    tally.begin(0)
    tally.add_heads(Heads(0, ones, -ones, None), 1, SATURATION)
    tally.largest_KL[0] = -math.inf  # as the other rank, whose samples do not count, has it
    assert tally.values(1)["largest_logit"] == [-2.0]


def test_values_that_are_not_finite_show() -> None:
    tally, q = Tally(1, 2, 0), torch.full((1, 1, 2, 1), math.nan)
    tally.add_hidden(0, torch.full((1, 2, 4), math.nan))
    tally.begin(0)
    tally.add_heads(Heads(0, q, q, None), 1, SATURATION)
    values = tally.values(1)
    for name in ("max_residual_variance", "min_attention_entropy", "max_logit"):
        assert math.isnan(values[name]), name


@dataclass(frozen=True)
class Ids:
    """As much of a micro-batch as is looked at."""

    sample_ids_B: torch.Tensor


@pytest.mark.parametrize("data", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 4, 6, 7])
def test_the_first_samples_count_in_every_layout(data: int, samples: int) -> None:
    plan = BatchPlan(data, 1, 1, data, 2, 5, 10 * data, 8, 80 * data)
    number = micro_batches_for(samples, plan)
    starts = [(m * data + r) * 2 for m in range(number) for r in range(data)]
    counted = [number_below(Ids(torch.arange(first, first + 2)), samples) for first in starts]  # type: ignore[arg-type]
    assert sum(counted) == samples
    assert starts[-1] + 2 < samples + 2 * data + 2, "more micro-batches than needed"
