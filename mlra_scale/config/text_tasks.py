"""The entries of `evaluation.tasks`: where each text is read from, and what of it is scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

HUGGING_FACE, HARNESS = "hf:", "harness:"
_NAME_ON_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class TextTask:
    """A text whose perplexity a run measures.

    Attributes:
        name: Names its figures in the record; unique in a run.
        source: Files, a folder, a glob or hf:NAME, as of mlra-scale prepare; or a folder that it made.
        field: Field or column that holds the text.
        split: Split of a Hugging Face data set.
        config_name: Configuration of a Hugging Face data set.
        separator: Joins all documents to one, in which each is context for the next; None: each is scored by itself.
        is_last_word: Whether of each document only the last word is scored, after all words before it.
    """

    name: str
    source: str
    field: str = "text"
    split: str = "test"
    config_name: str | None = None
    separator: str | None = None
    is_last_word: bool = False

    @property
    def is_on_hub(self) -> bool:
        """Whether it is a data set of the Hugging Face hub; "hf:FOLDER" is local."""
        return name_on_hub(self.source) is not None

    @property
    def data_set(self) -> str:
        """The data set on the hub, without revision; of local text the name of the task: folders are private."""
        return name_on_hub(self.source) or self.name


def name_on_hub(source: str) -> str | None:
    """Returns the NAME or OWNER/NAME of a data set of the hub, without revision; None for local text."""
    spec = source.removeprefix(HUGGING_FACE)
    name = spec.partition("@")[0]
    # A folder that exists is what is read (data/sources.py).
    is_on_hub = source.startswith(HUGGING_FACE) and _NAME_ON_HUB.fullmatch(name) and not Path(spec).exists()
    return name if is_on_hub else None


_WIKITEXT = "hf:EleutherAI/wikitext_document_level"
NAMED_TEXTS = {
    task.name: task
    for task in (
        # The passages of the harness's lambada_openai: the last word has to be predicted.
        TextTask("lambada", "hf:EleutherAI/lambada_openai", config_name="default", is_last_word=True),
        # Rows are whole articles.
        TextTask("wikitext-2", _WIKITEXT, field="page", config_name="wikitext-2-raw-v1"),
        TextTask("wikitext-103", _WIKITEXT, field="page", config_name="wikitext-103-raw-v1"),
        # Rows are sentences. The hub converts data sets that are scripts, which the library no longer runs.
        TextTask(
            "ptb",
            "hf:ptb-text-only/ptb_text_only@refs/convert/parquet",
            field="sentence",
            config_name="penn_treebank",
            separator="\n",
        ),
    )
}
"""By name: texts of the Hugging Face hub."""


def text_task(given: str) -> TextTask:
    """Returns the task that an entry of `evaluation.tasks` stands for.

    It is named as NAME=SOURCE says, or else by its file or folder; a glob by the last part before its wildcards.
    """
    if given in NAMED_TEXTS:
        return NAMED_TEXTS[given]
    if (chosen := re.fullmatch(r"([\w.-]+)=(.+)", given, re.ASCII)) is not None:
        return replace(text_task(chosen[2]), name=chosen[1])
    parts = (name_on_hub(given) or given.removeprefix(HUGGING_FACE)).rstrip("/").split("/")
    stems = [part.strip(".").split(".")[0] for part in parts]
    is_wild = [any(wild in stem for wild in "*?[") for stem in stems]
    last = stems[is_wild.index(True) - 1] if any(is_wild[1:]) and not is_wild[0] else stems[-1]
    return TextTask(last or "text", given)


def text_tasks(given: Sequence[str]) -> list[TextTask]:
    """Returns the entries of `evaluation.tasks` that are texts."""
    return [text_task(each) for each in given if not each.startswith(HARNESS)]


def harness_tasks(given: Sequence[str]) -> list[str]:
    """Returns the entries of `evaluation.tasks` that lm-evaluation-harness runs: names, or YAML files."""
    return [each.removeprefix(HARNESS) for each in given if each.startswith(HARNESS)]


def equal_names(given: Sequence[str]) -> list[str]:
    """Returns the names that two texts of `evaluation.tasks` share."""
    names = [task.name for task in text_tasks(given)]
    return sorted({name for name in names if names.count(name) > 1})
