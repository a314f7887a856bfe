"""lm-evaluation-harness on made-up scores: what it asks for, and the figures that it makes of the answers."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra harness)")

from mlra_scale.evaluation import EvaluationError
from mlra_scale.evaluation.harness import Harness, Score
from mlra_scale.evaluation.perplexity import Window
from tests.support.gpt2_folders import tokenizer
from tests.support.harness_tasks import CHOICES, EXAMPLES, TEXTS, WORDS, harness_files

LENGTH = 24
PREFIX = tokenizer().end_of_document_token


def ids(text: str) -> list[int]:
    return tokenizer().tokenizer.encode(text).ids


def nats(window: Window) -> float:
    return float(sum(token % 5 + 1 for token in window.tokens[len(window.tokens) - window.num_new :]))


class Asked:
    """A scorer that remembers the windows."""

    def __init__(self) -> None:
        self.windows = list[Window]()

    def __call__(self, windows: Sequence[Window]) -> list[Score]:
        self.windows += windows
        return [Score(nats(window), window.tokens[-1] % 2 == 0) for window in windows]


def test_choices_and_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files = harness_files(tmp_path)
    harness = Harness([str(files["choose"]), str(files["last_word"])], tokenizer(), LENGTH)
    asked = Asked()
    found = harness.evaluate(asked)
    pairs = [(each["question"], " " + choice) for each in CHOICES for choice in each["choices"]]
    pairs += [(each["text"], " " + each["word"]) for each in WORDS]
    wanted = [Window([*ids(before), *ids(after)][-LENGTH - 1 :], len(ids(after))) for before, after in pairs]
    assert sorted(asked.windows) == sorted(wanted) and max(map(len, (window.tokens for window in wanted))) == LENGTH + 1
    scores = iter([nats(window) for window in wanted])
    right, right_norm = 0, 0
    for each in CHOICES:
        sums = [next(scores) for _ in each["choices"]]
        per_letter = [total / len(choice) for total, choice in zip(sums, each["choices"], strict=True)]
        right += sums.index(min(sums)) == each["answer"]
        right_norm += per_letter.index(min(per_letter)) == each["answer"]
    assert found["choose"] == pytest.approx({"acc": right / 3, "acc_norm": right_norm / 3})
    likely = sum(ids(" " + each["word"])[-1] % 2 == 0 for each in WORDS) / 2
    assert found["last_word"] == pytest.approx({"perplexity": math.exp(sum(scores) / 2), "acc": likely})
    again = Asked()
    assert harness.evaluate(again) == found and again.windows == asked.windows, "as at the next checkpoint"


def test_examples_are_the_same_in_every_evaluation_and_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = [Asked(), Asked(), Asked()]
    file = str(harness_files(tmp_path)["few_shot"])
    harness, next_start = Harness([file], tokenizer(), 200), Harness([file], tokenizer(), 200)
    found = [harness.evaluate(asked[0]), harness.evaluate(asked[1]), next_start.evaluate(asked[2])]
    assert found[0] == found[1] == found[2]
    assert asked[0].windows == asked[1].windows == asked[2].windows
    examples = {tuple(window.tokens[:10]) for window in asked[0].windows}
    assert len(asked[0].windows) == len(EXAMPLES) and len(examples) > 1, "they differ from document to document"


def test_whole_texts_are_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    harness, asked = Harness([str(harness_files(tmp_path)["whole"])], tokenizer(), LENGTH), Asked()
    found = harness.evaluate(asked)
    tokens = [[PREFIX, *ids(each["text"])] for each in TEXTS]
    scored = [token for window in asked.windows for token in window.tokens[len(window.tokens) - window.num_new :]]
    assert scored == [token for each in tokens for token in each[1:]]
    assert all(len(window.tokens) <= LENGTH + 1 for window in asked.windows)
    num_bytes = sum(len(each["text"]) for each in TEXTS)
    total = sum(token % 5 + 1 for token in scored)
    assert found == {"whole": {"bits_per_byte": pytest.approx(total / num_bytes / math.log(2))}}


def test_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = harness_files(tmp_path)["whole"]
    file.write_text(file.read_text().replace("loglikelihood_rolling", "generate_until"))
    with pytest.raises(EvaluationError, match="harness task whole generates text"):
        Harness([str(file)], tokenizer(), LENGTH)
    file.write_text("task: [")
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        Harness([str(file)], tokenizer(), LENGTH)


def test_its_failures_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    harness = Harness([str(harness_files(tmp_path)["whole"])], tokenizer(), LENGTH)

    def fail(windows: Sequence[Window]) -> list[Score]:
        raise RuntimeError("of the scorer")

    with pytest.raises(EvaluationError, match="lm-evaluation-harness failed: of the scorer"):
        harness.evaluate(fail)
