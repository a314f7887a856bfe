"""What a resumed run may change: the configuration of a start compared with the run that it continues. No torch.

Every field of the configuration is in one of three classes.

FREE fields say where and how a run computes (layout, machine, paths of files); a start may change them. NAMED fields
change the run itself. Such a difference counts only if the field is named on the command line: one that comes from a
preset's default is ignored, and the run keeps its own value; one that comes from the configuration file is refused,
because an edited file may be a mistake. All other fields are the run's identity (architecture, seeds, sequence length,
what a document is) and never change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlra_scale.config import Config, ConfigError, ModelConfig, Named, Problem, stored_yaml
from mlra_scale.config.json_text import printable

FREE = (
    "preset",
    "model.vocab_padding_multiple",
    # Paths of the data; whether they are the same data is decided by their fingerprints.
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
    "tensorboard.",
    "profile.",
)
WATCHERS = ("wandb.", "tensorboard.")
"""Free fields that a run keeps from start to start unless they are named: see `with_watchers_of`."""
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
    "export.",
)
"""Fields, and with a dot at the end whole sections."""

RESETS_GUARD_STATISTICS = (
    "model.embedding_dropout",
    "model.attention_dropout",
    "model.residual_dropout",
    "model.z_loss",
    "data.blend",
    "train.global_batch_size",
    "train.precision",
    # The guard has not seen the steps during which it was off: its statistics may be old.
    "guard.enabled",
)
"""Fields whose change shifts the training loss or its gradient norm at once, without being a sign of instability."""

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
    """A field (its dotted name), or something else of the run, that has another value from this start on."""

    field: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return printable(f"{self.field}: {_shown(self.was)} -> {_shown(self.now)}")


@dataclass(frozen=True)
class History:
    """What a run changed in the course of its resumes, kept in every checkpoint for model cards.

    Attributes:
        changes: Each with the step after which the new value holds; the oldest first.
        begun_from: What a checkpoint of weights states about its origin, where the run began with one.
        known_from: Changes up to this step are not recorded; 0: all are.
    """

    changes: tuple[tuple[int, Change], ...] = ()
    begun_from: Mapping[str, Any] | None = None
    known_from: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any], step: int) -> History:
        """Reads the history from a checkpoint's state; checkpoints of early versions have none.

        Raises:
            ValueError: It is garbled.
        """
        stored = state.get("history")
        if stored is None:
            return cls(known_from=step)
        try:
            changes = [
                (int(item["step"]), Change(item["field"], item["was"], item["now"])) for item in stored["changes"]
            ]
            return cls(tuple(changes), stored["begun_from"], int(stored["known_from"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a history of changes: {error}") from error

    def followed_by(self, changes: Sequence[Change], step: int) -> History:
        """Returns the history with the changes of a start that continues from a step; before the first, none counts."""
        if step == 0:
            return self
        return replace(self, changes=(*self.changes, *((step, change) for change in changes)))

    def after_rollback_to(self, step: int) -> History:
        """Returns the history of a run that repeats the steps after an earlier one with its present settings."""
        return replace(self, changes=tuple((min(at, step), change) for at, change in self.changes))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        changes = [{"step": at, "field": item.field, "was": item.was, "now": item.now} for at, item in self.changes]
        return {"changes": changes, "begun_from": self.begun_from, "known_from": self.known_from}


@dataclass(frozen=True)
class ConfigComparison:
    """The configuration to continue with, and differences from the run so far: accepted ones and refused ones."""

    config: Config
    changes: list[Change] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def compare(config: Config, named: Named, stored: Config) -> ConfigComparison:
    """Compares the configuration of this start, and what of it was named, with that of the run to be continued."""
    now, was = flat(config.to_dict()), flat(stored.to_dict())
    _keep_stored_data(now, was, named)
    changes, problems = [], []
    for name in was:
        if was[name] == now[name] or name == "parallel.named_layout_fields":  # written by the planner
            continue
        if is_in(FREE, name) or (name in named.on_command_line and is_in(NAMED, name)):
            if name != "data.blend":  # compare_data compares the mix by what its data sets hold
                changes.append(Change(name, was[name], now[name]))
        elif name == "data.blend" and was[name] is not None and now[name] is not None:
            continue  # from the configuration file: perhaps only the paths differ
        elif not is_in(NAMED, name):
            remedy = f"the run to be resumed has {_shown(was[name])}; leave it so, or start a new run"
            problems.append(Problem(name, now[name], remedy))
        elif name in named.in_file or (name == "data.blend" and now["data.path"] is not None):
            remedy = f"the run to be resumed has {_shown(was[name])}; if the change is meant, name it on the command "
            problems.append(Problem(name, now[name], remedy + f"line: {name}={_shown(now[name])}"))
        else:
            now[name] = was[name]
    return ConfigComparison(Config.from_dict(nested(now)), changes, problems)


def with_watchers_of(own: Config, config: Config, named: Named) -> Config:
    """Returns a configuration with the watchers of the newest start of its run, but for those that are named.

    A run that was kept off wandb stays so when its first command is repeated, in which only the preset speaks of it.
    """
    names, now = named.on_command_line | named.in_file, flat(config.to_dict())
    was = flat(own.to_dict())
    now |= {name: value for name, value in was.items() if is_in(WATCHERS, name) and name not in names}
    return Config.from_dict(nested(now))


def _keep_stored_data(now: dict[str, Any], was: Mapping[str, Any], named: Named) -> None:
    """Keeps the data of the run (`was`) where a start (`now`, changed in place) does not name any."""
    names = named.on_command_line | named.in_file
    if not names & {"data.path", "data.blend"}:
        now["data.path"], now["data.blend"] = was["data.path"], was["data.blend"]
    for name in {"data.validation_path", "data.tokenizer"} - names:
        now[name] = was[name]


def compare_model(config: Config, stored: ModelConfig) -> list[Problem]:
    """Returns a problem for every field of the architecture in which a new run differs from its first weights."""
    now, was = _architecture(config.model), _architecture(stored)
    return [
        Problem(f"model.{name}", now[name], f"the weights to begin with have {_shown(was[name])}; set it to that")
        for name in was
        if now[name] != was[name]
    ]


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """Returns the fields that decide on parameters and what is computed with them, derived values written out."""
    values = model.model_dump(mode="json", exclude=set(_NOT_ARCHITECTURE))
    values["ffn_hidden_size"] = model.ffn_size
    is_factorised = model.attention == "mlra"
    values["attention_rank"] = model.rank if is_factorised else None
    values["base_depth"] = model.base_depth if model.depth_rule == "completep" else None
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
    """Reverses `flat`."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        (result.setdefault(section, {}) if section else result)[key] = value
    return result


def read_stored(path: Path) -> Config:
    """Reads config.yaml of a run directory.

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
    """Returns a value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
