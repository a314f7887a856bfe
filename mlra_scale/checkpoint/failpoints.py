"""Failpoints: the steps of a save at which tests let a rank fail or die.

In production `reached` does nothing. Code calls `failpoints.reached(NAME)`, and a test replaces the function
(`failpoints.reached = ...`) by one that raises an error, waits, or kills the process.
The text of each failpoint says what a fault at this step may leave behind.
"""

from __future__ import annotations

FAILPOINTS: dict[str, str] = {
    "snapshot": "every rank, before the save has done anything",
    "copy": "every rank, before it copies its fragments, while training continues to its next update",
    "file-open": "every rank, its file is open and empty",
    "mid-file": "every rank, about half of its file is written",
    "file-complete": "every rank, its file is complete",
    "agreed": "every rank, all of them know that the files of all ranks are complete",
    "before-manifest": "rank 0, everything but the manifest is on disk",
    "before-rename": "rank 0, the folder is complete under its unfinished name",
    "before-latest": "rank 0, the folder has its name and `latest` names the one before",
    "retention": "rank 0, a checkpoint that is no longer kept is hidden, and none of it is deleted yet",
}
"""Every failpoint, in the order of a save, with the ranks that pass it and what is on disk then."""


def reached(name: str) -> None:
    """Does nothing, at one of FAILPOINTS."""
