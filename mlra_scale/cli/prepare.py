"""`mlra-scale prepare`: turns text into a data set for training."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import place, seed, settings_of
from mlra_scale.console import InputError

if TYPE_CHECKING:
    from mlra_scale.data.mixture import Component

EXAMPLES = """examples:
  # no network needed: the documentation and sources that come with Python, and a BPE trained on them
  PROG --output data/python-docs --train-bpe 4096

  # local files of mixed kinds with GPT-2's tokenizer files; --field once, or once for each source
  PROG --output data/mine --source 'corpus/**/*.jsonl.gz' --source code.parquet \\
      --field text --field content --tokenizer gpt2/vocab.json gpt2/merges.txt --workers 8

  # several data sets with one tokenizer, and the configuration that trains on them by weight
  PROG --output data/mixture --mixture mixture.yaml --train-bpe 32000

  # a Hugging Face data set, streamed, with a tokenizer by name
  PROG --output data/wikitext --source hf:Salesforce/wikitext \\
      --config-name wikitext-103-raw-v1 --split train --tokenizer gpt2

  # compare every byte of a finished data set with what was recorded when it was made
  PROG --verify data/wikitext

  # how long the documents are, as a table and as a picture
  PROG --lengths data/wikitext

The same command continues an interrupted preparation of more than a minute.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--output",
        required=True,
        type=place,
        metavar="FOLDER",
        help="folder to make; it appears when it is finished",
    )
    add(
        "--source",
        dest="sources",
        action="append",
        metavar="SOURCE",
        help="may be repeated: a .txt (one document per file), .jsonl (one object per line), .json (the same, or an "
        "array of objects) or .parquet file, all but .parquet also with .gz or .zst; a folder (searched recursively), "
        "a glob, hf:NAME for a Hugging Face data set, or python-docs, the embedded corpus (default)",
    )
    add(
        "--field",
        dest="fields",
        action="append",
        metavar="NAME",
        help="field or column that holds the text (default: text); once, or once for each --source in their order",
    )
    add(
        "--mixture",
        type=place,
        metavar="FILE.yaml",
        help="several data sets with weights instead of --source: NAME: {weight: W, sources: [...]} (docs/data.md)",
    )
    add("--config-name", dest="hf_config", metavar="NAME", help="configuration of Hugging Face data sets")
    add("--split", dest="hf_split", help="split of Hugging Face data sets (default: train)")
    add(
        "--max-bytes",
        type=_count,
        metavar="N",
        help="stop after this much text (10e6 is fine; of each data set), for a quick look",
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer",
        nargs="+",
        default=(),
        metavar="NAME",
        help="a Hugging Face name or folder, a tokenizer.json, or GPT-2's vocab.json merges.txt (two files, or their "
        "folder; encoder.json vocab.bpe as well)",
    )
    tokenizer.add_argument(
        "--train-bpe",
        type=partial(_count, largest=10**7),
        metavar="N",
        help="train a byte-level BPE with N tokens on the corpus",
    )
    add("--train-bpe-bytes", type=_count, default=10**8, metavar="N", help="on at most this much text (default: 100e6)")
    add("--end-of-document", metavar="TOKEN", help="token that ends documents (default: the tokenizer's eos token)")
    add("--validation-fraction", type=_fraction, default=0.01, metavar="F", help="share of documents (default: 0.01)")
    add("--seed", type=partial(seed, bits=63), default=0, help="seed of the train/validation split (default: 0)")
    add(
        "--workers",
        type=partial(_count, largest=1024),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="tokenizing processes (default: one per usable core)",
    )
    add("--overwrite", action="store_true", help="replace a finished data set, once the new one is complete")
    add("--quiet", dest="progress", action="store_false", help="no progress bar")
    add("--verify", action=_Verify, type=place, metavar="FOLDER", help="check all of a finished data set, and stop")
    add(
        "--lengths",
        action=_Lengths,
        type=place,
        metavar="FOLDER",
        help="print how long the documents of a finished data set are, draw FOLDER/lengths.png, and stop",
    )


