"""Silent data corruption: steps whose computation, messages or memory were wrong without any error.

Two checks, each at steps of its own:
- Replay (`guard.replay_every`). The forward and backward pass of a step is computed again from the same state, on the
  same ranks and, with two data ranks or more, on the data rank before each, which reads its micro-batches. Dropout is
  keyed by the sample, so the results must be the same bits. The passes come before the step's own and leave no trace.
- Checksums (`guard.checksum_every`). Replay does not see a weight or moment that changed in memory: all passes compute
  with it. So a checksum of each rank's state is taken after an update and compared right before the next one.

At a difference the update is left out on all ranks, the ranks at fault are named, and the guard takes the run back to a
checkpoint that a later check has confirmed. docs/guard.md says what is named in which layout, and what is not seen.

Replay of a step on the same rank is in torchtitan too (its pull requests 4333 and 4334).
"""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mlra_scale.stability.guard import Guard
from mlra_scale.stability.watcher import Step, Watcher, is_due

if TYPE_CHECKING:  # the libraries behind an engine
    from mlra_scale.config import Config
    from mlra_scale.parallel import Engine, MicroBatch, StepResult, UpdateProposal

FORWARD, BACKWARD, REDUCED, PROPOSED = range(4)  # as in parallel/checksums.py
BOUND = 1e-3
"""By how much norms of two passes may differ, relative to the larger one, where a device does not repeat its bits."""

_NAMED = 8
_MEMORY = "holds weights or moments that changed without an update"
_WORDS = {
    FORWARD: "another hidden state or loss",
    BACKWARD: "another gradient",
    REDUCED: "another sum of gradients over micro-batches and data ranks",
    PROPOSED: "another loss or gradient norm over all ranks",
}

Passes = Sequence[Sequence[Sequence[float]]]
"""By rank, pass and place: fingerprints (checksums.py). Of three passes the second one is of another rank's data."""


