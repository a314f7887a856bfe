"""The blend pattern: proportions in every window, each data set in its own order, nothing but weights and index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.data.blend import BLOCK, BlendPattern, largest_remainder

BLENDS = [[7, 3], [1, 1, 1], [0.9, 0.05, 0.03, 0.01, 0.01], [1.0] * 20, [3, 2, 2, 1, 1, 1] + [0.01] * 30, [1, 1e-9]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50))
def test_quotas_fill_the_block(weights: list[float]) -> None:
    quotas = largest_remainder(weights, BLOCK)
    assert sum(quotas) == BLOCK and min(quotas) >= 1
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    raised = sum(1 for share in exact if share < 1)
    for quota, share in zip(quotas, exact, strict=True):
        assert abs(quota - share) < 1 + raised


@pytest.mark.parametrize("weights", BLENDS)
def test_any_window_has_the_proportions(weights: list[float]) -> None:
    pattern = BlendPattern(weights)
    parts, _ = pattern.locate(np.arange(2 * BLOCK + 1000))
    wanted = np.array(weights) / sum(weights)
    for part, share in enumerate(pattern.proportions):
        assert abs(share - wanted[part]) <= 1 / BLOCK
        # Count minus share, over all prefixes: a window is the difference of two prefixes.
        excess = np.concatenate([[0], np.cumsum(parts == part)]) - share * np.arange(len(parts) + 1)
        assert excess.max() - excess.min() < 4


def test_weights_near_the_largest_number_keep_their_proportions() -> None:
    assert BlendPattern([1.5e308, 0.5e308]).proportions == [0.75, 0.25]


def test_equal_weights_take_turns() -> None:
    parts, _ = BlendPattern([1, 1]).locate(np.arange(1000))
    assert (parts[:-1] != parts[1:]).all()


def test_the_pattern_is_frozen() -> None:
    parts, local = BlendPattern([0.5, 0.3, 0.2]).locate(np.array([*range(12), BLOCK + 3]))
    assert parts.tolist() == [1, 0, 0, 1, 2, 0, 0, 1, 0, 2, 1, 0, 1]
    assert local.tolist() == [0, 0, 1, 1, 0, 2, 3, 2, 4, 1, 3, 5, 19662]
