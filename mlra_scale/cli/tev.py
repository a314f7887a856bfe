"""`mlra-scale tev`: reports the token embedding variability of a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import count, json_output, place

if TYPE_CHECKING:
    from mlra_scale.stability.tev_folder import EmbeddingReport

EXAMPLES = """examples:
  PROG checkpoints/gpt2
  PROG checkpoints/gpt2 --extremes 10
  PROG checkpoints/odd-names --tensor encoder.table.weight --json
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "path",
        type=place,
        metavar="PATH",
        help="checkpoint folder (safetensors, sharded too) or a .safetensors file",
    )
    add("--tensor", metavar="NAME", help="the tensor to measure (default: found by its name, and an untied head)")
    add("--tokens", type=count, metavar="N", help="number of real tokens (default: vocab_size of config.json)")
    add("--extremes", type=count, default=0, metavar="N", help="list the N highest and lowest tokens")


def _run(options: argparse.Namespace) -> int:
    from mlra_scale.stability.tev_folder import tev_of_folder, token_texts

    found, is_tied = tev_of_folder(options.path, options.tensor, options.tokens, options.extremes)
    text_of = token_texts(options.path) if options.extremes else lambda token: None
    if options.json:
        embeddings = [_plain(embedding, text_of) for embedding in found]
        print(json.dumps({"path": str(options.path), "ddof": 0, "head_is_tied": is_tied, "embeddings": embeddings}))
        return 0
    lines = [line for embedding in found for line in _lines(embedding, text_of)]
    lines += ["  the head is tied to the input embedding"] if is_tied else []
    print("\n".join([str(options.path), *lines]))
    return 0


def _plain(embedding: EmbeddingReport, text_of: Callable[[int], str | None]) -> dict[str, Any]:
    def tokens(listed: list[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{"token": token, "text": text_of(token), "tev": value} for token, value in listed]

    content, statistics = asdict(embedding), embedding.statistics
    del content["statistics"]
    quantiles = {f"{q:g}": value for q, value in statistics.quantiles.items()}
    extremes = {"highest": tokens(statistics.highest), "lowest": tokens(statistics.lowest)}
    return content | asdict(statistics) | {"quantiles": quantiles} | extremes


def _lines(embedding: EmbeddingReport, text_of: Callable[[int], str | None]) -> list[str]:
    from mlra_scale.config.json_text import printable

    statistics = embedding.statistics
    padding = embedding.rows - statistics.num_tokens
    role = "input embedding" if embedding.role == "input" else "untied head"
    size = f"{statistics.num_tokens} tokens x {embedding.hidden_size}, {embedding.dtype}"
    lines = [
        f"  {role} {printable(embedding.name)}: {size}" + (f", {padding} padded rows left out" if padding else ""),
        f"    TEV mean {statistics.mean:.8g}   std {statistics.std:.8g}",
        "    quantiles " + "   ".join(f"{q:g}: {value:.6g}" for q, value in statistics.quantiles.items()),
        f"    norm of the mean embedding {statistics.mean_embedding_norm:.6g}",
        f"    mean row RMS {statistics.mean_row_rms:.6g}",
    ]
    for title, listed in (("highest", statistics.highest), ("lowest", statistics.lowest)):
        for number, (token, value) in enumerate(listed):
            text = text_of(token)
            shown = "" if text is None else f"  {printable(json.dumps(text, ensure_ascii=False))}"
            lines.append(f"    {title if number == 0 else '':<8} {token:>8}  {value:.6g}{shown}")
    return lines


COMMAND = Command(
    name="tev",
    summary="report the token embedding variability (TEV) of a Hugging Face checkpoint",
    description="Token embedding variability of a checkpoint: for each token the population standard deviation "
    "(ddof 0) of its embedding, then mean, spread and quantiles over the tokens. Only the embedding is read.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    parents=[json_output()],
)
