"""Reads what wandb leaves on disk, to see that a run is really in it."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_HEADER = struct.Struct("<IHB")  # checksum, length, kind of fragment
_FULL, _FIRST, _LAST = 1, 2, 4


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Yields the records of a .wandb file: a 7-byte preamble, then LevelDB's log format in blocks of 32 KiB."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", path
    position, parts = 7, b""
    while position + _HEADER.size <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER.size:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = _HEADER.unpack_from(data, position)
        start = position + _HEADER.size
        position = start + length
        parts = data[start:position] if kind in (_FULL, _FIRST) else parts + data[start:position]
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def history(run_directory: Path) -> list[dict[str, Any]]:
    """Returns the logged values of every offline run under a run directory, oldest first."""
    rows = []
    for path in sorted((run_directory / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def run_ids(run_directory: Path) -> list[str]:
    """Returns the id of every offline run under a run directory, oldest first."""
    return [path.stem.removeprefix("run-") for path in sorted((run_directory / "wandb").glob("offline-run-*/*.wandb"))]
