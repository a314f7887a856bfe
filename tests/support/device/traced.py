"""One rank of a layout on a device that is not there: builds the real engine, trains two steps, reports."""

from __future__ import annotations

import pickle
import sys
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.device import cuda_stubs, measured
from tests.support.device.answers import Answers
from tests.support.device.faults import FAULTS
from tests.support.device.layouts import Layout
from tests.support.device.matrix_runs import MatrixRuns
from tests.support.device.report import Matrices, Phase, Report
from tests.support.device.tracing import Trace


def configured(layout: Layout) -> Any:
    """The validated configuration of a layout."""
    from mlra_scale.config.loading import load_named_config
    from mlra_scale.model.validation import validate

    base = ["train.device=cuda", "data.path=x", f"model.num_layers={layout.num_layers}", *layout.overrides]
    config, _ = load_named_config(layout.preset, None, layout.ds_config, base)
    ranks = config.parallel.tensor * config.parallel.pipeline
    batch = layout.num_micro_batches * config.train.micro_batch_size * layout.world_size // ranks
    config, _ = load_named_config(layout.preset, None, layout.ds_config, [*base, f"train.global_batch_size={batch}"])
    validate(config, layout.world_size, device="cuda")
    return config


class TracedRank:
    """The rank: its engine, and what is noted of it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.trace = Trace()
        cuda_stubs.install(layout.rank % cuda_stubs.NUM_DEVICES, self.trace.wait)

    def build(self) -> None:
        """Configuration, groups and engine, as a start makes them."""
        from tests.support.device import fake_ranks

        self.groups = fake_ranks.install(self.layout.rank, self.layout.world_size)
        from mlra_scale.config import batch_plan
        from mlra_scale.parallel import build_engine, build_topology, initialize_distributed
        from mlra_scale.training.log.console import silence_libraries

        silence_libraries("cuda")
        cuda_stubs.answer_for_cpu_adam()
        self.config = configured(self.layout)
        self.plan = batch_plan(self.config, self.layout.world_size)
        self.topology = build_topology(self.plan, initialize_distributed("cuda", 10.0), 10.0)
        self.trace.group_of = fake_ranks.group_names(self.topology)
        fake_ranks.exchange_objects(self.trace.sends_object)
        self.matrix_runs = MatrixRuns()
        self.matrix_runs.install()
        self._mark_matrices()
        engine: Any = build_engine(self.config, self.plan, self.topology)
        self.engine = engine
        self.deepspeed_engine: Any = self.engine.deepspeed_engine
        self.blocks = _blocks(self.engine.module)
        self._mark_blocks()
        self.step_batches = self.batches()  # on a run, the feed's thread has them ready

    def batches(self) -> list[Any]:
        """The micro-batches of a step, as the feed hands them out."""
        from mlra_scale.data import Batch

        shape = (self.plan.micro_batch_size, self.plan.sequence_length)

        def micro_batch() -> Batch:
            tokens, targets, positions, documents = (torch.zeros(shape, dtype=torch.int64) for _ in range(4))
            return Batch(tokens, targets, positions, documents, torch.zeros(shape[0], dtype=torch.int64)).pinned()

        return [micro_batch() for _ in range(self.plan.accumulation_steps)]

    def train(self) -> Any:
        """One step of training."""
        return self.engine.train_batch(self.step_batches, 1e-4, lambda proposal: True, lambda: False)

    def _mark_blocks(self) -> None:
        """Has the trace note where the blocks' passes begin and end."""
        middle = len(self.blocks) // 2
        first, of_middle, last = self.blocks[0], self.blocks[middle], self.blocks[-1]

        def is_forward() -> bool:
            return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1

        def hooked(begins_in: Any, ends_in: Any, name: str) -> None:
            def before(_: Any, inputs: Any) -> None:
                if is_forward():
                    self.trace.mark(f"{name} begins")
                    _on_gradient(inputs, lambda: self.trace.mark(f"{name} begins backward"))

            def after(_: Any, inputs: Any, outputs: Any) -> None:
                if is_forward():
                    self.trace.mark(f"{name} ends")
                    _on_gradient(outputs, lambda: self.trace.mark(f"{name} ends backward"))

            begins_in.register_forward_pre_hook(before)
            ends_in.register_forward_hook(after)

        hooked(of_middle, of_middle, "middle")
        hooked(first, last, "all")

    def _mark_matrices(self) -> None:
        """Has the trace note where muon and spectron begin and end; in the first step they are a phase of their own."""
        from mlra_scale.parallel.matrix_optimizer import MatrixOptimizer

        update = MatrixOptimizer.update

        def marked(optimizer: Any, *arguments: Any) -> None:
            if "step" not in self.trace.phases:
                with self.trace.phase("matrices"):
                    update(optimizer, *arguments)
                return
            self.trace.mark("matrices begin")
            update(optimizer, *arguments)
            self.trace.mark("matrices end")

        MatrixOptimizer.update = marked  # type: ignore[method-assign,assignment]

    def report(self) -> Report:
        """Everything that was noted."""
        from mlra_scale.planning.memory import rank_memory

        module, step = self.engine.module, self.trace.phases["step"]
        named = [*module.named_parameters(), *module.named_buffers()]
        optimizer = type(self.deepspeed_engine.optimizer).__name__
        # Of ZeRO 3 the mean of all blocks: a bucket of gradients is flushed in some of them.
        passes = _pass_launches(step, "all") if "Stage3" in optimizer else _pass_launches(step, "middle")
        num_blocks = len(self.blocks) if "Stage3" in optimizer else 1
        return Report(
            layout=self.layout.name,
            engine=(type(self.deepspeed_engine).__name__, optimizer),
            num_micro_batches=self.plan.accumulation_steps,
            num_blocks=len(self.blocks),
            num_parameters=len(list(module.parameters())),
            misplaced=[name for name, value in named if value.device.type != "cuda"],
            phases=self.trace.phases,
            block_launches=(passes[0] / num_blocks, passes[1] / num_blocks),
            between_launches=_between(step, self.plan.accumulation_steps),
            planned_bytes=rank_memory(self.config, self.plan, self.topology.pipeline_rank).device,
            planned_sent=_planned_sent(self.config, self.plan, self.topology.pipeline_rank),
            matrices=self._matrices(step),
            mesh=(self.plan.tensor, self.plan.pipeline, self.plan.data),
            groups=dict(self.groups),
        )

    def _matrices(self, step: Phase) -> Matrices | None:
        """What muon and spectron do in a step; None: AdamW updates everything."""
        from mlra_scale.planning.communication import matrix_traffic
        from mlra_scale.planning.layout import Stage
        from mlra_scale.planning.memory_state import matrix_bytes
        from mlra_scale.planning.step_time import matrix_launches

        stage = Stage(self.config, self.plan, self.topology.pipeline_rank)
        if not stage.matrices:
            return None
        sent = self.matrix_runs.sent_by_ranks(stage.transported_element)
        planned, marks = matrix_traffic(stage), dict(step.marks)
        return Matrices(
            number=len(stage.matrices),
            num_launches=marks["matrices end"] - marks["matrices begin"],
            planned_launches=matrix_launches(stage),
            expected_sent=sent[self.topology.data_rank * self.topology.tensor + self.topology.tensor_rank],
            mean_sent=sum(sent) / len(sent),
            planned_sent=planned.sent,
            planned_messages=round(planned.messages + planned.rings),
            added=self.trace.phases["matrices"].peak - self.trace.phases["matrices"].start,
            planned_added=matrix_bytes(stage),
        )


