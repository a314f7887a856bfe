"""`mlra-scale evaluate`: measures a model's perplexity on text."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import count, json_output, place, text_fields, trained_model
from mlra_scale.console import InputError

if TYPE_CHECKING:
    from mlra_scale.data.tokenizer import LoadedTokenizer
    from mlra_scale.evaluation.models import OpenedModel
    from mlra_scale.evaluation.perplexity import Document, Perplexity

EXAMPLES = """examples:
  PROG runs/first --data data/python-docs
  PROG exported/first --text book.txt --stride 256
  PROG gpt2 --text 'test/*.jsonl' --field text --dtype bfloat16 --batch-size 8 --json
  PROG exported/first --task lambada

Each document is scored by itself: no context crosses from one to the next. A .txt file is one document, so is each
line of a .jsonl file and each document of prepared data. docs/evaluation.md has the formulas.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    from mlra_scale.config.text_tasks import NAMED_TEXTS

    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", nargs="+", metavar="SOURCE", help="files, folders, globs, as prepare_data.py has them"
    )
    source.add_argument("--data", type=place, metavar="FOLDER", help="a folder made by prepare_data.py")
    source.add_argument("--task", choices=NAMED_TEXTS, help="a text of the Hugging Face hub (docs/evaluation.md)")
    add = parser.add_argument
    add("--split", help="of --data: train or validation (default); of Hugging Face data sets: default test")
    add("--window", type=count, metavar="N", help="tokens of a window (default: the model's positions)")
    add("--stride", type=count, metavar="N", help="distance of the windows (default: half a window)")
    add("--start-token", action="store_true", help="score first tokens too, after the token that ends documents")
    add("--join", action="store_true", help="one stream of all documents, each ended by its token, as in training")
    add("--max-tokens", type=count, metavar="N", help="stop after N tokens of text")
    add("--batch-size", type=count, default=1, metavar="N", help="windows that pass the model at once (default: 1)")


def _run(options: argparse.Namespace) -> int:
    from mlra_scale.training.record import finite_or_none

    content = finite_or_none(_measure(options))  # a perplexity per word may be infinite
    print(json.dumps(content) if options.json else _as_text(content))
    return 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Opens model and text and scores it; returns the figures."""
    from mlra_scale.evaluation.models import open_model
    from mlra_scale.evaluation.perplexity import checked_window

    opened = open_model(options.model, options.dtype, options.device, options.trust_remote_code)
    loaded = opened.tokenizer(options.tokenizer)
    window, stride = checked_window(opened, options.window, options.stride)
    began = time.monotonic()
    found = _score(options, opened, loaded, window, stride)
    seconds = time.monotonic() - began
    return {
        "model": str(opened.path),
        "text": options.text or [str(options.data or options.task)],
        **found.figures(),
        "window": window,
        "stride": stride,
        "start_token": options.start_token,
        "joined": options.join,
        "dtype": options.dtype,
        "device": opened.module.device.type,
        "seconds": seconds,
    }


def _score(
    options: argparse.Namespace, opened: OpenedModel, loaded: LoadedTokenizer, window: int, stride: int
) -> Perplexity:
    from mlra_scale.config.text_tasks import NAMED_TEXTS
    from mlra_scale.evaluation.perplexity import perplexity, perplexity_of_windows
    from mlra_scale.evaluation.tasks import task_windows

    if options.task is None:
        start = loaded.end_of_document_token if options.start_token else None
        return perplexity(opened, _documents(options, loaded), window, stride, options.batch_size, start)
    if options.start_token or options.join or options.split:
        raise InputError("--start-token, --join and --split are for --text and --data; a task says how it is read")
    counts, task = Counter[str](), NAMED_TEXTS[options.task]
    found = task_windows(task, loaded, counts, opened.vocab_size, window, stride, options.max_tokens, _note)
    return perplexity_of_windows(opened, found, counts, options.batch_size)


def _note(line: str) -> None:
    print(f"evaluate: {line}", file=sys.stderr)


def _documents(options: argparse.Namespace, loaded: LoadedTokenizer) -> Iterable[Document]:
    from mlra_scale.evaluation.texts import PieceEncoder, documents_of_data, documents_of_sources, joined

    encoder = PieceEncoder(loaded, options.max_tokens)
    if options.data:
        documents = documents_of_data(options.data, options.split or "validation", encoder, loaded, _note)
    else:
        documents = documents_of_sources(
            options.text, encoder, options.field, options.split or "test", options.hf_config, _note
        )
    return [joined(documents, encoder.end_of_document)] if options.join else documents


def _as_text(content: dict[str, Any]) -> str:
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


COMMAND = Command(
    name="evaluate",
    summary="measure a model's perplexity on text",
    description="Perplexity per token and per word, and bits per byte, with a sliding window.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    parents=[trained_model(), text_fields(), json_output()],
)
