"""QK-clip's factors, and that scaled rows give scaled logits, however the weights are cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.model.parameters import ParameterTable
from mlra_scale.parallel.fragments import Fragment, scale_rows
from mlra_scale.stability.qk_clip import clip_factors, row_factors
from tests.support.layouts import Layout, canonical_weights, global_batch, layout_config
from tests.support.oracle import build_reference


def test_heads_above_the_threshold_get_the_root_of_the_ratio_unless_it_is_not_finite() -> None:
    largest = torch.tensor([[-5.0, 99.9, 100.0], [100.1, 400.0, 1e30]], dtype=torch.float64)
    expected = [[1.0, 1.0, 1.0], [math.sqrt(100 / 100.1), 0.5, 1e-14]]
    assert clip_factors(largest, 100.0).tolist() == [pytest.approx(row, rel=1e-12) for row in expected]
    assert clip_factors(largest, 100.0)[0].tolist() == [1.0, 1.0, 1.0]
    for value in (math.nan, math.inf, -math.inf):
        assert clip_factors(torch.tensor([[value, 4.0]], dtype=torch.float64), 1.0).tolist() == [[1.0, 0.5]]


@given(width=st.integers(1, 5), num_rows=st.integers(1, 6), cuts=st.lists(st.integers(1, 29), max_size=4))
@settings(max_examples=60, deadline=None)
def test_rows_are_scaled_wherever_they_are_cut(width: int, num_rows: int, cuts: list[int]) -> None:
    matrix = torch.arange(1.0, num_rows * width + 1).view(num_rows, width)
    factors = torch.linspace(0.5, 1.0, num_rows, dtype=torch.float64)
    expected = matrix * factors.float()[:, None]
    flat = matrix.clone().view(-1)
    ends = sorted({cut for cut in cuts if cut < flat.numel()} | {flat.numel()})
    for first, end in zip([0, *ends], ends, strict=False):
        scale_rows(Fragment("w", first, flat[first:end]), width, factors)
    assert torch.equal(flat.view_as(matrix), expected)


@pytest.mark.parametrize("attention", ["mlra", "dense"])
@pytest.mark.parametrize("factorised", [("q", "k", "v"), ("k", "o")])
def test_the_logits_of_clipped_heads_are_scaled_and_no_others(attention: str, factorised: tuple[str, ...]) -> None:
    """In fp64: the first block's largest logits become the threshold, and only rows of clipped heads change."""
    shape = {"model__attention": attention, "model__factorised_projections": factorised}
    config = layout_config(Layout(), **shape)
    weights = {name: tensor.double() for name, tensor in canonical_weights(config.model).items()}
    batch = global_batch(config, 0)
    reference = build_reference(config, weights)
    with torch.no_grad():
        before = reference.attention_logits(batch.tokens_BS)[0]
    largest = torch.full((4, 4), -1.0, dtype=torch.float64)
    largest[0] = before.amax(dim=(0, 2, 3))
    threshold = float(largest[0].sort().values[1:3].mean())
    factors = row_factors(clip_factors(largest, threshold), config.model, ParameterTable(config.model))
    ends = [
        f"{projection}{'.up' if config.model.is_factorised(projection) else ''}.{part}"
        for projection in "qk"
        for part in ("weight", "bias")
    ]
    assert set(factors) == {f"blocks.0.attention.{end}" for end in ends}, "blocks below the threshold are left out"
    for name, factor in factors.items():
        width = math.prod(weights[name].shape[1:])
        scale_rows(Fragment(name, 0, weights[name].view(-1)), width, factor)
    reference = build_reference(config, weights)
    with torch.no_grad():
        after = reference.attention_logits(batch.tokens_BS)[0]
    ratio = (threshold / largest[0]).clamp(max=1.0)
    assert ((ratio < 1.0).sum(), (ratio == 1.0).sum()) == (2, 2)
    allowed = before.isfinite()
    torch.testing.assert_close(after[allowed], (before * ratio[:, None, None])[allowed], rtol=1e-12, atol=1e-12)
    assert after.amax(dim=(0, 2, 3)).max().item() == pytest.approx(threshold, rel=1e-12)
