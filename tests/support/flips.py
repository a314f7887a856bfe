"""One flipped bit, somewhere in a training step of one rank: what a bad chip, link or memory does."""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from mlra_scale.config import Config
from mlra_scale.stability.watcher import Step
from tests.distributed.steps import allow_fp16_on_cpu
from tests.support.layouts import make_batch, micro_batches, start

BeforeUpdate = Callable[[Any], bool]

PLACES = ("activation", "gradient", "sum", "message", "model weight", "fp32 weight", "first moment", "second moment")
STORED = PLACES[4:]
"""Found by checksums; the others by replay."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Flip:
    """A bit to be flipped.

    Attributes:
        place: One of PLACES. sum: a gradient summed over micro-batches and data ranks. message: what is received in a
            pass from pipeline neighbours, tensor and data ranks.
        number: Of what passes compute: the pass of the step, counted from 0, the repeated ones first.
        rank: The rank where it happens.
        bit: Counted from the least significant one, modulo the size of an element.
        seed: Chooses tensor and element.
    """

    place: str
    number: int
    rank: int
    bit: int
    seed: int = 0


def flip_bit(values: torch.Tensor, index: int, bit: int) -> None:
    """Flips a bit of one element, in place; the same again restores it."""
    size = 8 * values.element_size()
    bit %= size
    mask = (1 << bit) - ((1 << size) if bit == size - 1 else 0)
    flat = values.detach().view(-1)
    flat[index : index + 1].view(_INTEGERS[values.element_size()]).bitwise_xor_(mask)


class Injector:
    """Does it, once; `is_done` says whether it has come to pass."""

    def __init__(self, engine: Any, flip: Flip) -> None:
        self._engine, self._flip, self._random = engine, flip, random.Random(flip.seed)
        self.is_done = False
        self._undo: tuple[torch.Tensor, int] | None = None

    def _is_now(self) -> bool:
        flip, recorder = self._flip, self._engine.recorder
        is_here = flip.rank == self._engine.topology.rank and not self.is_done
        return is_here and bool(recorder._handles) and len(recorder._passes) == flip.number

    def _spoil(self, values: torch.Tensor) -> int:
        index = self._random.randrange(values.numel())
        flip_bit(values, index, self._flip.bit)
        self.is_done = True
        return index

    def _spoiled(self, values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        self._spoil(values)
        return values

    @contextlib.contextmanager
    def during_passes(self) -> Iterator[None]:
        """Flips what passes compute or receive, within the block."""
        with contextlib.ExitStack() as stack:
            getattr(self, f"_in_{self._flip.place}", lambda stack: None)(stack)
            yield

    def _in_activation(self, stack: contextlib.ExitStack) -> None:
        modules = [each for each in self._engine.module.modules() if type(each).__name__.endswith("Linear")]

        def see(module: Any, arguments: Any, output: Any) -> Any:
            return self._spoiled(output) if self._is_now() and torch.is_tensor(output) else None

        stack.callback(self._random.choice(modules).register_forward_hook(see).remove)

    def _in_gradient(self, stack: contextlib.ExitStack) -> None:
        parameter = self._random.choice([*self._engine._view.named.values()])
        hook = parameter.register_hook(lambda gradient: self._spoiled(gradient) if self._is_now() else None)
        stack.callback(hook.remove)

    def _in_sum(self, stack: contextlib.ExitStack) -> None:
        recorder = self._engine.recorder
        end_pass = recorder.end_pass

        def spoil_first(*arguments: Any) -> None:
            if self._is_now():
                self._spoil(self._random.choice([*self._engine._view.gradients()]).values)
            end_pass(*arguments)

        stack.enter_context(mock.patch.object(recorder, "end_pass", spoil_first))

    def _in_message(self, stack: contextlib.ExitStack) -> None:
        from deepspeed.runtime.pipe import p2p

        left_out = self._random.randrange(4)

        def received(call: Any, result_of: Any) -> Any:
            def wrapper(*arguments: Any, **options: Any) -> Any:
                nonlocal left_out
                work = call(*arguments, **options)
                values = result_of(*arguments, **options)
                if self._is_now() and values.is_floating_point():
                    left_out -= 1
                    if left_out < 0:
                        if work is not None and hasattr(work, "wait"):
                            work.wait()
                        self._spoil(values)
                return work

            return wrapper

        def first(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            return tensor

        import torch.distributed as dist

        stack.enter_context(mock.patch.object(p2p, "recv", received(p2p.recv, first)))
        stack.enter_context(mock.patch.object(dist, "all_reduce", received(dist.all_reduce, first)))

    def before_step(self) -> None:
        """Flips a bit of what lies in memory."""
        flip, view = self._flip, self._engine._view
        if flip.place not in STORED or flip.rank != self._engine.topology.rank:
            return
        masters = view.adam.masters
        tensors = {
            "model weight": [*view._model_weights()] or [*masters],
            "fp32 weight": [*masters],
            "first moment": [view.adam.of(master)["exp_avg"] for master in masters],
            "second moment": [view.adam.of(master)["exp_avg_sq"] for master in masters],
        }[flip.place]
        chosen = self._random.choice([each for each in tensors if each.numel()])
        self._undo = chosen, self._spoil(chosen.data)

    def after_step(self) -> None:
        """Mends what lies in memory."""
        if self._undo is not None:
            values, index = self._undo
            flip_bit(values.data, index, self._flip.bit)


@dataclass
class Bench:
    """What stands in for the guard, and one rank's account of the steps."""

    engine: Any
    check: Any = None
    named: list[dict[int, str]] = field(default_factory=list)
    clean: int = 0

    def go_back(self, step: int, reason: str, nodes: dict[int, str]) -> None:
        self.named[-1] = dict.fromkeys(nodes, reason)

    def note_clean_check(self, step: int) -> None:
        self.clean += 1

    def read(self, data_rank: int, first_sample: int) -> list[Any]:
        """The micro-batches of a data rank, as the trainer would read them."""
        plan = self.engine.plan
        size = plan.micro_batch_size
        starts = [first_sample + (m * plan.data + data_rank) * size for m in range(plan.accumulation_steps)]
        return [make_batch(self.engine.config, range(start, start + size)) for start in starts]

    def step(self, number: int, flip: Flip | None = None, decide: BeforeUpdate | None = None) -> tuple[Any, bool]:
        """Makes a step that is checked; returns its result, and whether the bit was flipped on this rank.

        `decide` stands in for the decision of the check, which it may ask.
        """
        engine, check, injector = self.engine, self.check, Injector(self.engine, flip or Flip("none", 0, -1, 0))
        batches = micro_batches(engine, number)
        step = Step(number + 1, True, number * engine.plan.global_batch_size, batches, 1e-3)
        self.named.append({})
        vectors = [norm.vector for norm in engine._spectral_norms]
        with injector.during_passes():
            check.before_step(step)
            injector.before_step()
            result = engine.train_batch(batches, 1e-3, decide or check.before_update)
        injector.after_step()
        check.after_step(step, result)
        if self.named[-1]:  # what a rollback does
            for norm, vector in zip(engine._spectral_norms, vectors, strict=True):
                norm.vector = vector
        return result, injector.is_done


def bench(config: Config, world_size: int) -> Bench:
    """Builds the engine of this rank, and its checks."""
    from mlra_scale.stability.corruption import CorruptionCheck

    if config.train.precision == "fp16":
        allow_fp16_on_cpu()
    made = Bench(start(config, world_size))
    rank = made.engine.topology.rank
    made.check = CorruptionCheck(made.engine, config, made, f"node-{rank}", made.read, print, lambda: None)  # type: ignore[arg-type]
    return made
