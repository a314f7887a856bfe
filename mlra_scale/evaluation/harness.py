"""Tasks of lm-evaluation-harness for a model that somebody else runs: windows go out, log-likelihoods come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML, MappingNode
from ruamel.yaml.error import YAMLError

from mlra_scale.data.tokenizer import LoadedTokenizer
from mlra_scale.evaluation import EvaluationError
from mlra_scale.evaluation.perplexity import Window

MISSING = "lm-evaluation-harness is missing; pip install 'mlra-scale[harness]'"
_FILES = (".yaml", ".yml")
_FEWSHOT_SEED = 1234
"""That of lm_eval's simple_evaluate and of its command line, which alone set one."""


class Score(NamedTuple):
    """Of a window: the sum of -ln p over its scored tokens, and whether each of them is the most likely one."""

    negative_log_likelihood: float
    is_greedy: bool


ScoreWindows = Callable[[Sequence[Window]], Sequence[Score]]


def harness_problem(task: str) -> str | None:
    """Returns why a task (a name, or a YAML file) cannot be run, as far as it is seen without loading it."""
    if find_spec("lm_eval") is None:
        return MISSING
    if Path(task).is_file():
        return _file_problem(Path(task))
    if task.endswith(_FILES):
        return f"{task} does not exist; name a task of lm-evaluation-harness, or the YAML file of one"
    try:
        known = _manager(True).all_tasks
    except EvaluationError as error:
        return str(error)
    if task in known:
        return None
    near = get_close_matches(task, known, n=3)
    did_you_mean = f" (near it: {', '.join(near)})" if near else ""
    return f"{task} is no task, group or tag of lm-evaluation-harness{did_you_mean}, and no YAML file of one"


def _file_problem(path: Path) -> str | None:
    """Returns why a file cannot be a task; its functions and files are not loaded."""
    try:
        root = YAML(typ="safe", pure=True).compose(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        return f"{path} cannot be read as YAML: {' '.join(str(error).split())}"
    keys = {str(key.value) for key, _ in root.value} if isinstance(root, MappingNode) else set()
    if keys & {"task", "group", "include"}:
        return None
    return f"{path} is no YAML file of a task: it has neither `task` nor `group` nor `include`"


@cache
def _manager(has_defaults: bool) -> Any:
    """Returns what loads tasks; with those of the harness, for which it reads thousands of files."""
    with _errors("the tasks of lm-evaluation-harness cannot be listed"):
        from lm_eval.tasks import TaskManager

        return TaskManager(include_defaults=has_defaults)


class Harness:
    """Loaded tasks of lm-evaluation-harness, with their documents.

    Args:
        tasks: Names of tasks, groups and tags, and YAML files.
        loaded: The model's tokenizer.
        length: Tokens of the model's longest input.

    Raises:
        EvaluationError: A task cannot be loaded, or wants text to be generated.
    """

    def __init__(self, tasks: Sequence[str], loaded: LoadedTokenizer, length: int) -> None:
        self._loaded, self._length = loaded, length
        with _errors(f"harness tasks {', '.join(tasks)} cannot be loaded"):
            self._tasks: Any = _manager(not all(Path(task).is_file() for task in tasks)).load(list(tasks))
        for name, task in self._tasks["tasks"].items():
            if task.OUTPUT_TYPE == "generate_until":
                raise EvaluationError(
                    f"harness task {name} generates text, which a model in training does not; run it on an export"
                )
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    def evaluate(self, score: ScoreWindows) -> dict[str, dict[str, float]]:
        """Runs all tasks and returns their metrics, without standard errors: by task or group, then by metric.

        Raises:
            EvaluationError: The harness fails.
        """
        from lm_eval.evaluator import evaluate

        model = _ScoredModel(self._loaded, self._length, score)
        for task in self._tasks["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # the same examples at every checkpoint
        with _errors("lm-evaluation-harness failed"):
            results = evaluate(lm=model, task_dict=self._tasks, bootstrap_iters=0, log_samples=False)
        return {name: _metrics(values) for name, values in results["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Keeps what is a measure: `acc,none` as acc, `exact_match,strict` as it is; no stderr, no number of samples."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float) and math.isfinite(value)
    }


class _ScoredModel:
    """What the harness calls a model. It runs on one rank: what lies behind `score` may be many."""

    rank, world_size = 0, 1

    def __init__(self, loaded: LoadedTokenizer, length: int, score: ScoreWindows) -> None:
        self._tokenizer, self._prefix = loaded.tokenizer, loaded.end_of_document_token
        self._length, self._score = length, score

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Scores continuations after their contexts; each request has both as texts."""
        scores = self._score([self._continuation(*request.args) for request in requests])
        return [(-score.negative_log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Scores whole texts, in the harness's own windows."""
        from lm_eval.utils import get_rolling_token_windows

        windows, owners = list[Window](), list[int]()
        for number, request in enumerate(requests):
            tokens = self._encode(request.args[0])
            for inputs, predicted in get_rolling_token_windows(tokens, self._prefix, self._length, context_len=1):
                windows.append(Window([*inputs, predicted[-1]], len(predicted)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, score in zip(owners, self._score(windows), strict=True):
            totals[number] -= score.negative_log_likelihood
        return totals

    def _continuation(self, context: str, continuation: str) -> Window:
        """Cuts the tokens of both together where those of the context end; a blank belongs to the word behind it."""
        kept = context.rstrip()
        before = self._encode(kept) or [self._prefix]
        after = self._encode(context + continuation)[len(before) if kept else 0 :]
        tokens = [*before, *after][-self._length - 1 :]
        return Window(tokens, min(len(after), len(tokens) - 1))

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """Raises EvaluationError for the errors of the harness, its tasks and their data, which are of many kinds."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvaluationError(f"{what}: {reason}") from error
