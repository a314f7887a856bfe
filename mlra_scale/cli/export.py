"""`mlra-scale export`: writes a checkpoint as a Hugging Face folder and verifies it."""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import count
from mlra_scale.console import InputError

if TYPE_CHECKING:
    from mlra_scale.checkpoint.huggingface.exporting import VerificationText
    from mlra_scale.checkpoint.reader import Store
    from mlra_scale.data.tokenizer import LoadedTokenizer

EXAMPLES = """examples:
  PROG runs/first exported/first
  PROG runs/first/checkpoints/step-00000200 exported/first-bf16 --dtype bfloat16
  PROG runs/first exported/first-mlra --format mlra --text book.txt

exit code: 0 exported (and verified, unless --no-verify), 1 the verification failed, 2 wrong input or a damaged
checkpoint. With 1 and 2 there is no output folder.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run directory (its newest one)")
    add("output", type=Path, metavar="OUTPUT", help="the folder to make")
    add("--format", choices=("gpt2", "mlra"), default="gpt2", help="stock GPT-2 (default), or factors kept and code")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="written type (float32)")
    add("--tokenizer", metavar="NAME", help="tokenizer folder or name (default: the checkpoint's copy)")
    add("--text", metavar="FILE", help="verify on this text (default: the run's own validation data)")
    add("--tokens", type=count, default=1024, metavar="N", help="about how many tokens to verify on (1024)")
    add("--no-verify", action="store_true", help="do not compare the folder with the checkpoint")
    add("--no-checksums", action="store_true", help="do not compare the checkpoint's files with their checksums first")
    add("--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="largest file, as in 500MB (5GB)")
    add("--force", action="store_true", help="replace the export at OUTPUT, once the new one is verified")


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?", text.strip(), re.IGNORECASE)
    if found is None or Fraction(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    unit = (found[2] or "b").lower()
    return math.ceil(Fraction(found[1]) * (1024 if "i" in unit else 1000) ** "bkmgt".index(unit[0]))


def _run(options: argparse.Namespace) -> int:
    # Megatron's import warns about libraries that nothing here would use.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from mlra_scale.checkpoint.huggingface.configuration import DTYPES
    from mlra_scale.checkpoint.huggingface.exporting import ExportOptions, check_target, export_checkpoint
    from mlra_scale.checkpoint.huggingface.verification import VerificationError
    from mlra_scale.checkpoint.reader import Store
    from mlra_scale.checkpoint.retention import checkpoint_at

    check_target(options.output, options.force)
    store = Store.open(checkpoint_at(options.checkpoint))
    print(f"checkpoint {store.folder}: {store.manifest.total_bytes / 1e9:.3g} GB in {len(store.manifest.files)} files")
    if not options.no_checksums and (faults := store.verify()):
        raise InputError(f"{'; '.join(faults)}; use another checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _exported_tokenizer(options.tokenizer, store, Path(folder, "tokenizer"))
        trained_with = _training_tokenizer(tokenizer, store)
        text = None if options.no_verify else _text(options, store, trained_with)
        if trained_with is None:
            print("the checkpoint has no copy of a tokenizer: none is exported; name one with --tokenizer")
        dtype, size = DTYPES[options.dtype], options.max_shard_size
        try:
            chosen = ExportOptions(options.format, dtype, size, tokenizer, options.force)
            export_checkpoint(store, options.output, chosen, text, print)
        except VerificationError as error:
            print(f"{options.program}: the export failed its verification and was removed: {error}", file=sys.stderr)
            return 1
    print(f"exported to {options.output}" + ("" if text else ", not verified"))
    return 0


def _exported_tokenizer(name: str | None, store: Store, folder: Path) -> Path | None:
    """Converts the tokenizer, named or imported, to a Hugging Face folder; None: the checkpoint's copy will do."""
    from mlra_scale.data.tokenizer import load_tokenizer, names_its_end, save_tokenizer
    from mlra_scale.evaluation.models import check_same_tokens

    own = store.tokenizer_folder
    # An imported one may be vocab.json and merges.txt alone, or leave its eos token to GPT-2's class.
    if name is None and (own is None or names_its_end(own)):
        return None
    loaded = load_tokenizer([name or str(own)])
    if name is not None and own is not None:
        check_same_tokens(loaded, own)
    save_tokenizer(loaded, folder)
    return folder


def _training_tokenizer(named: Path | None, store: Store) -> LoadedTokenizer | None:
    """Loads the tokenizer of the training: the checkpoint's own copy, or the named one where there is none."""
    from mlra_scale.checkpoint.huggingface.exporting import recorded_tokenizer
    from mlra_scale.data.tokenizer import load_tokenizer
    from mlra_scale.evaluation.verification_text import check_checksum

    folder = store.tokenizer_folder or named
    if folder is None:
        return None
    loaded = load_tokenizer([str(folder)])
    check_checksum(loaded, recorded_tokenizer(store))
    return loaded


def _text(options: argparse.Namespace, store: Store, trained_with: LoadedTokenizer | None) -> VerificationText:
    from mlra_scale.checkpoint.huggingface.exporting import VerificationText
    from mlra_scale.evaluation.verification_text import (
        documents_of_sequences,
        text_tokens,
        validation_documents,
        validation_tokens,
    )

    if options.text is None:
        if store.config is None:
            raise InputError(
                f"{store.folder} was not trained by this project, so it names no validation data; name a text to "
                "verify on with --text, or leave the verification out with --no-verify"
            )
        tokens_NS = validation_tokens(store.config, options.tokens)
        documents = [] if trained_with is None else validation_documents(store.config, trained_with, options.tokens)
        return VerificationText(tokens_NS, "the run's validation data", tuple(documents))
    if trained_with is None:
        raise InputError("--text needs a tokenizer, and the checkpoint has no copy of one; name it (--tokenizer)")
    length = store.model.max_positions if store.config is None else store.config.train.sequence_length
    tokens_NS = text_tokens([options.text], trained_with, length, options.tokens)
    # Of an imported model it is not known how its text was encoded.
    documents = [] if store.config is None else documents_of_sequences(trained_with, tokens_NS)
    return VerificationText(tokens_NS, Path(options.text).name, tuple(documents))


COMMAND = Command(
    name="export",
    summary="write a checkpoint as a Hugging Face folder, and verify it",
    description="Writes a checkpoint as a folder that Hugging Face transformers loads, as stock GPT-2 (factorised "
    "projections merged) or with its factors and code of its own. The folder is then loaded and its logits are "
    "compared with the trained model's; it gets its name only if they are equal to rounding.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    has_side_effects=True,
)
