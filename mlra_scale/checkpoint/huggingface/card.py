"""The model card of an export. It says only what the checkpoint records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

import mlra_scale
from mlra_scale.checkpoint.files import CheckpointError
from mlra_scale.checkpoint.huggingface.tensors import Format
from mlra_scale.checkpoint.huggingface.verification import Verification
from mlra_scale.checkpoint.state_contents import STATE
from mlra_scale.config import Config, ModelConfig

if TYPE_CHECKING:
    from mlra_scale.checkpoint.reader import Store

Rows = list[tuple[str, str]]
CARD_MARK = b"exported with mlra-scale"
"""A text that every card contains; by it an export is recognised."""

_TEMPLATE = """\
---
{{ card_data }}
---

# GPT-2, {{ model.num_layers }} layers of width {{ model.hidden_size }}, \
{{ "MLRA (rank %d)" % model.rank if factorised else "dense attention" }}

A language model trained and exported with mlra-scale {{ version }}.{% if not factorised %} \
Its architecture is GPT-2's{{ ", with queries and keys normalised" if model.qk_norm }}.{% else %} \
It was trained with the attention projections {{ factorised }} as products of two factors of rank {{ model.rank }} \
(multi-head low-rank attention, Chung et al. 2024, arXiv 2409.07787).\
{% if is_gpt2 %} Here the factors are merged, which changes nothing: the architecture is that of GPT-2.\
{% else %} Here the factors are kept; `modeling_mlra.py` is the model's code.{% endif %}{% endif %}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder{{ "" if is_gpt2 else ", trust_remote_code=True" }})
{# It needs no code, but the library looks at the model's configuration first, and asks. -#}
tokenizer = AutoTokenizer.from_pretrained(folder{{ "" if is_gpt2 else ", trust_remote_code=False" }})
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

## Model

{{ model_table }}

## Training

{{ training_table }}{% if changes %}

Changed in the course of the training:

{{ changes }}{% endif %}{% if known_from > 0 %}

Whether settings were changed before step {{ "{:,}".format(known_from + 1) }} is not recorded in the checkpoint; the \
first table has the last ones.{% endif %}

## Verification

{% if not verification %}This export was not compared with the checkpoint.{% else %}\
This folder, loaded by transformers, against the training's own layers with the checkpoint's weights, \
on {{ text }}:

{{ verification }}{% endif %}

"""

_FIELDS_OF_ROWS: dict[str, tuple[str, ...]] = {
    "batch": ("train.global_batch_size",),
    "precision": ("train.precision",),
    "learning rate": ("optim.lr", "optim.schedule", "optim.warmup_steps", "optim.decay_steps", "train.steps"),
    "Adam": ("optim.betas", "optim.weight_decay"),
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
    """Returns the content of README.md.

    Args:
        store: The exported checkpoint.
        export_format: "gpt2" or "mlra".
        dtype: Name of the weights' type.
        verification: The figures, or None where the export was not verified.
        text: The source of the text of the verification.
    """
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["mlra-scale", export_format]
    )
    history, changes = _history(store), _shown_changes(store)
    known_from = history.get("known_from", store.step)
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        model=store.model,
        version=mlra_scale.__version__,
        factorised=_factorised(store.model),
        is_gpt2=export_format == "gpt2",
        model_table=_table(_model_rows(store.model, dtype)),
        training_table=_table(_training_rows(store, {str(change["field"]) for change in changes})),
        changes=_table(map(_change_row, changes), ("from step", "field", "before", "from then on")) if changes else "",
        known_from=known_from if store.config is not None and type(known_from) is int else 0,
        verification="" if verification is None else _table(verification.lines()),
        text=text,
    )
    return str(card)


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    lines = ("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n".join(["| " + " | ".join(head) + " |" if any(head) else "| | |", "|---" * len(head) + "|", *lines])


def _change_row(change: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return f"{change['step'] + 1:,}", str(change["field"]), _value(change["was"]), _value(change["now"])


def _factorised(model: ModelConfig) -> str:
    return ", ".join(name for name in ("q", "k", "v", "o") if model.is_factorised(name))


def _model_rows(model: ModelConfig, dtype: str) -> Rows:
    return [
        ("parameters", f"{model.num_parameters():,} as trained, tied head counted once"),
        ("layers", str(model.num_layers)),
        ("width", f"{model.hidden_size}, {model.ffn_size} in feed-forward layers"),
        ("heads", f"{model.num_heads} of width {model.head_dim}"),
        ("attention", f"{_factorised(model)} of rank {model.rank}" if _factorised(model) else "dense"),
        *([("options", "; ".join(options))] if (options := _options(model)) else []),
        ("positions", f"{model.max_positions:,}, learned"),
        ("vocabulary", f"{model.vocab_size:,} tokens"),
        ("weights", dtype),
    ]


def _options(model: ModelConfig) -> list[str]:
    """The model's options beside its shape, and how the export represents them."""
    found = {
        "QK-norm (arXiv 2302.05442)": model.qk_norm,
        "sigmaReparam (arXiv 2303.06296), folded into the weights": model.sigma_reparam,
        "LayerNorm Scaling (arXiv 2502.05795), folded into the norms": model.layer_norm_scaling,
        f"token embeddings times {model.embedding_factor:g} on entry and not in the head": model.embedding_factor
        != 1.0,
    }
    return [text for text, is_on in found.items() if is_on]


def _training_rows(store: Store, changed: set[str]) -> Rows:
    """The rows of a run, those with the last of several values marked; of an import its origin."""
    rows: Rows = []
    progress = store.state.get("progress") or {}
    if store.config is not None:
        rows.append(("optimizer steps", f"{store.step:,} of {store.config.train.steps:,}"))
    for field, name in (("consumed_tokens", "tokens"), ("consumed_samples", "sequences")):
        if field in progress:
            rows.append((name, f"{progress[field]:,}"))
    if (loss := store.state.get("validation_loss")) is not None:
        rows.append(("validation loss", f"{loss:.4f} nats per token after step {store.step:,}"))
    if store.config is not None:
        rows += _run_rows(store.config)
        layout = {key: value for key, value in store.manifest.layout.items() if key != "precision"}
        rows.append(("layout", ", ".join(f"{key} {value}" for key, value in layout.items())))
    rows += _data_rows(store)
    for index, (name, value) in enumerate(rows):
        if any(field.startswith(_FIELDS_OF_ROWS.get(name, ())) for field in changed):
            rows[index] = (name, f"{value} (last of several: see the changes below)")
    rows += [(f"origin: {key}", _plain(value)) for key, value in (store.state.get("origin") or {}).items()]
    begun_from = _history(store).get("begun_from") or {}
    rows += [(f"began with weights: {key}", _plain(value)) for key, value in begun_from.items()]
    versions = [f"{library} {version}" for library, version in store.manifest.versions.items()]
    saved = f"{store.manifest.created}, {store.manifest.save_id}"
    return [*rows, ("checkpoint", saved), ("saved with", ", ".join(versions))]


def _history(store: Store) -> dict[str, Any]:
    """The section that training/history.py writes; checkpoints of early versions have none."""
    history = store.state.get("history") or {}
    changes = history.get("changes", [])
    is_sound = isinstance(changes, list) and all(
        isinstance(change, dict) and {"step", "field", "was", "now"} <= change.keys() and type(change["step"]) is int
        for change in changes
    )
    if not (is_sound and isinstance(history.get("begun_from") or {}, dict)):
        raise CheckpointError(f"{store.folder / STATE} has a history that is not sound; use another checkpoint")
    return dict(history)


def _shown_changes(store: Store) -> list[dict[str, Any]]:
    changes = _history(store).get("changes") or []
    if store.config is None:
        return []
    return [change for change in changes if not str(change["field"]).startswith(_CHANGES_NOT_SHOWN)]


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


def _run_rows(config: Config) -> Rows:
    train, optim = config.train, config.optim
    return [
        ("batch", f"{train.global_batch_size} sequences of {train.sequence_length} tokens"),
        ("precision", train.precision),
        ("learning rate", f"{optim.lr:g}, {optim.schedule}, {optim.warmup_steps} steps of warm-up"),
        ("Adam", f"betas {optim.betas[0]:g}, {optim.betas[1]:g}; weight decay {optim.weight_decay:g}"),
        ("dropout", _dropout(config.model)),
        ("seed", str(train.seed)),
        ("documents", _documents(config)),
    ]


def _documents(config: Config) -> str:
    """How the documents of a sequence were separated, which decides what input suits the model."""
    if config.data.document_attention == "across":
        return "see each other within a sequence"
    positions = "begin again with each" if config.data.reset_positions else "count through"
    return f"do not see each other (attention stops at their borders); positions {positions}"


def _dropout(model: ModelConfig) -> str:
    rates = (model.embedding_dropout, model.attention_dropout, model.residual_dropout)
    return "none" if not any(rates) else "embedding {:g}, attention {:g}, residual {:g}".format(*rates)


def _data_rows(store: Store) -> Rows:
    """Names of the data sets (not their paths) and fingerprints of their content."""
    rows: Rows = []
    data = None if store.config is None else store.config.data
    if data is not None and data.blend:
        total = sum(data.blend.values())
        shares = (f"{Path(path).name} ({100 * weight / total:.4g} %)" for path, weight in data.blend.items())
        rows.append(("data", ", ".join(shares)))
    elif data is not None and data.path is not None:
        rows.append(("data", Path(data.path).name))
    for field, fingerprint in (store.state.get("data_fingerprints") or {}).items():
        label = field if "/" not in field else Path(field).name
        rows.append((f"fingerprint of {label}", str(fingerprint)))
    return rows
