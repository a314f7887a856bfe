"""Options that several commands share, each defined once, and the types of option values."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from pathlib import Path
from typing import Any


def json_output(what: str = "one JSON object") -> argparse.ArgumentParser:
    """The option --json."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--json", action="store_true", help=f"print {what}")
    return parent


def configuration() -> argparse.ArgumentParser:
    """Where a configuration comes from; `add_overrides` adds the rest of it."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--preset", help="starting point, as for mlra_scale.train")
    parent.add_argument("--config", metavar="FILE.yaml", help="fields that replace the preset's")
    parent.add_argument(
        "--ds-config", metavar="FILE.json", help="DeepSpeed's own knobs; without it those of ds_configs/ are tried"
    )
    return parent


def add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds the dotted overrides of single fields, after the command's other positional arguments."""
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help=text)


def trained_model() -> argparse.ArgumentParser:
    """A model to evaluate or to generate with, and how it is loaded."""
    parent = argparse.ArgumentParser(add_help=False)
    add = parent.add_argument
    add(
        "model",
        type=place,
        metavar="MODEL",
        help="checkpoint, run directory (its newest one), or Hugging Face folder",
    )
    add("--tokenizer", metavar="NAME", help="tokenizer folder (default: the model's)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights and computation")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    add("--trust-remote-code", action="store_true", help="let a foreign folder run the code that it brings")
    return parent


def text_fields() -> argparse.ArgumentParser:
    """Where the text is in a source of several fields."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--field", default="text", help="field or column that holds the text (default: text)")
    parent.add_argument(
        "--config-name", dest="hf_config", metavar="NAME", help="configuration of Hugging Face data sets"
    )
    return parent


def settings_of(options: argparse.Namespace, kind: type[Any]) -> Any:
    """Returns a dataclass whose fields are the parsed options of the same names."""
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)})


def place(text: str) -> Path:
    """A file or folder; its name can be written into other files."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path; name one, such as . for this folder")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8; rename it") from None
    return Path(text)


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def seed(text: str, bits: int | None = None) -> int:
    """A whole number of at least 0, of so many bits at most."""
    if not text.isdecimal() or (bits is not None and int(text) >= 2**bits):
        end = "on" if bits is None else f"to 2^{bits} - 1"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 {end}")
    return int(text)


def positive(text: str, largest: float = math.inf) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf and value <= largest):
        limit = "" if largest == math.inf else f" up to {largest:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number{limit}")
    return value
