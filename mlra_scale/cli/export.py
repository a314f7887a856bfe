"""`mlra-scale export`: writes a checkpoint as a Hugging Face folder and verifies it."""

from __future__ import annotations

import argparse
import math
import re
import sys
from fractions import Fraction

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import count, place
from mlra_scale.console import InputError

EXAMPLES = """examples:
  PROG runs/first exported/first
  PROG runs/first/checkpoints/step-00000200 exported/first-bf16 --dtype bfloat16
  PROG runs/first exported/first-mlra --format mlra --text book.txt
  PROG runs/first exported/first --license apache-2.0 --language en --push-to-hub me/first

exit code: 0 exported (verified, unless --no-verify; and pushed, with --push-to-hub), 1 the verification failed, 2 wrong
input, a damaged checkpoint, or no access to the hub, 3 exported and not pushed. With 1 and 2 there is no output folder.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=place, metavar="CHECKPOINT", help="a checkpoint, or a run directory (its newest one)")
    add("output", type=place, metavar="OUTPUT", help="the folder to make")
    add("--format", choices=("gpt2", "mlra"), default="gpt2", help="stock GPT-2 (default), or factors kept and code")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="written type (float32)")
    add("--tokenizer", metavar="NAME", help="tokenizer folder or name (default: the checkpoint's copy)")
    add("--text", metavar="FILE", help="verify on this text (default: the run's own validation data)")
    add("--tokens", type=count, default=1024, metavar="N", help="about how many tokens to verify on (1024)")
    add("--no-verify", action="store_true", help="do not compare the folder with the checkpoint")
    add("--no-checksums", action="store_true", help="do not compare the checkpoint's files with their checksums first")
    add("--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="largest file, as in 500MB (5GB)")
    add("--force", action="store_true", help="replace the export at OUTPUT, once the new one is verified")
    add("--license", metavar="NAME", help="license in the model card, as the hub names it (apache-2.0, ...)")
    add("--language", metavar="CODE", nargs="+", default=[], help="languages in the model card (en ...)")
    add("--dataset", metavar="NAME", nargs="+", default=[], help="the hub's data sets of the training, in the card")
    add("--repo-name", metavar="NAME", help="what the card loads the model by (default: that of --push-to-hub)")
    add("--push-to-hub", metavar="OWNER/NAME", help="push the verified export to this repository, made if need be")
    add("--private", action="store_true", help="make the repository private; one that exists must be private")


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?", text.strip(), re.IGNORECASE)
    if found is None or Fraction(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    unit = (found[2] or "b").lower()
    return math.ceil(Fraction(found[1]) * (1024 if "i" in unit else 1000) ** "bkmgt".index(unit[0]))


def _check(options: argparse.Namespace) -> None:
    """Refuses what the section `export` of a configuration would refuse."""
    from pydantic import ValidationError

    from mlra_scale.config import ConfigError, ExportConfig
    from mlra_scale.config.problems import problems_of

    try:
        ExportConfig(
            repository=options.push_to_hub,
            license=options.license,
            languages=options.language,
            datasets=options.dataset,
        )
    except ValidationError as error:
        raise ConfigError(problems_of(error, ExportConfig)) from None


def _run(options: argparse.Namespace) -> int:
    from mlra_scale.checkpoint.huggingface.card import CardDetails
    from mlra_scale.checkpoint.huggingface.verification import VerificationError
    from mlra_scale.publishing import hub
    from mlra_scale.publishing.exporting import ExportRequest, export

    repository = options.push_to_hub
    if options.private and repository is None:
        raise InputError("--private is for a repository that is pushed to; name it with --push-to-hub")
    if options.no_verify and repository is not None:
        raise InputError("--no-verify and --push-to-hub: only a verified export is pushed; leave one of them out")
    _check(options)
    if repository is not None:
        hub.check_access(repository, options.private)
    card = CardDetails(
        repository=options.repo_name or repository,
        license=options.license,
        languages=tuple(options.language),
        datasets=tuple(options.dataset),
    )
    request = ExportRequest(
        options.checkpoint,
        options.output,
        options.format,
        options.dtype,
        options.max_shard_size,
        options.tokenizer,
        options.text,
        options.tokens,
        is_verified=not options.no_verify,
        has_checksums=not options.no_checksums,
        is_replacing=options.force,
        card=card,
    )
    try:
        export(request, print)
    except VerificationError as error:
        print(f"{options.program}: the export failed its verification and was removed: {error}", file=sys.stderr)
        return 1
    if repository is not None:
        try:
            hub.push(options.output, repository, options.private, print)
        except hub.HubError as error:
            print(f"{options.program}: {error}", file=sys.stderr)
            return 3
    return 0


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
