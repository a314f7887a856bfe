"""`mlra-scale checkpoints`: lists, verifies, describes, compares and prunes checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import count, json_output, place

EXAMPLES = """examples:
  PROG list runs/first
  PROG verify runs/first
  PROG describe runs/first/checkpoints/step-00000100
  PROG diff runs/first runs/two --moments
  PROG prune runs/first --keep-last 2 --keep-every 1000 --dry-run

exit codes: 0 all is well; 1 verify found damage, or diff found a difference; 2 bad input
"""

Answer = tuple[dict[str, Any], list[str], int]
"""The result of a sub-command: for JSON, as lines for people, and the exit code."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parents = [json_output()]

    def add(name: str, what: str, path_help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what, parents=parents)
        command.add_argument("path", type=place, metavar="PATH", help=path_help)
        return command

    run = "run directory, or folder of checkpoints"
    one = "checkpoint, or run directory (its newest complete checkpoint)"
    add("list", "the checkpoints of a run: step, tokens, size, layout, and what is wrong with them", run)
    add("verify", "compare all files with their checksums", f"checkpoint; {run} (all of them)")
    add("describe", "layout, step, tokens, model and files of a checkpoint", one)
    diff = add("diff", "configuration fields and tensors in which two checkpoints differ", f"first: {one}")
    diff.add_argument("other", type=place, metavar="OTHER", help="the second one")
    diff.add_argument("--moments", action="store_true", help="compare the moments too")
    prune = add("prune", "remove checkpoints but the newest ones, and the one that the guard would go back to", run)
    prune.add_argument("--keep-last", type=count, required=True, metavar="N", help="how many of the newest stay")
    prune.add_argument("--keep-every", type=count, default=0, metavar="M", help="multiples of M steps stay too")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def _run(options: argparse.Namespace) -> int:
    from mlra_scale.config.json_text import printable

    command = {"list": _list, "verify": _verify, "describe": _describe, "diff": _diff, "prune": _prune}[options.command]
    result, lines, code = command(options)
    # Names and values come from files: what a terminal would obey is escaped.
    print(json.dumps(result) if options.json else "\n".join(map(printable, lines)))
    return code


def _list(options: argparse.Namespace) -> Answer:
    from mlra_scale.checkpoint.inspection import checkpoints_folder, list_checkpoints

    folder = checkpoints_folder(options.path)
    found = list_checkpoints(folder)
    lines = [str(folder)]
    for entry in found:
        mark = "*" if entry["latest"] else " "
        if entry["fault"] is not None:
            lines.append(f"{mark} {entry['name']:<14} INCOMPLETE: {entry['fault']}")
            continue
        tokens = "" if entry["tokens"] is None else f"{entry['tokens']:,} tokens   "
        size = f"{_size(entry['bytes'])} in {entry['files']} files"
        lines.append(
            f"{mark} {entry['name']:<14} {tokens}{size}   {entry['created'][:19]}   {_layout(entry['layout'])}"
        )
    lines.append("* is what `latest` names")
    return {"folder": str(folder), "checkpoints": found}, lines, 0


def _verify(options: argparse.Namespace) -> Answer:
    from mlra_scale.checkpoint import CheckpointError, Store
    from mlra_scale.checkpoint.inspection import checkpoints_at

    found: dict[str, list[str]] = {}
    for path in checkpoints_at(options.path):
        try:
            found[str(path)] = Store.open(path).verify()
        except CheckpointError as error:
            found[str(path)] = [str(error)]
    lines = [f"{path}: {'; '.join(faults) or 'all files are as they were written'}" for path, faults in found.items()]
    return {"faults": found}, lines, 1 if any(found.values()) else 0


def _describe(options: argparse.Namespace) -> Answer:
    from mlra_scale.checkpoint import Store
    from mlra_scale.checkpoint.inspection import describe_checkpoint
    from mlra_scale.checkpoint.retention import checkpoint_at

    found = describe_checkpoint(Store.open(checkpoint_at(options.path)))
    model = found["model"]
    rank = "" if model["rank"] is None else f" of rank {model['rank']}"
    progress = "" if found["tokens"] is None else f", {found['samples']:,} samples, {found['tokens']:,} tokens"
    lines = [
        found["folder"],
        f"  kind        {found['kind']}, {_moments(found)}",
        f"  step        {found['step']}{progress}",
        f"  model       {model['attention']}{rank}, {model['layers']} layers, width {model['hidden_size']}, "
        f"{model['heads']} heads, vocabulary {model['vocabulary']:,}, {model['positions']} positions: "
        f"{model['parameters']:,} parameters",
        f"  layout      {_layout(found['layout'])}",
        f"  saved       {found['created']}, id {found['save_id']}",
        f"  state       {', '.join(found['state'])}",
        f"  buffers     {', '.join(found['buffers']) or 'none'}",
        f"  tokenizer   {'yes' if found['has_tokenizer'] else 'no'}",
        f"  last step   learning rate {_value(found['learning_rate'])}, validation loss "
        f"{_value(found['validation_loss'])}",
        f"  format      version {found['format_version']}",
        f"  written by  {', '.join(f'{library} {version}' for library, version in found['versions'].items())}",
        f"  size        {_size(found['bytes'])} in {len(found['files'])} files",
        *(f"    {_size(size):>10}  {name}" for name, size in found["files"].items()),
    ]
    return found, lines, 0


