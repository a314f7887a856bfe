"""A study (a YAML file) and its grid of runs.

A cell is one variant, one value of every axis and one seed. Cells that differ only in the variant are a pair. The seed
is train.seed: it determines the order of the data (data.seed is train.seed unless it is set) and, by their names, the
initial weights. So a pair reads the same samples, and starts with equal weights where the shapes are equal.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from mlra_scale.config import Config, ConfigError, Problem, load_config, yaml_text
from mlra_scale.config.loading import read_text
from mlra_scale.config.problems import problems_of
from mlra_scale.config.section import Section, Text
from mlra_scale.model.validation import validate

SEED = "train.seed"
_SHORT = {"model.num_layers": "L", "model.hidden_size": "D", "optim.lr": "lr"}
"""Axes with a short name in the name of a cell; other axes have the last part of their dotted name there."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_NAME_REMEDY = "is part of file names: use letters, digits and any of _ . + -"
_LONGEST_NAME = 150


# A key without a value, such as a variant that changes nothing, is an empty mapping.
_NONE_IS_EMPTY = BeforeValidator(lambda value: {} if value is None else value)
Fields = Annotated[dict[Text, Any], _NONE_IS_EMPTY]
"""Fields of the configuration by their dotted names."""


class Study(Section):
    """A study: what varies between its runs, and what they share."""

    name: Text = Field(description="Name of the study; its results go to runs/NAME unless --output says otherwise.")
    description: str = Field("", description="The question of the study.")
    preset: Text = Field(description="The preset that every run starts from.")
    data: Text | None = Field(None, description="Data of every run (data.path); null: set by other fields.")
    base: Fields = Field(default_factory=dict, description="Fields that differ from the preset, in every run.")
    variants: Annotated[dict[Text, Fields], _NONE_IS_EMPTY] = Field(description="What is compared: fields by variant.")
    axes: Annotated[dict[Text, list[Any]], _NONE_IS_EMPTY] = Field(
        default_factory=dict, description="Fields with several values; every variant is run with every combination."
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        strict=False, description="Values of train.seed; every variant is run with each, and runs are paired by it."
    )
    ranks: int = Field(1, ge=1, description="Processes of each run.")
    checkpoints: Literal["discard", "keep"] = Field(
        "discard", description="discard: checkpoints of a run are removed when its result is written; keep: they stay."
    )

    @field_validator("name", mode="after")
    @classmethod
    def _is_file_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError(_NAME_REMEDY)
        return value

    def to_yaml(self) -> str:
        """Returns the study as a YAML document that `load_study` reads back equal."""
        return yaml_text.dump(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        index: Its index in the grid, from 0; also its index in a Slurm array.
        name: Made of variant, axes and seed; also the name of its run directory.
        variant, seed: Its variant, and train.seed.
        axes: The value of every axis.
        overrides: Dotted overrides of its command line.
        config: Its resolved configuration.
    """

    index: int
    name: str
    variant: str
    axes: Mapping[str, Any]
    seed: int
    overrides: tuple[str, ...]
    config: Config = field(repr=False)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        train = self.config.train
        return train.steps * train.global_batch_size * train.sequence_length

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole run (ModelConfig.flops_per_token)."""
        return self.tokens * self.config.model.flops_per_token(self.config.train.sequence_length)


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Reads a study; overrides "section.field=value" for all cells are added to `base`.

    Raises:
        ConfigError: With everything that is wrong in the file itself and in the form of the overrides. Fields of the
            configuration are checked by `cells_of`.
    """
    problems: list[Problem] = []
    values = _read(path, problems)
    added = _read_overrides(overrides, problems)
    if values is None:
        raise ConfigError(problems)
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise ConfigError(problems + problems_of(error, Study)) from None
    problems += [*_gaps(study), *_clashes(study, added)]
    if problems:
        raise ConfigError(problems)
    base = {**study.base, **added}
    data = base.pop("data.path", study.data)
    return study.model_copy(update={"data": data, "base": base})


def _read(path: Path, problems: list[Problem]) -> dict[str, Any] | None:
    text = read_text(path, "study", problems)
    try:
        values = None if text is None else yaml_text.load(text)
    except ValueError as error:
        problems.append(Problem("study", str(path), str(error)))
        return None
    if text is not None and not isinstance(values, dict):
        problems.append(Problem("study", str(path), "must hold name:, preset:, variants:, seeds: ... at its top"))
    return values if isinstance(values, dict) else None


def _read_overrides(overrides: Sequence[str], problems: list[Problem]) -> dict[str, Any]:
    fields = {}
    for text in overrides:
        name, separator, value = text.partition("=")
        try:
            if separator and name:
                fields[name] = yaml_text.load(value)
            else:
                problems.append(Problem("override", text, "must look like section.field=value"))
        except ValueError as error:
            problems.append(Problem(name, value, f"is not YAML: {error}"))
    return fields


def _gaps(study: Study) -> Iterator[Problem]:
    """Yields what is empty, duplicated, or cannot be part of a file name."""
    if not study.variants:
        yield Problem("variants", {}, "is empty; name at least one, with the fields that make it")
    if not study.seeds:
        yield Problem("seeds", [], "is empty; give at least one")
    elif len(set(study.seeds)) < len(study.seeds):
        yield Problem("seeds", list(study.seeds), "holds a seed twice")
    for axis, values in study.axes.items():
        if not values:
            yield Problem(f"axes.{axis}", [], "is empty; give its values, or remove the axis")
    for variant in study.variants:
        if not _NAME.fullmatch(variant):
            yield Problem("variants", variant, _NAME_REMEDY)


def _clashes(study: Study, overrides: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields fields that two sections set. Variants override `base`; no other section overrides another."""
    owners = {SEED: "seeds"} | ({} if study.data is None else {"data.path": "data"})
    yield from _set_twice("axes", study.axes, owners)
    owners |= dict.fromkeys(study.axes, "axes")
    yield from _set_twice("base", study.base, owners)
    for variant, fields in study.variants.items():
        yield from _set_twice(f"variants.{variant}", fields, owners)
    owners |= {name: f"variants.{variant}" for variant, fields in study.variants.items() for name in fields}
    if owners.get("data.path") == "data":
        del owners["data.path"]
    yield from _set_twice("override", overrides, owners)


def _set_twice(section: str, fields: Mapping[str, Any], owners: Mapping[str, str]) -> Iterator[Problem]:
    for name, value in fields.items():
        if name in owners:
            yield Problem(f"{section}: {name}", value, f"is set by {owners[name]} as well; remove one of them")


def cells_of(study: Study) -> list[Cell]:
    """Returns the grid, every cell with its whole configuration, loaded and validated.

    The seed changes slowest and the variant fastest: the cells that are finished at any time are mostly pairs.

    Raises:
        ConfigError: With everything that is wrong in any cell; a problem that several cells share is listed once.
    """
    points = [
        (seed, dict(zip(study.axes, values, strict=True)), variant)
        for seed in study.seeds
        for values in itertools.product(*study.axes.values())
        for variant in study.variants
    ]
    cells: list[Cell] = []
    names: set[str] = set()
    problems: dict[str, tuple[Problem, list[str]]] = {}  # by its text, each with the names of its cells
    for index, (seed, axes, variant) in enumerate(points):
        name, found = cell_name(variant, axes, seed), list[Problem]()
        if name in names:
            found.append(Problem("axes", axes, "gives two cells of one name; remove equal values"))
        elif len(name) > _LONGEST_NAME:
            found.append(Problem("axes", axes, f"makes a file name of {len(name)} characters; shorten its values"))
        names.add(name)
        overrides = _overrides_of(study, variant, axes, seed)
        try:
            config = load_config(study.preset, overrides=overrides)
            validate(config, study.ranks)
            if config.export.format is not None:
                remedy = (
                    "is not for studies, whose cells are over, and their checkpoints gone, whatever an export did; "
                )
                remedy += "leave it out, set checkpoints: keep and use `mlra-scale export` on the runs that you choose"
                found.append(Problem("export.format", config.export.format, remedy))
            cells.append(Cell(index, name, variant, axes, seed, overrides, config))
        except ConfigError as error:
            found += error.problems
        for problem in found:
            problems.setdefault(str(problem), (problem, []))[1].append(name)
    if problems:
        raise ConfigError([_with_cells(problem, having, len(points)) for problem, having in problems.values()])
    return cells


def _with_cells(problem: Problem, names: Sequence[str], num_cells: int) -> Problem:
    """Returns a problem whose remedy names a cell that has it."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    where = "in every cell" if len(names) == num_cells else f"in cell {names[0]}{more}"
    return Problem(problem.field, problem.value, f"{problem.remedy} ({where})")


def _overrides_of(study: Study, variant: str, axes: Mapping[str, Any], seed: int) -> tuple[str, ...]:
    data = {} if study.data is None else {"data.path": study.data}
    fields = {**data, **study.base, **study.variants[variant], **axes, SEED: seed}
    return tuple(f"{name}={_value_text(value)}" for name, value in fields.items())


def _value_text(value: Any) -> str:
    """Returns a value for the command line: JSON, which is YAML, or text as it is if YAML reads it back equal."""
    if isinstance(value, str):
        try:
            if yaml_text.load(value) == value:
                return value
        except ValueError:
            pass  # text that is not YAML
    return json.dumps(value)


def cell_name(variant: str, axes: Mapping[str, Any], seed: int) -> str:
    """Returns the name of a cell, such as mlra-L48-lr0.001-seed1; it depends on nothing else."""
    lasts = [axis.rpartition(".")[2] for axis in axes]
    parts = [variant]
    for axis, last in zip(axes, lasts, strict=True):
        short = _SHORT.get(axis, last if lasts.count(last) == 1 else axis)
        parts.append(short + _file_text(axes[axis]))
    return "-".join([*parts, f"seed{seed}"])


def _file_text(value: Any) -> str:
    """Returns a value as part of a file name."""
    if isinstance(value, list):
        return "_".join(map(_file_text, value))
    if isinstance(value, float):
        # 1.0 and 1 are the same value.
        value = int(value) if value.is_integer() and abs(value) < 1e9 else value
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text)
