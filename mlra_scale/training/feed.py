"""Which samples a data rank reads in a step, and reading them one step ahead."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mlra_scale.config import BatchPlan
from mlra_scale.data import Batch, DataError, SampleStream
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.finite import TrainingStopped
from mlra_scale.training.progress import Progress

if TYPE_CHECKING:
    # Importing the topology imports DeepSpeed, and reading needs only its numbers.
    from mlra_scale.parallel import Topology


Read = Callable[[], list[Batch]]


class BadData(TrainingStopped):
    """Some rank has read data that cannot be trained on; raised on all ranks. The steps before can be saved."""


def first_samples(plan: BatchPlan, data_rank: int, consumed_samples: int) -> list[int]:
    """Returns the global index of the first sample of each micro-batch of one data rank in one step.

    Micro-batch m of data rank r of R starts at consumed + (m R + r) * micro_batch_size: over all ranks and
    micro-batches a step reads consumed ... consumed + global_batch_size - 1, whatever R and the micro-batch size are.

    Args:
        plan: The batch arithmetic of the run.
        data_rank: r.
        consumed_samples: Samples that earlier steps have read, over all ranks.
    """
    return [
        consumed_samples + (micro_batch * plan.data + data_rank) * plan.micro_batch_size
        for micro_batch in range(plan.accumulation_steps)
    ]


def read_batches(stream: SampleStream, plan: BatchPlan, data_rank: int, consumed_samples: int) -> list[Batch]:
    """Reads the micro-batches of one data rank in one step."""
    return [stream.batch(first, plan.micro_batch_size) for first in first_samples(plan, data_rank, consumed_samples)]


def on_all_ranks(
    read: Read,
    progress: Progress,
    topology: Topology,
    is_checked: bool,
    before: Callable[[], None] = lambda: None,
) -> list[Batch]:
    """Reads batches, and stops all ranks if one of them cannot use what it has read; collective.

    That is a token that the model does not have, or a damaged block of a large prepared file. Without this the rank
    would leave the others waiting for it, and the steps since the last checkpoint would be lost. One number is
    exchanged per call, over gloo: a GPU is not waited for. Data that were checked as a whole at the start need no
    exchange.

    Args:
        read: Reads this rank's batches.
        progress: The counters before the step, for the message.
        topology: The mesh.
        is_checked: Whether all data were checked at the start (Datasets.is_checked).
        before: Called first.

    Raises:
        BadData: Some rank's data are bad; on all ranks.
    """
    before()
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


class Feed:
    """Reads the next step's micro-batches in a background thread while the current step computes.

    Args:
        stream: Training samples.
        plan: The batch plan.
        data_rank: This process's coordinate on the data axis.
        pins_memory: Whether batches go to page-locked memory: from any other, copying to a GPU waits for all that it
            was given before.
    """

    def __init__(self, stream: SampleStream, plan: BatchPlan, data_rank: int, pins_memory: bool = False) -> None:
        self._stream, self._plan, self._data_rank = stream, plan, data_rank
        self._pins_memory = pins_memory
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def take(self, consumed_samples: int) -> list[Batch]:
        """Returns the micro-batches of the step that starts at `consumed_samples`; begins to read the next one's."""
        batches = self._request(consumed_samples).result()
        following = consumed_samples + self._plan.global_batch_size
        self._ahead = (following, self._request(following))
        return batches

    def _request(self, consumed_samples: int) -> Future[list[Batch]]:
        if self._ahead is not None and self._ahead[0] == consumed_samples:
            return self._ahead[1]
        return self._thread.submit(self._read, consumed_samples)

    def _read(self, consumed_samples: int) -> list[Batch]:
        batches = read_batches(self._stream, self._plan, self._data_rank, consumed_samples)
        return [batch.pinned() for batch in batches] if self._pins_memory else batches

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
