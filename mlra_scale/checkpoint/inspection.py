"""Listing, describing and comparing checkpoints, without an engine. Results are JSON values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mlra_scale.checkpoint.files import CheckpointError, system_errors
from mlra_scale.checkpoint.fragments import PARTS, Part, matrix_shape
from mlra_scale.checkpoint.manifest import MANIFEST, read_complete_manifest
from mlra_scale.checkpoint.reader import Store
from mlra_scale.checkpoint.retention import CHECKPOINTS, UNFINISHED, checkpoint_folders, latest, newest_complete
from mlra_scale.checkpoint.state_contents import STATE, parse_state

_BLOCK_ELEMENTS = 2**22


def checkpoints_folder(path: Path) -> Path:
    """Returns the folder of checkpoints at a path, which is that folder or a run directory.

    Raises:
        CheckpointError: There are no checkpoints, complete or not.
    """
    for folder in (path / CHECKPOINTS, path):
        if checkpoint_folders(folder) or any(folder.glob(f"{UNFINISHED}*")):
            return folder
    what = "holds no checkpoints" if path.exists() else "does not exist"
    raise CheckpointError(f"{path} {what}; name a run directory or its folder {CHECKPOINTS}")


def checkpoints_at(path: Path) -> list[Path]:
    """Returns the checkpoint at a path, or all those of the run there, complete or not, as checkpoints_folder does."""
    return [path] if (path / MANIFEST).is_file() else checkpoint_folders(checkpoints_folder(path))


def good_step(state: Mapping[str, Any]) -> int | None:
    """Returns the step of the checkpoint that the guard would roll back to, from the state of a checkpoint, or None."""
    guard = (state.get("windows") or {}).get("guard")
    step = guard.get("good_step") if isinstance(guard, dict) else None
    return step if isinstance(step, int) else None


def pinned_step(folder: Path) -> int | None:
    """Returns the step of the checkpoint that a run keeps for its guard, or None, from the run's checkpoints."""
    for path in (latest(folder), newest_complete(folder)):
        with contextlib.suppress(CheckpointError):
            if path is not None:
                return good_step(Store.open(path).state)
    return None


def list_checkpoints(folder: Path) -> list[dict[str, Any]]:
    """Returns an entry for every checkpoint of a run, and for every save that was interrupted."""
    newest = latest(folder)
    entries = [_entry(path) | {"latest": path == newest} for path in checkpoint_folders(folder)]
    for path in sorted(folder.glob(f"{UNFINISHED}*")):
        fault = "being written, or left by a run that died; the next save clears it away"
        entries.append({"name": path.name, "fault": fault, "latest": False})
    return entries


def _entry(path: Path) -> dict[str, Any]:
    try:
        manifest = read_complete_manifest(path)
        with system_errors("read", path / STATE):
            state = parse_state((path / STATE).read_bytes(), path / STATE)
    except CheckpointError as error:
        return {"name": path.name, "fault": str(error)}
    return {
        "name": path.name,
        "fault": None,
        "step": manifest.step,
        "tokens": (state.get("progress") or {}).get("consumed_tokens"),
        "created": manifest.created,
        "bytes": manifest.total_bytes,
        "files": len(manifest.files),
        "layout": dict(manifest.layout),
    }


def describe_checkpoint(store: Store) -> dict[str, Any]:
    """Returns layout, step, model, state, versions and files of a checkpoint."""
    manifest, model = store.manifest, store.model
    progress = store.state.get("progress") or {}
    return {
        "folder": str(store.folder),
        "kind": store.kind,
        "step": store.step,
        "samples": progress.get("consumed_samples"),
        "tokens": progress.get("consumed_tokens"),
        "created": manifest.created,
        "save_id": manifest.save_id,
        "layout": dict(manifest.layout),
        "model": {
            "attention": model.attention,
            "layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "heads": model.num_heads,
            "rank": model.rank if model.attention == "mlra" else None,
            "vocabulary": model.vocab_size,
            "positions": model.max_positions,
            "parameters": model.num_parameters(),
        },
        "has_moments": manifest.has_moments,
        "momentum_only": len(manifest.momentum_only),
        "has_tokenizer": store.tokenizer_folder is not None,
        "state": sorted(store.state),
        "buffers": sorted(store.buffer_names),
        "versions": dict(manifest.versions),
        "format_version": manifest.version,
        "learning_rate": store.state.get("learning_rate"),
        "validation_loss": store.state.get("validation_loss"),
        "bytes": manifest.total_bytes,
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
    }


