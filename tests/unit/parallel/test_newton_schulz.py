"""Newton-Schulz: torch.optim.Muon's result in bf16 bit for bit, the polynomial of the singular values in fp32 and fp64.

The usual coefficients multiply what is nearly nothing by 485. Rounding noise in directions where a matrix is zero stays
below 2e-4 in fp32; in bf16 it becomes as large as the rest.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import _muon

from mlra_scale.parallel.newton_schulz import orthogonalised
from tests.support.optimizers import newton_schulz_values
from tests.support.optimizers import orthogonalised as expected_of

USUAL = (3.4445, -4.7750, 2.0315)
SHAPES = [(16, 16), (16, 48), (48, 16), (1, 9), (9, 1), (33, 50), (128, 32)]


def random(shape: tuple[int, int], seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_values(shape: tuple[int, int], values: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """A matrix in fp64 with these singular values."""
    left, _, right = torch.linalg.svd(random(shape, seed).double(), full_matrices=False)
    return left * values.double() @ right


def norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


@pytest.mark.parametrize("steps", [1, 5, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_bf16_it_is_torchs_bit_for_bit(shape: tuple[int, int], steps: int) -> None:
    for matrix in (random(shape), 1e-6 * random(shape, 2), 1e4 * random(shape, 3), torch.zeros(shape)):
        found = orthogonalised(matrix, USUAL, steps, torch.bfloat16)
        expected = _muon._zeropower_via_newtonschulz(matrix, USUAL, steps, 1e-7)
        assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_polynomial_of_the_singular_values(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    """Of the largest and smallest a tenth apart, relative to the result, in Frobenius norm."""
    values = torch.linspace(1.0, 0.1, min(shape))
    matrix = with_values(shape, values).to(dtype)
    for steps, coefficients in ((5, USUAL), (3, (2.0, -1.5, 0.5)), (12, (1.875, -1.25, 0.375))):
        found = orthogonalised(matrix, coefficients, steps, dtype)
        expected = expected_of(matrix, steps, coefficients)
        assert found.dtype == dtype
        assert float((found.double() - expected).norm() / expected.norm()) < tolerance


def test_enough_steps_of_a_convergent_iteration_orthogonalise() -> None:
    found = orthogonalised(random((24, 40)).double(), (1.875, -1.25, 0.375), 40, torch.float64)
    torch.testing.assert_close(found @ found.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.float64, 0.6818, 1.2024), (torch.float32, 0.6818, 1.2024), (torch.bfloat16, 0.6, 1.26)],
)
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 40)),
    exponents=st.lists(st.floats(-2.0, 0.0), min_size=24, max_size=24),
    seed=st.integers(0, 100),
    scale=st.sampled_from([1e-5, 1.0, 1e5]),
)
def test_bounds_after_five_steps(
    dtype: torch.dtype,
    low: float,
    high: float,
    shape: tuple[int, int],
    exponents: list[float],
    seed: int,
    scale: float,
) -> None:
    """Of singular values of at least 0.002 of the Frobenius norm, in bf16 of at least 0.02."""
    exponents = exponents[: min(shape)]
    values = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
    values = values / values.norm()
    values = values.clamp(min=0.021 if dtype == torch.bfloat16 else 0.0021)
    matrix = with_values(shape, scale * values, seed).float()
    found = torch.linalg.svdvals(orthogonalised(matrix, USUAL, 5, dtype).double())
    assert low - 1e-4 < float(found.min()) and float(found.max()) < high + 1e-4


@settings(max_examples=40, deadline=None)
@given(shape=st.tuples(st.integers(1, 20), st.integers(1, 20)), seed=st.integers(0, 100), exponent=st.integers(-20, 20))
def test_scale_and_transposition_change_nothing(shape: tuple[int, int], seed: int, exponent: int) -> None:
    """Bitwise, as far as no number is rounded otherwise: powers of two."""
    matrix = random(shape, seed)
    before = matrix.clone()
    found = orthogonalised(matrix, USUAL, 5, torch.float32)
    assert torch.equal(matrix, before), "the argument is changed"
    torch.testing.assert_close(
        orthogonalised(2.0**exponent * matrix, USUAL, 5, torch.float32), found, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(orthogonalised(matrix.T, USUAL, 5, torch.float32).T, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_zeros_come_zeros(dtype: torch.dtype) -> None:
    assert not orthogonalised(torch.zeros(5, 9), USUAL, 5, dtype).any()
    tiny = 1e-14 * random((5, 9))  # below a norm of 1e-7 a matrix is not brought to 1
    found, expected = orthogonalised(tiny, USUAL, 5, dtype).double(), expected_of(tiny, 5, USUAL)
    assert 0 < norm(found) < 1e-3 and norm(found - expected) < 0.01 * norm(expected)


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32)])
def test_rank_deficient(shape: tuple[int, int]) -> None:
    """Half of the singular values are zero, but for the rounding of the matrix to fp32 or bf16."""
    values = torch.cat([torch.linspace(1.0, 0.2, 16), torch.zeros(16)])
    exact = with_values(shape, values)
    expected = expected_of(exact, 5, USUAL)
    differences = {
        dtype: norm(orthogonalised(exact.to(dtype), USUAL, 5, dtype).double() - expected)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    print(shape, differences)
    assert differences[torch.float64] < 1e-12
    assert differences[torch.float32] < 2e-4
    assert 0.1 < differences[torch.bfloat16] < 1.3


def test_slope_at_zero() -> None:
    """A direction of 1e-6 comes out 485 times as large."""
    values = torch.tensor([1.0, 0.5, 1e-6], dtype=torch.float64)
    found = torch.linalg.svdvals(orthogonalised(with_values((3, 5), values), USUAL, 5, torch.float64))
    after = newton_schulz_values(values / values.norm(), 5, USUAL)
    assert abs(float(found.min() * values.norm()) / 484.876e-6 - 1) < 1e-4
    torch.testing.assert_close(found, after.sort(descending=True).values, rtol=1e-9, atol=0)
