"""The model card of an export. It says only what the checkpoint records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import mlra_scale
from mlra_scale.checkpoint.files import CheckpointError
from mlra_scale.checkpoint.huggingface.tensors import Format
from mlra_scale.checkpoint.huggingface.verification import Verification
from mlra_scale.checkpoint.state_contents import STATE
from mlra_scale.config import Config, ExportConfig, ModelConfig, OptimConfig
from mlra_scale.config.text_tasks import NAMED_TEXTS, TextTask, text_tasks
from mlra_scale.model.optim_text import optimizer_text, rule_text

if TYPE_CHECKING:
    from mlra_scale.checkpoint.reader import Store

CARD_MARK = b"exported with mlra-scale"
"""A text that every card contains; by it an export is recognised."""

_TEMPLATE = Path(__file__).with_name("card_template.md")

_FIELDS_OF_ROWS: dict[str, tuple[str, ...]] = {
    "batch": ("train.global_batch_size",),
    "precision": ("train.precision",),
    "learning rate": ("optim.lr", "optim.schedule", "optim.warmup_steps", "optim.decay_steps", "train.steps"),
    "optimizer": (
        *(f"optim.{name}" for name in ("name", "betas", "eps", "momentum", "nesterov", "newton_schulz_")),
        *(f"optim.{name}" for name in ("matrix_scale", "weight_decay", "rules", *OptimConfig.replaced)),
    ),
    "dropout": ("model.embedding_dropout", "model.attention_dropout", "model.residual_dropout"),
    "layout": ("parallel.", "number of ranks"),
    "data": ("data.blend",),
}
"""Fields, or their beginnings, that a row of the card shows the last value of."""
_CHANGES_NOT_SHOWN = (
    "preset",
    "form of the data's fingerprints",
    "data.path",
    "data.validation_path",
    "data.tokenizer",
    "train.log_every",
    "train.peak_tflops",
    "train.device",
    "cluster.",
    "wandb.",
    "tensorboard.",
    "profile.",
    "tev.",
    "gradients.",
    "activations.",
    "evaluation.",
    "checkpoint.",
    "export.",
)
"""Changes that do not change the model: of paths, of records, and of what is measured and when."""


_FIGURES = {"perplexity": "token_perplexity", "word_perplexity": "word_perplexity", "bits_per_byte": "bits_per_byte"}
"""By the hub's name of a metric: the figure of a text."""
_FIGURES_OF_A_TEXT = ("tokens_scored", *_FIGURES.values())
_LARGEST_LOSS = 700.0
"""In nats; the perplexity of a larger one is beyond a float."""


@dataclass(frozen=True)
class CardDetails:
    """What a card says beside what was measured; what is left open is as the run's configuration has it (`export.*`).

    Attributes:
        repository: What its example loads the model by; None: the folder itself.
        license: As the hub names it.
        languages: Codes of the languages of the training text.
        datasets: Data sets of the hub that the training used.
    """

    repository: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()

    def completed(self, run: ExportConfig) -> CardDetails:
        """Returns these with the license, languages and data sets of the run where there are none."""
        return CardDetails(
            self.repository, self.license or run.license, self.languages or run.languages, self.datasets or run.datasets
        )


def model_card(
    store: Store,
    export_format: Format,
    dtype: str,
    verification: Verification | None,
    text: str | None,
    details: CardDetails | None = None,
) -> str:
    """Returns the content of README.md; `text` is the source of the text of the verification, if there was one."""
    details = (details or CardDetails()).completed(ExportConfig() if store.config is None else store.config.export)
    tasks, harness = _tasks(store), _figures(store, "harness")
    results = _results(store, details, tasks, harness)
    data = ModelCardData(
        language=list(details.languages) or None,
        license=details.license,
        datasets=list(details.datasets) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mlra-scale", export_format],
        model_name=_name(store.model, details) if results else None,
        eval_results=results or None,
    )
    model, config, history = store.model, store.config, _history(store)
    changes = [] if config is None else history.get("changes") or []
    changes = [each for each in changes if not str(each["field"]).startswith(_CHANGES_NOT_SHOWN)]
    known_from = history.get("known_from", store.step)
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        manifest=store.manifest,
        config=config,
        model=model,
        dtype=dtype,
        version=mlra_scale.__version__,
        factorised=", ".join(name for name in ("q", "k", "v", "o") if model.is_factorised(name)),
        is_gpt2=export_format == "gpt2",
        options=_options(model),
        optimizer=None if config is None else optimizer_text(model, config.optim),
        rules=[] if config is None else [rule_text(rule) for rule in config.optim.rules],
        dropouts=(model.embedding_dropout, model.attention_dropout, model.residual_dropout),
        progress=store.state.get("progress") or {},
        validation_loss=store.state.get("validation_loss"),
        data=_data_names(config),
        provenance=_provenance(store, history),
        changes=[(each["step"] + 1, each["field"], _value(each["was"]), _value(each["now"])) for each in changes],
        changed_rows=[
            row
            for row, fields in _FIELDS_OF_ROWS.items()
            if any(str(each["field"]).startswith(fields) for each in changes)
        ],
        known_from=known_from if config is not None and type(known_from) is int else 0,
        repository=details.repository,
        tasks=tasks,
        harness=harness,
        stride=None if config is None else config.evaluation.task_stride or max(1, config.train.sequence_length // 2),
        verification=None if verification is None else verification.lines(),
        text=text,
    )
    return str(card)


