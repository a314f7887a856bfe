"""The checksum of copies, and the message where two of them differ."""

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.checkpoint.copies import collect, differing_copies, digests_on_device
from mlra_scale.checkpoint.saving import RankReport
from mlra_scale.model.bit_checksum import BLOCK
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.randomness import hash_int64
from mlra_scale.parallel.fragments import Fragment
from tests.unit.checkpoint.builders import MODEL, FakeEngine, Layout, all_parts, parts_with

TABLE = ParameterTable(MODEL)
EVERYTHING = frozenset(TABLE)


def value_of(pieces: list[tuple[int, torch.Tensor]]) -> int:
    fragments = [Fragment("x", start, values) for start, values in pieces]
    keys, sums = digests_on_device(fragments, frozenset({"x"}))
    return collect(keys, sums.tolist())["x", "weight"].value


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 600_000), st.lists(st.integers(1, 600_000), max_size=4), st.integers(0, 2**31))
def test_cuts_do_not_matter_and_every_bit_does(size: int, cuts: list[int], seed: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    whole = value_of([(0, values)])
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    pieces = [(start, values[start:stop]) for start, stop in pairwise(edges)]
    assert value_of(pieces[::-1]) == whole
    changed = values.clone()
    changed.view(torch.int32)[seed % size] ^= 1 << seed % 31
    assert value_of([(0, changed)]) != whole


def test_the_checksum_is_the_formula() -> None:
    """In Python's own numbers, across the border of a block."""
    start, values = BLOCK - 2, torch.tensor([1.0, -2.5, 3e-9, -0.0, float("nan")])
    expected = 0
    for position, bits in enumerate(values.view(torch.int32).tolist(), start):
        block, offset = divmod(position, BLOCK)
        inside, across = int(hash_int64(torch.tensor(offset))) | 1, block * 0xC2B2AE3D27D4EB4F % 2**64 | 1
        expected += bits * inside * across
    assert value_of([(start, values)]) == expected % 2**64


def test_two_elements_that_change_places_are_seen() -> None:
    values = torch.randn(BLOCK + 1000)
    for one, other in ((0, 1), (5, 5 + BLOCK), (3, BLOCK + 999)):
        swapped = values.clone()
        swapped[[one, other]] = values[[other, one]]
        assert value_of([(0, swapped)]) != value_of([(0, values)])


def reports_of(layout: Layout, spoil: Any = lambda rank, engine: None) -> list[RankReport]:
    reports = []
    for rank in range(layout.world_size):
        engine = FakeEngine(layout.topology(rank), layout, all_parts())
        spoil(rank, engine)
        keys, sums = digests_on_device(engine.held_fragments(with_moments=True), EVERYTHING)
        digests = collect(keys, sums.tolist())
        place = engine.topology
        reports.append(RankReport(rank, place.tensor_rank, place.pipeline_rank, digests=digests))
    return reports


LAYOUTS = [
    Layout(),
    Layout(tensor=4),
    Layout(data=3, is_replicated=True),
    Layout(tensor=2, data=3, seed=3),
    Layout(tensor=2, pipeline=2, data=2, seed=5),
    Layout(tensor=2, pipeline=2, data=2, is_replicated=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equal_copies_pass(layout: Layout) -> None:
    assert differing_copies(reports_of(layout), TABLE, layout.tensor) is None


@pytest.mark.parametrize(
    ("layout", "name", "bad", "message"),
    [
        # Replicated over tensor ranks.
        (Layout(tensor=2), "final_norm.bias", 1, r"of final_norm\.bias .* between rank\(s\) 0 and rank\(s\) 1$"),
        # Tied: first and last stage; cut differently over data ranks on each of them.
        (Layout(pipeline=2), "embedding.weight", 1, r"embedding\.weight .* rank\(s\) 0 and rank\(s\) 1$"),
        (Layout(2, 2, 2, seed=5), "embedding.weight", 7, r"embedding\.weight .* rank\(s\) 1\+3 and rank\(s\) 5\+7$"),
        # Stage 0: data replicas, of what is sharded too.
        (Layout(data=3, is_replicated=True), "blocks.0.mlp.fc_in.weight", 2, r"rank\(s\) 0, 1 and rank\(s\) 2$"),
        (Layout(2, 1, 2, True), "blocks.0.mlp.fc_in.weight", 3, r"rank\(s\) 1 and rank\(s\) 3$"),
    ],
)
@pytest.mark.parametrize("part", ["weight", "exp_avg_sq"])
def test_one_copy_that_differs_is_named(layout: Layout, name: str, bad: int, message: str, part: str) -> None:
    def spoil(rank: int, engine: FakeEngine) -> None:
        if rank == bad:
            fragment = next(fragment for fragment in engine.fragments if fragment.name == name)
            values: Any = {"weight": fragment.values, "exp_avg_sq": fragment.exp_avg_sq}[part]
            values[-1] += 1e-3

    found = differing_copies(reports_of(layout, spoil), TABLE, layout.tensor)
    assert found is not None and re.search(message, found)
    assert ("exp_avg_sq of " in found) == (part == "exp_avg_sq")


def test_copies_of_a_momentum_are_compared() -> None:
    """Of a factor of o, which every tensor rank holds and muon updates: it has no second moment."""
    layout, name = Layout(tensor=2), "blocks.0.attention.o.up.weight"
    model = MODEL.model_copy(update={"factorised_projections": ("q", "k", "v", "o")})
    reports = []
    for rank in range(2):
        engine = FakeEngine(layout.topology(rank), layout, parts_with(model, name="muon"), model)
        fragment = next(fragment for fragment in engine.fragments if fragment.name == name)
        assert fragment.exp_avg is not None and fragment.exp_avg_sq is None
        fragment.exp_avg[-1] += 1e-3 * rank
        keys, sums = digests_on_device(engine.fragments, frozenset(engine.table))
        reports.append(RankReport(rank, rank, 0, digests=collect(keys, sums.tolist())))
    found = differing_copies(reports, ParameterTable(model), 2)
    assert found == f"copies of exp_avg of {name} that should be equal differ between rank(s) 0 and rank(s) 1"
