"""Training steps of one shape in different layouts, from the same weights on the same samples, as turns.

Sample number i is the same everywhere, and so is the weight a name stands for: layouts that read the same samples in a
step start from the same loss, which `benchmarks.scaling` checks before it reports anything.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from time import perf_counter
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass
from torch import nn

from benchmarks.contenders import BETAS, CLIP, EPSILON, LEARNING_RATE, Shape, config_of
from benchmarks.turns import Action, Measured
from mlra_scale.config import Config, batch_plan
from mlra_scale.data import Batch
from mlra_scale.model.context import ModelContext
from mlra_scale.model.gpt import GPT
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.parallel import Engine, Topology, build_engine, build_topology, initialize_distributed
from mlra_scale.parallel.optimizer import parameter_groups

MINUTES = 10.0


@dataclass(frozen=True)
class Layout:
    """How a shape is trained.

    Attributes:
        tensor: Tensor-parallel degree.
        pipeline: Pipeline stages.
        stage: Of ZeRO.
        engine: "zero" or "pipeline".
        micro_batches: Micro-batches per step and data rank.
        micro_batch_size: Samples of each.
    """

    tensor: int = 1
    pipeline: int = 1
    stage: int = 0
    engine: str = "zero"
    micro_batches: int = 1
    micro_batch_size: int = 4

    def config(self, shape: Shape, world_size: int) -> Config:
        """The configuration of a shape in this layout."""
        values = config_of(shape, "mlra", "fp32").model_dump()
        data = world_size // (self.tensor * self.pipeline)
        values["train"] |= {
            "global_batch_size": self.micro_batches * self.micro_batch_size * data,
            "micro_batch_size": self.micro_batch_size,
            "device": "cpu",
        }
        values["parallel"] |= {"tensor": self.tensor, "pipeline": self.pipeline, "engine": self.engine}
        if self.stage:
            # A bucket for the whole model: DeepSpeed's own of 5e8 numbers would be allocated anew in every step.
            weights = config_of(shape, "mlra", "fp32").model.num_parameters()
            values["deepspeed"] = {"zero_optimization": {"stage": self.stage, "reduce_bucket_size": weights}}
        return Config.from_dict(values)


def samples(shape: Shape, numbers: Iterable[int]) -> Batch:
    """Samples by number as one micro-batch."""
    one = replace(shape, batch_size=1)
    rows = [one.batch(number) for number in numbers]
    return Batch(**{field.name: torch.cat([getattr(row, field.name) for row in rows]) for field in fields(Batch)})


def micro_batches(shape: Shape, first: int, rank: int, ranks: int, count: int, size: int) -> list[Batch]:
    """A data rank's micro-batches of the step that begins at sample `first`, in the order of the trainer."""
    starts = [first + (index * ranks + rank) * size for index in range(count)]
    return [samples(shape, range(start, start + size)) for start in starts]


def topology_of(layout: Layout, shape: Shape) -> Topology:
    """Starts the mesh of this process; once per process, for all layouts of the same degrees."""
    device = initialize_distributed("cpu", MINUTES)
    world_size = dist.get_world_size()
    return build_topology(batch_plan(layout.config(shape, world_size), world_size), device, MINUTES)


def engine_of(layout: Layout, shape: Shape, topology: Topology) -> Engine:
    """The package's engine for a layout."""
    config = layout.config(shape, topology.world_size)
    return build_engine(config, batch_plan(config, topology.world_size), topology)


def action_of(engine: Engine, shape: Shape, count: int, size: int) -> Action:
    """A training step as a turn.

    Args:
        engine: The engine; one that is no pipeline takes micro-batches of any size.
        shape: What is trained.
        count: Micro-batches per data rank.
        size: Samples of each.
    """
    topology = engine.topology
    per_step = count * size * topology.data

    def step(turn: int) -> Measured:
        batches = micro_batches(shape, turn * per_step, topology.data_rank, topology.data, count, size)
        dist.barrier()
        started = perf_counter()
        result = engine.train_batch(batches, LEARNING_RATE, lambda proposal: proposal.is_finite)
        return {"seconds": perf_counter() - started, "loss": result.loss, "started": started}

    return step


def plain_action(shape: Shape, topology: Topology, size: int) -> Action:
    """The same module in a plain loop: torch's fused AdamW, multi-tensor clipping, nothing of DeepSpeed."""
    config = Layout(micro_batch_size=size).config(shape, 1)
    module = GPT(ModelContext(model=config.model, seed=config.train.seed, tensor_group=topology.tensor_group))
    parameters = list(module.parameters())
    groups = parameter_groups(dict(module.named_parameters()), ParameterTable(config.model), config.optim)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)

    def step(turn: int) -> Measured:
        batch = samples(shape, range(turn * size, (turn + 1) * size))
        started = perf_counter()
        loss = module(batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.sample_ids_B, batch.targets_BS)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "seconds": perf_counter() - started}

    return step


