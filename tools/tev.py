#!/usr/bin/env python
"""Reports the token embedding variability of a Hugging Face checkpoint: python tools/tev.py --help."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from mlra_scale.stability.tev_folder import EmbeddingReport, FolderReport

EXAMPLES = """examples:
  python tools/tev.py checkpoints/gpt2
  python tools/tev.py checkpoints/gpt2 --extremes 10
  python tools/tev.py checkpoints/odd-names --tensor encoder.table.weight --json
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    result = argparse.ArgumentParser(
        prog="tev.py",
        description="Token embedding variability of a checkpoint: for each token the population standard deviation "
        "(ddof 0) of its embedding, then mean, spread and quantiles over the tokens. Only the embedding is read.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("path", type=Path, metavar="PATH", help="checkpoint folder (safetensors, sharded too) or a .safetensors file")
    add("--tensor", metavar="NAME", help="the tensor to measure (default: found by its name, and an untied head)")
    add("--tokens", type=_count, metavar="N", help="number of real tokens (default: vocab_size of config.json)")
    add("--extremes", type=_count, default=0, metavar="N", help="list the N highest and lowest tokens")
    add("--json", action="store_true", help="print one JSON object")
    return result


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 for bad input."""
    options = parser().parse_args(arguments)
    from mlra_scale.stability.tev_folder import FolderError, tev_of_folder, token_texts

    try:
        report = tev_of_folder(options.path, options.tensor, options.tokens, options.extremes)
        text_of = token_texts(options.path) if options.extremes else lambda token: None
    except FolderError as error:
        print(f"tev: error: {error}", file=sys.stderr)
        return 2
    print(as_json(options.path, report, text_of) if options.json else as_text(options.path, report, text_of))
    return 0


def as_json(path: Path, report: FolderReport, text_of: Callable[[int], str | None]) -> str:
    """Returns the report as one JSON object."""

    def tokens(listed: list[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{"token": token, "text": text_of(token), "tev": value} for token, value in listed]

    embeddings = []
    for embedding in report.embeddings:
        content = asdict(embedding) | asdict(embedding.statistics)
        del content["statistics"]
        content["quantiles"] = {f"{q:g}": value for q, value in embedding.statistics.quantiles.items()}
        content["highest"] = tokens(embedding.statistics.highest)
        content["lowest"] = tokens(embedding.statistics.lowest)
        embeddings.append(content)
    return json.dumps({"path": str(path), "ddof": 0, "head_is_tied": report.head_is_tied, "embeddings": embeddings})


def as_text(path: Path, report: FolderReport, text_of: Callable[[int], str | None]) -> str:
    """Returns the report as lines for people."""
    lines = [str(path)]
    for embedding in report.embeddings:
        lines += _lines(embedding, text_of)
    if report.head_is_tied:
        lines.append("  the head is tied to the input embedding")
    return "\n".join(lines)


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
        for place, (token, value) in enumerate(listed):
            text = text_of(token)
            shown = "" if text is None else f"  {printable(json.dumps(text, ensure_ascii=False))}"
            lines.append(f"    {title if place == 0 else '':<8} {token:>8}  {value:.6g}{shown}")
    return lines


if __name__ == "__main__":
    from mlra_scale.console import run_tool

    sys.exit(run_tool(main, has_side_effects=False))
