"""What a resumed run may change: the comparison of this start with the one that is continued, before anything starts.

A checkpoint holds, beside the engine's files, config.yaml and origin.json: what has to be known of it without reading
weights. origin.json is written last; a folder without it is no checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlra_scale.config import Config, ConfigError, Problem, engine_kind, zero_stage
from mlra_scale.training.record import write_atomically

_ORIGIN = "origin.json"

_MAY_CHANGE = (
    "preset",
    # Data may move: whether they are the same data is for their fingerprints to say.
    "data.path",
    "data.validation_path",
    "data.tokenizer",
    "train.steps",
    "train.device",
    "train.log_every",
    "train.peak_tflops",
    "train.max_consecutive_overflows",
    # Not decay_factors and decay_embedding: they decide how parameters are grouped in the stored optimizer.
    "optim.lr",
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
    "optim.grad_clip",
    "optim.schedule",
    "optim.warmup_steps",
    "optim.decay_steps",
    "optim.min_lr_ratio",
    "parallel.timeout_minutes",
    "parallel.world_size",
)
_SECTIONS_THAT_MAY_CHANGE = ("tev.", "evaluation.", "checkpoint.", "wandb.", "profile.")
"""Fields and sections that a resumed run may set differently: none of them changes what is stored or which samples
come next. Everything else must be as it was."""


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from.

    Attributes:
        step: Steps done.
        world_size: Number of ranks that wrote it.
        data_parallel: Data-parallel degree; the other degrees are in the configuration.
        data_fingerprints: Of every data set by the field that named it (data.fingerprints).
    """

    step: int
    world_size: int
    data_parallel: int
    data_fingerprints: dict[str, str]

    def write(self, checkpoint: Path) -> None:
        """Writes it into the folder of a checkpoint."""
        write_atomically(checkpoint / _ORIGIN, json.dumps(asdict(self), indent=1) + "\n")


def is_checkpoint(path: Path) -> bool:
    """Returns whether a folder is a checkpoint, wherever it lies and whatever its name is."""
    return (path / "config.yaml").is_file() and (path / _ORIGIN).is_file()


def read_origin(checkpoint: Path) -> Origin:
    """Reads origin.json.

    Raises:
        ConfigError: It is damaged.
    """
    try:
        origin = Origin(**json.loads((checkpoint / _ORIGIN).read_text(encoding="utf-8")))
        # A damaged file may still be JSON.
        assert min(origin.step, origin.world_size, origin.data_parallel) >= 1 and dict(origin.data_fingerprints)
    except (OSError, ValueError, TypeError, AssertionError) as error:
        remedy = f"its {_ORIGIN} cannot be read ({type(error).__name__}: {error}); resume from another checkpoint"
        raise ConfigError([Problem("--resume", str(checkpoint), remedy)]) from error
    return origin


def changed_fields(config: Config, stored_file: Path) -> list[Problem]:
    """Compares the configuration with a stored one, field by field.

    Args:
        config: Of this start.
        stored_file: A config.yaml.

    Returns:
        A problem for every field that differs and must not.
    """
    try:
        stored = Config.from_yaml(stored_file.read_text(encoding="utf-8"))
    except (ConfigError, OSError) as error:
        return [Problem("--resume", str(stored_file.parent), f"its config.yaml cannot be read: {error}")]
    was, now = dict(_flat(stored.to_dict())), dict(_flat(config.to_dict()))
    problems = []
    for field in sorted(was.keys() | now.keys()):
        if was.get(field) == now.get(field) or field in _MAY_CHANGE or field.startswith(_SECTIONS_THAT_MAY_CHANGE):
            continue
        if field == "data.blend":
            remedy = f"the run to be resumed has the weights {was.get(field)}, in this order, which decides on the "
            remedy += "order of samples; leave them so (the paths may be others), or start a new run"
        else:
            remedy = f"the run to be resumed has {was.get(field)!r}; leave it so, or start a new run"
        problems.append(Problem(field, now.get(field), remedy))
    return problems


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and the value of every field; the DeepSpeed section counts as one field.

    Of a blend the weights in their order: its paths are compared by what they hold.
    """
    for key, value in values.items():
        if key == "blend" and value is not None:
            yield prefix + key, list(value.values())
        elif isinstance(value, dict) and key != "deepspeed":
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def changed_layout(config: Config, origin: Origin, world_size: int) -> list[Problem]:
    """Refuses another number of data-parallel ranks where the optimizer is sharded over them.

    DeepSpeed stores what each rank holds, and from ZeRO stage 1 on that is a share of the optimizer; its bf16 optimizer
    of the pipeline engine is divided so at stage 0 too.

    Args:
        config: Of this start; tensor and pipeline degree are known to be those of the checkpoint.
        origin: Of the checkpoint.
        world_size: Number of ranks of this start.
    """
    data_parallel, stage = world_size // (config.parallel.tensor * config.parallel.pipeline), zero_stage(config)
    is_divided = stage > 0 or (config.train.precision == "bf16" and engine_kind(config) == "pipeline")
    if data_parallel == origin.data_parallel or not is_divided:
        return []
    owner = f"ZeRO stage {stage}" if stage > 0 else "the bf16 pipeline engine"
    remedy = (
        f"the run to be resumed has {origin.world_size} ranks, {origin.data_parallel} of them data-parallel, over "
        f"which {owner} divides the optimizer, and not {data_parallel}; start {origin.world_size} ranks"
    )
    return [Problem("number of ranks", world_size, remedy)]


def changed_data(fingerprints: dict[str, str], origin: Origin) -> list[Problem]:
    """Refuses other data than those of the run, wherever they lie.

    Args:
        fingerprints: Of the data of this start.
        origin: Of the checkpoint.
    """
    problems = []
    for field in sorted(fingerprints.keys() | origin.data_fingerprints.keys()):
        was, now = origin.data_fingerprints.get(field), fingerprints.get(field)
        if was == now:
            continue
        if was is None:
            remedy = "the run to be resumed has no data of this kind; leave it out, or start a new run"
        elif now is None:
            remedy = f"the run to be resumed has data here, of fingerprint {was[:16]}; name them, or start a new run"
        else:
            remedy = f"not the data of the run to be resumed, whose fingerprint is {was[:16]}; they may have moved, "
            remedy += "but must be the same, or start a new run"
        problems.append(Problem(field, None if now is None else f"fingerprint {now[:16]}", remedy))
    return problems
