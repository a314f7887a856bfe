"""manifest.json: what a checkpoint consists of, and how to tell that it is whole.

The manifest is written last. It names every other file with size and checksum, has the shape of every parameter, and
carries a checksum of itself. docs/checkpoints.md has the format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.files import FileEntry, faults_told, size_fault
from mlra_scale.config.json_text import parse_json, read_bytes

MANIFEST = "manifest.json"
FORMAT = "mlra-scale-checkpoint"
VERSION = 2
_LAST_YEAR = 9000
_LONG = ("files", "parameters")
Kind = Literal["training", "weights"]


@dataclass(frozen=True)
class StoredParameter:
    """A parameter as it was when it was saved.

    Attributes:
        shape: Global shape, padded vocabulary rows included.
        shard_dim: The dimension that was split over tensor-parallel ranks, or None.
    """

    shape: tuple[int, ...]
    shard_dim: int | None


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        save_id: Drawn anew for every save; each file with weights carries it too.
        kind: "training" (can be resumed) or "weights" (the start of a new run).
        step: Optimizer steps done.
        created: When it was completed, ISO 8601 in UTC; later saves of a run have later ones.
        layout: world_size, tensor, pipeline, data, engine, zero_stage, precision of the run that wrote it.
        has_moments: Whether Adam's moments are stored beside the weights.
        versions: Of the libraries that wrote it.
        files: Every other file by its path in the folder.
        parameters: Every parameter by canonical name.
        version: Of the format that the file has: of state.json and fragments.json too.
    """

    save_id: str
    kind: Kind
    step: int
    created: str
    layout: Mapping[str, Any]
    has_moments: bool
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]
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
        """Says that the checkpoint is of an older version; None: it is of the current one."""
        if self.version == VERSION:
            return None
        return f"the checkpoint has version {self.version} of the format and is read as version {VERSION}"

    def to_json(self) -> bytes:
        """Returns the file's content; a line for every short section, file and parameter."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": self.version,
            "save_id": self.save_id,
            "kind": self.kind,
            "step": self.step,
            "created": self.created,
            "layout": dict(self.layout),
            "has_moments": self.has_moments,
            "versions": dict(self.versions),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "parameters": {name: asdict(parameter) for name, parameter in self.parameters.items()},
        }
        content["checksum"] = _checksum(content)
        lines = (f"{json.dumps(key)}: {_text(value, key in _LONG)}" for key, value in content.items())
        return "{{\n{}\n}}\n".format(",\n".join(lines)).encode("ascii")


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks the manifest of a checkpoint; looks at no other file.

    Args:
        folder: A checkpoint.

    Raises:
        CheckpointError: There is none, it is damaged, of a newer format, or not sound.
    """
    path = folder / MANIFEST
    with faults_told("read", path):
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
    if not _is_count(version) or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{path} has version {version!r} of the format, this program reads 1 to {VERSION}; "
            "use the program that wrote it"
        )
    try:
        return _parsed(_converted(content, version))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not sound ({_reason(error)}); use another one") from error


def read_complete_manifest(folder: Path) -> Manifest:
    """Reads the manifest and checks that every file is there and as large as it should be.

    Args:
        folder: A checkpoint.

    Raises:
        CheckpointError: As read_manifest, or a file is missing or of another size.
    """
    manifest = read_manifest(folder)
    with faults_told("read", folder):
        faults = [fault for name, entry in manifest.files.items() if (fault := size_fault(folder / name, entry))]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(f"{faults[0]}{more}; use another checkpoint")
    return manifest


def _converted(content: Mapping[str, Any], version: int) -> Mapping[str, Any]:
    """Returns the content of an older version as VERSION has it; a change of the format adds its step here.

    Version 2 differs from 1 in config.yaml alone, which has a version of its own (config/stored_yaml.py).
    """
    assert 1 <= version <= VERSION
    return content


def _parsed(content: Mapping[str, Any]) -> Manifest:
    for field, kind in (("save_id", str), ("created", str), ("has_moments", bool), ("layout", dict)):
        if not isinstance(content[field], kind):
            raise ValueError(f"{field} is {content[field]!r}")
    files = {name: _entry(name, entry) for name, entry in content["files"].items()}
    layout = content["layout"]
    _check_layout(layout, len(files))
    if content["kind"] not in get_args(Kind):
        raise ValueError(f"kind {content['kind']!r} is not known")
    if not _is_count(content["step"]):
        raise ValueError(f"step {content['step']!r} is no number of steps")
    if datetime.fromisoformat(content["created"]).year > _LAST_YEAR:
        raise ValueError(f"created {content['created']!r} is no time of a save")
    versions = content["versions"]
    if not all(isinstance(version, str) for version in versions.values()):
        raise ValueError(f"versions is {versions!r}")
    return Manifest(
        version=content["version"],
        save_id=content["save_id"],
        kind=content["kind"],
        step=content["step"],
        created=content["created"],
        layout=layout,
        has_moments=content["has_moments"],
        versions=versions,
        files=files,
        parameters={
            name: _parameter(name, tuple(entry["shape"]), entry["shard_dim"], layout["tensor"])
            for name, entry in content["parameters"].items()
        },
    )


def _check_layout(layout: Mapping[str, Any], num_files: int) -> None:
    for degree in ("world_size", "tensor", "pipeline", "data"):
        if not _is_count(layout[degree]) or layout[degree] < 1:
            raise ValueError(f"layout has {degree} {layout[degree]!r}")
    # Every tensor-parallel rank has a file; without this bound the shards of a damaged degree are counted for hours.
    if layout["tensor"] > num_files:
        raise ValueError(f"layout has {layout['tensor']} tensor-parallel ranks, and there are {num_files} files")
    engine, precision = layout.get("engine"), layout.get("precision")
    if not isinstance(engine, str | None) or not isinstance(precision, str):
        raise ValueError(f"layout has engine {engine!r} and precision {precision!r}")


def _entry(name: str, entry: Any) -> FileEntry:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\0" in name or not parts.parts:
        raise ValueError(f"file name {name!r} leads out of the folder, or to none of its files")
    found = FileEntry(**entry)
    if not _is_count(found.bytes) or not isinstance(found.sha256, str):
        raise ValueError(f"{name!r} has size {found.bytes!r} and checksum {found.sha256!r}")
    return found


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


def _parameter(name: str, shape: tuple[int, ...], shard_dim: int | None, tensor: int) -> StoredParameter:
    is_sound = 1 <= len(shape) <= 2 and all(_is_count(size) and size > 0 for size in shape)
    if is_sound and shard_dim is not None:
        is_sound = shard_dim in range(len(shape)) and shape[shard_dim] % tensor == 0
    if not is_sound:
        raise ValueError(f"{name} of shape {shape}, split over {tensor} tensor rank(s) along {shard_dim}")
    return StoredParameter(shape, shard_dim)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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
