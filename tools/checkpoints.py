#!/usr/bin/env python
"""Lists, verifies, describes, compares and prunes checkpoints: python tools/checkpoints.py --help."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EXAMPLES = """examples:
  python tools/checkpoints.py list runs/first
  python tools/checkpoints.py verify runs/first
  python tools/checkpoints.py describe runs/first/checkpoints/step-00000100
  python tools/checkpoints.py diff runs/first runs/two --moments
  python tools/checkpoints.py prune runs/first --keep-last 2 --keep-every 1000 --dry-run

exit codes: 0 all is well; 1 verify found damage, or diff found a difference; 2 bad input
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    result = argparse.ArgumentParser(
        prog="checkpoints.py",
        description="Lists, verifies, describes, compares and prunes checkpoints. No process group, no GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, what: str, path_help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("path", type=Path, metavar="PATH", help=path_help)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        return command

    run = "run directory, or folder of checkpoints"
    one = "checkpoint, or run directory (its newest complete checkpoint)"
    add("list", "the checkpoints of a run: step, tokens, size, layout, and what is wrong with them", run)
    add("verify", "compare all files with their checksums", f"checkpoint; {run} (all of them)")
    add("describe", "layout, step, tokens, model and files of a checkpoint", one)
    diff = add("diff", "configuration fields and tensors in which two checkpoints differ", f"first: {one}")
    diff.add_argument("other", type=Path, metavar="OTHER", help="the second one")
    diff.add_argument("--moments", action="store_true", help="compare Adam's moments too")
    prune = add("prune", "remove checkpoints but the newest ones, and the one that the guard would go back to", run)
    prune.add_argument("--keep-last", type=_count, required=True, metavar="N", help="how many of the newest stay")
    prune.add_argument("--keep-every", type=_count, default=0, metavar="M", help="multiples of M steps stay too")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return result


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, 1 for damage or a difference, or 2 for bad input."""
    options = parser().parse_args(arguments)
    from mlra_scale.checkpoint import CheckpointError
    from mlra_scale.config.json_text import printable

    run = {"list": list_, "verify": verify, "describe": describe, "diff": diff, "prune": prune}[options.command]
    try:
        result, lines, code = run(options)
    except CheckpointError as error:
        print(f"checkpoints: error: {error}", file=sys.stderr)
        return 2
    # Names and values come from files: what a terminal would obey is escaped.
    print(json.dumps(result) if options.json else "\n".join(map(printable, lines)))
    return code


Answer = tuple[dict[str, Any], list[str], int]
"""What a command found: for JSON, as lines for people, and the exit code."""


def list_(options: argparse.Namespace) -> Answer:
    """The command list."""
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


def verify(options: argparse.Namespace) -> Answer:
    """The command verify."""
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


def describe(options: argparse.Namespace) -> Answer:
    """The command describe."""
    from mlra_scale.checkpoint import Store
    from mlra_scale.checkpoint.inspection import describe_checkpoint
    from mlra_scale.checkpoint.retention import checkpoint_at

    found = describe_checkpoint(Store.open(checkpoint_at(options.path)))
    model = found["model"]
    rank = "" if model["rank"] is None else f" of rank {model['rank']}"
    progress = "" if found["tokens"] is None else f", {found['samples']:,} samples, {found['tokens']:,} tokens"
    lines = [
        found["folder"],
        f"  kind        {found['kind']}, {'with' if found['has_moments'] else 'without'} Adam's moments",
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


def diff(options: argparse.Namespace) -> Answer:
    """The command diff."""
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


def prune(options: argparse.Namespace) -> Answer:
    """The command prune."""
    from mlra_scale.checkpoint import retention
    from mlra_scale.checkpoint.inspection import checkpoints_folder, pinned_step

    folder = checkpoints_folder(options.path)
    if options.dry_run:
        removed = retention.prunable(folder, options.keep_last, options.keep_every, pinned_step(folder))
    else:
        with _nobody_else(folder):
            removed = retention.prune(folder, options.keep_last, options.keep_every, pinned_step(folder))
    verb = "would remove" if options.dry_run else "removed"
    lines = [f"{verb} {path}" for path in removed] or ["nothing to remove"]
    return {"removed": [str(path) for path in removed], "dry_run": options.dry_run}, lines, 0


@contextlib.contextmanager
def _nobody_else(folder: Path) -> Any:
    """Keeps a run out of its directory while checkpoints are removed, and refuses where one is at work."""
    from mlra_scale.checkpoint import CheckpointError
    from mlra_scale.config import ConfigError
    from mlra_scale.training.run_directory import RunDirectory, run_lock

    # The folder may be given as ".", and it or the run directory's entry for it may be a symbolic link.
    parents = {Path(os.path.abspath(folder)).parent.resolve(), folder.resolve().parent}
    with contextlib.ExitStack() as stack:
        try:
            for parent in parents:
                if (parent / ".lock").exists():
                    stack.enter_context(run_lock(RunDirectory(parent)))
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        yield


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


if __name__ == "__main__":
    from mlra_scale.console import run_tool

    sys.exit(run_tool(main, has_side_effects=True))
