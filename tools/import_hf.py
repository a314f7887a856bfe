#!/usr/bin/env python
"""Turns a Hugging Face GPT-2 folder into a checkpoint to train from: python tools/import_hf.py --help."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from mlra_scale.checkpoint.huggingface.importing import Imported

EXAMPLES = """examples:
  python tools/import_hf.py gpt2 imported/gpt2                      # dense, every weight as it is
  python tools/import_hf.py gpt2 imported/gpt2-r384 --rank 384      # q, k, v become products of two factors
  python tools/import_hf.py gpt2 imported/gpt2-o --rank 384 --factorise q,k,v,o --json

FOLDER is on this machine; where the hub is reachable, 'hf download gpt2 --local-dir gpt2' fetches one.
"""
PRESETS = {768: "gpt2", 1024: "gpt2-medium", 1280: "gpt2-large", 1600: "gpt2-xl"}
PROJECTIONS = ("q", "k", "v", "o")


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    result = argparse.ArgumentParser(
        prog="import_hf.py",
        description="Writes a GPT2LMHeadModel as a checkpoint of weights: dense exactly as it is, or with attention "
        "projections factorised by their singular value decomposition, so that a trained GPT-2 goes on as MLRA.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("folder", type=Path, metavar="FOLDER", help="config.json with model.safetensors or pytorch_model.bin")
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="the checkpoint to make")
    add("--rank", type=_count, metavar="R", help="factorise at this rank (default: everything stays dense)")
    add("--factorise", type=_projections, metavar="LIST", help="which of q,k,v,o to factorise (default: q,k,v)")
    add(
        "--vocab-padding-multiple",
        type=_count,
        default=128,
        metavar="N",
        help="pad the embedding to a multiple of N rows; every tensor-parallel degree must divide it (default: 128)",
    )
    add("--json", action="store_true", help="print one JSON object")
    return result


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _projections(text: str) -> tuple[str, ...]:
    names = text.replace(",", " ").split()
    if not names or len(set(names)) < len(names) or not set(names) <= set(PROJECTIONS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of q, k, v, o, such as q,k,v")
    return tuple(name for name in PROJECTIONS if name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 for bad input."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.factorise and options.rank is None:
        command_line.error("--factorise needs --rank R")
    from mlra_scale.checkpoint.files import CheckpointError
    from mlra_scale.checkpoint.huggingface.importing import import_gpt2

    try:
        made = import_gpt2(
            options.folder,
            options.checkpoint,
            rank=options.rank,
            projections=options.factorise or ("q", "k", "v"),
            vocab_padding_multiple=options.vocab_padding_multiple,
        )
    except CheckpointError as error:
        print(f"import_hf: error: {error}", file=sys.stderr)
        return 2
    print(as_json(made) if options.json else as_text(made))
    return 0


def as_json(made: Imported) -> str:
    """Returns what was made as one JSON object."""
    kept = [{"block": entry.block, "projection": entry.projection, "energy": entry.energy} for entry in made.kept]
    return json.dumps(
        {
            "checkpoint": str(made.checkpoint),
            "model": made.model.model_dump(mode="json"),
            "parameters": made.model.num_parameters(),
            "stored_dtypes": made.stored_dtypes,
            "has_tokenizer": made.has_tokenizer,
            "energy_kept": kept,
            "notes": made.notes,
        }
    )


def as_text(made: Imported) -> str:
    """Returns what was made, and what comes next, as lines for people."""
    model, path = made.model, made.checkpoint
    lines = [
        f"{path}: {model.num_layers} layers of width {model.hidden_size}, {model.num_parameters():,} parameters, "
        f"attention {model.attention}, from {' and '.join(made.stored_dtypes)}",
        *(f"  note: {note}" for note in made.notes),
        *_energy_table(made),
        "Next: prepare data with its tokenizer, then train from it",
    ]
    tokenizer = f"{path}/tokenizer" if made.has_tokenizer else "TOKENIZER"
    lines.append(f"  python tools/prepare_data.py --output data/mine --source TEXT --tokenizer {tokenizer}")
    command = (
        f"  python -m mlra_scale.train --preset {PRESETS.get(model.hidden_size, 'gpt2')} --config {path}/config.yaml"
    )
    lines.append(f"{command} --resume {path} --run-dir runs/continued data.path=data/mine")
    if model.max_positions < 1024:
        lines[-1] += f" train.sequence_length={model.max_positions}"
    return "\n".join(lines)


def _energy_table(made: Imported) -> list[str]:
    """Layers in rows, projections in columns, their mean below."""
    if not made.kept:
        return []
    names = [name for name in PROJECTIONS if any(entry.projection == name for entry in made.kept)]
    energy = {(entry.block, entry.projection): entry.energy for entry in made.kept}
    blocks = range(made.model.num_layers)
    lines = [f"  energy kept at rank {made.model.rank} (share of the squared singular values)"]
    lines.append("  layer" + "".join(f"{name:>9}" for name in names))
    for block in blocks:
        lines.append(f"  {block:>5}" + "".join(f"{energy[block, name]:>9.5f}" for name in names))
    means = [sum(energy[block, name] for block in blocks) / len(blocks) for name in names]
    lines.append("   mean" + "".join(f"{mean:>9.5f}" for mean in means))
    return lines


if __name__ == "__main__":
    from mlra_scale.console import run_tool

    sys.exit(run_tool(main, has_side_effects=True))
