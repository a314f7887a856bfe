"""What a resumed run may change: this start compared with the run that it continues. Imports no torch.

Every field of the configuration is in one of three classes.

FREE fields say where and how a run computes and change at every start as they are given: layout, machine, places of
files. NAMED fields change the run itself, and a person may want that: a difference counts only if the field stands on
the command line. A difference that comes merely from a preset's default is none: the run keeps its own value. One that
comes from the config file is refused, because a file that was edited, or is another one, may be a mistake. All other
fields are the run's identity (architecture, seeds, sequence length, what a document is) and never change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlra_scale.config import Config, ConfigError, ModelConfig, Named, Problem, stored_yaml
from mlra_scale.config.json_text import printable

FREE = (
    "preset",
    "model.vocab_padding_multiple",
    # Where data lie; whether they are the same data is for their fingerprints to say.
    "data.path",
    "data.validation_path",
    "data.tokenizer",
    "train.device",
    "train.compile",
    "train.deterministic",
    "train.garbage_every",
    "train.micro_batch_size",
    "parallel.",
    "cluster.",
    "deepspeed",
    "wandb.",
    "profile.",
)
NAMED = (
    "model.embedding_dropout",
    "model.attention_dropout",
    "model.residual_dropout",
    "model.z_loss",
    "data.blend",
    "train.steps",
    "train.global_batch_size",
    "train.precision",
    "train.log_every",
    "train.peak_tflops",
    "train.max_consecutive_overflows",
    "optim.",
    "tev.",
    "gradients.",
    "activations.",
    "qk_clip.",
    "guard.",
    "evaluation.",
    "checkpoint.",
)
"""Fields, and with a dot at the end whole sections."""

CHANGE_WHAT_IS_USUAL = (
    "model.embedding_dropout",
    "model.attention_dropout",
    "model.residual_dropout",
    "model.z_loss",
    "data.blend",
    "train.global_batch_size",
    "train.precision",
    # While it was off the guard has seen nothing: what it knows may be of long ago.
    "guard.enabled",
)
"""Fields whose change moves the training loss or its gradient's norm at once, and for good: no sign of instability."""

_NOT_ARCHITECTURE = (
    "vocab_padding_multiple",
    "attention_rank_ratio",
    "init_std",
    "init_width_rule",
    "attention_init",
    "paired_mlra_init",
    "depth_scaled_init",
    "embedding_dropout",
    "attention_dropout",
    "residual_dropout",
    "z_loss",
)
"""Fields of the model that may differ where a new run begins with given weights."""


@dataclass(frozen=True)
class Change:
    """A field that goes on with another value than the run had.

    Attributes:
        field: Its dotted name, or what else changed.
        was: Its value in the checkpoint.
        now: Its value from here on.
    """

    field: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return printable(f"{self.field}: {_shown(self.was)} -> {_shown(self.now)}")


@dataclass(frozen=True)
class Comparison:
    """A start, compared with the run that it continues.

    Attributes:
        config: The configuration to go on with: of this start, with the stored values that are kept.
        changes: What differs from the run so far.
        problems: What differs and must not.
    """

    config: Config
    changes: list[Change] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def compare(config: Config, named: Named, stored: Config) -> Comparison:
    """Compares the configuration of this start with a stored one, field by field.

    Args:
        config: Of this start.
        named: Which of its fields a person named, and where.
        stored: Of the run to be continued.
    """
    now, was = flat(config.to_dict()), flat(stored.to_dict())
    keep_stored_data(now, was, named)
    changes, problems = [], []
    for name in was:
        if was[name] == now[name] or name == "parallel.named_layout_fields":  # a note, written by the planner
            continue
        if is_in(FREE, name) or (name in named.on_command_line and is_in(NAMED, name)):
            # The mix of data sets is compared by what they hold, by compare_data.
            if name != "data.blend":
                changes.append(Change(name, was[name], now[name]))
        elif name == "data.blend" and was[name] is not None and now[name] is not None:
            # From the config file: maybe only the places are others.
            continue
        elif not is_in(NAMED, name):
            remedy = f"the run to be resumed has {_shown(was[name])}; leave it so, or start a new run"
            problems.append(Problem(name, now[name], remedy))
        elif name in named.in_file or (name == "data.blend" and now["data.path"] is not None):
            remedy = f"the run to be resumed has {_shown(was[name])}; if the change is meant, name it on the command "
            problems.append(Problem(name, now[name], remedy + f"line: {name}={_shown(now[name])}"))
        else:
            now[name] = was[name]
    return Comparison(Config.from_dict(nested(now)), changes, problems)


def keep_stored_data(now: dict[str, Any], was: Mapping[str, Any], named: Named) -> None:
    """Lets a start that does not say where its data are read those of the run.

    Args:
        now: Flat fields of this start; changed in place.
        was: Flat fields of the run.
        named: What this start names.
    """
    told = named.on_command_line | named.in_file
    if not told & {"data.path", "data.blend"}:
        now["data.path"], now["data.blend"] = was["data.path"], was["data.blend"]
    for name in ("data.validation_path", "data.tokenizer"):
        if name not in told:
            now[name] = was[name]


def compare_model(config: Config, stored: ModelConfig) -> list[Problem]:
    """Compares the architecture of a new run with that of the weights it is to begin with.

    Args:
        config: Of this start.
        stored: The model that the weights belong to.

    Returns:
        A problem for every field that differs.
    """
    now, was = _architecture(config.model), _architecture(stored)
    return [
        Problem(f"model.{name}", now[name], f"the weights to begin with have {_shown(was[name])}; set it to that")
        for name in was
        if now[name] != was[name]
    ]


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """The fields that decide on parameters and what is computed with them, derived values written out."""
    values = model.model_dump(mode="json", exclude=set(_NOT_ARCHITECTURE))
    values["ffn_hidden_size"] = model.ffn_size
    is_factorised = model.attention == "mlra"
    values["attention_rank"] = model.rank if is_factorised else None
    values["factorised_projections"] = list(model.factorised_projections) if is_factorised else None
    return values


def is_in(names: tuple[str, ...], name: str) -> bool:
    """Returns whether a field is in one of the lists above."""
    return any(name == item or (item.endswith(".") and name.startswith(item)) for item in names)


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns every field by its dotted name; the DeepSpeed section and a blend count as one field each."""
    return dict(_flat(values, ""))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("deepspeed", "blend"):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `flat`."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        (result.setdefault(section, {}) if section else result)[key] = value
    return result


def read_stored(path: Path) -> Config:
    """Reads the configuration of a run directory.

    Args:
        path: Its config.yaml.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return Config.from_yaml(stored_yaml.read_text(path))
    except ConfigError as error:
        reason = error.in_one_line
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} ")
    remedy = f"the configuration of the run cannot be read: {reason}; put it back, "
    raise ConfigError([Problem("--resume", str(path), remedy + "every checkpoint of the run has a copy")])


def _shown(value: Any) -> str:
    """A value as it would stand on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
