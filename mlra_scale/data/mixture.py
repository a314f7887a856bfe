"""A mixture of data sets in one YAML file: what each is made of, and its weight in training.

    web:
      weight: 7
      sources:
        - source: crawl/**/*.jsonl.zst
          field: content
        - wiki/
    code:
      weight: 3
      sources: [code.parquet]

An entry of `sources` is a source as mlra-scale prepare --source has it, or a mapping with `source` and, as needed,
`field`, `split` and `config_name`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mlra_scale.config import yaml_text
from mlra_scale.data import DataError
from mlra_scale.data.sources import SourceName

MIXTURE_NAME = "mixture.yaml"
"""The configuration that trains on a prepared mixture, in its folder."""
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Component:
    """A data set of a preparation.

    Attributes:
        name: Of its folder inside the output; empty: the output itself, and the only one.
        sources: What it is made of.
        weight: Relative share of its samples in training.
    """

    name: str
    sources: Sequence[SourceName]
    weight: float = 1.0


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Source(_Entry):
    source: str
    field: str = "text"
    split: str = "train"
    config_name: str | None = None


class _Component(_Entry):
    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    sources: Annotated[list[str | _Source], Field(min_length=1)]


_FILE = TypeAdapter(Annotated[dict[str, _Component], Field(min_length=1)])


def read_mixture(path: Path) -> list[Component]:
    """Reads a file as described above.

    Raises:
        DataError: It cannot be read, or is no mixture; the message names the place.
    """
    try:
        content = _FILE.validate_python(yaml_text.load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise DataError(f"{path}: {'; '.join(_problems(error))} (docs/data.md, 'Mixtures')") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    for name in content:
        if not _FOLDER_NAME.fullmatch(name):
            raise DataError(f"{path}: {name!r} names a folder: use letters, digits, - and _")
    return [Component(name, [_named(each) for each in entry.sources], entry.weight) for name, entry in content.items()]


def _problems(error: ValidationError) -> list[str]:
    """Every problem with its place and value; of an entry that may be a text or a mapping, those of what it is."""
    found = []
    for entry in error.errors():
        place, given = entry["loc"], entry["input"]
        other = "str" if isinstance(given, dict) else "_Source" if isinstance(given, str) else None
        if place and place[-1] == other:
            continue
        where = ".".join(str(part) for part in place if part not in ("_Source", "str")) or "the file"
        value = "" if entry["type"] == "missing" else f" = {given!r:.60}"
        found.append(f"{where}{value}: {entry['msg'][0].lower()}{entry['msg'][1:]}")
    return found


def _named(entry: str | _Source) -> SourceName:
    if isinstance(entry, str):
        return SourceName(entry)
    return SourceName(entry.source, entry.field, entry.split, entry.config_name)


def mixture_text(output: Path, components: Sequence[Component], vocabulary_size: int) -> str:
    """Returns the configuration that trains on a prepared mixture."""
    blend = {str(output / component.name): component.weight for component in components}
    return yaml_text.dump({"model": {"vocab_size": vocabulary_size}, "data": {"path": None, "blend": blend}})


def data_sets_in(folder: Path) -> list[Path]:
    """Returns the prepared folders of a mixture, which may have been moved as a whole, or the folder itself.

    Raises:
        DataError: The mixture's configuration is damaged.
    """
    path = folder / MIXTURE_NAME
    if not path.is_file():
        return [folder]
    try:
        return [folder / Path(name).name for name in yaml_text.load(path.read_text(encoding="utf-8"))["data"]["blend"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged: {error}; prepare the mixture again") from error
