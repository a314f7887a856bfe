"""One rank of a layout on a device that is not there: builds the real engine, trains two steps, reports.

python -m tests.support.device.traced LAYOUT_AS_JSON [FAULT]     (running.py does that)
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.device import cuda_stubs, measured
from tests.support.device.answers import Answers
from tests.support.device.faults import FAULTS
from tests.support.device.layouts import Layout
from tests.support.device.report import PhaseReport, Report
from tests.support.device.tracing import Phase, Trace

HOLDERS_SHOWN = 24


def configured(layout: Layout) -> Any:
    """The validated configuration of a layout."""
    from mlra_scale.config import validate
    from mlra_scale.config.loading import load_named_config

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
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.began: list[tuple[str, str | None]] = []
        self.trace = Trace()
        cuda_stubs.install(layout.rank % cuda_stubs.NUM_DEVICES, self.trace.wait, self._begins)

    def _begins(self, what: str) -> None:
        self.began.append((what, os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")))

    def build(self) -> None:
        """Configuration, groups and engine, as a start makes them."""
        from tests.support.device import fake_ranks

        self.groups = fake_ranks.install(self.layout.rank, self.layout.world_size)
        from mlra_scale.config import batch_plan
        from mlra_scale.parallel import build_engine, build_topology, initialize_distributed
        from mlra_scale.training.quiet import quiet_libraries

        quiet_libraries("cuda")
        cuda_stubs.answer_for_cpu_adam()
        with self._timed("configuration"):
            self.config = configured(self.layout)
            self.plan = batch_plan(self.config, self.layout.world_size)
        place = initialize_distributed("cuda", 10.0)
        with self._timed("process groups of the mesh"):
            self.topology = build_topology(self.plan, place, 10.0)
        self.trace.group_of = fake_ranks.group_names(self.topology)
        fake_ranks.exchange_objects(self.trace.sends_object)
        with self._timed("engine"):
            engine: Any = build_engine(self.config, self.plan, self.topology)
        self.engine = engine
        self.deepspeed_engine: Any = self.engine.deepspeed_engine
        is_partitioned = getattr(self.deepspeed_engine, "is_pipe_partitioned", False)
        self.trace.received = fake_ranks.Neighbour(self.config, self.plan, self.topology, is_partitioned).says
        self.blocks = _blocks(self.engine.module)
        self._mark_blocks()
        self.step_batches = self.batches()  # on a run, the feed's thread has them ready

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.cpu_seconds[name] = time.process_time() - began

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
        first, of_middle = self.blocks[0], self.blocks[middle]

        def is_forward() -> bool:
            return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1

        def hooked(module: Any, begin: str, end: str) -> None:
            def before(_: Any, inputs: Any) -> None:
                if is_forward():
                    self.trace.mark(begin)
                    _on_gradient(inputs, lambda: self.trace.mark(f"{begin} backward"))

            def after(_: Any, inputs: Any, outputs: Any) -> None:
                if is_forward():
                    self.trace.mark(end)
                    _on_gradient(outputs, lambda: self.trace.mark(f"{end} backward"))

            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)

        hooked(of_middle, "middle begins", "middle ends")
        first.register_forward_pre_hook(lambda *_: self.trace.mark("blocks begin") if is_forward() else None)
        first.register_forward_pre_hook(
            lambda _, inputs: _on_gradient(inputs, lambda: self.trace.mark("blocks are back")) if is_forward() else None
        )

    def report(self) -> Report:
        """Everything that was noted."""
        from mlra_scale.planning.memory import rank_memory

        module, step = self.engine.module, self.trace.phases["step"]
        named = [*module.named_parameters(), *module.named_buffers()]
        optimizer = type(self.deepspeed_engine.optimizer).__name__
        between, of_micro_batch = _between(step, self.topology.is_first_stage)
        return Report(
            layout=self.layout.name,
            engine=(type(self.deepspeed_engine).__name__, optimizer),
            seconds=self.seconds,
            num_micro_batches=self.plan.accumulation_steps,
            num_blocks=len(self.blocks),
            num_parameters=len(list(module.parameters())),
            misplaced=[name for name, value in named if value.device.type != "cuda"],
            phases={name: _phase_report(phase) for name, phase in self.trace.phases.items()},
            block_launches=_block_launches(step),
            between_launches=between,
            micro_batch_launches=of_micro_batch,
            planned_bytes=rank_memory(self.config, self.plan, self.topology.pipeline_rank).device,
            planned_sent=_planned_sent(self.config, self.plan, self.topology.pipeline_rank),
            began_cuda=self.began[:3],
            groups={str(size): number for size, number in sorted(self.groups.items())},
            cpu_seconds=self.cpu_seconds,
        )


def _blocks(module: Any) -> list[Any]:
    from mlra_scale.model.layers import Block

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

    gradients, weights = planned.data_traffic_per_micro_batch(config, plan, stage)
    micro_batches = plan.accumulation_steps
    per_step = planned.data_traffic_per_step(config, plan, stage).sent
    return {
        "tensor": micro_batches * planned.tensor_traffic(config, plan, stage).sent,
        "pipeline": micro_batches * planned.pipeline_traffic(config, plan, stage).sent,
        "tied": planned.tied_traffic(config, plan, stage).sent,
        "data": micro_batches * (gradients.sent + weights.sent) + per_step,
    }


def _block_launches(phase: Phase) -> tuple[int, int]:
    """Kernels of the middle block's last forward and backward pass."""
    last: dict[str, int] = {}
    found = [0, 0]
    for name, number in phase.marks:
        last[name] = number
        if name == "middle ends":
            found[0] = number - last["middle begins"]
        elif name == "middle begins backward":
            found[1] = number - last["middle ends backward"]
    return found[0], found[1]


