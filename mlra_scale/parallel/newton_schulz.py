"""Orthogonalisation by Newton-Schulz iterations, as in Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

For X = U S V^T an iteration gives U p(S) V^T with the polynomial p(s) = a s + b s^3 + c s^5, whose coefficients are
chosen for a steep slope at zero: five iterations with the usual ones bring singular values between 0.0015 and 1 times
the Frobenius norm to between 0.68 and 1.21, not to 1. Directions in which the matrix is zero stay zero.
"""

import torch

_SMALLEST_NORM = 1e-7
"""A matrix whose Frobenius norm is smaller is divided by this instead: of zeros come zeros."""


def orthogonalised(
    matrix_MN: torch.Tensor, coefficients: tuple[float, float, float], steps: int, dtype: torch.dtype
) -> torch.Tensor:
    """Returns a matrix [M, N] with the singular vectors of the given one and singular values near 1, of type `dtype`.

    Args:
        matrix_MN: Any matrix, also one without elements; it is not changed.
        coefficients: a, b, c of an iteration X <- a X + (b A + c A A) X with A = X X^T.
        steps: Number of iterations.
        dtype: Type in which they compute. In bf16 the result is that of torch.optim.Muon, bit for bit.
    """
    a, b, c = coefficients
    is_tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    X = (matrix_MN.T if is_tall else matrix_MN).to(dtype, copy=True)
    del matrix_MN  # frees it if the caller has no other reference
    X.div_(X.norm().clamp(min=_SMALLEST_NORM))
    for _ in range(steps):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.T if is_tall else X
