"""The files of a checkpoint beside its weights: names, and how they are written."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

import mlra_scale
from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.files import FileEntry, copy_file, write_file
from mlra_scale.config import ConfigError, ModelConfig
from mlra_scale.config.json_text import parse_json
from mlra_scale.config.problems import problems_of
from mlra_scale.files import sync

STATE = "state.json"
BUFFERS = "state.safetensors"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer"
# data.tokenizer may name the folder of a whole model, whose weights no checkpoint should carry along.
_TOKENIZER_SUFFIXES = {".json", ".txt", ".bpe", ".model", ".tiktoken", ".jinja"}

_STATE_SECTIONS = ("progress", "engine", "windows", "data", "data_fingerprints", "origin", "history")

Part = Literal["weight", "exp_avg", "exp_avg_sq"]
PARTS: tuple[Part, ...] = ("weight", "exp_avg", "exp_avg_sq")
"""What is stored of a parameter: itself, and Adam's two moments in a checkpoint that has them."""


def tensor_key(part: Part, name: str, start: int) -> str:
    """Returns the name of a fragment's tensor in its safetensors file."""
    return f"{part}/{name}/{start}"


def write_small_files(folder: Path, state: bytes, config_text: str, tokenizer: Path | None) -> dict[str, FileEntry]:
    """Writes state, configuration and a copy of the tokenizer.

    Args:
        folder: The checkpoint in the making.
        state: What `json_bytes` made of it.
        config_text: The YAML document.
        tokenizer: A folder with a tokenizer's files, or None.

    Returns:
        The files' entries by their names in the folder.
    """
    files = {STATE: write_file(folder / STATE, state)}
    files[CONFIG] = write_file(folder / CONFIG, config_text.encode())
    if tokenizer is not None:
        target = folder / TOKENIZER
        target.mkdir()
        for source in sorted(tokenizer.iterdir()):
            if not source.is_file() or source.suffix not in _TOKENIZER_SUFFIXES:
                continue
            files[f"{TOKENIZER}/{source.name}"] = copy_file(source, target / source.name)
        sync(target)
    return files


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """Returns JSON for people: indented, ASCII. Numbers that are not finite are written as Python reads them back."""
    return (json.dumps(values, indent=1) + "\n").encode("ascii")


def state_of(content: bytes, path: Path) -> dict[str, Any]:
    """Reads state.json; what its sections hold is for those who wrote them to check.

    Args:
        content: The file's content.
        path: The file, for the error.

    Raises:
        CheckpointError: It is damaged, or a section is none.
    """
    try:
        # The windows of the guard and of the spike scores may hold values that are not finite.
        state = parse_json(content, str(path), allow_nan=True)
    except ValueError as error:
        raise CheckpointError(f"{error}; use another checkpoint") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} must hold a JSON object; use another checkpoint")
    for name in _STATE_SECTIONS:
        if not isinstance(state.get(name), dict | None):
            raise CheckpointError(f"{path} has {name} {str(state[name])[:80]!r}, no object; use another checkpoint")
    progress = state.get("progress") or {}
    if not all(type(value) is int and value >= 0 for value in progress.values()):
        raise CheckpointError(f"{path} has progress {str(progress)[:200]}; use another checkpoint")
    return state


def model_of(values: Any, path: Path) -> ModelConfig:
    """Returns the model section of a checkpoint's configuration.

    Args:
        values: The section.
        path: The file it is from, for the error.

    Raises:
        CheckpointError: A field is wrong or missing.
    """
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        found = ConfigError(problems_of(error, ModelConfig)).in_one_line
        raise CheckpointError(f"{path} has a model section that is not sound: {found}") from None


def library_versions() -> dict[str, str]:
    """Returns the versions of what writes a checkpoint."""
    versions = {"mlra_scale": mlra_scale.__version__, "python": platform.python_version()}
    for library in ("torch", "deepspeed", "megatron-core", "safetensors"):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def now() -> str:
    """Returns the time as a manifest has it: UTC, to the microsecond, in an order that is that of the text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