def _name(model: ModelConfig, details: CardDetails) -> str:
    if details.repository is not None:
        return details.repository.rpartition("/")[2]
    return f"gpt2-{model.attention}-{model.num_layers}l"


def _tasks(store: Store) -> dict[TextTask, dict[str, Any]]:
    """The figures of texts that were measured at the checkpoint, by their tasks."""
    if store.config is None:
        return {}
    known = NAMED_TEXTS | {task.name: task for task in text_tasks(store.config.evaluation.tasks)}
    found = _figures(store, "tasks", _FIGURES_OF_A_TEXT)
    return {known.get(name) or TextTask(name, name): figures for name, figures in found.items()}


def _figures(store: Store, section: str, needed: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Returns a section of the state that has figures by the names of what was measured, checked."""
    found = store.state.get(section) or {}
    for figures in found.values():
        values = [figures.get(name) for name in (*needed, *figures)] if isinstance(figures, dict) else [None]
        if not all(type(value) in (int, float) for value in values):
            raise CheckpointError(f"{store.folder / STATE} has {section} that are not sound; use another one")
    return found


def _results(
    store: Store,
    details: CardDetails,
    tasks: Mapping[TextTask, Mapping[str, Any]],
    harness: Mapping[str, Mapping[str, Any]],
) -> list[EvalResult]:
    """Returns all figures as the hub's model-index has them; values that are not finite are left out."""
    found: list[tuple[dict[str, Any], dict[str, float]]] = []
    loss, data = store.state.get("validation_loss"), f"{_data_names(store.config)} (held-out samples)"
    if loss is not None:
        perplexity = math.exp(loss) if loss < _LARGEST_LOSS else math.inf
        # What was held out of these data: no split that a data set of the hub has.
        named: dict[str, Any] = {"type": data, "name": data}
        found.append((named, {"perplexity": perplexity}))
    for task, figures in tasks.items():
        split = task.split if task.is_on_hub else None
        named = {"type": task.data_set, "name": task.name, "split": split, "config": task.config_name}
        found.append((named, {metric: figures[figure] for metric, figure in _FIGURES.items()}))
    found += [({"type": name, "name": name}, dict(metrics)) for name, metrics in harness.items()]
    return [
        EvalResult(
            "text-generation",
            **{f"dataset_{key}": value for key, value in named.items()},
            metric_type=metric,
            metric_value=value,
        )
        for named, metrics in found
        for metric, value in metrics.items()
        if math.isfinite(value)
    ]


def _options(model: ModelConfig) -> list[str]:
    """The model's options beside its shape, and how the export represents them."""
    factor, branches = model.embedding_factor, f"branches times {model.base_depth}/{model.num_layers}"
    found = {
        "QK-norm (arXiv 2302.05442)": model.qk_norm,
        "sigmaReparam (arXiv 2303.06296), folded into the weights": model.sigma_reparam,
        "LayerNorm Scaling (arXiv 2502.05795), folded into the norms": model.layer_norm_scaling,
        f"CompleteP (arXiv 2505.01618), {branches}, folded into o and fc_out": model.depth_rule == "completep",
        f"token embeddings times {factor:g} on entry and not in the head": factor != 1.0,
    }
    return [text for text, is_on in found.items() if is_on]


def _data_names(config: Config | None) -> str:
    """The names of the data sets, without their folders."""
    if config is None:
        return ""
    blend = config.data.blend or {}
    total = sum(blend.values())
    shares = [f"{Path(path).name} ({100 * weight / total:.4g} %)" for path, weight in blend.items()]
    return ", ".join(shares) or Path(config.data.path or "").name


def _provenance(store: Store, history: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Fingerprints of the data, and where imported weights come from."""
    fingerprints = store.state.get("data_fingerprints") or {}
    rows = [
        (f"fingerprint of {Path(field).name if '/' in field else field}", str(fingerprint))
        for field, fingerprint in fingerprints.items()
    ]
    for label, values in (("origin", store.state.get("origin")), ("began with weights", history.get("begun_from"))):
        rows += [(f"{label}: {key}", _plain(value)) for key, value in (values or {}).items()]
    return rows


def _history(store: Store) -> dict[str, Any]:
    """The section of the changes of a run (training/resume.py); checkpoints of early versions have none."""
    history = store.state.get("history") or {}
    changes = history.get("changes", [])
    is_sound = isinstance(changes, list) and all(
        isinstance(change, dict) and {"step", "field", "was", "now"} <= change.keys() and type(change["step"]) is int
        for change in changes
    )
    if not (is_sound and isinstance(history.get("begun_from") or {}, dict)):
        raise CheckpointError(f"{store.folder / STATE} has a history that is not sound; use another checkpoint")
    return dict(history)


def _value(value: Any) -> str:
    """A value of a changed field; of data sets only the names."""
    if isinstance(value, Mapping):
        return ", ".join(f"{Path(str(key)).name}: {_value(item)}" for key, item in value.items()) or "none"
    return _plain(value) if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> str:
    """A JSON value as text; of a path only the name, since folders of the author's machine are private."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return Path(value).name if isinstance(value, str) else str(value)