class _Verify(argparse.Action):
    """Like --help, an option that does its work at once and stops: it needs none of the others."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, folder: Any, __: str | None = None) -> NoReturn:
        """Verifies the folder, and exits if it is whole."""
        from mlra_scale.data.folder import verify_folder
        from mlra_scale.data.mixture import data_sets_in

        problems = []
        try:
            for each in data_sets_in(folder):
                problems += verify_folder(each, print)
        except OSError as error:
            problems = [str(error)]
        if problems:
            raise InputError("\n".join(problems))
        parser.exit()


class _Lengths(argparse.Action):
    """As `_Verify`: prints and draws the lengths of documents."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, folder: Any, __: str | None = None) -> NoReturn:
        """Prints the table, draws the picture where matplotlib is installed, and exits."""
        from mlra_scale.data.lengths import length_table, lengths_of
        from mlra_scale.data.mixture import data_sets_in

        found = {each.name: lengths_of(each) for each in data_sets_in(folder)}
        print(length_table(found))
        try:
            from mlra_scale.study.report.length_figure import draw_lengths
        except ImportError as error:
            print(f"no picture: it needs more libraries ({error}); install them with: pip install 'mlra-scale[report]'")
            parser.exit()
        try:
            print(draw_lengths(folder / "lengths.png", found))
        except OSError as error:
            raise InputError(f"{folder / 'lengths.png'} cannot be written: {error.strerror}") from error
        parser.exit()


def _count(text: str, largest: int = 2**63 - 1) -> int:
    """A whole number of at least 1, also written as 10e6."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (1 <= value <= largest and value == int(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {largest} (10e6 is fine)")
    return int(value)


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1") from None


def _components(options: argparse.Namespace) -> list[Component]:
    """Returns the data sets that the command line names.

    Raises:
        InputError: Options do not fit together, or the mixture cannot be read.
    """
    from mlra_scale.data.mixture import Component, read_mixture
    from mlra_scale.data.sources import SourceName

    if options.mixture is not None:
        if options.sources or options.fields or options.hf_config or options.hf_split:
            raise InputError("--mixture names sources, fields, splits and configurations itself: leave out the options")
        return read_mixture(options.mixture)
    sources, fields = options.sources or ["python-docs"], options.fields or ["text"]
    if len(fields) not in (1, len(sources)):
        raise InputError(f"--field is given {len(fields)} times for {len(sources)} sources: give it once, or for each")
    fields = fields * len(sources) if len(fields) == 1 else fields
    split, config = options.hf_split or "train", options.hf_config
    return [Component("", [SourceName(*pair, split, config) for pair in zip(sources, fields, strict=True)])]


def _run(options: argparse.Namespace) -> int:
    # Training a BPE uses threads: as many as there are workers later.
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.workers))
    from mlra_scale.data.manifest import summary
    from mlra_scale.data.mixture import MIXTURE_NAME
    from mlra_scale.data.options import PrepareOptions
    from mlra_scale.data.prepare import note_of_kept, prepare

    started = time.monotonic()
    options.components = _components(options)
    try:
        manifests = prepare(settings_of(options, PrepareOptions))
    except KeyboardInterrupt:
        print(f"{options.program}: interrupted; {note_of_kept(options.output)}", file=sys.stderr)
        return 130
    for manifest in manifests:
        print("\n".join(summary(manifest)))
    workers = f"{options.workers} worker{'s' if options.workers > 1 else ''}"
    print(f"  made in     {time.monotonic() - started:.1f} s with {workers}")
    print("Next: train on it with")
    chosen = ["--config", str(options.output / MIXTURE_NAME)]
    if options.mixture is None:
        chosen = [f"data.path={options.output}", f"model.vocab_size={manifests[0].tokenizer.vocabulary_size}"]
    run = f"runs/{options.output.resolve().name or 'first'}"
    print("  " + shlex.join(["mlra-scale", "train", "--preset", "laptop", "--run-dir", run, *chosen]))
    return 0


COMMAND = Command(
    name="prepare",
    summary="turn text into a data set with its tokenizer",
    description="Turns text into Megatron indexed data sets (train, validation) with tokenizer and manifest.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    has_side_effects=True,
)
