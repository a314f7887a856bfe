"""Which files a path, a folder or a glob matches, and which of them are not read, with the reason."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlra_scale.config.json_text import printable
from mlra_scale.data import DataError

# Kinds whose files may be compressed as a whole; .parquet compresses its own pages.
_STREAMS = {".txt": ".txt", ".md": ".txt", ".jsonl": ".jsonl", ".json": ".json"}
"""Kinds by the endings of names."""
KNOWN_KINDS = ".txt, .md, .jsonl, .json (each also with .gz or .zst behind it), .parquet"
_NOTES = "Markdown beside files of data; name it to have it read"
BEYOND = "beyond --max-bytes"
"""Reason why a file after the cap is not read."""
_NUM_NAMES = 10
"""How many names of files of each kind a manifest has; its numbers are complete."""
_NUM_PRINTED = 3


class NotRead(NamedTuple):
    """A file or folder that a source matched and that is not read; files that are left out alike have equal reasons."""

    path: str
    reason: str


def file_counts(read: int, without_documents: Sequence[str], not_read: Sequence[NotRead]) -> dict[str, Any]:
    """Returns what became of the files that a source matched, as the manifest has it: all numbers, the first names.

    Args:
        read: Number of files that were read, the last one perhaps in part (--max-bytes).
        without_documents: Paths of those that were read and hold no document.
        not_read: All others.
    """

    def named(paths: Sequence[str]) -> dict[str, Any]:
        return {"files": len(paths), "names": list(map(printable, paths[:_NUM_NAMES]))}

    return {
        "matched": read + len(not_read),
        "read": read,
        "without_documents": named(without_documents),
        "not_read": [{"reason": reason} | named(paths) for reason, paths in _by_reason(not_read).items()],
    }


def kind_of(path: Path) -> str | None:
    """Returns how a file is read: ".txt" (.md too), ".jsonl", ".json" or ".parquet"; None if the kind is not known."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return ".parquet"
    stem = name.removesuffix(compression_of(path))
    return next((kind for ending, kind in _STREAMS.items() if stem.endswith(ending)), None)


def compression_of(path: Path) -> str:
    """Returns ".gz", ".zst" or "", whichever a file's name ends with."""
    return next((ending for ending in (".gz", ".zst") if path.name.lower().endswith(ending)), "")


def find_files(name: str) -> tuple[list[Path], list[NotRead]]:
    """Finds the files that a path, folder or glob matches.

    Folders are searched at any depth, without links to folders and without hidden files and folders; so is ** in a
    glob. (The standard library's ** follows links, around loops as well.)

    Returns:
        At least one file to read, in sorted order; and the others. A folder that is not searched counts as one.

    Raises:
        DataError: There is no file to read, or a file cannot be looked at.
    """
    path, not_read = Path(name), set[NotRead]()
    if path.is_file() and kind_of(path) is None:
        raise DataError(f"source {name} is of no known kind ({KNOWN_KINDS})")
    try:
        roots, tail = ([path], "") if path.exists() else _expand(name)
        if not roots:
            raise DataError(
                f"source {name} does not exist; a Hugging Face data set is written hf:NAME, "
                "the embedded corpus python-docs"
            )
        files = _sort_out({file for root in roots for file in _search(root, tail, not_read)}, not_read)
        if any(kind_of(file) != ".txt" for file in files):
            notes = {file for file in files if file.name.lower().removesuffix(compression_of(file)).endswith(".md")}
            not_read |= {NotRead(str(file), _NOTES) for file in notes}
            files = [file for file in files if file not in notes]
    except OSError as error:
        raise DataError(f"{error.filename or name} cannot be read: {error.strerror}") from error
    if not files:
        others = f"; {describe(sorted(not_read))}" if not_read else ""
        raise DataError(f"source {name} holds no file of a known kind ({KNOWN_KINDS}){others}")
    return files, sorted(not_read)


def _expand(pattern: str) -> tuple[list[Path], str]:
    """Returns what a glob matches; with **, the folders before it, and the part of the pattern behind it."""
    parts = pattern.split("/")
    if "**" not in parts:
        return [Path(path) for path in glob.glob(pattern)], ""
    position = parts.index("**")
    head = "/".join(parts[:position]) or ("/" if pattern.startswith("/") else ".")
    tail = "/".join(part for part in parts[position + 1 :] if part not in ("", "**"))
    return [Path(path) for path in glob.glob(head) if os.path.isdir(path)], tail


def _search(root: Path, tail: str, not_read: set[NotRead]) -> Iterator[Path]:
    """Yields a file, or the files below a folder of which the path, or a folder on it, ends as `tail` says.

    What is hidden, and links to folders, go to `not_read`.
    """
    if not root.is_dir():
        yield root
        return
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        below = Path(folder).relative_to(root)
        is_whole = not tail or any(part.match(tail) for part in (below, *below.parents))
        for name in subfolders:
            if name.startswith("."):
                not_read.add(NotRead(os.path.join(folder, name), "hidden"))
            elif os.path.islink(os.path.join(folder, name)):
                not_read.add(NotRead(os.path.join(folder, name), "a link to a folder"))
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                if is_whole:
                    not_read.add(NotRead(os.path.join(folder, name), "hidden"))
            elif is_whole or (below / name).match(tail):
                yield Path(folder, name)


def _raise(error: OSError) -> None:
    raise error


def _sort_out(found: Iterable[Path], not_read: set[NotRead]) -> list[Path]:
    """Returns the files that can be read, in order; the others go to `not_read`."""
    files: dict[tuple[int, int], Path] = {}
    for file in sorted(found):
        if kind_of(file) is None:
            not_read.add(NotRead(str(file), "of no known kind"))
        elif not stat.S_ISREG(file.stat().st_mode):
            not_read.add(NotRead(str(file), "not a regular file"))
        elif files.setdefault(identity(file), file) is not file:
            not_read.add(NotRead(str(file), "the same file under a second name"))
    return list(files.values())


def identity(path: Path) -> tuple[int, int]:
    """Returns what two names of one file have in common, links of both kinds included (device, inode)."""
    status = path.stat()
    return status.st_dev, status.st_ino


def describe(not_read: Sequence[NotRead]) -> str:
    """Returns one line: how many were not read, for each reason with the first names."""
    return "; ".join(
        f"{len(paths):,} not read, {reason}: {shown_names(paths, len(paths))}"
        for reason, paths in _by_reason(not_read).items()
    )


def shown_names(names: Sequence[str], count: int) -> str:
    """Returns the first names of a list for a terminal, and how many of `count` more there are."""
    more = f" and {count - _NUM_PRINTED:,} more" if count > _NUM_PRINTED else ""
    return ", ".join(map(printable, names[:_NUM_PRINTED])) + more


def _by_reason(not_read: Iterable[NotRead]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for entry in not_read:
        groups.setdefault(entry.reason, []).append(entry.path)
    return groups