class StageWatch:
    """How long a pipeline stage computes within a step, and when its last backward pass ends.

    Args:
        engine: A pipeline engine; its forward and backward passes are timed from now on.
    """

    def __init__(self, engine: Any) -> None:
        inner = engine.deepspeed_engine
        instructions = inner._INSTRUCTION_MAP
        watched = {kind: self._timed(instructions[kind]) for kind in (ForwardPass, BackwardPass)}
        inner._INSTRUCTION_MAP = {**instructions, **watched}
        self.busy = self.ended = 0.0

    def _timed(self, function: Any) -> Any:
        def run(inner: Any, *arguments: Any, **named: Any) -> None:
            started = perf_counter()
            MethodType(function, inner)(*arguments, **named)
            self.ended = perf_counter()
            self.busy += self.ended - started

        return run

    def around(self, step: Action) -> Action:
        """The same step, which also tells "busy" and "span": seconds from its beginning to the last backward pass."""

        def watched(turn: int) -> Measured:
            self.busy = 0.0
            measured = step(turn)
            return {**measured, "busy": self.busy, "span": self.ended - measured["started"]}

        return watched


def build_single(shape: Shape, accumulated: Sequence[int]) -> Mapping[str, Action]:
    """What one process does: the plain loop, ZeRO 0 to 3, a pipeline of one stage, and steps of several micro-batches.

    Args:
        shape: What is trained; its batch is one micro-batch.
        accumulated: Numbers of micro-batches of one sample.
    """
    size = shape.batch_size
    topology = topology_of(Layout(), shape)
    actions = {"plain loop": plain_action(shape, topology, size)}
    for stage in range(4):
        engine = engine_of(Layout(stage=stage, micro_batch_size=size), shape, topology)
        actions[f"ZeRO {stage}"] = action_of(engine, shape, 1, size)
    engine = engine_of(Layout(engine="pipeline", micro_batch_size=size), shape, topology)
    actions["pipeline of one stage"] = action_of(engine, shape, 1, size)
    for count in accumulated:
        engine = engine_of(Layout(micro_batches=count, micro_batch_size=1), shape, topology)
        actions[f"m = {count}"] = action_of(engine, shape, count, 1)
    return actions


def build_neighbour(shape: Shape) -> Mapping[str, Action]:
    """What another single process does at the same time: the same as ZeRO 0, and nothing between the two."""
    layout = Layout(micro_batch_size=shape.batch_size)
    engine = engine_of(layout, shape, topology_of(layout, shape))
    return {"ZeRO 0": action_of(engine, shape, 1, shape.batch_size)}


def build_data_parallel(shape: Shape) -> Mapping[str, Action]:
    """Two data ranks at every ZeRO stage: with the samples of one process shared (strong), or as many each (weak)."""
    topology = topology_of(Layout(), shape)
    actions = {}
    for stage in range(4):
        engine = engine_of(Layout(stage=stage, micro_batch_size=shape.batch_size), shape, topology)
        actions[f"ZeRO {stage} strong"] = action_of(engine, shape, 1, shape.batch_size // 2)
        actions[f"ZeRO {stage} weak"] = action_of(engine, shape, 1, shape.batch_size)
    return actions


def build_tensor_parallel(shape: Shape) -> Mapping[str, Action]:
    """Two tensor ranks: with the samples of one process (strong), and with twice as many (weak)."""
    layout = Layout(tensor=2, micro_batch_size=shape.batch_size)
    engine = engine_of(layout, shape, topology_of(layout, shape))
    return {
        "strong": action_of(engine, shape, 1, shape.batch_size),
        "weak": action_of(engine, shape, 1, 2 * shape.batch_size),
    }


def build_pipeline(shape: Shape, accumulated: Sequence[int]) -> Mapping[str, Action]:
    """Two stages, at several numbers of micro-batches of one sample."""
    layouts = [Layout(pipeline=2, engine="pipeline", micro_batches=m, micro_batch_size=1) for m in accumulated]
    topology = topology_of(layouts[0], shape)
    actions = {}
    for layout in layouts:
        engine = engine_of(layout, shape, topology)
        step = action_of(engine, shape, layout.micro_batches, 1)
        actions[f"m = {layout.micro_batches}"] = StageWatch(engine).around(step)
    return actions
