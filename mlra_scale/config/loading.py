"""Preset, file, DeepSpeed JSON and dotted overrides become one configuration; all mistakes are reported together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlra_scale import bundled
from mlra_scale.config import stored_yaml, yaml_text
from mlra_scale.config.deepspeed_json import check_deepspeed_keys
from mlra_scale.config.json_text import parse_json
from mlra_scale.config.presets import preset_names, preset_values
from mlra_scale.config.problems import (
    REQUIRED,
    ConfigError,
    Problem,
    model_at,
    nearest,
    problems_of,
    replacement,
    unknown_key,
)
from mlra_scale.config.schema import Config


@dataclass(frozen=True)
class Named:
    """Fields that a person named, as dotted names; what is inside `deepspeed` or `data.blend` counts as that field.

    Attributes:
        on_command_line: By overrides (and `deepspeed` by a DeepSpeed file).
        in_file: In the config file, whether or not an override replaced them.
    """

    on_command_line: frozenset[str] = frozenset()
    in_file: frozenset[str] = frozenset()


def load_config(
    preset: str | None = None,
    config_file: str | Path | None = None,
    ds_config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Builds the configuration of a run: the first value that `load_named_config` returns."""
    return load_named_config(preset, config_file, ds_config_file, overrides)[0]


def load_named_config(
    preset: str | None = None,
    config_file: str | Path | None = None,
    ds_config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    run_config: Path | None = None,
) -> tuple[Config, Named]:
    """Builds the configuration of a run; later sources win: preset, config file, DeepSpeed file, overrides.

    A preset's warm-up belongs to its length: with fewer steps than the preset has, and no warm-up given, it shrinks in
    proportion (never below one step). It does not grow, so that extending a run leaves its beginning as it was.

    Args:
        preset: Name of a preset, or None. A config file may name one instead.
        config_file: YAML file with some or all fields; the `config.yaml` of a run directory is one.
        ds_config_file: JSON file with DeepSpeed's own knobs; replaces the `deepspeed` section as a whole.
            `ds_configs/NAME.json` that is not there is the package's own file of that name.
        overrides: "section.field=value" each, the value read as YAML. "section.field?=value" is a default: it holds
            where neither the file nor an override has the field, and does not count as named.
        run_config: The `config.yaml` of the run that is to be continued, where neither preset nor config file is given.
            Every field of it is resolved, its preset is a note, and none of its fields counts as named.

    Returns:
        The configuration, every field checked by itself (`validate` checks them together), and which of its fields
        were named where.

    Raises:
        ConfigError: With all mistakes of all sources.
    """
    problems: list[Problem] = []
    if run_config is not None:
        given, name = _read_mapping(run_config, "--run-dir", problems), None
        in_file: frozenset[str] = frozenset()
    else:
        given = {}
        if config_file is not None:
            given = _read_mapping(Path(config_file), "--config", problems)
        in_file = frozenset(_field_names(given))
        name = _choose_preset(preset, given, problems)
        if name is None and config_file is None:
            remedy = f"give one of {', '.join(preset_names())}, or a --config file, or continue a run: --resume auto "
            problems.append(Problem("--preset", None, remedy + "with the --run-dir that holds it"))
    on_command_line: set[str] = set()
    if ds_config_file is not None:
        given["deepspeed"] = _read_mapping(bundled.ds_config(ds_config_file), "--ds-config", problems, _json_object)
        on_command_line.add("deepspeed")
    for text in (text for text in overrides if not _is_default(text)):
        on_command_line |= _apply_override(given, text, problems)
    for text in filter(_is_default, overrides):
        path, _, value = text.partition("?=")
        if path not in set(_field_names(given)):
            _apply_override(given, f"{path}={value}", problems)
    values: dict[str, Any] = {}
    if name is not None:
        try:
            values = preset_values(name)
        except ConfigError as error:
            problems += error.problems
    _merge(values, given)
    if isinstance(values.get("deepspeed"), dict):
        problems += check_deepspeed_keys(values["deepspeed"])
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found = problems_of(error, Config)
        if problems:
            # Without its preset or file a configuration lacks most fields: that is the mistake, not each of them.
            found = [problem for problem in found if problem.remedy != REQUIRED]
        raise ConfigError(problems + found) from None
    if problems:
        raise ConfigError(problems)
    return config, Named(frozenset(on_command_line), in_file)


def _is_default(override: str) -> bool:
    return override.partition("=")[0].endswith("?")


def _field_names(values: dict[str, Any]) -> Iterator[str]:
    """Yields the dotted names of the fields in plain values of whatever shape a file has."""
    for key, value in values.items():
        if model_at(Config, [key]) is None:
            yield key
        elif isinstance(value, dict):
            yield from (f"{key}.{name}" for name in value)


