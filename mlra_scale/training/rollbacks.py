"""guard.json: the rollbacks of a run, which have to outlive the checkpoints that they lead to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlra_scale.training.record import write_atomically


def write_rollbacks(path: Path, rollbacks: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file at once."""
    write_atomically(path, json.dumps({"rollbacks": [*rollbacks]}, indent=1) + "\n")


def read_rollbacks(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Reads the file; a missing one is a run that never went back.

    Raises:
        ValueError: It is none of ours.
    """
    if not path.exists():
        return ()
    try:
        rollbacks = json.loads(path.read_text(encoding="utf-8"))["rollbacks"]
        whole = [{key: int(item[key]) for key in ("to_step", "skipped_from", "skipped_to")} for item in rollbacks]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is no record of the guard ({error!r}); move it away to read all data again") from error
    return tuple({**item, **numbers} for item, numbers in zip(rollbacks, whole, strict=True))
