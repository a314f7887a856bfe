"""`mlra-scale import`: turns a Hugging Face GPT-2 folder into a checkpoint to train from."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import count, json_output, place
from mlra_scale.console import InputError, table

if TYPE_CHECKING:
    from mlra_scale.checkpoint.huggingface.importing import Imported

EXAMPLES = """examples:
  PROG gpt2 imported/gpt2                      # dense, every weight as it is
  PROG gpt2 imported/gpt2-r384 --rank 384      # q, k, v become products of two factors
  PROG gpt2 imported/gpt2-o --rank 384 --factorise q,k,v,o --json

FOLDER is on this machine; where the hub is reachable, 'hf download gpt2 --local-dir gpt2' fetches one.
"""
PRESETS = {768: "gpt2", 1024: "gpt2-medium", 1280: "gpt2-large", 1600: "gpt2-xl"}
PROJECTIONS = ("q", "k", "v", "o")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=place, metavar="FOLDER", help="config.json with model.safetensors or pytorch_model.bin")
    add("checkpoint", type=place, metavar="CHECKPOINT", help="the checkpoint to make")
    add("--rank", type=count, metavar="R", help="factorise at this rank (default: everything stays dense)")
    add("--factorise", type=_projections, metavar="LIST", help="which of q,k,v,o to factorise (default: q,k,v)")
    add(
        "--vocab-padding-multiple",
        type=count,
        default=128,
        metavar="N",
        help="pad the embedding to a multiple of N rows; every tensor-parallel degree must divide it (default: 128)",
    )


def _projections(text: str) -> tuple[str, ...]:
    names = text.replace(",", " ").split()
    if not names or len(set(names)) < len(names) or not set(names) <= set(PROJECTIONS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of q, k, v, o, such as q,k,v")
    return tuple(name for name in PROJECTIONS if name in names)


def _run(options: argparse.Namespace) -> int:
    if options.factorise and options.rank is None:
        raise InputError("--factorise needs --rank R")
    from mlra_scale.checkpoint.huggingface.importing import import_gpt2

    made = import_gpt2(
        options.folder,
        options.checkpoint,
        rank=options.rank,
        projections=options.factorise or ("q", "k", "v"),
        vocab_padding_multiple=options.vocab_padding_multiple,
    )
    print(_as_json(made) if options.json else _as_text(made))
    return 0


def _as_json(made: Imported) -> str:
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


def _as_text(made: Imported) -> str:
    """Returns a summary of the checkpoint, and the commands that train from it."""
    model, path = made.model, made.checkpoint
    tokenizer = f"{path}/tokenizer" if made.has_tokenizer else "TOKENIZER"
    length = f" train.sequence_length={model.max_positions}" if model.max_positions < 1024 else ""
    return "\n".join(
        [
            f"{path}: {model.num_layers} layers of width {model.hidden_size}, {model.num_parameters():,} parameters, "
            f"attention {model.attention}, from {' and '.join(made.stored_dtypes)}",
            *(f"  note: {note}" for note in made.notes),
            *_energy_table(made),
            "Next: prepare data with its tokenizer, then train from it",
            f"  mlra-scale prepare --output data/mine --source TEXT --tokenizer {tokenizer}",
            f"  mlra-scale train --preset {PRESETS.get(model.hidden_size, 'gpt2')} --config "
            f"{path}/config.yaml --resume {path} --run-dir runs/continued data.path=data/mine{length}",
        ]
    )


def _energy_table(made: Imported) -> list[str]:
    """Layers in rows, projections in columns, their mean below."""
    if not made.kept:
        return []
    names = [name for name in PROJECTIONS if any(entry.projection == name for entry in made.kept)]
    energy = {(entry.block, entry.projection): entry.energy for entry in made.kept}
    blocks = range(made.model.num_layers)
    rows = [(str(block), [energy[block, name] for name in names]) for block in blocks]
    rows.append(("mean", [sum(energy[block, name] for block in blocks) / len(blocks) for name in names]))
    cells = [[title, *(f"{value:.5f}" for value in values)] for title, values in rows]
    title = f"  energy kept at rank {made.model.rank} (share of the squared singular values)"
    return [title, *(f"  {line}" for line in table(["layer", *names], cells, left=0).split("\n"))]


COMMAND = Command(
    name="import",
    summary="turn a Hugging Face GPT-2 folder into a checkpoint to train from",
    description="Writes a GPT2LMHeadModel as a checkpoint of weights: dense exactly as it is, or with attention "
    "projections factorised by their singular value decomposition, so that a trained GPT-2 continues as MLRA.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    parents=[json_output()],
    has_side_effects=True,
)
