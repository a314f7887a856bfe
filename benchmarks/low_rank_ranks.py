"""What every rank does for benchmarks.low_rank: times, counts and errors of the projections q, k and v.

Everything here runs the modules of the package, in gloo processes (processes.py).
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import LEARNING_RATE, Shape, build_ours, config_of
from benchmarks.turns import rotated
from mlra_scale.config import batch_plan
from mlra_scale.model.attention import SelfAttention
from mlra_scale.model.context import ModelContext
from mlra_scale.model.low_rank_plan import PLANS
from mlra_scale.model.parameters import LowRankPlan
from mlra_scale.parallel import Topology, build_topology, destroy_topology, initialize_distributed

DENSE = "dense"
REPEATS = 2
"""Passes of the projections that are timed together; a whole step is long enough alone."""
RATE_PASSES = 10
"""Matrix products, or all-reduces, within one pass of a rate: they are short."""


@dataclass(frozen=True)
class Plan:
    """One way to compute q, k and v.

    Attributes:
        name: "dense" or a low-rank plan.
        parts: R is D / parts; 0 where it is dense.
    """

    name: str
    parts: int = 0

    def __str__(self) -> str:
        return self.name if self.parts == 0 else f"{self.name} R=D/{self.parts}"

    def sections(self, hidden_size: int, tensor: int) -> dict[str, dict[str, Any]]:
        """Fields of the configuration, by section."""
        sections: dict[str, dict[str, Any]] = {"parallel": {"tensor": tensor}}
        if self.parts:
            sections["parallel"]["low_rank_plan"] = self.name
            sections["model"] = {"attention_rank": hidden_size // self.parts}
        return sections


def plans_of(tensor: int, parts: Sequence[int]) -> list[Plan]:
    """Dense, and every plan that there is at a tensor-parallel degree with every rank."""
    names = [name for name in PLANS if tensor > 1 or name != "sharded"]
    return [Plan(DENSE), *(Plan(name, part) for part in parts for name in names)]


def attention_of(shape: Shape, plan: Plan, group: dist.ProcessGroup) -> SelfAttention:
    """The attention of a block of ours, on the ranks of a group."""
    config = config_of(shape, "mlra" if plan.parts else "dense", "fp32", **plan.sections(shape.hidden_size, 1))
    name: LowRankPlan = config.parallel.low_rank_plan if plan.parts else "replicated"  # type: ignore[assignment]
    context = ModelContext(model=config.model, seed=1, tensor_group=group, low_rank_plan=name)
    return SelfAttention(context, "blocks.0.attention", 0)


class Projections:
    """q, k and v of one block, forward and backward, for T tokens.

    Args:
        shape: Widths.
        plan: How they are computed.
        tokens: T.
        group: The tensor-parallel ranks.
    """

    def __init__(self, shape: Shape, plan: Plan, tokens: int, group: dist.ProcessGroup) -> None:
        self.attention = attention_of(shape, plan, group)
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(1, tokens, shape.hidden_size, generator=generator).requires_grad_()
        num_heads, width = shape.num_heads, shape.hidden_size // shape.num_heads
        gradients = torch.randn(3, 1, num_heads, tokens, width, generator=generator)
        self.gradients = gradients.chunk(group.size(), dim=2)[group.rank()].contiguous()

    def run(self) -> list[Tensor]:
        """One forward and one backward pass; returns q, k and v of this rank's heads."""
        self.hidden.grad = None
        self.attention.zero_grad(set_to_none=True)
        outputs = self.attention._project(self.hidden)  # all of q, k, v and no more: what the plans differ in
        torch.autograd.backward(outputs, list(self.gradients.to(outputs[0].dtype)))
        return outputs