def _blocks(module: Any) -> list[Any]:
    from mlra_scale.model.block import Block

    return [child for child in module.modules() if isinstance(child, Block)]


def _on_gradient(values: Any, call: Any) -> None:
    """Calls when the gradient of the first of these tensors is there."""
    value = values
    while isinstance(value, tuple):
        value = value[0]
    if value.requires_grad:
        value.register_hook(lambda gradient: call())


def _planned_sent(config: Any, plan: Any, stage: int) -> dict[str, float]:
    from mlra_scale.planning import communication as planned
    from mlra_scale.planning.layout import Stage

    planned_stage = Stage(config, plan, stage)
    gradients, weights = planned.data_traffic_per_micro_batch(planned_stage)
    micro_batches = plan.accumulation_steps
    per_step = sum(traffic.sent for traffic in planned.data_traffic_per_step(planned_stage))
    return {
        "tensor": micro_batches * planned.tensor_traffic(planned_stage).sent,
        "pipeline": micro_batches * planned.pipeline_traffic(planned_stage).sent,
        "tied": planned.tied_traffic(planned_stage).sent,
        "data": micro_batches * (gradients.sent + weights.sent) + per_step,
    }


def _pass_launches(phase: Phase, of: str) -> tuple[int, int]:
    """Kernels of the last forward and backward pass of the middle block, or of all blocks."""
    last: dict[str, int] = {}
    found = [0, 0]
    for name, number in phase.marks:
        last[name] = number
        if name == f"{of} ends":
            found[0] = number - last[f"{of} begins"]
        elif name == f"{of} begins backward":
            found[1] = number - last[f"{of} ends backward"]
    assert min(found) > 0, f"no passes of the blocks were seen: {phase.marks}"
    return found[0], found[1]


def _between(phase: Phase, num_micro_batches: int) -> int:
    """Kernels between the blocks' backward pass and the next forward pass.

    Near the end of the step, where a pipeline does one of each in turns, and before gradients are reduced.
    """
    begins = [number for name, number in phase.marks if name == "all begins"]
    backs = [number for name, number in phase.marks if name == "all begins backward"]
    assert len(begins) == len(backs) == num_micro_batches, f"not every micro-batch was seen: {phase.marks}"
    if num_micro_batches < 2:
        return 0
    earlier, later = begins[-2], begins[-1]
    between = [later - number for number in backs if earlier < number <= later]
    assert between, f"no backward pass between the last two forward passes: {phase.marks}"
    return between[-1]


def main() -> None:
    """Traces the layout that stdin holds, pickled with faults and the file in which the report is left."""
    layout, faults, file = pickle.load(sys.stdin.buffer)
    rank = TracedRank(layout)
    for name in faults:
        FAULTS[name]()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(rank.trace)
        stack.enter_context(Answers(rank.trace))
        for name, work in (("build", rank.build), ("first step", rank.train), ("step", rank.train)):
            with rank.trace.phase(name):
                work()
        report = rank.report()
        if layout.with_measurements:
            report.results |= measured.trace_measurements(rank)
        content = pickle.dumps(report)
    file.write_bytes(content)
    dist.destroy_process_group()