def _between(phase: Phase, is_first: bool) -> tuple[int, int]:
    """Kernels between the blocks' backward pass and the next forward pass, and those from forward pass to forward pass.

    Both near the end of the step, where a pipeline does one of each in turns, and before gradients are reduced.
    """
    begins = [number for name, number in phase.marks if name == "blocks begin"]
    backs = [number for name, number in phase.marks if name == "blocks are back"]
    if len(begins) < 2:
        return 0, 0
    earlier, later = begins[-2], begins[-1]
    between = [later - number for number in backs if earlier < number <= later]
    return (between[-1] if between else 0), later - earlier


def _phase_report(phase: Phase) -> PhaseReport:
    return PhaseReport(
        start=phase.start,
        peak=phase.peak,
        end=phase.end,
        host_start=phase.host_start,
        host_peak=phase.host_peak,
        num_launches=phase.num_launches,
        launches=dict(phase.launches.most_common()),
        waits=[(*key, number) for key, number in phase.waits.most_common()],
        messages=[(*key, message.number, message.sent) for key, message in phase.messages.items()],
        wide_products=dict(phase.wide_products),
        host_results=dict(phase.host_results),
        misplaced=dict(phase.misplaced),
        holders=dict(phase.holders().most_common(HOLDERS_SHOWN)),
    )


def main(layout_as_json: str, faults: str) -> None:
    """Traces and prints the report."""
    layout = Layout(**json.loads(layout_as_json))
    layout = Layout(**{**vars(layout), "overrides": tuple(layout.overrides)})
    began = time.monotonic()
    rank = TracedRank(layout)
    for name in filter(None, faults.split(",")):
        FAULTS[name]()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(rank.trace)
        stack.enter_context(Answers(rank.trace))
        for name, work in (("build", rank.build), ("first step", rank.train), ("step", rank.train)):
            with rank.trace.phase(name):
                work()
            rank.seconds[name] = time.monotonic() - began
        report = rank.report()
        if layout.with_measurements:
            report.results |= measured.trace_measurements(rank)
            report.phases |= {name: _phase_report(phase) for name, phase in rank.trace.phases.items()}
            rank.seconds["measurements"] = time.monotonic() - began
    from tests.support.device.running import MARK

    print(f"\n{MARK}{report.to_json()}")
    sys.stdout.flush()
    dist.destroy_process_group()
