"""Windows are shared among data ranks: together these score every one once, in any layout of a batch."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlra_scale.config import BatchPlan, batch_plan, load_config
from mlra_scale.evaluation import EvaluationError
from mlra_scale.evaluation.harness import Score, ScoreWindows
from mlra_scale.evaluation.perplexity import Window, windows
from mlra_scale.evaluation.tasks import Tasks, TaskText
from mlra_scale.model.loss import NO_TARGET
from mlra_scale.training.watch import text_tasks
from mlra_scale.training.watch.text_tasks import TextTasks

VOCABULARY, LENGTH = 50, 8


def nats(token: int, target: int, place: int) -> float:
    return 1.0 + math.sin(token + 7 * target) + 0.01 * place


def is_likely(token: int, target: int) -> bool:
    return (token + target) % 4 > 0


def expected(window: Window) -> Score:
    """The score of a window in which token t follows s with a made-up probability."""
    places = range(len(window.tokens) - 1 - window.num_new, len(window.tokens) - 1)
    pairs = [(window.tokens[place], window.tokens[place + 1], place) for place in places]
    return Score(sum(nats(*pair) for pair in pairs), all(is_likely(*pair[:2]) for pair in pairs))


class OneRank:
    """The engine of one rank; what the others have is not added to its scores."""

    def __init__(self, plan: BatchPlan, data_rank: int = 0, tensor_rank: int = 0) -> None:
        device = torch.device("cpu")
        self.topology = SimpleNamespace(rank=0, data_rank=data_rank, tensor_rank=tensor_rank, device=device)
        self.module, self.plan = SimpleNamespace(see=None), plan
        self.num_batches = list[int]()

    def eval_batch(self, batches: Sequence[Any], between: Callable[[], None]) -> float:
        self.num_batches.append(len(batches))
        for batch in batches:
            between()
            assert batch.tokens_BS.shape == (self.plan.micro_batch_size, LENGTH)
            losses, first = torch.zeros(batch.tokens_BS.shape), torch.ones(batch.tokens_BS.shape, dtype=torch.bool)
            for row, place in (batch.targets_BS != NO_TARGET).nonzero().tolist():
                token, target = int(batch.tokens_BS[row, place]), int(batch.targets_BS[row, place])
                losses[row, place], first[row, place] = nats(token, target, place), is_likely(token, target)
            self.module.see(losses, first)
        return 0.0


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process group: a rank keeps its own figures, and hears itself."""

    @contextmanager
    def observed(module: Any, see: Any) -> Iterator[None]:
        module.see = see
        yield

    monkeypatch.setattr(text_tasks, "observe_scores", observed)
    monkeypatch.setattr(text_tasks.dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(text_tasks, "value_of_rank_0", lambda value, topology: value)


def tasks_of(engine: Any, tasks: Tasks, stop: Callable[[], None] = lambda: None) -> tuple[TextTasks, list[str]]:
    said = list[str]()
    return TextTasks(engine, engine.plan, tasks, lambda: said.append("pass"), stop, said.append, 60.0), said


def plan_of(ranks: int, micro: int, batch: int) -> BatchPlan:
    sizes = [f"train.micro_batch_size={micro}", f"train.global_batch_size={batch}"]
    return batch_plan(load_config("debug", overrides=[f"train.sequence_length={LENGTH}", *sizes]), ranks)


def text_of(*lengths: int) -> TaskText:
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    found = [window for tokens in documents for window in windows([tokens], LENGTH, LENGTH // 2)]
    scored = sum(window.num_new for window in found)
    return TaskText("text", found, Counter(documents=len(lengths), scored=scored, words=1, bytes=1))


@pytest.mark.parametrize("lengths", [(2,), (40,), (3, 9, 30, 5, 8), (8,) * 17], ids=str)
@pytest.mark.parametrize(("ranks", "micro", "batch"), [(1, 1, 1), (1, 4, 8), (2, 2, 8), (4, 1, 4), (3, 2, 12)])
def test_every_window_counts_once(ranks: int, micro: int, batch: int, lengths: tuple[int, ...]) -> None:
    plan, text = plan_of(ranks, micro, batch), text_of(*lengths)
    engines = [OneRank(plan, data_rank) for data_rank in range(ranks)]
    found = [tasks_of(engine, Tasks())[0].score(text.windows) for engine in engines]
    for window, *of_ranks in zip(text.windows, *found, strict=True):
        nonzero = [score for score in of_ranks if score.negative_log_likelihood > 0.0]
        assert len(nonzero) == 1, "exactly one data rank has it"
        wanted = expected(window)
        assert nonzero[0].negative_log_likelihood == pytest.approx(wanted.negative_log_likelihood, rel=1e-6)
        assert nonzero[0].is_greedy == wanted.is_greedy
    rounds = -(-len(text.windows) // (micro * ranks))
    assert {tuple(engine.num_batches) for engine in engines} == {tuple(engines[0].num_batches)}
    assert sum(engines[0].num_batches) == rounds, "no pass without a window"
    other = tasks_of(OneRank(plan, tensor_rank=1), Tasks())[0].score(text.windows)
    assert {score.negative_log_likelihood for score in other} == {0.0}, "of tensor-parallel ranks one counts"


def test_the_figures_of_a_text() -> None:
    text = text_of(40, 3)
    tasks, said = tasks_of(OneRank(plan_of(1, 4, 4)), Tasks([text]))
    found = tasks.measure(has_harness=False)
    total = sum(expected(window).negative_log_likelihood for window in text.windows)
    assert found.keys() == {"tasks"} and found["tasks"].keys() == {"text"}
    assert found["tasks"]["text"]["negative_log_likelihood"] == pytest.approx(total, rel=1e-6)
    assert found["tasks"]["text"]["tokens_scored"] == text.counts["scored"]
    assert said == ["pass"] * math.ceil(len(text.windows) / 4)


class StopHere(Exception):
    pass


def stop() -> None:
    raise StopHere


def test_a_stop_ends_a_pass() -> None:
    tasks, _ = tasks_of(OneRank(plan_of(1, 4, 4)), Tasks([text_of(40)]), stop)
    with pytest.raises(StopHere):
        tasks.measure(has_harness=False)


def harness_of(evaluate: Callable[[ScoreWindows], dict[str, dict[str, float]]]) -> Any:
    return SimpleNamespace(evaluate=evaluate)


def test_the_harness_gets_scores_and_gives_figures() -> None:
    asked = text_of(9, 4).windows

    def evaluate(score: ScoreWindows) -> dict[str, dict[str, float]]:
        assert [pytest.approx(expected(window), rel=1e-6) for window in asked] == list(score(asked))
        return {"choose": {"acc": 0.5}}

    tasks, _ = tasks_of(OneRank(plan_of(1, 2, 4)), Tasks([], harness_of(evaluate)))
    assert tasks.measure(has_harness=True) == {"harness": {"choose": {"acc": 0.5}}}


def test_a_harness_that_fails_costs_its_figures_and_a_stop_within_it_stops() -> None:
    def fail(score: ScoreWindows) -> dict[str, dict[str, float]]:
        try:
            score(text_of(9).windows)
        except Exception as error:  # as the harness's own errors are wrapped
            raise EvaluationError("lm-evaluation-harness failed: stop") from error
        raise EvaluationError("lm-evaluation-harness failed: no such metric")

    tasks, said = tasks_of(OneRank(plan_of(1, 2, 4)), Tasks([], harness_of(fail)))
    assert tasks.measure(has_harness=True) == {}
    assert "no such metric; there are no figures of the harness at this step" in said[-1]
    stopped, said = tasks_of(OneRank(plan_of(1, 2, 4)), Tasks([], harness_of(fail)), stop)
    with pytest.raises(StopHere):
        stopped.measure(has_harness=True)
    assert said == ["pass"]


def test_a_harness_at_work_gives_signs_of_life_and_none_during_or_after_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = OneRank(plan_of(1, 2, 4))
    windows, sent = text_of(9).windows, list[Any]()

    def send(value: Any, topology: Any) -> Any:
        assert not is_scoring, "ranks that score do not listen"
        sent.append(value)
        return value

    is_scoring = list[bool]()
    real = engine.eval_batch

    def eval_batch(*given: Any) -> float:
        is_scoring.append(True)
        time.sleep(0.05)
        is_scoring.clear()
        return real(*given)

    def evaluate(score: ScoreWindows) -> dict[str, dict[str, float]]:
        deadline = time.monotonic() + 10.0
        while len(sent) < 3 and time.monotonic() < deadline:  # contexts are built
            time.sleep(0.01)
        score(windows)
        return {"choose": {"acc": 0.5}}

    monkeypatch.setattr(text_tasks, "value_of_rank_0", send)
    monkeypatch.setattr(engine, "eval_batch", eval_batch)
    said = list[str]()
    tasks = TextTasks(
        engine, engine.plan, Tasks([], harness_of(evaluate)), lambda: said.append("sign"), lambda: None, print, 0.01
    )
    assert tasks.measure(has_harness=True) == {"harness": {"choose": {"acc": 0.5}}}
    signs = [value for value in sent if value == (text_tasks._AT_WORK, {})]
    assert len(signs) >= 3 and len(said) >= len(signs)
    assert [value for value in sent if value not in signs] == [(windows, {}), (None, {"choose": {"acc": 0.5}})]
    num_sent = len(sent)
    time.sleep(0.05)
    assert len(sent) == num_sent


def test_a_rank_that_is_lost_while_the_harness_works_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    num_sent = 0

    def send(value: Any, topology: Any) -> Any:
        nonlocal num_sent
        num_sent += 1
        raise StopHere

    def evaluate(score: ScoreWindows) -> dict[str, dict[str, float]]:
        deadline = time.monotonic() + 10.0
        while num_sent == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        return {"choose": {"acc": 0.5}}

    monkeypatch.setattr(text_tasks, "value_of_rank_0", send)
    engine: Any = OneRank(plan_of(1, 2, 4))
    tasks = TextTasks(engine, engine.plan, Tasks([], harness_of(evaluate)), lambda: None, lambda: None, print, 0.01)
    with pytest.raises(StopHere):
        tasks.measure(has_harness=True)
    assert num_sent == 1


def test_signs_come_before_a_job_counts_as_hung() -> None:
    minutes = {"": 20.0, "parallel.timeout_minutes=1": 15.0, "cluster.hang_minutes=0.3": 9.0}
    for override, seconds in minutes.items():
        config = load_config("debug", overrides=[override] if override else [])
        assert text_tasks.seconds_between_signs(config) == pytest.approx(seconds)
