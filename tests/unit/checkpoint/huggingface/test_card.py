"""The model card of a run that was resumed with other settings tells all of them."""

import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mlra_scale.checkpoint.files import CheckpointError
from mlra_scale.checkpoint.huggingface.card import CardDetails, model_card
from mlra_scale.checkpoint.reader import Store
from mlra_scale.config import ExportConfig, ParameterRule

WRITTEN = Path(__file__).resolve().parents[3] / "fixtures" / "written_by_3a017c2"


@pytest.fixture
def store() -> Store:
    """A checkpoint of step 3, of before there was a history."""
    return Store.open(WRITTEN / "zero3" / "checkpoints" / "step-00000003")


def card_of(store: Store, *changes: tuple[int, str, Any, Any], **more: Any) -> str:
    listed = [{"step": step, "field": field, "was": was, "now": now} for step, field, was, now in changes]
    store.state["history"] = {"changes": listed, "begun_from": None, "known_from": 0, **more}
    return model_card(store, "gpt2", "float32", None, None)


def test_a_run_that_was_never_changed_has_plain_rows(store: Store) -> None:
    card = card_of(store)
    assert "changes below" not in card and "Changed in the course" not in card and "not recorded" not in card
    assert "| precision | bf16 |" in card and "| saved with | mlra_scale " in card


def test_every_change_is_told_with_its_step(store: Store) -> None:
    card = card_of(
        store,
        (1, "optim.lr", 1e-3, 3e-4),
        (1, "train.global_batch_size", 8, 16),
        (2, "train.precision", "fp32", "bf16"),
        (2, "data.blend", {"/home/me/web": 1.0}, {"/home/me/web": 0.5, "/home/me/books": 0.5}),
        (2, "parallel.pipeline", 2, 1),
        (2, "number of ranks", 4, 2),
        (2, "optim.rules", [], [{"kind": "factor", "weight_decay": 0.0}]),
        (2, "model.residual_dropout", 0.0, 0.1),
        (2, "train.steps", 6, 3),
    )
    for line in (
        "| 2 | optim.lr | 0.001 | 0.0003 |",
        "| 2 | train.global_batch_size | 8 | 16 |",
        "| 3 | train.precision | fp32 | bf16 |",
        "| 3 | data.blend | web: 1.0 | web: 0.5, books: 0.5 |",
        "| 3 | parallel.pipeline | 2 | 1 |",
        "| 3 | number of ranks | 4 | 2 |",
        "| 3 | model.residual_dropout | 0.0 | 0.1 |",
    ):
        assert line in card, line
    rows = {line.split(" | ")[0].strip("| "): line for line in card.splitlines() if line.startswith("| ")}
    for name in ("batch", "precision", "learning rate", "optimizer", "dropout", "layout", "data"):
        assert "last of several: see the changes below" in rows[name], name
    assert "/home/me" not in card, "where things lay is nobody's business"


@pytest.mark.parametrize("name", ["name", "betas", "matrix_scale", "newton_schulz_steps", "decay_embedding"])
def test_the_row_of_the_optimizer_tells_of_a_change_to_any_of_its_fields(store: Store, name: str) -> None:
    (row,) = [line for line in card_of(store, (1, f"optim.{name}", 1, 2)).splitlines() if "| optimizer |" in line]
    assert "last of several" in row
    (row,) = [line for line in card_of(store, (1, "optim.decay_steps", 1, 2)).splitlines() if "| optimizer |" in line]
    assert "last of several" not in row


def test_the_card_has_the_optimizer_and_its_rules(store: Store) -> None:
    adamw = "AdamW (betas 0.9, 0.95; epsilon 1e-08)"
    card = card_of(store)
    assert f"| optimizer | {adamw}; weight decay 0.1, none on biases and norms |" in card
    assert "parameter rules" not in card
    assert store.config is not None
    rules = ParameterRule(kind="embedding", weight_decay=0.0), ParameterRule(names="blocks.0.*", lr_factor=0.5)
    optim = store.config.optim.model_copy(update={"name": "muon", "rules": rules})
    store.config = store.config.model_copy(update={"optim": optim})
    card = card_of(store)
    settings = "Nesterov momentum 0.95, 5 Newton-Schulz steps, updates times 0.2 sqrt(max(m, n))"
    muon = f"muon for 12 factors and 6 matrices, {adamw} for all else; muon: {settings}"
    assert f"| optimizer | {muon}; weight decay 0.1, none on biases and norms |" in card
    assert "| parameter rules | kind embedding: weight decay 0; blocks.0.*: learning rate times 0.5 |" in card


def test_what_does_not_change_the_model_is_not_told(store: Store) -> None:
    card = card_of(
        store,
        (1, "data.path", "/home/me/a", "/home/me/b"),
        (1, "form of the data's fingerprints", 1, 2),
        (1, "train.log_every", 1, 10),
        (1, "wandb.mode", "disabled", "online"),
        (1, "checkpoint.every", None, 5),
    )
    assert "Changed in the course" not in card and "/home/me" not in card


def test_what_is_not_recorded_is_not_claimed(store: Store) -> None:
    card = model_card(store, "gpt2", "float32", None, None)
    assert "Whether settings were changed before step 4 is not recorded in the checkpoint" in card
    later = card_of(store, (2, "optim.lr", 1e-3, 3e-4), known_from=2)
    assert "before step 3 is not recorded" in later and "| 3 | optim.lr | 0.001 | 0.0003 |" in later