def compare_configurations(one: Store, other: Store) -> list[dict[str, Any]]:
    """Returns the configuration fields in which two checkpoints differ; those of the model where one has no others."""
    if one.config is None or other.config is None:
        values = [{"model": store.model.model_dump(mode="json")} for store in (one, other)]
    else:
        values = [config.to_dict() for config in (one.config, other.config)]
    first, second = (dict(_flat(value)) for value in values)
    return [
        {"field": field, "first": first.get(field), "second": second.get(field)}
        for field in sorted(first.keys() | second.keys())
        if first.get(field) != second.get(field)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def compare_tensors(one: Store, other: Store, with_moments: bool) -> Iterator[dict[str, Any]]:
    """Yields the tensors in which two checkpoints differ, whatever their layouts; a few rows are in memory at a time.

    Padded vocabulary rows are left out. With moments, both must have some. An entry has name, part, and either `fault`
    (one of them lacks it, or has another shape), or `max_abs`, the largest absolute difference, and `relative`, the
    norm of the difference over the norm of the first (None where that is zero or not finite).
    """
    for name in dict.fromkeys([*one.table, *other.table]):
        shapes = [_compared_shape(store, name) for store in (one, other)]
        if shapes[0] is None or shapes[1] is None or shapes[0] != shapes[1]:
            yield {"name": name, "part": None, "fault": f"shape {shapes[0]} in the first, {shapes[1]} in the second"}
            continue
        for part in PARTS if with_moments else PARTS[:1]:
            # Of a checkpoint without any moments, reading one is an error.
            has_part = [part in store.parts(name) or not store.manifest.has_moments for store in (one, other)]
            if has_part in ([True, False], [False, True]):
                which = "second" if has_part[0] else "first"
                yield {"name": name, "part": part, "fault": f"the {which} has the momentum alone"}
            if has_part != [True, True]:
                continue
            difference = _difference(one, other, name, part, shapes[0])
            if difference is not None:
                yield {"name": name, "part": part, "fault": None, **difference}


def _compared_shape(store: Store, name: str) -> tuple[int, ...] | None:
    if name not in store.table:
        return None
    info = store.table[name]
    return (store.model.vocab_size, *info.shape[1:]) if info.kind == "embedding" else info.shape


def _difference(one: Store, other: Store, name: str, part: Part, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """The difference of one tensor, or None where all bits are equal."""
    rows, columns = matrix_shape(shape)
    step = max(1, _BLOCK_ELEMENTS // columns)
    is_equal, largest, squares, norm = True, 0.0, 0.0, 0.0
    for first in range(0, rows, step):
        stop = min(rows, first + step)
        mine, theirs = (store.rows(name, first, stop, part) for store in (one, other))
        is_equal = is_equal and torch.equal(mine.view(torch.int32), theirs.view(torch.int32))
        difference = mine.double() - theirs.double()
        # max() of Python would lose a NaN.
        largest = torch.tensor([largest, float(difference.abs().max())], dtype=torch.float64).max().item()
        squares += float(difference.square().sum())
        norm += float(mine.double().square().sum())
    if is_equal:
        return None
    relative = math.sqrt(squares / norm) if norm > 0.0 and math.isfinite(squares / norm) else None
    return {"max_abs": largest if math.isfinite(largest) else None, "relative": relative}
