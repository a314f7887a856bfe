"""The planned training state, and the planned peak, against the tensors that the ranks really hold."""

import gc
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.tensor_memory import recording
from mlra_scale.config import Config, batch_plan
from mlra_scale.planning.layout import Stage
from mlra_scale.planning.memory import phases_of_a_step, rank_memory
from mlra_scale.planning.memory_state import early_gradient_bytes, reduction_bytes
from tests.support.layouts import Layout, layout_config, micro_batches, start
from tests.support.pool import Pools

BUCKET = 50_021  # elements: a size that no other tensor has
LOOKS_AGAIN = 5  # times, 20 ms apart


@dataclass
class Held:
    """Largest numbers of bytes that a rank held."""

    state: int = 0
    buckets: int = 0
    owned: int = 0


def storages() -> dict[int, torch.UntypedStorage]:
    """Every storage that a Python object refers to, by address; activations are held by autograd alone."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None, getattr(thing, "ds_tensor", None)):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage
    return found


def measure(rank: int, world_size: int, config: Config) -> Held:
    """Trains two steps and looks between micro-batches, inside the backward pass and before the update."""
    before = storages()  # kept, so that no address of theirs is given out again
    engine = start(config, world_size)
    held = Held()

    def read() -> tuple[int, int]:
        sizes = [storage.nbytes() for address, storage in storages().items() if address not in before]
        buckets = sum(size for size in sizes if size in (2 * BUCKET, 4 * BUCKET))
        return buckets, sum(sizes) - buckets

    def look(*_: Any, is_backward: bool = False) -> bool:
        buckets, state = read()
        # A thread of gloo releases its tensor a moment after the collective is done; what is kept is there later too.
        for _again in range(LOOKS_AGAIN):
            if buckets <= held.buckets and (is_backward or state <= held.state):
                break
            time.sleep(0.02)
            buckets, state = map(min, (buckets, state), read())
        held.buckets = max(held.buckets, buckets)
        if not is_backward:
            held.state = max(held.state, state)
        return True

    def look_inside(*_: Any) -> None:
        look(is_backward=True)

    if engine.plan.pipeline == 1:
        engine.module.register_forward_pre_hook(lambda *_: look() and None)
        engine.module.blocks[0].register_full_backward_pre_hook(look_inside)
    for step in range(2):
        assert engine.plan.accumulation_steps > 1
        engine.train_batch(micro_batches(engine, step), 1e-3, look)
    for fragment in engine.owned_fragments(with_moments=True):
        parts = (fragment.values, fragment.exp_avg, fragment.exp_avg_sq)
        held.owned += sum(part.nbytes for part in parts if part is not None)
    return held


def planned_config(layout: Layout, precision: str, **more: int) -> Config:
    zero = {"stage": layout.stage, "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0, **more}
    sections: dict[str, Any] = {"deepspeed": {"zero_optimization": zero}} if layout.stage else {}
    config = layout_config(layout, train__precision=precision, model__hidden_size=64, model__vocab_size=241)
    return config.model_validate(config.model_dump() | sections)


LAYOUTS = [
    Layout(data=2),
    Layout(data=2, stage=1),
    Layout(data=2, stage=2),
    Layout(data=2, stage=3),
    Layout(pipeline=2),
    Layout(tensor=2),
]


@pytest.mark.slow_except("tp1pp1dp2 zero1-bf16", "tp1pp1dp2 zero3-fp32", "tp1pp2dp1 zero0-bf16")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_plan_is_what_ranks_hold(worker_pool: Pools, layout: Layout, precision: str) -> None:
    compare(worker_pool, planned_config(layout, precision), layout)


def test_weights_that_zero_3_need_not_keep_are_not_planned(worker_pool: Pools) -> None:
    layout = Layout(data=2, stage=3)
    less = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    compare(worker_pool, planned_config(layout, "fp32", **less), layout)


@pytest.mark.slow_except("muon-tp1pp1dp2 zero3-fp32")
@pytest.mark.parametrize(
    ("name", "layout", "precision"),
    [
        ("muon", Layout(data=2, stage=3), "fp32"),
        ("muon", Layout(data=2, stage=1), "bf16"),
        ("muon", Layout(pipeline=2), "fp32"),
        ("spectron", Layout(tensor=2), "fp32"),
        ("spectron", Layout(data=2, stage=2), "bf16"),
    ],
    ids=str,
)
def test_muon_and_spectron_hold_one_moment_as_planned(
    worker_pool: Pools, name: str, layout: Layout, precision: str
) -> None:
    config = planned_config(layout, precision)
    optim = config.optim.model_copy(update={"name": name})
    compare(worker_pool, config.model_copy(update={"optim": optim}), layout)


def compare(worker_pool: Pools, config: Config, layout: Layout) -> None:
    plan = batch_plan(config, layout.world_size)
    ranks = worker_pool(layout.world_size).run(measure, config)
    of_stage = layout.tensor * layout.data
    for index in range(layout.pipeline):
        owned = max(held.owned for held in ranks[index * of_stage : (index + 1) * of_stage])
        assert owned == pytest.approx(rank_memory(config, plan, index).snapshot, rel=0.1)
    for rank, held in enumerate(ranks):
        stage = Stage(config, plan, rank // of_stage)
        memory = rank_memory(config, plan, stage.index)
        assert held.buckets == reduction_bytes(stage)
        peak = max(phases_of_a_step(stage).values(), key=lambda phase: phase.total)
        # In bf16 with ZeRO 1 there are more at the end of a backward pass, where the peak may be.
        early = early_gradient_bytes(stage)
        state = memory.weights + (early or memory.gradients - peak.buffers) + memory.master + memory.moments
        # Padding of partitions, the batch and what a pipeline passes on weigh more here than in a model of any use.
        assert held.state == pytest.approx(state, rel=0.1)


def record(rank: int, world_size: int, config: Config) -> int:
    """Trains three steps and returns the peak of all tensors within the last two."""
    with recording() as memory:
        engine = start(config, world_size)
        for step in range(3):
            with memory.span("later" if step else "first"):
                engine.train_batch(micro_batches(engine, step), 1e-3)
    return memory.peaks["later"]


def peak_config(layout: Layout, micro_batch_size: int, checkpointing: str, precision: str) -> Config:
    """A model in which neither the batch's own tensors nor padding of partitions weigh anything."""
    zero = {"stage": layout.stage, "reduce_bucket_size": 500_022, "allgather_bucket_size": 500_022}
    if layout.stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 200_000}
        zero |= {"stage3_max_live_parameters": 500_000, "stage3_max_reuse_distance": 500_000}
    values: dict[str, Any] = {
        "model__hidden_size": 128,
        "model__num_layers": 6,
        "model__vocab_size": 4000,
        "model__max_positions": 128,
        "train__sequence_length": 128,
        "train__micro_batch_size": micro_batch_size,
        "train__global_batch_size": 2 * layout.data * micro_batch_size,
        "train__precision": precision,
        "parallel__activation_checkpointing": checkpointing,
    }
    config = layout_config(layout, **values)
    return config.model_copy(update={"deepspeed": {"zero_optimization": zero} if layout.stage else {}})


