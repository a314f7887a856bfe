"""The texts of a run: what is read of them, the windows that are scored, and what is refused before anything runs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlra_scale.config import Config, load_config, text_tasks
from mlra_scale.config.text_tasks import TextTask
from mlra_scale.data import DataError
from mlra_scale.data.folder import open_prepared
from mlra_scale.data.sources import HuggingFace
from mlra_scale.data.tokenizer import save_tokenizer
from mlra_scale.evaluation import EvaluationError
from mlra_scale.evaluation.perplexity import Window, windows
from mlra_scale.evaluation.tasks import TaskText, read_tasks, task_problems
from tests.support.gpt2_folders import TEXT, tokenizer
from tests.unit.data.builders import prepare_texts

LENGTH = 16
PASSAGES = ["a window slides over the text", "nothing is between them", "one", " two words \n"]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., TaskText]:
    """read(task, *overrides): reads one task with the test tokenizer, in windows of LENGTH tokens."""
    save_tokenizer(tokenizer(), tmp_path / "tokenizer")

    def one(task: str, *overrides: str) -> TaskText:
        read = read_tasks(config_of(task, *overrides), str(tmp_path / "tokenizer"), lambda line: None)
        (found,) = read.texts
        return found

    return one


def config_of(task: str, *overrides: str) -> Config:
    return load_config("debug", overrides=[f"train.sequence_length={LENGTH}", f"evaluation.tasks=[{task}]", *overrides])


def ids(text: str) -> list[int]:
    return tokenizer().tokenizer.encode(text).ids


def lines_file(path: Path, lines: list[str], field: str = "text") -> str:
    path.write_text("".join(json.dumps({field: line}) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[[TextTask], str]:
    """Gives a task its place among the named ones; their own data are on a hub."""

    def add(task: TextTask) -> str:
        monkeypatch.setitem(text_tasks.NAMED_TEXTS, task.name, task)
        return task.name

    return add


def test_documents_are_scored_one_by_one(tmp_path: Path, read: Callable[..., TaskText]) -> None:
    lines = TEXT.splitlines()
    found = read(lines_file(tmp_path / "lines.jsonl", lines))
    assert found.name == "lines"
    assert found.windows == [window for line in lines for window in windows([ids(line)], LENGTH, LENGTH // 2)]
    assert found.counts["documents"] == len(lines) and found.counts["words"] == len(TEXT.split())
    assert found.counts["scored"] == sum(len(ids(line)) - 1 for line in lines)
    assert found.counts["bytes"] == sum(map(len, lines))
    wider = read(str(tmp_path / "lines.jsonl"), "evaluation.task_stride=15")
    assert wider.windows == [window for line in lines for window in windows([ids(line)], LENGTH, 15)]
    assert sum(window.num_new for window in wider.windows) == found.counts["scored"]


def test_a_limit_of_tokens(tmp_path: Path, read: Callable[..., TaskText]) -> None:
    found = read(lines_file(tmp_path / "lines.jsonl", TEXT.splitlines()), "evaluation.task_tokens=20")
    assert found.counts["tokens"] == 20 and found.counts["documents"] == 1


def test_prepared_data_are_their_validation_split(tmp_path: Path, read: Callable[..., TaskText]) -> None:
    own = [str(tmp_path / "tokenizer")]
    folder = prepare_texts(tmp_path / "prepared", TEXT.splitlines() * 4, tokenizer=own, validation_fraction=0.5)
    manifest, opened = open_prepared(folder)
    found = read(str(folder))
    assert found.name == "prepared" and found.counts["documents"] == opened["validation"].num_documents > 0
    assert all(manifest.tokenizer.end_of_document_token not in window.tokens for window in found.windows)


def test_documents_that_are_joined_are_context_for_each_other(
    tmp_path: Path, read: Callable[..., TaskText], named: Callable[[TextTask], str]
) -> None:
    source = lines_file(tmp_path / "rows.jsonl", PASSAGES, "sentence")
    found = read(named(TextTask("rows", source, field="sentence", separator="\n")))
    whole = "\n".join(PASSAGES)
    assert found.windows == list(windows([ids(whole)], LENGTH, LENGTH // 2))
    assert found.counts["documents"] == 1 and found.counts["bytes"] == len(whole)


def test_the_last_word_alone_is_scored_after_all_before_it(
    tmp_path: Path, read: Callable[..., TaskText], named: Callable[[TextTask], str]
) -> None:
    passages = [*PASSAGES, " ".join(["long"] * 40 + ["end"])]
    task = named(TextTask("passages", lines_file(tmp_path / "p.jsonl", passages), is_last_word=True))
    found = read(task)
    expected = [
        ("a window slides over the", " text"),
        ("nothing is between", " them"),
        (" two", " words"),
        (" ".join(["long"] * 40), " end"),
    ]
    assert found.windows == [
        Window([*ids(context), *ids(word)][-LENGTH:], len(ids(word))) for context, word in expected
    ]
    assert found.counts["words"] == found.counts["documents"] == 4, "a passage of one word has no context"
    assert found.counts["scored"] == sum(len(ids(word)) for _, word in expected)
    assert found.counts["bytes"] == sum(len(word) for _, word in expected)
    first = len(ids("a window slides over the")) + len(ids(" text"))
    cut = read(task, f"evaluation.task_tokens={first + 3}")
    assert cut.windows == found.windows[:1], "a passage that the limit cuts is left out"


def test_what_cannot_be_scored_names_the_text(tmp_path: Path, read: Callable[..., TaskText]) -> None:
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(EvaluationError, match=r"evaluation\.tasks: short: there is nothing to score"):
        read(str(tmp_path / "short.txt"))
    (tmp_path / "long.txt").write_text(TEXT)
    with pytest.raises(EvaluationError, match=r"evaluation\.tasks: long: the text has the token \d+, but the model"):
        read(str(tmp_path / "long.txt"), "model.vocab_size=100")
    with pytest.raises(DataError, match="other field"):
        read(lines_file(tmp_path / "other.jsonl", PASSAGES, "other field"))


def test_a_run_that_continues_leaves_out_what_it_cannot_read(tmp_path: Path) -> None:
    save_tokenizer(tokenizer(), tmp_path / "tokenizer")
    (tmp_path / "long.txt").write_text(TEXT)
    config, notes = config_of(f"{tmp_path}/gone.txt,{tmp_path}/long.txt"), list[str]()
    found = read_tasks(config, str(tmp_path / "tokenizer"), notes.append, needs_all=False)
    assert [text.name for text in found.texts] == ["long"]
    (note,) = notes
    assert note.startswith("the run continues without it: ") and "gone.txt" in note


def test_problems_are_found_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here.txt").write_text(TEXT)
    monkeypatch.setattr("mlra_scale.data.sources.unreachable_hub", None)  # asking the hub would fail
    tasks = f"lambada,ptb,{tmp_path}/here.txt,{tmp_path}/there.txt"
    (problem,) = task_problems(config_of(tasks), has_tokenizer=True)
    assert problem.field == "evaluation.tasks" and problem.value == f"{tmp_path}/there.txt"
    first, second = task_problems(config_of(tasks), has_tokenizer=False)
    assert "name it in data.tokenizer" in first.remedy and second == problem
    assert task_problems(load_config("debug"), has_tokenizer=False) == []
    monkeypatch.setattr("mlra_scale.evaluation.harness.find_spec", lambda name: name)
    (problem,) = task_problems(config_of("harness:none.yaml"), has_tokenizer=True)
    assert problem.value == "harness:none.yaml" and "does not exist" in problem.remedy
    for content, fault in (("task: [", "cannot be read as YAML: while parsing"), ("- task", "neither `task` nor")):
        (tmp_path / "bad.yaml").write_text(content)
        (problem,) = task_problems(config_of(f"harness:{tmp_path}/bad.yaml"), has_tokenizer=True)
        assert fault in problem.remedy
    (tmp_path / "good.yaml").write_text("task: mine\ndoc_to_text: !function own.text\n")
    assert task_problems(config_of(f"harness:{tmp_path}/good.yaml"), has_tokenizer=True) == []
    monkeypatch.setattr("mlra_scale.evaluation.harness.find_spec", lambda name: None)
    (problem,) = task_problems(config_of("harness:arc_easy"), has_tokenizer=True)
    assert "pip install 'mlra-scale[harness]'" in problem.remedy
    assert task_problems(config_of("harness:arc_easy"), has_tokenizer=True, has_packages=False) == []


def test_texts_without_content_are_found_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    other = lines_file(tmp_path / "other.jsonl", PASSAGES, "other field")
    blank = lines_file(tmp_path / "blank.jsonl", ["", " "])
    good = lines_file(tmp_path / "good.jsonl", ["", *PASSAGES])
    found = task_problems(config_of(f"{tmp_path}/empty.txt,{other},{blank},{good}"), has_tokenizer=True)
    assert [problem.value for problem in found] == [f"{tmp_path}/empty.txt", other, blank]
    assert "nothing to score" in found[0].remedy and "other field" in found[1].remedy
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "mixture.yaml").write_text("data: {}")
    (problem,) = task_problems(config_of(f"{tmp_path}/mix"), has_tokenizer=True)
    assert "name one of the folders in it" in problem.remedy
    (problem,) = task_problems(config_of(good, "train.sequence_length=1"), has_tokenizer=True)
    assert problem.field == "train.sequence_length"


def test_a_text_of_the_hub_must_be_in_the_cache_where_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def examples(source: HuggingFace) -> Iterator[dict[str, str]]:
        if "cached" not in source.spec:
            raise DataError("not in the cache")
        yield {"text": TEXT}

    monkeypatch.setattr(HuggingFace, "_examples", examples)
    tasks = config_of("lambada,hf:me/cached")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (problem,) = task_problems(tasks, has_tokenizer=True, reads_hub_cache=True)
    assert problem.value == "hf:EleutherAI/lambada_openai" and "not in the cache" in problem.remedy
    assert task_problems(tasks, has_tokenizer=True) == [], "on other nodes"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert task_problems(tasks, has_tokenizer=True, reads_hub_cache=True) == []


@pytest.mark.slow
def test_a_misspelt_task_of_the_harness(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra harness)")
    (problem,) = task_problems(config_of("harness:arc_easy,harness:arc_eazy"), has_tokenizer=True)
    assert problem.value == "harness:arc_eazy" and "near it: arc_easy" in problem.remedy
