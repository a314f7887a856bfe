"""`evaluation.tasks` on the model that trains: perplexity of texts, and lm-evaluation-harness; shared by all ranks.

Shape suffixes: W windows, B samples of a micro-batch, S positions; 2: sum of -ln p, and whether each token is the most
likely one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mlra_scale.config import BatchPlan, Config
from mlra_scale.data import Batch
from mlra_scale.evaluation import EvaluationError
from mlra_scale.evaluation.harness import Score
from mlra_scale.evaluation.perplexity import Window, perplexity_of
from mlra_scale.evaluation.tasks import Tasks
from mlra_scale.model.loss import NO_TARGET
from mlra_scale.model.probe import observe_scores
from mlra_scale.training.loop.batches import first_samples
from mlra_scale.training.start.agreement import value_of_rank_0

if TYPE_CHECKING:
    from mlra_scale.parallel import Engine


_MOST_SECONDS_BETWEEN_SIGNS = 20.0
_AT_WORK = "at work"


def seconds_between_signs(config: Config) -> float:
    """Returns half the time without progress after which a job ends as hung, at most 20 s."""
    minutes = config.cluster.hang_minutes or config.parallel.timeout_minutes / 2
    return min(_MOST_SECONDS_BETWEEN_SIGNS, 60.0 * minutes / 2)


class TextTasks:
    """Scores windows by passes of the engine, in any layout; `measure` and `score` are collective.

    A pass takes as many windows as a training step takes samples, dealt to the data ranks as samples are. A window is
    a sample of `train.sequence_length` positions, of which those without a scored token have no target.

    Args:
        engine: The model.
        plan: The batch plan.
        tasks: The texts, the same on every rank; the harness, on rank 0.
        before_pass: Called before every pass, and again and again while the harness works between passes.
        hear_stop: See passes.raise_if_stopped.
        say: Called on rank 0 with a line about a failure.
        sign_seconds: While the harness works, rank 0 tells the others so, see `seconds_between_signs`.
    """

    def __init__(
        self,
        engine: Engine,
        plan: BatchPlan,
        tasks: Tasks,
        before_pass: Callable[[], None],
        hear_stop: Callable[[], None],
        say: Callable[[str], None],
        sign_seconds: float,
    ) -> None:
        self._engine, self._plan, self._tasks = engine, plan, tasks
        self._before_pass, self._hear_stop, self._say = before_pass, hear_stop, say
        self._sign_seconds = sign_seconds

    def measure(self, has_harness: bool) -> dict[str, Any]:
        """Returns the entries `tasks` (texts) and `harness` of the record, where there are any.

        A harness that fails is reported, and its figures are missing: it must not cost a run its checkpoint.
        """
        texts = {text.name: perplexity_of(text.counts, self._sum(text.windows)).figures() for text in self._tasks.texts}
        harness = self._run_harness() if has_harness else {}
        return {name: found for name, found in (("tasks", texts), ("harness", harness)) if found}

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """Returns the scores of windows, which every rank has, on every rank."""
        plan, topology = self._plan, self._engine.topology
        found_W2 = torch.zeros(len(windows), 2, dtype=torch.float64, device=topology.device)
        for first in range(0, len(windows), plan.global_batch_size):
            self._before_pass()
            # At the end, micro-batches that are empty on all ranks are left out.
            num_left = min(plan.global_batch_size, len(windows) - first)
            rounds = -(-num_left // (plan.micro_batch_size * plan.data))
            starts = first_samples(plan, topology.data_rank, first)[:rounds]
            batches = [self._batch(windows[start : start + plan.micro_batch_size]) for start in starts]
            rows_2 = iter([found_W2[start : start + plan.micro_batch_size] for start in starts])

            def see(losses_BS: torch.Tensor, is_first_BS: torch.Tensor, rows: Any = rows_2) -> None:
                row_B2 = next(rows)
                if topology.tensor_rank == 0:  # all tensor-parallel ranks see the same
                    row_B2[:, 0] = losses_BS.sum(dim=1, dtype=torch.float64)[: len(row_B2)]
                    row_B2[:, 1] = is_first_BS.all(dim=1)[: len(row_B2)]

            with observe_scores(self._engine.module, see):
                self._engine.eval_batch(batches, self._hear_stop)
        dist.all_reduce(found_W2)
        return [Score(total, is_greedy > 0) for total, is_greedy in found_W2.tolist()]

    def _sum(self, windows: Sequence[Window]) -> float:
        return math.fsum(score.negative_log_likelihood for score in self.score(windows))

    def _run_harness(self) -> dict[str, Any]:
        """Runs the harness on rank 0, for which the other ranks score windows until it has its figures."""
        topology, failure, lock = self._engine.topology, list[BaseException](), threading.Lock()

        def exchange(windows: Sequence[Window] | str | None, figures: dict[str, Any]) -> list[Score]:
            with lock:  # two threads of rank 0 come here, and the ranks must stay in step
                if failure:
                    raise failure[0]
                try:
                    value_of_rank_0((windows, figures), topology)
                    return [] if windows is None or isinstance(windows, str) else self.score(windows)
                except BaseException as error:
                    failure.append(error)
                    raise

        if topology.rank > 0:
            while (received := value_of_rank_0(None, topology))[0] is not None:
                if received[0] == _AT_WORK:
                    self._before_pass()
                else:
                    self.score(received[0])
            return dict(received[1])

        def sign() -> None:
            self._before_pass()
            exchange(_AT_WORK, {})

        figures: dict[str, Any] = {}
        try:
            if self._tasks.harness is not None:  # else it could not be loaded at this start
                with _repeated(sign, self._sign_seconds):
                    figures = self._tasks.harness.evaluate(lambda windows: exchange(windows, {}))
        except EvaluationError as error:
            if failure:  # not of the harness: a stop request, or a rank that is lost
                raise failure[0] from error
            self._say(f"{error}; there are no figures of the harness at this step")
        exchange(None, figures)
        return figures

    def _batch(self, windows: Sequence[Window]) -> Batch:
        """Returns a micro-batch of windows, filled up with samples without targets."""
        size, length = self._plan.micro_batch_size, self._plan.sequence_length
        tokens_BS = torch.zeros(size, length, dtype=torch.int64)
        targets_BS = torch.full((size, length), NO_TARGET, dtype=torch.int64)
        for row, window in enumerate(windows):
            values, stop = torch.tensor(window.tokens), len(window.tokens) - 1
            tokens_BS[row, :stop] = values[:-1]
            targets_BS[row, stop - window.num_new : stop] = values[stop + 1 - window.num_new :]
        positions_BS = torch.arange(length).expand(size, length).contiguous()
        return Batch(tokens_BS, targets_BS, positions_BS, torch.zeros_like(tokens_BS), torch.arange(size))


@contextmanager
def _repeated(sign: Callable[[], object], seconds: float) -> Iterator[None]:
    """Gives a sign from a thread every so many seconds, until one fails: the harness may take minutes."""
    is_over = threading.Event()

    def run() -> None:
        # A rank is lost, or asked to stop; this rank's own thread meets the same.
        with suppress(BaseException):
            while not is_over.wait(seconds):
                sign()

    thread = threading.Thread(target=run, name="harness", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
