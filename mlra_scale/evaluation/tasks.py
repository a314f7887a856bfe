"""What `evaluation.tasks` names, read for a model that trains: texts in windows, and tasks of the harness."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlra_scale.config import Config, Problem
from mlra_scale.config.text_tasks import HARNESS, TextTask, harness_tasks, text_tasks
from mlra_scale.data import DataError
from mlra_scale.data.files import kind_of
from mlra_scale.data.hub import is_offline
from mlra_scale.data.manifest import MANIFEST_NAME
from mlra_scale.data.mixture import MIXTURE_NAME
from mlra_scale.data.sources import HuggingFace, LocalFiles, Source, SourceName, open_sources, texts_of
from mlra_scale.data.tokenizer import LoadedTokenizer, load_tokenizer
from mlra_scale.evaluation import EvaluationError
from mlra_scale.evaluation.harness import Harness, harness_problem
from mlra_scale.evaluation.perplexity import Document, Window, check_counts, check_tokens, counted_windows
from mlra_scale.evaluation.texts import PieceEncoder, documents_of_data, documents_of_sources, pieces


@dataclass(frozen=True)
class TaskText:
    """A text of a run, in the windows in which it is scored.

    Attributes:
        name: Of the task.
        windows: Of `train.sequence_length` tokens at most.
        counts: What they hold, see perplexity.counted_windows.
    """

    name: str
    windows: list[Window]
    counts: Counter[str]


def task_problems(
    config: Config, has_tokenizer: bool, reads_hub_cache: bool = False, has_packages: bool = True
) -> list[Problem]:
    """Finds tasks that cannot be read, of which at most a first text is read; the hub is not asked.

    Args:
        config: The configuration.
        has_tokenizer: Whether the data, or `data.tokenizer`, name a tokenizer.
        reads_hub_cache: Whether texts of the hub have to be in its cache here where HF_HUB_OFFLINE is set.
        has_packages: Whether a harness that the run finds is one that this process finds.
    """
    tasks, problems = config.evaluation.tasks, list[Problem]()
    if tasks and not has_tokenizer:
        remedy = "need the tokenizer that the data were made with; name it in data.tokenizer"
        problems.append(Problem("evaluation.tasks", list(tasks), remedy))
    if tasks and config.train.sequence_length < 2:
        remedy = "must be at least 2 with evaluation.tasks: a token is scored after another one"
        problems.append(Problem("train.sequence_length", config.train.sequence_length, remedy))
    for task in text_tasks(tasks):
        if not _is_prepared(task):
            try:
                _check_first_text(task, reads_hub_cache)
            except DataError as error:
                problems.append(Problem("evaluation.tasks", task.source, str(error)))
    for name in harness_tasks(tasks) if has_packages else ():
        if (fault := harness_problem(name)) is not None:
            problems.append(Problem("evaluation.tasks", HARNESS + name, fault))
    return problems


@dataclass(frozen=True)
class Tasks:
    """What `evaluation.tasks` names: texts, and tasks of lm-evaluation-harness; None: there are none."""

    texts: list[TaskText] = field(default_factory=list)
    harness: Harness | None = None


def read_tasks(config: Config, tokenizer: str, note: Callable[[str], None], needs_all: bool = True) -> Tasks:
    """Reads and tokenizes the texts of a run, and loads the tasks of the harness.

    Args:
        config: The configuration.
        tokenizer: Folder or name of the tokenizer of the data.
        note: Called with lines about what is not read.
        needs_all: Whether a task that cannot be read is an error; else it is noted and left out.

    Raises:
        DataError: A text or the tokenizer cannot be read.
        EvaluationError: A text has nothing to score, or a token that the model does not know; or a task of the harness
            cannot be loaded.
    """
    given, loaded = config.evaluation.tasks, load_tokenizer([tokenizer])
    texts, harness, names = list[TaskText](), None, harness_tasks(given)

    @contextmanager
    def left_out() -> Iterator[None]:
        try:
            yield
        except (DataError, EvaluationError) as error:
            if needs_all:
                raise
            note(f"the run continues without it: {error}")

    for task in text_tasks(given):
        with left_out():
            texts.append(_read(task, loaded, config, note))
    if names:
        with left_out():
            harness = Harness(names, loaded, config.train.sequence_length)
    return Tasks(texts, harness)


def _read(task: TextTask, loaded: LoadedTokenizer, config: Config, note: Callable[[str], None]) -> TaskText:
    window, vocab_size = config.train.sequence_length, config.model.vocab_size
    stride = config.evaluation.task_stride or max(1, window // 2)
    counts, limit = Counter[str](), config.evaluation.task_tokens
    try:
        windows = list(task_windows(task, loaded, counts, vocab_size, window, stride, limit, note))
        check_counts(counts)
    except EvaluationError as error:
        raise EvaluationError(f"evaluation.tasks: {task.name}: {error}") from error
    return TaskText(task.name, windows, counts)


def task_windows(
    task: TextTask,
    loaded: LoadedTokenizer,
    counts: Counter[str],
    vocab_size: int,
    window: int,
    stride: int,
    max_tokens: int | None,
    note: Callable[[str], None],
) -> Iterator[Window]:
    """Reads a text and yields its windows, which it counts as perplexity.counted_windows does.

    Args:
        task: The text.
        loaded: The model's tokenizer.
        counts: What the windows hold is added to it.
        vocab_size: Number of tokens that the model knows.
        window: Tokens of a window.
        stride: Distance of the windows of a document.
        max_tokens: Stop after so many tokens; None: read all.
        note: Called with lines about what is not read.

    Raises:
        DataError: The text cannot be read.
        EvaluationError: It has a token that the model does not know.
    """
    encoder = PieceEncoder(loaded, max_tokens)
    if task.is_last_word:
        return _last_words(_texts(task), encoder, counts, vocab_size, window)
    return counted_windows(_documents(task, encoder, loaded, note), counts, vocab_size, window, stride)


def _is_prepared(task: TextTask) -> bool:
    return (Path(task.source) / MANIFEST_NAME).is_file()


def _documents(
    task: TextTask, encoder: PieceEncoder, loaded: LoadedTokenizer, note: Callable[[str], None]
) -> Iterable[Document]:
    if _is_prepared(task):
        return documents_of_data(Path(task.source), "validation", encoder, loaded, note)
    if task.separator is None:
        return documents_of_sources([task.source], encoder, task.field, task.split, task.config_name, note)
    # The separator before each text but the first.
    parts = itertools.chain.from_iterable((task.separator, text) for text in _texts(task))
    return [pieces(itertools.islice(parts, 1, None), encoder)]


def _sources(task: TextTask) -> list[Source]:
    return open_sources([SourceName(task.source, task.field, task.split, task.config_name)])


def _check_first_text(task: TextTask, reads_hub_cache: bool) -> None:
    """Raises DataError where a text is not there, is empty, has no such field, or is a prepared mixture."""
    if (Path(task.source) / MIXTURE_NAME).is_file():
        raise DataError(f"{task.source} is a mixture of data sets; name one of the folders in it")
    for source in _sources(task):
        if isinstance(source, HuggingFace) and not source.folder.exists():
            if not (reads_hub_cache and is_offline()):
                continue
        elif not isinstance(source, LocalFiles):
            continue
        elif any(kind_of(path) == ".txt" and path.stat().st_size for path in source.paths):
            continue  # it would be read as a whole
        if not any(text.strip() for text in texts_of(source)):
            raise DataError(f"{source.name}: there is nothing to score: it holds no text")


def _texts(task: TextTask) -> Iterator[str]:
    for source in _sources(task):
        yield from texts_of(source)


def _last_words(
    texts: Iterable[str], encoder: PieceEncoder, counts: Counter[str], vocab_size: int, size: int
) -> Iterator[Window]:
    """Yields a window per text, which ends with its last word, the only one that is scored; counts as counted_windows.

    A text of one word is left out, and so is what the encoder's limit cuts.
    """
    for text in texts:
        context, space, word = text.rstrip().rpartition(" ")
        before, last = encoder.piece(context), encoder.piece(space + word)
        if encoder.is_full:
            return
        if not before.tokens or not last.tokens:
            continue
        tokens = [*before.tokens, *last.tokens][-size:]
        check_tokens(tokens, vocab_size)
        num_new = min(len(last.tokens), len(tokens) - 1)
        counts.update(documents=1, tokens=len(tokens), words=1, bytes=last.num_bytes, scored=num_new)
        yield Window(tokens, num_new)