def _diff(options: argparse.Namespace) -> Answer:
    from mlra_scale.checkpoint import Store
    from mlra_scale.checkpoint.inspection import compare_configurations, compare_tensors
    from mlra_scale.checkpoint.retention import checkpoint_at

    one, other = (Store.open(checkpoint_at(path)) for path in (options.path, options.other))
    fields = compare_configurations(one, other)
    tensors = list(compare_tensors(one, other, options.moments))
    lines = [f"first   {one.folder}, step {one.step}", f"second  {other.folder}, step {other.step}"]
    lines += [f"  {entry['field']}: {entry['first']!r} -> {entry['second']!r}" for entry in fields]
    for entry in tensors:
        name = entry["name"] if entry["part"] in (None, "weight") else f"{entry['part']} of {entry['name']}"
        lines.append(f"  {name}: {entry['fault'] or _figures(entry)}")
    compared = "weights and moments" if options.moments else "weights"
    lines.append(
        f"{len(fields)} field(s) and {len(tensors)} tensor(s) of the {compared} differ"
        if fields or tensors
        else f"configuration and {compared} are equal, bit by bit"
    )
    result = {"first": str(one.folder), "second": str(other.folder), "fields": fields, "tensors": tensors}
    return result, lines, 1 if fields or tensors else 0


def _prune(options: argparse.Namespace) -> Answer:
    from mlra_scale.checkpoint import retention
    from mlra_scale.checkpoint.inspection import checkpoints_folder, pinned_step

    folder = checkpoints_folder(options.path)
    if options.dry_run:
        removed = retention.prunable(folder, options.keep_last, options.keep_every, pinned_step(folder))
    else:
        with _locked(folder):
            removed = retention.prune(folder, options.keep_last, options.keep_every, pinned_step(folder))
    verb = "would remove" if options.dry_run else "removed"
    lines = [f"{verb} {path}" for path in removed] or ["nothing to remove"]
    return {"removed": [str(path) for path in removed], "dry_run": options.dry_run}, lines, 0


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the run directory while its checkpoints are removed; refuses where a run holds the lock."""
    from mlra_scale.training.run_directory import RunDirectory, run_lock

    # The folder may be given as ".", and it or the run directory's entry for it may be a symbolic link.
    parents = {Path(os.path.abspath(folder)).parent.resolve(), folder.resolve().parent}
    with contextlib.ExitStack() as stack:
        for parent in parents:
            if (parent / ".lock").exists():
                stack.enter_context(run_lock(RunDirectory(parent)))
        yield


def _moments(found: dict[str, Any]) -> str:
    if not found["has_moments"] or not found["momentum_only"]:
        return f"{'with' if found['has_moments'] else 'without'} Adam's moments"
    return f"with Adam's moments, and of {found['momentum_only']} matrices the momentum alone"


def _value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "not measured"


def _figures(entry: dict[str, Any]) -> str:
    values = {"largest difference": entry["max_abs"], "relative": entry["relative"]}
    return ", ".join(f"{key} {'not finite' if value is None else f'{value:.3g}'}" for key, value in values.items())


def _layout(layout: dict[str, Any]) -> str:
    degrees = f"{layout['world_size']} rank(s): tp{layout['tensor']} pp{layout['pipeline']} dp{layout['data']}"
    if layout.get("engine") is None:
        return degrees
    return f"{degrees}, {layout['engine']} engine, ZeRO {layout['zero_stage']}, {layout['precision']}"


def _size(size: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B"


COMMAND = Command(
    name="checkpoints",
    summary="list, verify, describe, compare and prune checkpoints",
    description="Lists, verifies, describes, compares and prunes checkpoints. No process group, no GPU.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    has_side_effects=True,
)