PEAKS = [
    *((layout, 4, "none", "fp32") for layout in [Layout(), Layout(stage=1), *LAYOUTS]),
    # Few activations, so that the state and what is temporary weigh most.
    *((layout, 1, "block", "fp32") for layout in [Layout(), *LAYOUTS]),
    (Layout(), 4, "selective", "fp32"),
    (Layout(pipeline=2, stage=1), 4, "selective", "fp32"),
    (Layout(), 4, "none", "bf16"),
    (Layout(), 1, "block", "bf16"),
    (Layout(stage=1), 1, "block", "bf16"),
]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
def test_the_planned_peak_with_sequence_parallelism(worker_pool: Pools, checkpointing: str) -> None:
    layout = Layout(tensor=2)
    config = peak_config(layout, 4, checkpointing, "fp32")
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"sequence_parallel": True})})
    for measured in worker_pool(2).run(record, config):
        memory = rank_memory(config, batch_plan(config, 2), 0)
        assert measured == pytest.approx(memory.device, rel=0.1), memory


@pytest.mark.slow_except(
    "tp1pp2dp1 zero1-4-selective-fp32",
    "tp1pp1dp1 zero1-1-block-bf16",
)
@pytest.mark.parametrize(("layout", "micro_batch_size", "checkpointing", "precision"), PEAKS, ids=str)
def test_the_planned_peak_is_that_of_all_tensors(
    worker_pool: Pools, layout: Layout, micro_batch_size: int, checkpointing: str, precision: str
) -> None:
    config = peak_config(layout, micro_batch_size, checkpointing, precision)
    plan = batch_plan(config, layout.world_size)
    for rank, measured in enumerate(worker_pool(layout.world_size).run(record, config)):
        memory = rank_memory(config, plan, rank // (layout.tensor * layout.data))
        assert measured == pytest.approx(memory.device, rel=0.1), (rank, memory)
