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


def test_each_text_has_a_name_of_its_own() -> None:
    assert equal_names([*NAMED_TEXTS, "a.txt", "b.txt"]) == []
    assert equal_names(["a/x.txt", "b/x.jsonl", "ptb", "ptb.txt"]) == ["ptb", "x"]