def measure(tensor: int, shape: Shape, tokens: Sequence[int], parts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Times on `tensor` ranks.

    Args:
        tensor: The tensor-parallel degree, all processes.
        shape: Of the whole step; its batch is one micro-batch.
        tokens: Of a micro-batch, for the projections alone.
        parts: R is D divided by these.
        rounds: How often everything gets its turn.

    Returns:
        By T, seconds by plan and round of the projections, with FLOP/s and bytes/s of each round; and of whole steps.
    """
    place = initialize_distributed("cpu", timeout_minutes=10.0)
    plan = batch_plan(config_of(shape, DENSE, "fp32", parallel={"tensor": tensor}), tensor)
    topology = build_topology(plan, place, timeout_minutes=10.0)
    plans = plans_of(tensor, parts)
    found: dict[str, Any] = {"projections": {}}
    for count in tokens:
        actions = {str(plan): Projections(shape, plan, count, topology.tensor_group).run for plan in plans}
        actions |= _rates(shape, count, topology)
        found["projections"][count] = _in_turns(actions, rounds, REPEATS)
    steps = {str(plan): _whole_step(shape, plan, topology) for plan in plans}
    found["steps"] = _in_turns(steps, rounds, 1)
    destroy_topology(topology)
    return found


MATRIX_PRODUCT, ALL_REDUCE = "matrix product", "all-reduce"


def _rates(shape: Shape, tokens: int, topology: Topology) -> dict[str, Callable[[], Any]]:
    """What the cost model is fed with: a product as the projections have it, and an all-reduce as large as X."""
    activations = torch.randn(tokens, shape.hidden_size)
    weight = torch.randn(shape.hidden_size // topology.tensor, shape.hidden_size)
    message = torch.zeros(tokens, shape.hidden_size)

    def products() -> None:
        for _ in range(RATE_PASSES):
            torch.nn.functional.linear(activations, weight)

    def sums() -> None:
        for _ in range(RATE_PASSES):
            dist.all_reduce(message, group=topology.tensor_group)

    return {MATRIX_PRODUCT: products, **({ALL_REDUCE: sums} if topology.tensor > 1 else {})}


def _whole_step(shape: Shape, plan: Plan, topology: Topology) -> Callable[[], Any]:
    sections = plan.sections(shape.hidden_size, topology.tensor)
    engine = build_ours(shape, "mlra" if plan.parts else DENSE, "fp32", topology, **sections)
    batch = shape.batch(0)
    return lambda: engine.train_batch([batch], LEARNING_RATE)


def _in_turns(actions: dict[str, Callable[[], Any]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Seconds by action and round, after one warm-up; all ranks begin and end together."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for turn in range(rounds + 1):
        for name in rotated(names, turn):
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(repeats):
                actions[name]()
            dist.barrier()
            if turn > 0:
                seconds[name].append((time.perf_counter() - begin) / repeats)
    return seconds


def _added_product_flops(_: object, left: tuple[int, int], right: tuple[int, int], **__: object) -> int:
    return 2 * left[0] * left[1] * right[1]


PRODUCTS = {torch.ops.aten.addmm_: _added_product_flops}
"""For FlopCounterMode, which by itself does not count a product that is added in place."""


class SentNumbers(TorchDispatchMode):
    """Adds up how many numbers this rank sends in collectives, by the rings' shares: (t - 1) / t, all-reduce twice."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.share = (ranks - 1) / ranks
        self.numbers = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            # In each case what is whole: what is summed, gathered, or reduced before it is scattered.
            whole = {"allreduce_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1}
            if name not in whole:
                raise NotImplementedError(f"numbers that {func} sends")
            factor = 2 if name == "allreduce_" else 1
            self.numbers += factor * self.share * sum(tensor.numel() for tensor in _flat(args[whole[name]]))
        return func(*args, **(kwargs or {}))


def _flat(value: Any) -> Iterable[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in _flat(item)]


def count(shape: Shape, tokens: int, parts: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Counts on real modules, forward and backward: FLOPs of this rank, and numbers that it sends, by plan."""
    group = dist.group.WORLD
    assert group is not None
    found = {}
    for plan in plans_of(group.size(), parts):
        projections = Projections(shape, plan, tokens, group)
        with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as flops, SentNumbers(group.size()) as sent:
            projections.run()
        found[str(plan)] = (float(flops.get_total_flops()), sent.numbers)
    return found


@torch.no_grad()
def _rounded(attention: SelfAttention) -> SelfAttention:
    for parameter in attention.parameters():
        parameter.copy_(parameter.bfloat16())
    return attention


def errors(shape: Shape, tokens: int, parts: Sequence[int], draws: int) -> dict[str, dict[str, float]]:
    """Relative errors (Frobenius norms) in bf16 and fp32 against fp64, of one process.

    Weights and inputs are rounded to bf16 first, so that only arithmetic differs.

    Args:
        shape: Widths.
        tokens: T.
        parts: R is D divided by these.
        draws: Inputs, of which the median is taken.

    Returns:
        By plan and precision: of q, k and v, of the gradient of the hidden state, and of all weights.
    """
    group = dist.group.WORLD
    assert group is not None
    found = {}
    for part in parts:
        exact = _results(shape, Plan("replicated", part), tokens, group, torch.float64, draws)
        for name in ("replicated", "merged"):
            for dtype in (torch.bfloat16, torch.float32):
                results = _results(shape, Plan(name, part), tokens, group, dtype, draws)
                kinds = {
                    kind: statistics.median(
                        float((ours - true).norm() / true.norm())
                        for ours, true in zip(values, exact[kind], strict=True)
                    )
                    for kind, values in results.items()
                }
                found[f"{Plan(name, part)} {str(dtype).removeprefix('torch.')}"] = kinds
    return found


def _results(
    shape: Shape, plan: Plan, tokens: int, group: dist.ProcessGroup, dtype: torch.dtype, draws: int
) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {"output": [], "gradient of x": [], "gradient of weights": []}
    projections = Projections(shape, plan, tokens, group)
    _rounded(projections.attention).to(dtype)
    projections.gradients = projections.gradients.bfloat16().to(dtype)
    for draw in range(draws):
        generator = torch.Generator().manual_seed(100 + draw)
        hidden = torch.randn(1, tokens, shape.hidden_size, generator=generator)
        projections.hidden = hidden.bfloat16().to(dtype).requires_grad_()
        outputs = projections.run()
        found["output"].append(_vector(outputs))
        assert projections.hidden.grad is not None
        found["gradient of x"].append(_vector([projections.hidden.grad]))
        weights = [p.grad for p in projections.attention.parameters() if p.grad is not None]
        found["gradient of weights"].append(_vector(weights))
    return found


def _vector(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])