class CorruptionCheck(Watcher):
    """Makes both checks. It comes after every watcher that changes weights.

    Args:
        engine: The model that trains.
        config: `guard` says how often; what is on is also checked at the last step.
        guard: Takes the run back.
        node: Name of this rank's node.
        read: Reads the micro-batches of a data rank (the first argument) in the step that begins with a sample (the
            second); collective.
        say: Prints on one rank.
        hear_stop: See passes.raise_if_stopped.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        guard: Guard,
        node: str,
        read: Callable[[int, int], Sequence[MicroBatch]],
        say: Callable[[str], None],
        hear_stop: Callable[[], None],
    ) -> None:
        self._engine, self._guard, self._node, self._read = engine, guard, node, read
        self._hear_stop = hear_stop
        self._settings, self._last = config.guard, config.train.steps
        self._is_exact = True
        if self._settings.replay_every > 0:
            self._is_exact = self._repeats_bits(config.train.deterministic, say)
        self._is_replaying = self._was_replayed = False
        self._wrong: dict[int, str] | None = None  # None: this step is not checked, or not yet

    def before_step(self, step: Step) -> None:
        """Computes a step before it is made, where that is due."""
        self._wrong, self._was_replayed = None, False
        note, topology = self._engine.state_note, self._engine.topology
        if not self._is_due(self._settings.checksum_every, step.number):
            note.drop()
        elif not note.is_taken:  # the first step of a start or after a rollback
            note.take()
        if not self._is_due(self._settings.replay_every, step.number):
            return
        began = time.perf_counter()
        passes = [step.batches]
        if topology.data > 1:
            passes.append(self._read((topology.data_rank + 1) % topology.data, step.first_sample))
        self._engine.recorder.start(self._is_exact)
        self._is_replaying = self._was_replayed = True
        try:
            for batches in passes:
                self._engine.gradient_norm(batches, self._hear_stop)
        except BaseException:
            self._engine.recorder.drop()
            self._is_replaying = self._was_replayed = False
            raise
        step.measuring_seconds["replay"] = time.perf_counter() - began

    def before_update(self, proposal: UpdateProposal) -> bool:
        self._compare()
        return not self._wrong

    def after_step(self, step: Step, result: StepResult) -> Mapping[str, Any]:
        """Has the guard take the run back after a difference; else notes the state for the next step."""
        if self._wrong is None:
            self._compare()  # fp16 gradients have overflowed, and there was no update to be asked about
        if self._wrong:
            nodes = self._nodes_of(self._wrong)
            named = [f"rank {rank} on {nodes[rank]} {what}" for rank, what in self._wrong.items()]
            more = [f"and {len(named) - _NAMED} more"] if len(named) > _NAMED else []
            self._guard.go_back(step.number, "; ".join([*named[:_NAMED], *more]), nodes)
            return {}
        if self._wrong is not None and (self._was_replayed or self._settings.replay_every == 0):
            self._guard.note_clean_check(step.number)
        if self._is_due(self._settings.checksum_every, step.number + 1):
            self._engine.state_note.take()
        return {}

    def _is_due(self, every: int, step: int) -> bool:
        return every > 0 and is_due(step, every, self._last)

    def _compare(self) -> None:
        """Compares on all ranks what is due, by one exchange and one read of the device; sets `_wrong`."""
        note, topology = self._engine.state_note, self._engine.topology
        has_note, is_replaying, self._is_replaying = note.is_taken, self._is_replaying, False
        if not has_note and not is_replaying:
            return
        mine = [note.difference()[None]] if has_note else []
        if is_replaying:
            mine.append(self._engine.recorder.stop().view(torch.int64).flatten())
        packed = torch.cat(mine)
        gathered = [torch.empty_like(packed) for _ in range(topology.world_size)]
        dist.all_gather(gathered, packed)
        of_ranks = torch.stack(gathered).cpu()
        wrong = {}
        if has_note:
            changed = of_ranks[:, 0].ne(0).tolist()
            wrong = {rank: _MEMORY for rank in range(len(changed)) if changed[rank]}
            of_ranks = of_ranks[:, 1:]
        if is_replaying and not wrong:
            passes = of_ranks.view(topology.world_size, -1, 4)
            is_same = _are_equal if self._is_exact else _are_close
            values: Passes = (passes if self._is_exact else passes.view(torch.float64)).tolist()
            degrees = (topology.pipeline, topology.data, topology.tensor)
            wrong = wrong_ranks(values, degrees, is_same)
        self._wrong = wrong

    def _repeats_bits(self, is_deterministic: bool, say: Callable[[str], None]) -> bool:
        """Returns whether every rank gets the same bits from the same micro-batches; collective."""
        topology = self._engine.topology
        device = topology.device
        kinds: list[Any] = [None] * topology.world_size
        kind = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{_cpu_model()} with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
        )
        dist.all_gather_object(kinds, kind, group=topology.control_group)
        reason = f"the ranks compute on {', '.join(sorted(set(kinds)))}" if len(set(kinds)) > 1 else ""
        if device.type != "cpu" and not is_deterministic:
            reason = "train.deterministic is false"
        if reason:
            say(
                f"guard.replay_every: {reason}, so passes do not repeat their bits: norms are compared within "
                f"{BOUND:g}, which finds large errors only"
            )
        return not reason

    def _nodes_of(self, ranks: Mapping[int, str]) -> dict[int, str]:
        """Returns the nodes of some ranks; collective."""
        nodes = [""] * self._engine.topology.world_size
        dist.all_gather_object(nodes, self._node, group=self._engine.topology.control_group)
        return {rank: nodes[rank] for rank in ranks}


def _cpu_model() -> str:
    """Returns the model's name, by which libraries choose kernels; without one, the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _are_equal(first: float, second: float) -> bool:
    return first == second


