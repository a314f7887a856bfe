"""Which samples a data rank reads in a step, reading them ahead, and stopping all ranks where they are bad."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mlra_scale.config import BatchPlan
from mlra_scale.data import Batch, DataError, SampleStream
from mlra_scale.training.exit_codes import ExitCode, TrainingStopped
from mlra_scale.training.schedule import Progress

if TYPE_CHECKING:
    from mlra_scale.parallel import Topology  # which imports DeepSpeed

Read = Callable[[], list[Batch]]


class BadData(TrainingStopped):
    """Some rank has read data that cannot be trained on; raised on all ranks. The steps before can be saved."""


def first_samples(plan: BatchPlan, data_rank: int, first_sample: int) -> list[int]:
    """Returns the global index of the first sample of each micro-batch of one data rank in one step.

    Micro-batch m of data rank r of R starts at first_sample + (m R + r) * micro_batch_size: over all ranks and
    micro-batches a step reads the same samples, whatever R and the micro-batch size are.
    """
    return [
        first_sample + (micro_batch * plan.data + data_rank) * plan.micro_batch_size
        for micro_batch in range(plan.accumulation_steps)
    ]


def read_batches(stream: SampleStream, plan: BatchPlan, data_rank: int, first_sample: int) -> list[Batch]:
    """Reads the micro-batches of one data rank in the step that starts at `first_sample`."""
    return [stream.batch(first, plan.micro_batch_size) for first in first_samples(plan, data_rank, first_sample)]


def read_collectively(read: Read, progress: Progress, topology: Topology, is_checked: bool) -> list[Batch]:
    """Reads batches, and stops all ranks if one of them cannot use what it has read; collective.

    Bad data are a token that the model does not have, or a damaged block of a large prepared file. One number is
    exchanged per call, over gloo, so a GPU is not waited for. Data that were checked as a whole at the start
    need no exchange.

    Args:
        read: Reads this rank's batches.
        progress: The counters before the step, for the message.
        topology: The mesh.
        is_checked: Whether all data were checked at the start (OpenData.is_checked).

    Raises:
        BadData: Some rank's data are bad; on all ranks.
    """
    batches, fault = [], ""
    try:
        batches = read()
    except DataError as error:
        if is_checked and topology.world_size > 1:
            raise  # changed after the check: the other ranks do not ask, and the launcher ends them
        fault = str(error)
    if topology.world_size > 1 and not is_checked:
        has_fault = torch.tensor(int(fault != ""))
        dist.all_reduce(has_fault, op=dist.ReduceOp.MAX, group=topology.control_group)
        if has_fault.item():
            faults: list[str] = [""] * topology.world_size
            dist.all_gather_object(faults, fault, group=topology.control_group)
            fault = next(text for text in faults if text)
    if fault:
        values = {"step": progress.step + 1, "consumed_samples": progress.consumed_samples}
        raise BadData(f"step {progress.step + 1}: {fault}", values, ExitCode.BAD_INPUT)
    return batches


class Prefetcher:
    """Reads the next step's micro-batches of a data rank in a background thread while the current step computes.

    They go to page-locked memory if `pins_memory`: copying to a GPU from any other waits for its queue.
    """

    def __init__(self, stream: SampleStream, plan: BatchPlan, data_rank: int, pins_memory: bool = False) -> None:
        self._stream, self._plan, self._data_rank = stream, plan, data_rank
        self._pins_memory = pins_memory
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def next_batches(self, first_sample: int) -> list[Batch]:
        """Returns the micro-batches of the step that starts at `first_sample`; begins to read those after it."""
        batches = self._request(first_sample).result()
        following = first_sample + self._plan.global_batch_size
        self._ahead = (following, self._request(following))
        return batches

    def _request(self, first_sample: int) -> Future[list[Batch]]:
        if self._ahead is not None and self._ahead[0] == first_sample:
            return self._ahead[1]
        return self._thread.submit(self._read, first_sample)

    def _read(self, first_sample: int) -> list[Batch]:
        batches = read_batches(self._stream, self._plan, self._data_rank, first_sample)
        return [batch.pinned() for batch in batches] if self._pins_memory else batches

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
