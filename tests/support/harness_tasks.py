"""Tasks of lm-evaluation-harness over a few local lines: a choice, a last word, whole texts, and one with examples."""

import json
from pathlib import Path
from typing import Any

CHOICES: list[dict[str, Any]] = [
    {"question": "A window slides over the", "choices": ["text", "moon, and every one", "rest"], "answer": 0},
    {"question": "every token in it is", "choices": ["seen", "lost"], "answer": 1},
    {"question": "Nothing " * 30 + "is", "choices": ["new", "old and long since gone"], "answer": 0},
]
WORDS = [{"text": "A window slides over the", "word": "text"}, {"text": "every token in it is seen", "word": "once"}]
EXAMPLES = [{"text": f"After {number} comes", "word": f"{number + 1}"} for number in range(20)]
TEXTS = [{"text": "A window slides over the text. " * 9}, {"text": "Nothing"}]


def harness_files(folder: Path) -> dict[str, Path]:
    """Writes the tasks `choose`, `last_word`, `whole` and `few_shot` with their data; returns their YAML files."""
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "choose": (
            CHOICES,
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_target": "answer",
                "doc_to_choice": "choices",
                "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
            },
        ),
        "last_word": (
            WORDS,
            {
                "output_type": "loglikelihood",
                "doc_to_text": "{{text}}",
                "doc_to_target": "{{' ' + word}}",
                "metric_list": [
                    {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                    {"metric": "acc", **mean},
                ],
            },
        ),
        "whole": (
            TEXTS,
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
            },
        ),
    }
    last_words = tasks["last_word"][1]
    tasks["few_shot"] = (EXAMPLES, last_words | {"num_fewshot": 2, "fewshot_split": "test"})
    for name, (rows, settings) in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, "test_split": "test", **settings}))
    return {name: folder / f"{name}.yaml" for name in tasks}
