"""manifest.json: what a checkpoint consists of, and how to tell that it is whole.

The manifest is written last. It names every other file with size and checksum, has the shape of every parameter, and
carries a checksum of itself. docs/checkpoints.md has the format.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

import mlra_scale
from mlra_scale.checkpoint.files import CheckpointError, FileEntry, size_fault, system_errors
from mlra_scale.config.json_text import parse_json, read_bytes

MANIFEST = "manifest.json"
FORMAT = "mlra-scale-checkpoint"
VERSION = 2
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
    """A parameter as it was when it was saved.

    Attributes:
        shape: Global shape, padded vocabulary rows included.
        shard_dim: The dimension that was split over tensor-parallel ranks, or None.
    """

    shape: Annotated[tuple[_Size, ...], Field(min_length=1, max_length=2)]
    shard_dim: Annotated[int, Field(ge=0)] | None


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        save_id: Drawn anew for every save; each file with weights carries it too.
        kind: "training" (can be resumed) or "weights" (the start of a new run).
        step: Optimizer steps done.
        created: When it was completed, ISO 8601 in UTC; later saves of a run have later ones.
        layout: world_size, tensor, pipeline, data, engine, zero_stage, precision of the run that wrote it.
        has_moments: Whether moments of the optimizer are stored beside the weights.
        versions: Of the libraries that wrote it.
        files: Every other file by its path in the folder.
        parameters: Every parameter by canonical name.
        version: Of the format of the file, and of state.json and fragments.json.
    """

    save_id: str
    kind: Literal["training", "weights"]
    step: _Count
    created: Annotated[str, AfterValidator(_time)]
    layout: Annotated[Mapping[str, Any], AfterValidator(_has_degrees)]
    has_moments: bool
    versions: Mapping[str, str]
    files: Mapping[Annotated[str, AfterValidator(_inside)], FileEntry]
    parameters: Mapping[str, StoredParameter]
    version: int = VERSION

    @property
    def tensor(self) -> int:
        """Tensor-parallel degree of the fragments."""
        return self.layout["tensor"]

    @property
    def total_bytes(self) -> int:
        """Size of all files that the manifest names."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def notice(self) -> str | None:
        """Says that the checkpoint has an older version of the format; None: it has the current one."""
        if self.version == VERSION:
            return None
        return f"the checkpoint has version {self.version} of the format and is read as version {VERSION}"

    def to_json(self) -> bytes:
        """Returns the file's content; a line for every short section, file and parameter."""
        content = {"format": FORMAT, "version": self.version} | asdict(self)
        content["checksum"] = _checksum(content)
        lines = (f"{json.dumps(key)}: {_text(value, key in _LONG)}" for key, value in content.items())
        return "{{\n{}\n}}\n".format(",\n".join(lines)).encode("ascii")


_MANIFEST = TypeAdapter(Manifest)


def now() -> str:
    """Returns the time as a manifest has it: UTC, to the microsecond; the order of times is that of the texts."""
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

    Args:
        folder: A checkpoint.

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
    except ValueError as error:
        raise CheckpointError(f"{error}; use another checkpoint") from None
    try:
        content = parse_json(raw, "it")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; use another checkpoint") from None
    if not isinstance(content, dict) or not {"format", "version", "checksum"} <= content.keys():
        raise CheckpointError(f"{path} is damaged: it lacks format, version or checksum; use another checkpoint")
    checksum, stored_format, version = content.pop("checksum"), content["format"], content["version"]
    if stored_format != FORMAT:
        raise CheckpointError(f"{path} has format {stored_format!r} and not {FORMAT!r}; it is not this project's")
    if checksum != _checksum(content):
        raise CheckpointError(f"{path} is damaged: its checksum is another; use another checkpoint")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{path} has version {version!r} of the format, this program reads 1 to {VERSION}; "
            "use the program that wrote it"
        )
    # Version 2 differs from 1 in config.yaml alone, which has a version of its own (config/stored_yaml.py).
    try:
        manifest = _MANIFEST.validate_json(raw, strict=True)
        _check_splits(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{path} is not sound ({where}: {reason}); use another checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not sound ({error}); use another checkpoint") from None
    return manifest


def _check_splits(manifest: Manifest) -> None:
    # Every tensor-parallel rank has a file; without this bound the shards of a damaged degree are counted for hours.
    if manifest.tensor > len(manifest.files):
        raise ValueError(f"{manifest.tensor} tensor-parallel ranks have {len(manifest.files)} files")
    for name, parameter in manifest.parameters.items():
        shape, dim = parameter.shape, parameter.shard_dim
        if dim is not None and (dim >= len(shape) or shape[dim] % manifest.tensor):
            raise ValueError(f"{name} of shape {shape} is split over {manifest.tensor} tensor ranks along {dim}")


def read_complete_manifest(folder: Path) -> Manifest:
    """Reads the manifest and checks that every file is there and as large as it should be.

    Args:
        folder: A checkpoint.

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
