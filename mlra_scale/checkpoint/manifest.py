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

MANIFEST = "manifest.json"
FORMAT = "mlra-scale-checkpoint"
VERSION = 1
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

    @property
    def tensor(self) -> int:
        """Tensor-parallel degree of the fragments."""
        return self.layout["tensor"]

    @property
    def total_bytes(self) -> int:
        """Size of all files that the manifest names."""
        return sum(entry.bytes for entry in self.files.values())

    def to_json(self) -> bytes:
        """Returns the file's content; a line for every short section, file and parameter."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
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
        raw = path.read_bytes()
    try:
        content = json.loads(raw)
        checksum = content.pop("checksum")
        stored_format, version = content["format"], content["version"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); use another checkpoint") from None
    if stored_format != FORMAT:
        raise CheckpointError(f"{path} has format {stored_format!r} and not {FORMAT!r}; it is not this project's")
    if checksum != _checksum(content):
        raise CheckpointError(f"{path} is damaged: its checksum is another; use another checkpoint")
    if version != VERSION:
        raise CheckpointError(
            f"{path} has version {version} of the format, this program reads {VERSION}; use the program that wrote it"
        )
    try:
        return _parsed(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not sound ({type(error).__name__}: {error}); use another one") from error


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


def _parsed(content: Mapping[str, Any]) -> Manifest:
    files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
    for name in files:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise ValueError(f"file name {name!r} leads out of the folder")
    tensor = content["layout"]["tensor"]
    if not _is_count(tensor) or tensor < 1:
        raise ValueError(f"layout has a tensor-parallel degree of {tensor!r}")
    if content["kind"] not in get_args(Kind):
        raise ValueError(f"kind {content['kind']!r} is not known")
    if not _is_count(content["step"]):
        raise ValueError(f"step {content['step']!r} is no number of steps")
    datetime.fromisoformat(content["created"])
    return Manifest(
        save_id=content["save_id"],
        kind=content["kind"],
        step=content["step"],
        created=content["created"],
        layout=content["layout"],
        has_moments=content["has_moments"],
        versions=content["versions"],
        files=files,
        parameters={
            name: _parameter(name, tuple(entry["shape"]), entry["shard_dim"], tensor)
            for name, entry in content["parameters"].items()
        },
    )


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
