#!/usr/bin/env python
"""Writes text with a model: python tools/generate.py --help."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from mlra_scale.evaluation.generation import Text

EXAMPLES = """examples:
  python tools/generate.py runs/first --prompt 'Return a list of'
  python tools/generate.py exported/first --prompts prompts.txt --greedy --json
  echo 'The module' | python tools/generate.py runs/first/checkpoints/step-00000200 --temperature 0.7 --top-p 0.9

An empty prompt is the beginning of a document.
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    result = argparse.ArgumentParser(
        prog="generate.py",
        description="Writes on from prompts with a checkpoint or a Hugging Face folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("model", type=Path, metavar="MODEL", help="checkpoint, run directory (its newest one), or Hugging Face folder")
    prompts = result.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated (default: standard input)")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="a file with one prompt on each line")
    add("--max-new-tokens", type=int, default=50, metavar="N", help="most tokens of a text (default: 50)")
    add("--num-samples", type=int, default=1, metavar="N", help="texts for every prompt (default: 1)")
    add("--greedy", action="store_true", help="always the most probable token; otherwise tokens are drawn")
    add("--temperature", type=float, default=1.0, metavar="T", help="divides the logits before drawing (default: 1)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens (default: from all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens with probability P together")
    add("--seed", type=_seed, default=0, metavar="N", help="of the drawing (default: 0)")
    add("--batch-size", type=int, default=8, metavar="N", help="texts that are written at once (default: 8)")
    add("--special-tokens", action="store_true", help="show tokens such as the one that ends documents")
    add("--tokenizer", metavar="NAME", help="tokenizer folder (default: the model's)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights and computation")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    add("--trust-remote-code", action="store_true", help="let a foreign folder run the code that it brings")
    add("--json", action="store_true", help="print one JSON object per text")
    return result


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 for bad input."""
    options = parser().parse_args(arguments)
    from mlra_scale.checkpoint.files import CheckpointError
    from mlra_scale.data.errors import DataError
    from mlra_scale.evaluation import EvaluationError

    try:
        for place, text in enumerate(write(options)):
            if options.json:
                print(json.dumps(asdict(text)), flush=True)
            else:
                print(("-" * 20 + "\n" if place else "") + text.prompt + text.text, flush=True)
    except (CheckpointError, DataError, EvaluationError) as error:
        print(f"generate: error: {error}", file=sys.stderr)
        return 2
    return 0


def write(options: argparse.Namespace) -> Iterator[Text]:
    """Reads the prompts, opens the model and yields the texts."""
    prompts = _prompts(options)
    from mlra_scale.evaluation.generation import GenerationOptions, generate
    from mlra_scale.evaluation.models import open_model

    opened = open_model(options.model, options.dtype, options.device, options.trust_remote_code)
    loaded = opened.tokenizer(options.tokenizer)
    settings = GenerationOptions(
        max_new_tokens=options.max_new_tokens,
        num_samples=options.num_samples,
        is_greedy=options.greedy,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        batch_size=options.batch_size,
        has_special_tokens=options.special_tokens,
    )
    yield from generate(opened, loaded, prompts, settings)


def _prompts(options: argparse.Namespace) -> list[str]:
    from mlra_scale.evaluation import EvaluationError

    try:
        if options.prompt is not None:
            prompts = list(options.prompt)
        elif options.prompts is None:
            prompts = [sys.stdin.read().removesuffix("\n")]
        else:
            text = options.prompts.read_text(encoding="utf-8")
            prompts = [line for line in text.split("\n") if line.strip()]
        for prompt in prompts:
            prompt.encode("utf-8")  # bytes that are no text come from the command line as halves of characters
    except OSError as error:
        raise EvaluationError(f"{options.prompts} cannot be read: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise EvaluationError(f"prompt {error.object!a} is not UTF-8 text") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{options.prompts or 'standard input'} is not UTF-8 text ({error.reason})") from error
    if not prompts:
        raise EvaluationError(f"{options.prompts} holds no prompt; it takes one on each line")
    return prompts


if __name__ == "__main__":
    from mlra_scale.console import run_tool

    sys.exit(run_tool(main, has_side_effects=False))
