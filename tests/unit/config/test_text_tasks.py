"""What an entry of evaluation.tasks stands for."""

from mlra_scale.config.text_tasks import NAMED_TEXTS, TextTask, equal_names, text_task


def test_names_of_texts_and_of_files() -> None:
    assert text_task("lambada").is_last_word and text_task("lambada").source == "hf:EleutherAI/lambada_openai"
    assert text_task("ptb").separator == "\n" and text_task("ptb").data_set == "ptb-text-only/ptb_text_only"
    assert text_task("texts/held-out.jsonl.gz") == TextTask("held-out", "texts/held-out.jsonl.gz")
    assert text_task("data/python-docs/").name == "python-docs"
    assert text_task("hf:me/corpus@v1") == TextTask("corpus", "hf:me/corpus@v1")
    assert text_task("hf:me/corpus@v1").data_set == "me/corpus"
    assert text_task("/home/me/a.txt").data_set == "a"
    assert text_task("texts/.hidden").name == "texts/.hidden"


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