def test_the_card_has_the_weights_that_a_run_began_with(store: Store) -> None:
    begun_from = {"checkpoint": "abc", "format": "gpt2", "folder": "/home/me/gpt2", "attention_rank": 384}
    card = card_of(store, begun_from=begun_from)
    assert "| began with weights: format | gpt2 |" in card and "| began with weights: folder | gpt2 |" in card


@pytest.mark.parametrize("history", [{"changes": 1}, {"changes": [1]}, {"changes": [{"step": 1}]}, {"begun_from": [1]}])
def test_a_history_that_is_not_sound_is_one_error(store: Store, history: dict[str, Any]) -> None:
    store.state["history"] = history
    with pytest.raises(CheckpointError, match=r"state\.json has a history that is not sound"):
        model_card(store, "gpt2", "float32", None, None)


FIGURES = {
    "tokens_scored": 5000,
    "token_perplexity": 21.5,
    "word_perplexity": 60.25,
    "bits_per_byte": 1.25,
    "loss": math.log(21.5),
}


def with_tasks(store: Store, **tasks: Any) -> Store:
    assert store.config is not None
    evaluation = store.config.evaluation.model_copy(update={"tasks": ("lambada", "hf:/home/me/private/held.set")})
    store.config = store.config.model_copy(update={"evaluation": evaluation})
    store.state["tasks"] = tasks
    return store


def test_the_card_has_figures_of_texts_and_the_hubs_index_of_results(store: Store) -> None:
    store.state["validation_loss"] = 2.0
    tasks = {"lambada": FIGURES, "held": {**FIGURES, "word_perplexity": math.inf}}
    store.state["harness"] = {"choose": {"acc": 0.25, "acc_norm": 0.5}}
    details = CardDetails("me/small", "mit", ("en",), ("me/corpus", "me/more"))
    card = ModelCard(model_card(with_tasks(store, **tasks), "gpt2", "float32", None, None, details))
    assert "| lambada * | 21.5 | 60.25 | 1.25 | 5,000 |" in card.text and "| held | 21.5 | inf | 1.25" in card.text
    assert "| choose | acc | 0.25 |\n| choose | acc_norm | 0.5 |\n" in card.text
    assert "/home/me" not in card.content and 'name = "me/small"\n' in card.text
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["datasets"]) == ("mit", ["en"], ["me/corpus", "me/more"])
    (model,) = data["model-index"]
    assert model["name"] == "small"
    found = {
        (result["dataset"]["type"], result["dataset"]["name"], result["dataset"].get("split")): {
            metric["type"]: metric["value"] for metric in result["metrics"]
        }
        for result in model["results"]
    }
    assert store.config is not None
    held_out = f"{Path(store.config.data.path or '').name} (held-out samples)"
    measures = {"perplexity": 21.5, "word_perplexity": 60.25, "bits_per_byte": 1.25}
    assert found == {
        (held_out, held_out, None): {"perplexity": math.exp(2.0)},
        ("EleutherAI/lambada_openai", "lambada", "test"): measures,
        ("held", "held", None): {"perplexity": 21.5, "bits_per_byte": 1.25},
        ("choose", "choose", None): {"acc": 0.25, "acc_norm": 0.5},
    }, "a perplexity that is not finite is no result"


def test_the_training_data_as_a_text_of_the_evaluation_are_another_measurement(store: Store) -> None:
    """Its windows and its stride are others than those of the validation loss."""
    assert store.config is not None
    name = Path(store.config.data.path or "").name
    store.state["validation_loss"], store.state["tasks"] = 2.0, {name: FIGURES}
    (model,) = ModelCard(model_card(store, "gpt2", "float32", None, None)).data.to_dict()["model-index"]
    found = [(result["dataset"], metric) for result in model["results"] for metric in result["metrics"]]
    perplexities = {dataset["type"]: metric["value"] for dataset, metric in found if metric["type"] == "perplexity"}
    assert perplexities == {f"{name} (held-out samples)": math.exp(2.0), name: 21.5}


def test_without_results_and_details_the_card_claims_none(store: Store) -> None:
    store.state["validation_loss"] = None
    card = ModelCard(model_card(store, "gpt2", "float32", None, None))
    assert not {"model-index", "license", "language", "datasets"} & card.data.to_dict().keys()
    assert "## Evaluation" not in card.text and 'name = "."  # this folder' in card.text


def test_details_that_are_left_open_are_those_of_the_run(store: Store) -> None:
    assert store.config is not None
    run = ExportConfig(license="mit", languages=("en",), datasets=("me/corpus",))
    store.config = store.config.model_copy(update={"export": run})
    card = ModelCard(model_card(store, "gpt2", "float32", None, None, CardDetails(license="apache-2.0")))
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["datasets"]) == ("apache-2.0", ["en"], ["me/corpus"])


@pytest.mark.parametrize("tasks", [{"a": 1}, {"a": {}}, {"a": {**FIGURES, "bits_per_byte": "x"}}])
def test_figures_that_are_not_sound_are_one_error(store: Store, tasks: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json has tasks that are not sound"):
        model_card(with_tasks(store, **tasks), "gpt2", "float32", None, None)
