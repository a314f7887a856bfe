"""`mlra-scale generate`: writes text with a model."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import json_output, place, seed, settings_of, trained_model
from mlra_scale.console import InputError

EXAMPLES = """examples:
  PROG runs/first --prompt 'Return a list of'
  PROG exported/first --prompts prompts.txt --greedy --json
  echo 'The module' | PROG runs/first/checkpoints/step-00000200 --temperature 0.7 --top-p 0.9

An empty prompt is the beginning of a document.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated (default: standard input)")
    prompts.add_argument("--prompts", type=place, metavar="FILE", help="a file with one prompt on each line")
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=50, metavar="N", help="most tokens of a text (default: 50)")
    add("--num-samples", type=int, default=1, metavar="N", help="texts for every prompt (default: 1)")
    add(
        "--greedy",
        dest="is_greedy",
        action="store_true",
        help="always the most probable token; otherwise tokens are drawn",
    )
    add("--temperature", type=float, default=1.0, metavar="T", help="divides the logits before drawing (default: 1)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens (default: from all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens with probability P together")
    add("--seed", type=partial(seed, bits=63), default=0, metavar="N", help="of the drawing (default: 0)")
    add("--batch-size", type=int, default=8, metavar="N", help="texts that are written at once (default: 8)")
    add(
        "--special-tokens",
        dest="has_special_tokens",
        action="store_true",
        help="show tokens such as the one that ends documents",
    )


def _run(options: argparse.Namespace) -> int:
    prompts = _prompts(options)
    from mlra_scale.evaluation.generation import GenerationOptions, generate
    from mlra_scale.evaluation.models import open_model

    opened = open_model(options.model, options.dtype, options.device, options.trust_remote_code)
    loaded = opened.tokenizer(options.tokenizer)
    for number, text in enumerate(generate(opened, loaded, prompts, settings_of(options, GenerationOptions))):
        if options.json:
            print(json.dumps(asdict(text)), flush=True)
        else:
            print(("-" * 20 + "\n" if number else "") + text.prompt + text.text, flush=True)
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
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
        raise InputError(f"{options.prompts} cannot be read: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"prompt {error.object!a} is not UTF-8 text") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{options.prompts or 'standard input'} is not UTF-8 text ({error.reason})") from error
    if not prompts:
        raise InputError(f"{options.prompts} holds no prompt; it takes one on each line")
    return prompts


COMMAND = Command(
    name="generate",
    summary="write text with a model",
    description="Writes on from prompts with a checkpoint or a Hugging Face folder.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    parents=[trained_model(), json_output("one JSON object per text")],
)