def read_text(path: Path, field: str, problems: list[Problem]) -> str | None:
    """Returns the text of a file or pipe, or None with one more problem of `field` in `problems`."""
    limit = stored_yaml.MAX_BYTES
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) <= limit:
            return content.decode("utf-8")
        remedy = f"is larger than {limit} bytes; name another file"
    except UnicodeDecodeError as error:
        remedy = f"is not UTF-8 text (byte {error.start})"
    except OSError as error:
        remedy = f"cannot be read: {error.strerror}"
    problems.append(Problem(field, str(path), remedy))
    return None


def _json_object(text: str) -> dict[str, Any]:
    values = parse_json(text, where="the file")
    if not isinstance(values, dict):
        raise ValueError("must hold a JSON object { ... } at its top")
    return values


def _read_mapping(
    path: Path, flag: str, problems: list[Problem], parse: Callable[[str], Any] = stored_yaml.parse
) -> dict[str, Any]:
    """Returns the mapping in a file ({} for an empty one), or {} with one more problem of `flag` in `problems`."""
    text = read_text(path, flag, problems)
    try:
        values = parse(text) if text is not None else {}
        if not isinstance(values, dict | None):
            raise ValueError("must hold sections (model:, train:, ...) at its top")
        return values or {}
    except ValueError as error:
        problems.append(Problem(flag, str(path), str(error)))
        return {}


def _choose_preset(preset: str | None, from_file: dict[str, Any], problems: list[Problem]) -> str | None:
    in_file = from_file.get("preset")
    if in_file is not None and not isinstance(in_file, str):
        problems.append(Problem("preset", from_file.pop("preset"), "must be the name of a preset"))
        return preset
    if preset is not None and in_file is not None and preset != in_file:
        problems.append(Problem("--preset", preset, f"the config file starts from '{in_file}'; name one preset only"))
    return preset if preset is not None else in_file


def _merge(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Puts what the user gave over the preset's values, section by section."""
    preset_train, preset_optim = values.get("train", {}), values.get("optim", {})
    for key, value in given.items():
        is_section = model_at(Config, [key]) is not None
        if is_section and value is None:
            # A section with all its lines commented out.
            values.setdefault(key, {})
        elif is_section and isinstance(value, dict):
            values[key] = {**values.get(key, {}), **value}
        else:
            values[key] = value
    train, optim = given.get("train"), given.get("optim")
    steps = train.get("steps") if isinstance(train, dict) else None
    if not isinstance(steps, int) or not 0 < steps < preset_train.get("steps", 0):
        return
    if isinstance(optim, dict | None) and (optim or {}).get("warmup_steps") is None:
        scaled = -(-preset_optim["warmup_steps"] * steps // preset_train["steps"])
        values["optim"] = {**values["optim"], "warmup_steps": scaled}


def _apply_override(values: dict[str, Any], text: str, problems: list[Problem]) -> set[str]:
    """Sets one dotted field from "a.b=value" and returns its name, alone in a set; an empty set for a bad override."""
    path, separator, value_text = text.partition("=")
    if not separator or not path:
        problems.append(Problem("override", text, "must look like section.field=value"))
        return set()
    try:
        value = yaml_text.load(value_text)
    except ValueError as error:
        problems.append(Problem(path, value_text, f"is not YAML: {error}"))
        return set()
    try:
        parts = _split_path(path)
        target = values
        for depth, part in enumerate(parts[:-1], start=1):
            if target.get(part) is None:
                target[part] = {}
            if not isinstance(target[part], dict):
                raise ValueError(f"{'.'.join(parts[:depth])} is already set to {target[part]!r}, which has no fields")
            target = target[part]
    except ValueError as error:
        problems.append(Problem(path, value, str(error)))
        return set()
    target[parts[-1]] = value
    is_in_section = model_at(Config, parts[:1]) is not None
    return {".".join(parts[: 2 if is_in_section else 1])}


def _split_path(path: str) -> list[str]:
    """Splits a dotted path into keys; raises ValueError with the reason if it leads to no field."""
    section, *inner = path.split(".")
    if section == "preset":
        raise ValueError("a preset is where values start from, not an override; use --preset")
    if section not in Config.model_fields:
        near = nearest(section, Config.model_fields)
        raise ValueError(f"unknown key '{section}'{near}" if inner else unknown_key(section, Config))
    model = model_at(Config, [section])
    if model is None:  # deepspeed, whose keys are checked as a whole
        return [section, *inner]
    if not inner:
        raise ValueError(f"is a section; set one of its fields: {', '.join(model.model_fields)}")
    field, *rest = inner
    if field not in model.model_fields:
        raise ValueError(replacement(field, model) or unknown_key(field, model, Config))
    if not rest:
        return [section, field]
    if field != "blend":
        raise ValueError(f"'{field}' is a value and has no fields")
    return [section, field, ".".join(rest)]  # the keys of a blend are paths, which have dots of their own
