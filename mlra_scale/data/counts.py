"""What the manifest says of a data set's sources: files read and not read, documents, and that the numbers add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlra_scale.config.json_text import printable
from mlra_scale.data.files import FileCounts, by_reason

# The manifest names the first files of each kind; the numbers are complete.
_NUM_NAMES = 10
_NUM_PRINTED = 3


def source_entry(name: str, kind: str, documents: int, empty: int, files: FileCounts | None) -> dict[str, Any]:
    """Returns the manifest's entry of one source.

    Args:
        name: The source's name.
        kind: Its kind.
        documents: Number of documents that went into the data set.
        empty: Number of documents of nothing but white space, which are left out.
        files: What became of its files; None if the source does not know them.

    Returns:
        The entry.
    """
    entry: dict[str, Any] = {"name": name, "kind": kind, "documents": documents, "empty_documents": empty}
    if files is not None:
        entry["files"] = {
            "matched": files.read + len(files.not_read),
            "read": files.read,
            "without_documents": _named(files.without_documents),
            "not_read": [{"reason": reason} | _named(paths) for reason, paths in by_reason(files.not_read).items()],
        }
    return entry


def _named(paths: Sequence[str]) -> dict[str, Any]:
    return {"files": len(paths), "names": list(paths[:_NUM_NAMES])}


def find_contradiction(content: dict[str, Any]) -> str | None:
    """Checks that the counts of the sources add up; what older manifests lack is not asked for.

    Args:
        content: The manifest, with entries of the right types.

    Returns:
        What does not add up, in one clause; None if all does.
    """
    sources = content["sources"]
    sums = [("documents", content["documents"], sum(source["documents"] for source in sources))]
    if all(source.get("empty_documents") is not None for source in sources):
        empty = sum(source["empty_documents"] for source in sources)
        sums.append(("empty documents", content["empty_documents_left_out"], empty))
    for source in sources:
        if source.get("files") is not None:
            files = source["files"]
            others = sum(group["files"] for group in files["not_read"])
            sums.append((f"files of source {printable(source['name'])}", files["matched"], files["read"] + others))
    return next(
        (f"it counts {whole} {what}, their parts {parts}" for what, whole, parts in sums if whole != parts), None
    )


def count_lines(content: dict[str, Any]) -> list[str]:
    """Returns the lines of a summary about what was read and what was not; none where all was read."""
    lines = []
    for source in content["sources"]:
        if source.get("files") is None:  # the hub's, or a manifest from before files were counted
            continue
        files = source["files"]
        if files["matched"] != 1 or files["not_read"]:
            lines.append(f"  files       {files['read']:,} of {files['matched']:,} read of {printable(source['name'])}")
        for group in files["not_read"]:
            lines.append(f"  not read    {group['files']:,} {group['reason']}: {_names(group)}")
        if files["without_documents"]["files"]:
            group = files["without_documents"]
            lines.append(f"  note        {group['files']:,} read without any document: {_names(group)}")
    if content["empty_documents_left_out"]:
        lines.append(f"  left out    {content['empty_documents_left_out']:,} empty documents")
    if content.get("documents_without_tokens"):  # older manifests do not count them
        lines.append(
            f"  note        {content['documents_without_tokens']:,} documents have text of which this tokenizer makes "
            "no token but the end's"
        )
    return lines


def _names(group: dict[str, Any]) -> str:
    shown = group["names"][:_NUM_PRINTED]
    more = group["files"] - len(shown)
    return ", ".join(map(printable, shown)) + (f" and {more:,} more" if more else "")
