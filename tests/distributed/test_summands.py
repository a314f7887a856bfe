"""What leaves tensor parallelism is summed over its ranks, in whatever order of memory it comes."""

import pytest
import torch
import torch.distributed as dist

from mlra_scale.model.context import ModelContext
from mlra_scale.model.tensor_parallel import enter_linear, leave_linear, leave_tensor_parallel
from tests.support.layouts import Layout, layout_config
from tests.support.pool import Pools

RTOL = 1e-5


def tensors() -> tuple[torch.Tensor, ...]:
    """The halves of an input and of a weight that two ranks hold, and a bias."""
    generator = torch.Generator().manual_seed(1)
    halves = [torch.randn(2, *shape, generator=generator) for shape in ((3, 4, 6), (5, 6))]
    return *halves, torch.randn(5, generator=generator)


def in_order(value: torch.Tensor, is_contiguous: bool) -> torch.Tensor:
    """The same values, in the order of memory that is wanted."""
    return (value.contiguous() if is_contiguous else value.mT.contiguous().mT).requires_grad_()


def sums(rank: int, world_size: int, is_contiguous: bool) -> tuple[list[torch.Tensor], ...]:
    """Outputs, and gradients of their sums of squares: of a row-parallel map in two forms, and of a column-parallel."""
    assert dist.group.WORLD is not None
    context = ModelContext(layout_config(Layout(tensor=2)).model, 1, dist.group.WORLD)
    x, weight, whole_bias = tensors()
    found = []
    for name in ("leave", "row", "column"):
        mine = in_order(x[rank if name != "column" else 0], is_contiguous)
        matrix, bias = in_order(weight[rank], is_contiguous), whole_bias.clone().requires_grad_()
        if name == "leave":
            partial = in_order((mine @ matrix.T).detach(), is_contiguous)
            output = leave_tensor_parallel(context, partial, bias)
            leaves = [partial, bias]
        else:
            output = (leave_linear if name == "row" else enter_linear)(context, mine, matrix, bias)
            leaves = [mine, matrix, bias]
        gradients = torch.autograd.grad(output.square().sum(), leaves)
        found.append([output.detach().contiguous(), *(gradient.contiguous() for gradient in gradients)])
    return tuple(found)


@pytest.mark.parametrize("is_contiguous", [True, False], ids=["contiguous", "transposed"])
def test_summands_may_lie_in_any_order(worker_pool: Pools, is_contiguous: bool) -> None:
    ranks = worker_pool(2).run(sums, is_contiguous)
    x, weight, bias = tensors()
    summed = torch.einsum("rbsi,roi->bso", x, weight) + bias
    columns = [x[0] @ weight[rank].T + bias for rank in range(2)]
    of_input = 2 * (columns[0] @ weight[0] + columns[1] @ weight[1])
    for rank, (left, row, column) in enumerate(ranks):
        of_bias = 2 * summed.sum(dim=(0, 1))
        expected: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [
            (left, [summed, 2 * summed, of_bias]),
            (row, [summed, 2 * summed @ weight[rank], torch.einsum("bso,bsi->oi", 2 * summed, x[rank]), of_bias]),
            (
                column,
                [
                    columns[rank],
                    of_input,
                    torch.einsum("bso,bsi->oi", 2 * columns[rank], x[0]),
                    2 * columns[rank].sum(dim=(0, 1)),
                ],
            ),
        ]
        for found, wanted in expected:
            torch.testing.assert_close(found, wanted, rtol=RTOL, atol=1e-4)
