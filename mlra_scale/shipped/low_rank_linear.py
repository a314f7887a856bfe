"""A linear map as the product of two factors, in plain torch (MLRA; Chung et al. 2024, arXiv 2409.07787).

    y = (x W_D^T) W_U^T + b      W_D [R, in], W_U [out, R]

Nothing stands between the factors, so they merge into one dense matrix W_U W_D, and a dense matrix is cut into the
nearest factors of a rank. The file stands alone: it travels with exported checkpoints, beside modeling_mlra.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

INITIALIZATIONS = ("gpt2", "xavier", "matched")


def factor_stds(in_features: int, out_features: int, rank: int, init: str, std: float) -> tuple[float, float]:
    """Returns the standard deviations of the initial values of the down factor and of the up factor.

    Elements of the product of two normal factors with standard deviations a and b have a b sqrt(R).

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        rank: R.
        init: `gpt2`: `std` for each factor; `xavier`: sqrt(2 / (in + out)) of each factor; `matched`: the same for
            both, so that elements of the product have `std`.
        std: What elements of a dense matrix would have.

    Raises:
        ValueError: There is no such initialization, or `std` is negative.
    """
    if not std >= 0.0:
        raise ValueError(f"std is {std}; use a standard deviation, 0 or more")
    if init == "gpt2":
        return std, std
    if init == "xavier":
        return math.sqrt(2.0 / (in_features + rank)), math.sqrt(2.0 / (rank + out_features))
    if init == "matched":
        return (math.sqrt(std) * rank**-0.25,) * 2
    raise ValueError(f"init is {init!r}; use {', '.join(INITIALIZATIONS)}")


def factorise(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Cuts a matrix [out, in] into balanced factors by its singular value decomposition, computed in fp64.

    With W = U S V^T these are up = U sqrt(S) and down = sqrt(S) V^T, the first R of each: the nearest product of its
    rank to W in the Frobenius norm (Eckart and Young 1936).

    Returns:
        up [out, R] and down [R, in], in fp64 if the matrix is and else in fp32, and the share of the squared singular
        values that they keep.

    Raises:
        ValueError: It is no matrix of finite numbers, or has no `rank` singular values.
    """
    if weight.dim() != 2 or not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank is {rank}, of weights {list(weight.shape)}; use 1 to the smaller side of a matrix")
    if weight.is_meta or not weight.isfinite().all():
        raise ValueError(f"the weights {list(weight.shape)} are not finite numbers, or on the meta device")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    left, singular, right = torch.linalg.svd(weight.double(), full_matrices=False)
    roots = singular[:rank].sqrt()
    energy, total = float(singular[:rank].square().sum()), float(singular.square().sum())
    up, down = (left[:, :rank] * roots).to(dtype), (roots[:, None] * right[:rank]).to(dtype)
    return up, down, energy / total if total else 1.0


class LowRankLinear(nn.Module):
    """A linear map as the product of two factors, in place of an nn.Linear(in_features, out_features, bias).

    down.weight: [R, in]; up.weight: [out, R]; up.bias: [out], if there is one

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        rank: R, at least 1.
        bias: Whether the up factor adds a bias, which begins at 0.
        init: Of the factors, see `factor_stds`.
        std: What elements of a dense matrix would have in the beginning.
        up_scale: What the up factor's initial values are multiplied by: 1 / sqrt(2 L) where the map writes to the
            residual stream of L blocks, as in GPT-2.
        device, dtype: Of the factors and the bias, as for nn.Linear.

    Raises:
        ValueError: `rank` is less than 1, `std` is negative, or there is no such initialization.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        init: str = "gpt2",
        std: float = 0.02,
        up_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is {rank}; use 1 or more")
        self.down_std, up_std = factor_stds(in_features, out_features, rank, init, std)
        self.up_std = up_std * up_scale
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the factors from normal distributions and sets the bias to 0."""
        nn.init.normal_(self.down.weight, std=self.down_std)
        nn.init.normal_(self.up.weight, std=self.up_std)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    @torch.no_grad()
    def set_dense(self, weight: Tensor) -> float:
        """Sets the factors to the nearest ones of a dense matrix [out, in], and returns the share that they keep.

        See `factorise`. The bias stays as it is.

        Raises:
            ValueError: The matrix has another shape, or R is larger than one of its sides.
        """
        shape = [self.up.out_features, self.down.in_features]
        if list(weight.shape) != shape:
            raise ValueError(f"weight has shape {list(weight.shape)}; the map needs {shape}")
        up, down, kept = factorise(weight, self.down.out_features)
        self.up.weight.copy_(up)
        self.down.weight.copy_(down)
        return kept

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Returns the product of the factors [out, in], formed in fp64, in the factors' type."""
        return (self.up.weight.double() @ self.down.weight.double()).to(self.up.weight.dtype)
