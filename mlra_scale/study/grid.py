"""A study as it is written down (a YAML file), and the grid of runs that it means.

Every cell is one variant, one value of every axis and one seed. Cells that differ in the variant only are a pair: the
seed is train.seed, which decides on the order of the data (data.seed is train.seed unless it is set) and on the initial
weights by their names, so that a pair reads the same samples and begins with the same weights wherever shapes agree.
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

from mlra_scale.config import Config, ConfigError, Problem, load_config, validate, yaml_text
from mlra_scale.config.loading import read_text
from mlra_scale.config.problems import problems_of
from mlra_scale.config.section import Section, Text

SEED = "train.seed"
_SHORT = {"model.num_layers": "L", "model.hidden_size": "D", "optim.lr": "lr"}
"""How the best-known axes stand in the name of a cell; others stand there with the last part of their name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_LONGEST_NAME = 150


def _mapping_of_nothing(value: Any) -> Any:
    """Reads a key with nothing behind it, such as a variant that changes nothing, as an empty mapping."""
    return {} if value is None else value


Fields = Annotated[dict[Text, Any], BeforeValidator(_mapping_of_nothing)]
"""Fields of the configuration by their dotted names."""


class Study(Section):
    """A study: what is varied, and what all of its runs share."""

    name: Text = Field(description="Name of the study; its results go to runs/NAME unless --output says otherwise.")
    description: str = Field("", description="What it is to find out.")
    preset: Text = Field(description="The preset that every run starts from.")
    data: Text | None = Field(None, description="Data of every run (data.path); null: other fields say.")
    base: Fields = Field(default_factory=dict, description="Fields that differ from the preset, in every run.")
    variants: Annotated[dict[Text, Fields], BeforeValidator(_mapping_of_nothing)] = Field(
        description="What is compared: by the variant's name, the fields that make it."
    )
    axes: Annotated[dict[Text, list[Any]], BeforeValidator(_mapping_of_nothing)] = Field(
        default_factory=dict, description="Fields that every variant is run over, with their values."
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        strict=False, description="Values of train.seed; every variant is run with each, and runs are paired by it."
    )
    ranks: int = Field(1, ge=1, description="Processes of each run.")
    checkpoints: Literal["discard", "keep"] = Field(
        "discard",
        description="discard: the checkpoints of a run go when its result is written; keep: they stay, as many as the "
        "run's own checkpoint section says.",
    )

    @field_validator("name", mode="after")
    @classmethod
    def _is_file_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("is part of file names: use letters, digits and any of _ . + -")
        return value

    def to_yaml(self) -> str:
        """Returns the study as a YAML document that `load_study` reads back equal."""
        return yaml_text.dump(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        index: Its place in the grid, from 0: what a Slurm array counts.
        name: Its name, made of the variant, the axes and the seed; also that of its run directory.
        variant: The variant.
        axes: The value of every axis.
        seed: train.seed.
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
    """Reads a study.

    Args:
        path: Its YAML file.
        overrides: "section.field=value" each, for all cells: they join `base`.

    Returns:
        The study; `cells_of` says what its grid is, and whether that can be run.

    Raises:
        ConfigError: With everything that is wrong with the file itself and the form of the overrides.
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
    if text is None:
        return None
    try:
        values = yaml_text.load(text)
    except ValueError as error:
        problems.append(Problem("study", str(path), str(error)))
        return None
    if not isinstance(values, dict):
        problems.append(Problem("study", str(path), "must hold name:, preset:, variants:, seeds: ... at its top"))
        return None
    return values


def _read_overrides(overrides: Sequence[str], problems: list[Problem]) -> dict[str, Any]:
    """Returns the fields of "a.b=value" texts; whether there are such fields is for the configuration to say."""
    fields = {}
    for text in overrides:
        name, separator, value = text.partition("=")
        if not separator or not name:
            problems.append(Problem("override", text, "must look like section.field=value"))
            continue
        try:
            fields[name] = yaml_text.load(value)
        except ValueError as error:
            problems.append(Problem(name, value, f"is not YAML: {error}"))
    return fields


def _gaps(study: Study) -> Iterator[Problem]:
    """What is empty, twice there, or cannot be part of a file name."""
    if not study.variants:
        yield Problem("variants", {}, "is empty; name at least one, with the fields that make it")
    if not study.seeds:
        yield Problem("seeds", [], "is empty; give at least one")
    elif len(set(study.seeds)) < len(study.seeds):
        yield Problem("seeds", list(study.seeds), "holds a seed twice")
    for axis, values in study.axes.items():
        if not values:
            yield Problem(f"axes.{axis}", [], "is empty; give its values, or take the axis out")
    for variant in study.variants:
        if not _NAME.fullmatch(variant):
            yield Problem("variants", variant, "is part of file names: use letters, digits and any of _ . + -")


def _clashes(study: Study, overrides: Mapping[str, Any]) -> Iterator[Problem]:
    """Fields that two places set. Variants win over `base`; of any other two nobody could say which should."""
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


def _set_twice(place: str, fields: Mapping[str, Any], owners: Mapping[str, str]) -> Iterator[Problem]:
    for name, value in fields.items():
        if name in owners:
            yield Problem(f"{place}: {name}", value, f"is set by {owners[name]} as well; take one of them out")


def cells_of(study: Study) -> list[Cell]:
    """Returns the grid, every cell with its whole configuration, loaded and validated.

    The seed changes slowest and the variant fastest: what is done when time runs out can be compared.

    Raises:
        ConfigError: With everything that is wrong in any cell; what several cells share is told once.
    """
    points = [
        (seed, dict(zip(study.axes, values, strict=True)), variant)
        for seed in study.seeds
        for values in itertools.product(*study.axes.values())
        for variant in study.variants
    ]
    cells, found = [], _Found()
    names: set[str] = set()
    for index, (seed, axes, variant) in enumerate(points):
        name = cell_name(variant, axes, seed)
        if name in names:
            found.add(name, Problem("axes", axes, "gives two cells of one name; take equal values out"))
        elif len(name) > _LONGEST_NAME:
            found.add(name, Problem("axes", axes, f"makes a file name of {len(name)} characters; shorten its values"))
        names.add(name)
        overrides = _overrides_of(study, variant, axes, seed)
        try:
            config = load_config(study.preset, overrides=overrides)
            validate(config, study.ranks)
        except ConfigError as error:
            found.add(name, *error.problems)
            continue
        cells.append(Cell(index, name, variant, axes, seed, overrides, config))
    found.tell(len(points))
    return cells


class _Found:
    """Problems, with the cells that have them."""

    def __init__(self) -> None:
        self._cells: dict[str, tuple[Problem, list[str]]] = {}

    def add(self, cell: str, *problems: Problem) -> None:
        """Notes the problems of a cell."""
        for problem in problems:
            self._cells.setdefault(str(problem), (problem, []))[1].append(cell)

    def tell(self, num_cells: int) -> None:
        """Raises ConfigError with each problem once, naming a cell that has it, if there are any."""
        told = []
        for problem, cells in self._cells.values():
            more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
            where = "in every cell" if len(cells) == num_cells else f"in cell {cells[0]}{more}"
            told.append(Problem(problem.field, problem.value, f"{problem.remedy} ({where})"))
        if told:
            raise ConfigError(told)


def _overrides_of(study: Study, variant: str, axes: Mapping[str, Any], seed: int) -> tuple[str, ...]:
    data = {} if study.data is None else {"data.path": study.data}
    fields = {**data, **study.base, **study.variants[variant], **axes, SEED: seed}
    return tuple(f"{name}={_value_text(value)}" for name, value in fields.items())


def _value_text(value: Any) -> str:
    """A value as it stands on a command line: JSON, which is YAML, and text as it is where that reads back equal."""
    if isinstance(value, str):
        try:
            if yaml_text.load(value) == value:
                return value
        except ValueError:
            pass  # text that is no YAML as it stands
    return json.dumps(value)


def cell_name(variant: str, axes: Mapping[str, Any], seed: int) -> str:
    """Returns the name of a cell, such as mlra-L48-lr0.001-seed1: a function of the three and of nothing else.

    Args:
        variant: The variant.
        axes: The value of every axis, in the study's order.
        seed: train.seed.
    """
    lasts = [axis.rpartition(".")[2] for axis in axes]
    parts = [variant]
    for axis, last in zip(axes, lasts, strict=True):
        short = _SHORT.get(axis, last if lasts.count(last) == 1 else axis)
        parts.append(short + _file_text(axes[axis]))
    return "-".join([*parts, f"seed{seed}"])


def _file_text(value: Any) -> str:
    """A value as part of a file name."""
    if isinstance(value, list):
        return "_".join(map(_file_text, value))
    if isinstance(value, float):
        # 1.0 and 1 are one value of a field.
        value = int(value) if value.is_integer() and abs(value) < 1e9 else value
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text)
