"""Stored configurations: the version of config.yaml, and how an older one is read.

config.yaml begins with `version`; a file without it was written before versions existed and counts as version 1. A file
that a person writes for `--config` needs none. A change that renames or removes a field raises VERSION and adds to
`_CONVERSIONS` a function that turns the older values into the newer ones, so that stored runs stay readable.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mlra_scale.config import yaml_text
from mlra_scale.config.json_text import read_bytes

logger = logging.getLogger(__name__)

KEY = "version"
VERSION = 4
"""Version 2 is version 1 with the key `version`; version 3 has no `parallel.low_rank_plan: sharded`; version 4 has
`optim.rules` in place of `optim.decay_factors` and `optim.decay_embedding`."""

NO_SHARDED = "the plan sharded was removed: it was the fastest one in 0 of 36 measured cases"

MAX_BYTES = 2**20
"""Size up to which a configuration file is read, in bytes: parsing a larger one would take minutes."""

Values = dict[str, Any]


def _without_sharded(values: Values) -> Values:
    parallel = values.get("parallel")
    if not isinstance(parallel, dict) or parallel.get("low_rank_plan") != "sharded":
        return values
    _notice_sharded()
    return {**values, "parallel": {**parallel, "low_rank_plan": "auto"}}


@cache
def _notice_sharded() -> None:
    """Once per process: a start reads the configurations of a run and of its checkpoints."""
    logger.warning("parallel.low_rank_plan = 'sharded' in a stored configuration: %s; auto takes its place", NO_SHARDED)


class _Converted(Values):
    """A rule that an old field became."""


_KINDS = {"decay_factors": ("factor",), "decay_embedding": ("embedding", "positions")}


def _with_rules(values: Values) -> Values:
    """Turns `decay_factors` and `decay_embedding` into rules with the same results."""
    optim = values.get("optim")
    if not isinstance(optim, dict):
        return values
    optim = dict(optim)
    rules: list[Values] = []
    for field, kinds in _KINDS.items():
        if isinstance(optim.get(field), bool) and not optim.pop(field):
            rules += [_Converted(kind=kind, weight_decay=0.0) for kind in kinds]
    given = optim.get("rules", [])
    if rules and isinstance(given, list):
        optim["rules"] = [*rules, *given]
    return {**values, "optim": optim}


_CONVERSIONS: Mapping[int, Callable[[Values], Values]] = {1: lambda values: values, 2: _without_sharded, 3: _with_rules}
"""For every version before the current one: what turns its values into those of the next version."""


def parse(text: str) -> Any:
    """Parses the text of a configuration file.

    Returns:
        Its values in the form of the current version, without the key `version`. A document that is no mapping is
        returned as it is, for the schema to refuse.

    Raises:
        ValueError: It is not YAML, or its version is not a number or newer than this program.
    """
    values = yaml_text.load(text)
    if not isinstance(values, dict):
        return values
    version = values.get(KEY, 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{KEY} = {version!r}: must be a whole number from 1 to {VERSION}")
    if version > VERSION:
        raise ValueError(
            f"{KEY} = {version}: the file was written by a newer program, and this one reads versions up to {VERSION}; "
            "use the program that wrote it"
        )
    values.pop(KEY, None)
    for older in range(version, VERSION):
        values = _CONVERSIONS[older](values)
    return values


def without_idle_rules(values: Any) -> Any:
    """Returns the values of a whole configuration without converted rules for what its model does not have.

    `decay_factors: false` had no effect in a dense model, where a rule for factors is an error. Whether a model is
    dense is known when presets, files and overrides are merged.
    """
    model, optim = (values.get(name) if isinstance(values, dict) else None for name in ("model", "optim"))
    if not (isinstance(model, dict) and isinstance(optim, dict) and model.get("attention") == "dense"):
        return values
    rules = optim.get("rules")
    if not isinstance(rules, list):
        return values
    kept = [rule for rule in rules if not (isinstance(rule, _Converted) and rule["kind"] == "factor")]
    return {**values, "optim": {**optim, "rules": kept}}


def with_version(values: Mapping[str, Any]) -> Values:
    """Returns the values of a configuration file as they are stored."""
    return {KEY: VERSION, **values}


def read_text(path: Path) -> str:
    """Reads the text of a stored configuration.

    Raises:
        ValueError: It cannot be read, is too large or not UTF-8; the message begins with the path.
    """
    try:
        return read_bytes(path, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
