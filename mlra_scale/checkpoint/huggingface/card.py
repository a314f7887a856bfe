"""The model card of an export. It says only what the checkpoint records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

import mlra_scale
from mlra_scale.checkpoint.files import CheckpointError
from mlra_scale.checkpoint.huggingface.tensors import Format
from mlra_scale.checkpoint.huggingface.verification import Verification
from mlra_scale.checkpoint.state_contents import STATE
from mlra_scale.config import Config, ModelConfig, OptimConfig
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
)
"""Changes that do not change the model: of paths, of records, and of what is measured and when."""


def model_card(
    store: Store, export_format: Format, dtype: str, verification: Verification | None, text: str | None
) -> str:
    """Returns the content of README.md; `text` is the source of the text of the verification, if there was one."""
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["mlra-scale", export_format]
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
        verification=None if verification is None else verification.lines(),
        text=text,
    )
    return str(card)


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