def _are_close(first: float, second: float) -> bool:
    """Whether two norms are within the bound; those of overflows are not finite, and equal to each other."""
    if math.isfinite(first) and math.isfinite(second):
        return abs(first - second) <= BOUND * max(first, second)
    return math.isfinite(first) == math.isfinite(second)


def wrong_ranks(
    passes: Passes, degrees: tuple[int, int, int], is_same: Callable[[float, float], bool]
) -> dict[int, str]:
    """Finds the ranks that have computed wrong.

    Args:
        passes: Of each rank: the repeated pass; with several data ranks the pass over the micro-batches of the next
            data rank; the step's own pass.
        degrees: Pipeline stages, data ranks and tensor ranks; rank = (stage * data + data_rank) * tensor + tensor_rank.
        is_same: Compares two fingerprints.

    Returns:
        What is wrong with each such rank; empty: nothing is.
    """
    num_stages, num_data, num_tensor = degrees
    # A wrong value spreads in this order; tensor ranks exchange sums in every block and differ together.
    order = [(FORWARD, stage) for stage in range(num_stages)]
    order += [(BACKWARD, stage) for stage in reversed(range(num_stages))]

    def rank_of(stage: int, data_rank: int, tensor_rank: int) -> int:
        return (stage * num_data + data_rank) * num_tensor + tensor_rank

    def first_difference(data_rank: int, computed_by: int, number: int) -> tuple[int, int, list[int]] | None:
        """Place, stage and tensor ranks where a pass over a data rank's micro-batches leaves that of the step."""
        for place, stage in order:
            tensor_ranks = [
                each
                for each in range(num_tensor)
                if not is_same(
                    passes[rank_of(stage, computed_by, each)][number][place],
                    passes[rank_of(stage, data_rank, each)][-1][place],
                )
            ]
            if tensor_ranks:
                return place, stage, tensor_ranks
        return None

    found: dict[int, str] = {}
    for data_rank in range(num_data):
        if (difference := first_difference(data_rank, data_rank, 0)) is not None:
            place, stage, tensor_ranks = difference
            text = f"got {_WORDS[place]} when it computed the same micro-batches again"
            found |= {rank_of(stage, data_rank, each): text for each in tensor_ranks}
    if found or num_data == 1:
        return found or _wrong_sums(passes, is_same)
    differing = {}
    for data_rank in range(num_data):
        if (difference := first_difference(data_rank, (data_rank - 1) % num_data, 1)) is not None:
            differing[data_rank] = difference
    for data_rank, (place, stage, tensor_ranks) in differing.items():
        text = f"got {_WORDS[place]} than another data rank from the same micro-batches"
        for suspect in _suspects([*differing], num_data) & {data_rank, (data_rank - 1) % num_data}:
            found |= {rank_of(stage, suspect, each): text for each in tensor_ranks}
    return found or _wrong_sums(passes, is_same)


def _suspects(differing: Sequence[int], num_data: int) -> set[int]:
    """Returns the data ranks at fault, from those whose micro-batches give others something else, twice, than them.

    Several: the rank that has a part in all of them, which computes wrong always. One alone, two data ranks, or no such
    rank: all that have a part. Two equal passes of a rank are no proof: a core may be wrong, always alike, for some
    operands only (Hochschild et al. 2021, "Cores that don't count").
    """
    involved = [{data_rank, (data_rank - 1) % num_data} for data_rank in differing]
    return set.intersection(*involved) or set.union(*involved)


def _wrong_sums(passes: Passes, is_same: Callable[[float, float], bool]) -> dict[int, str]:
    """Returns the ranks that hold other sums than before, although no rank's own losses and gradients differ."""
    for place in (REDUCED, PROPOSED):  # the norm is wrong on all ranks where the gradients of one are
        found = {
            rank: f"got {_WORDS[place]} from the same gradients"
            for rank, of_rank in enumerate(passes)
            if not is_same(of_rank[0][place], of_rank[-1][place])
        }
        if found:
            return found
    return {}
