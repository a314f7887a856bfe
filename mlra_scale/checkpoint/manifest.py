"""manifest.json: what a checkpoint consists of, and how to tell that it is whole; written last."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

import mlra_scale
from mlra_scale.checkpoint.files import CheckpointError, FileEntry, size_fault, system_errors
from mlra_scale.config.json_text import parse_json, read_bytes

if TYPE_CHECKING:
    from mlra_scale.model.parameters import ParameterTable

MANIFEST = "manifest.json"
FORMAT = "mlra-scale-checkpoint"
VERSION = 3
"""Version 2 is version 1 with a version in config.yaml. Version 3 has `momentum_only`, and `adam_begun_at` in
state.json, without which an older program would continue AdamW with wrong bias corrections."""
_LAST_YEAR = 9000
_LONG = ("files", "parameters")


def _time(text: str) -> str:
    if datetime.fromisoformat(text).year > _LAST_YEAR:
        raise ValueError("it is no time of a save")
    return text


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise ValueError("the file name leads out of the folder, or to none of its files")
    return name


def _has_degrees(layout: Mapping[str, Any]) -> Mapping[str, Any]:
    for degree in ("world_size", "tensor", "pipeline", "data"):
        if type(value := layout.get(degree)) is not int or value < 1:
            raise ValueError(f"{degree} is {value!r}")
    engine, precision = layout.get("engine"), layout.get("precision")
    if not isinstance(engine, str | None) or not isinstance(precision, str):
        raise ValueError(f"engine is {engine!r} and precision {precision!r}")
    return layout


_Count = Annotated[int, Field(ge=0)]
_Size = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class StoredParameter:
    """The global shape of a parameter, padded vocabulary rows included, and the dim that tensor ranks split."""

    shape: Annotated[tuple[_Size, ...], Field(min_length=1, max_length=2)]
    shard_dim: Annotated[int, Field(ge=0)] | None


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; docs/checkpoints.md explains each key."""

    save_id: str
    kind: Literal["training", "weights"]
    step: _Count
    created: Annotated[str, AfterValidator(_time)]
    layout: Annotated[Mapping[str, Any], AfterValidator(_has_degrees)]
    has_moments: bool
    versions: Mapping[str, str]
    files: Mapping[Annotated[str, AfterValidator(_inside)], FileEntry]
    parameters: Mapping[str, StoredParameter]
    momentum_only: tuple[str, ...] = ()
    version: int = VERSION

    @property
    def tensor(self) -> int:
        """Tensor-parallel degree of the fragments."""
        return self.layout["tensor"]

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    @property
    def notice(self) -> str | None:
        """A remark on an older version of the format; None: it is the current one."""
        if self.version == VERSION:
            return None
        return f"the checkpoint has version {self.version} of the format and is read as version {VERSION}"

    def to_json(self) -> bytes:
        """Returns the file's content; a line for every short section, file and parameter."""
        content = {"format": FORMAT, "version": self.version} | asdict(self)
        content["checksum"] = _checksum(content)
        lines = (f"{json.dumps(key)}: {_text(value, key in _LONG)}" for key, value in content.items())
        return "{{\n{}\n}}\n".format(",\n".join(lines)).encode("ascii")


def _check_parameters(manifest: Manifest) -> Manifest:
    # Every tensor-parallel rank has a file; without this bound the shards of a damaged degree are counted for hours.
    if manifest.tensor > len(manifest.files):
        raise ValueError(f"{manifest.tensor} tensor-parallel ranks have {len(manifest.files)} files")
    for name, parameter in manifest.parameters.items():
        shape, dim = parameter.shape, parameter.shard_dim
        if dim is not None and (dim >= len(shape) or shape[dim] % manifest.tensor):
            raise ValueError(f"{name} of shape {shape} is split over {manifest.tensor} tensor ranks along {dim}")
    if unknown := sorted(set(manifest.momentum_only) - manifest.parameters.keys()):
        raise ValueError(f"momentum_only has {unknown[0]}, which is no parameter")
    return manifest


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Annotated[Manifest, AfterValidator(_check_parameters)])


def stored_parameters(table: ParameterTable) -> dict[str, StoredParameter]:
    """Returns the manifest's entries for the parameters of a model."""
    return {name: StoredParameter(info.shape, info.shard_dim) for name, info in table.items()}


def now() -> str:
    """Returns the time as manifests have it: ISO 8601 in UTC, to the microsecond, which sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def library_versions() -> dict[str, str]:
    """Returns the versions of what writes a checkpoint."""
    versions = {"mlra_scale": mlra_scale.__version__, "python": platform.python_version()}
    for library in ("torch", "deepspeed", "megatron-core", "safetensors"):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks the manifest of a checkpoint; looks at no other file.

    Raises:
        CheckpointError: There is none, it is damaged, of a newer format, or not sound.
    """
    path = folder / MANIFEST
    with system_errors("read", path):
        if not path.is_file():
            what = "there is no such folder" if not folder.is_dir() else f"it has no {MANIFEST}"
            raise CheckpointError(f"{folder} is no complete checkpoint: {what}; name another checkpoint")
    try:
        raw = read_bytes(path)
        content = parse_json(raw, f"{path} is damaged: it")
        if not isinstance(content, dict) or not {"format", "version", "checksum"} <= content.keys():
            raise ValueError(f"{path} is damaged: it lacks format, version or checksum")
        checksum, stored_format, version = content.pop("checksum"), content["format"], content["version"]
        if stored_format != FORMAT:
            raise CheckpointError(f"{path} has format {stored_format!r} and not {FORMAT!r}; it is not this project's")
        if checksum != _checksum(content):
            raise ValueError(f"{path} is damaged: its checksum is another")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise CheckpointError(
                f"{path} has version {version!r} of the format, this program reads 1 to {VERSION}; "
                "use the program that wrote it"
            )
        # Nothing has to be converted: what older versions lack has a default. config.yaml has a version of its own.
        return _MANIFEST.validate_json(raw, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        fault = f"{where}: {reason}" if where else reason
        raise CheckpointError(f"{path} is not sound ({fault}); use another checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{error}; use another checkpoint") from None


def read_complete_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint and checks that every file is there and has its size.

    Raises:
        CheckpointError: As read_manifest, or a file is missing or of another size.
    """
    manifest = read_manifest(folder)
    with system_errors("read", folder):
        faults = [fault for name, entry in manifest.files.items() if (fault := size_fault(folder / name, entry))]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(f"{faults[0]}{more}; use another checkpoint")
    return manifest


def _text(value: Any, is_long: bool) -> str:
    if not is_long:
        return json.dumps(value)
    return "{{\n  {}\n}}".format(
        ",\n  ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
    )


def _checksum(content: Mapping[str, Any]) -> str:
    """sha256 of everything else in the manifest, however it is laid out in the file."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
