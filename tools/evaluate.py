#!/usr/bin/env python
"""Measures a model's perplexity on text: python tools/evaluate.py --help."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from mlra_scale.data.tokenizer import LoadedTokenizer
    from mlra_scale.evaluation.perplexity import Document

EXAMPLES = """examples:
  python tools/evaluate.py runs/first --data data/python-docs
  python tools/evaluate.py exported/first --text book.txt --stride 256
  python tools/evaluate.py gpt2 --text 'test/*.jsonl' --field text --dtype bfloat16 --batch-size 8 --json

Each document is scored by itself: no context crosses from one to the next. A .txt file is one document, so is each
line of a .jsonl file and each document of prepared data. docs/evaluation.md has the formulas.
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    result = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Perplexity per token and per word, and bits per byte, with a sliding window.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("model", type=Path, metavar="MODEL", help="checkpoint, run directory (its newest one), or Hugging Face folder")
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", nargs="+", metavar="SOURCE", help="files, folders, globs, as prepare_data.py has them"
    )
    source.add_argument("--data", type=Path, metavar="FOLDER", help="a folder made by prepare_data.py")
    add("--split", help="of --data: train or validation (default); of Hugging Face data sets: default test")
    add("--field", default="text", help="field or column that holds the text (default: text)")
    add("--config-name", metavar="NAME", help="configuration of Hugging Face data sets")
    add("--tokenizer", metavar="NAME", help="tokenizer folder (default: the model's)")
    add("--window", type=_count, metavar="N", help="tokens of a window (default: the model's positions)")
    add("--stride", type=_count, metavar="N", help="distance of the windows (default: half a window)")
    add("--start-token", action="store_true", help="score first tokens too, after the token that ends documents")
    add("--join", action="store_true", help="one stream of all documents, each ended by its token, as in training")
    add("--max-tokens", type=_count, metavar="N", help="stop after N tokens of text")
    add("--batch-size", type=_count, default=1, metavar="N", help="windows that pass the model at once (default: 1)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights and computation")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    add("--trust-remote-code", action="store_true", help="let a foreign folder run the code that it brings")
    add("--json", action="store_true", help="print one JSON object")
    return result


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 for bad input."""
    options = parser().parse_args(arguments)
    from mlra_scale.checkpoint.files import CheckpointError
    from mlra_scale.data.errors import DataError
    from mlra_scale.evaluation import EvaluationError

    try:
        content = measure(options)
    except (CheckpointError, DataError, EvaluationError) as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(content) if options.json else as_text(content))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Opens model and text and scores it; returns the figures."""
    from mlra_scale.evaluation.models import open_model
    from mlra_scale.evaluation.perplexity import checked_window, perplexity

    opened = open_model(options.model, options.dtype, options.device, options.trust_remote_code)
    loaded = opened.tokenizer(options.tokenizer)
    window, stride = checked_window(opened, options.window, options.stride)
    start = loaded.end_of_document_token if options.start_token else None
    began = time.monotonic()
    found = perplexity(opened, _documents(options, loaded), window, stride, options.batch_size, start)
    seconds = time.monotonic() - began
    return {
        "model": str(opened.path),
        "text": [str(options.data)] if options.data else options.text,
        "documents": found.num_documents,
        "tokens_scored": found.num_tokens,
        "words": found.num_words,
        "bytes": found.num_bytes,
        "negative_log_likelihood": found.negative_log_likelihood,
        "loss": found.loss,
        "token_perplexity": _finite(found.token_perplexity),
        "word_perplexity": _finite(found.word_perplexity),
        "bits_per_byte": _finite(found.bits_per_byte),
        "window": window,
        "stride": stride,
        "start_token": options.start_token,
        "joined": options.join,
        "dtype": options.dtype,
        "device": opened.module.device.type,
        "seconds": seconds,
    }


def _documents(options: argparse.Namespace, loaded: LoadedTokenizer) -> Iterable[Document]:
    from mlra_scale.evaluation.texts import PieceEncoder, documents_of_data, documents_of_sources, joined

    def note(line: str) -> None:
        print(f"evaluate: {line}", file=sys.stderr)

    encoder = PieceEncoder(loaded, options.max_tokens)
    if options.data:
        documents = documents_of_data(options.data, options.split or "validation", encoder, loaded, note)
    else:
        documents = documents_of_sources(
            options.text, encoder, options.field, options.split or "test", options.config_name, note
        )
    return [joined(documents, encoder.end_of_document)] if options.join else documents


def _finite(value: float) -> float | None:
    """JSON has no infinity: the perplexity of a model that knows nothing of long words may be one."""
    return value if math.isfinite(value) else None


def as_text(content: dict[str, Any]) -> str:
    """Returns the figures as lines for people."""

    def number(name: str) -> str:
        return "too large to write" if content[name] is None else f"{content[name]:.6g}"

    count = content["documents"]
    rate = content["tokens_scored"] / content["seconds"]
    windows = f"windows of {content['window']} tokens, stride {content['stride']}"
    return "\n".join(
        [
            f"{content['model']} on {' '.join(content['text'])}",
            f"  token perplexity {number('token_perplexity')}   (loss {content['loss']:.6g} nats per token)",
            f"  word perplexity  {number('word_perplexity')}",
            f"  bits per byte    {number('bits_per_byte')}",
            f"  {count:,} document{'s' * (count != 1)}: {content['tokens_scored']:,} tokens scored, "
            f"{content['words']:,} words, {content['bytes']:,} bytes",
            f"  {windows}, {content['dtype']} on {content['device']}: {content['seconds']:.1f} s, {rate:,.0f} tokens/s",
        ]
    )


if __name__ == "__main__":
    from mlra_scale.console import run_tool

    sys.exit(run_tool(main, has_side_effects=False))
