"""The small files of a checkpoint: state, small tensors, configuration and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlra_scale.checkpoint.files import CheckpointError, FileEntry, system_errors, write_file
from mlra_scale.checkpoint.safetensors_file import NamedTensors, spec_of, write_safetensors
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
_STATE_SECTIONS = (
    *("progress", "engine", "windows", "data", "data_fingerprints", "origin", "history", "tasks", "harness"),
)


def write_small_files(
    folder: Path, save_id: str, state: bytes, buffers: NamedTensors, config_text: str, tokenizer: Path | None
) -> dict[str, FileEntry]:
    """Writes state (from `json_bytes`), small tensors, configuration (YAML) and a copy of the tokenizer's folder.

    Returns:
        The files' entries by their names in the unfinished checkpoint.
    """
    files = {STATE: write_file(folder / STATE, state), CONFIG: write_file(folder / CONFIG, config_text.encode())}
    if buffers:
        specs = {name: spec_of(tensor) for name, tensor in buffers}
        files[BUFFERS] = write_safetensors(folder / BUFFERS, specs, buffers, {"save_id": save_id})
    if tokenizer is not None:
        target = folder / TOKENIZER
        target.mkdir()
        for source in sorted(tokenizer.iterdir()):
            if source.is_file() and source.suffix in _TOKENIZER_SUFFIXES:
                with system_errors("read", source):
                    content = source.read_bytes()
                files[f"{TOKENIZER}/{source.name}"] = write_file(target / source.name, content)
        sync(target)
    return files


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """Returns JSON, indented and in ASCII. Numbers that are not finite are written as Python reads them back."""
    return (json.dumps(values, indent=1) + "\n").encode("ascii")


def parse_state(content: bytes, path: Path) -> dict[str, Any]:
    """Parses the content of state.json; what a section holds is checked by its reader.

    Raises:
        CheckpointError: It is damaged, or a section is no object; names `path`.
    """
    try:
        # The statistics of the guard and of the spike scores may hold values that are not finite.
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


def parse_model(values: Any, path: Path) -> ModelConfig:
    """Parses the model section of a checkpoint's configuration.

    Raises:
        CheckpointError: A field is wrong or missing; names `path`.
    """
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        found = ConfigError(problems_of(error, ModelConfig)).in_one_line
        raise CheckpointError(f"{path} has a model section that is not sound: {found}") from None
