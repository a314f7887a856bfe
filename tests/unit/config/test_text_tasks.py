"""What an entry of evaluation.tasks stands for."""

from pathlib import Path

import pytest

from mlra_scale.config.text_tasks import NAMED_TEXTS, TextTask, equal_names, text_task


def test_names_of_texts_and_of_files() -> None:
    assert text_task("lambada").is_last_word and text_task("lambada").source == "hf:EleutherAI/lambada_openai"
    assert text_task("ptb").separator == "\n" and text_task("ptb").data_set == "ptb-text-only/ptb_text_only"
    assert text_task("texts/held-out.jsonl.gz") == TextTask("held-out", "texts/held-out.jsonl.gz")
    assert text_task("data/python-docs/").name == "python-docs"
    assert text_task("hf:me/corpus@v1") == TextTask("corpus", "hf:me/corpus@v1")
    assert text_task("hf:me/corpus@v1").data_set == "me/corpus"
    assert text_task("/home/me/a.txt").data_set == "a"
    assert text_task("/home/me/.hidden").name == "hidden" and text_task("../..").name == "text"


@pytest.mark.parametrize(
    "folder",
    ["/home/me/corpus", "./corpus", "../corpus", "~/corpus", "~me/corpus", "a/b/corpus", "/home/me@work/corpus"],
)
def test_a_local_folder_is_not_on_the_hub_and_only_its_last_name_is_told(folder: str) -> None:
    task = text_task(f"hf:{folder}")
    assert not task.is_on_hub and (task.data_set, task.name) == ("corpus", "corpus")


def test_a_folder_that_exists_is_local_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "corpus").mkdir(parents=True)
    task = text_task("hf:me/corpus")
    assert task.is_on_hub and task.data_set == "me/corpus" and text_task("hf:wikitext").is_on_hub
    monkeypatch.chdir(tmp_path)
    assert not task.is_on_hub and task.data_set == "corpus"


def test_globs_and_names_of_ones_own() -> None:
    assert text_task("texts/wiki/*.jsonl") == TextTask("wiki", "texts/wiki/*.jsonl")
    assert text_task("texts/*/test.txt").name == text_task("texts/**").name == "texts"
    assert text_task("*.txt").name == "*"
    assert text_task("wiki=a/test.txt") == TextTask("wiki", "a/test.txt")
    assert text_task("mine=hf:me/corpus@v1") == TextTask("mine", "hf:me/corpus@v1")
    assert text_task("w=lambada").is_last_word and text_task("w=lambada").name == "w"
    assert text_task("a/b=c.txt") == TextTask("b=c", "a/b=c.txt")
    assert equal_names(["wiki=wiki/test.txt", "news=news/test.txt", "test.txt"]) == []
    assert equal_names(["wiki=wiki/test.txt", "wiki.txt"]) == ["wiki"]


def test_each_text_has_a_name_of_its_own() -> None:
    assert equal_names([*NAMED_TEXTS, "a.txt", "b.txt"]) == []
    assert equal_names(["a/x.txt", "b/x.jsonl", "ptb", "ptb.txt"]) == ["ptb", "x"]
