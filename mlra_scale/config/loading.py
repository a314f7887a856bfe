"""Preset, file, DeepSpeed JSON and dotted overrides become one configuration, with every mistake told at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mlra_scale.config import stored_yaml, yaml_text
from mlra_scale.config.deepspeed_keys import check_deepspeed_keys
from mlra_scale.config.json_text import parse_json
from mlra_scale.config.presets import preset_names, preset_values
from mlra_scale.config.problems import REQUIRED, ConfigError, Problem, model_at, nearest, problems_of
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
    """Builds the configuration of a run: what `load_named_config` returns first."""
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
        overrides: "section.field=value" each, the value read as YAML. "section.field?=value" is a default: it holds
            where neither the file nor an override has the field, and does not count as named.
        run_config: The `config.yaml` of the run that is to be continued, where neither preset nor config file is given.
            Every field of it is resolved, its preset is a note, and none of its fields counts as named.

    Returns:
        The configuration, every field checked by itself (`validate` checks them together), and which of its fields
        were named where.

    Raises:
        ConfigError: With everything that is wrong in all sources.
    """
    problems: list[Problem] = []
    if run_config is None:
        given = _read_config_file(config_file, "--config", problems)
        in_file = frozenset(_field_names(given))
        name = _choose_preset(preset, given, problems)
    else:
        given, in_file, name = _read_config_file(run_config, "--run-dir", problems), frozenset(), None
    if name is None and config_file is None and run_config is None:
        remedy = f"give one of {', '.join(preset_names())}, or a --config file, or continue a run: --resume auto with "
        problems.append(Problem("--preset", None, remedy + "the --run-dir that holds it"))
    if ds_config_file is not None:
        given["deepspeed"] = _read_json(Path(ds_config_file), problems)
    on_command_line = {"deepspeed"} if ds_config_file is not None else set()
    for text in overrides:
        if not _is_default(text):
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
    try:
        with path.open("rb") as file:
            content = file.read(stored_yaml.MAX_BYTES + 1)
        if len(content) > stored_yaml.MAX_BYTES:
            problems.append(
                Problem(field, str(path), f"is larger than {stored_yaml.MAX_BYTES} bytes; name another file")
            )
            return None
        return content.decode("utf-8")
    except FileNotFoundError:
        problems.append(Problem(field, str(path), "there is no such file"))
    except UnicodeDecodeError as error:
        problems.append(Problem(field, str(path), f"is not UTF-8 text (byte {error.start})"))
    except OSError as error:
        problems.append(Problem(field, str(path), f"cannot be read: {error.strerror}"))
    return None


def _read_config_file(path: str | Path | None, flag: str, problems: list[Problem]) -> dict[str, Any]:
    if path is None:
        return {}
    text = read_text(Path(path), flag, problems)
    if text is None:
        return {}
    try:
        values = stored_yaml.parse(text)
    except ValueError as error:
        problems.append(Problem(flag, str(path), str(error)))
        return {}
    if values is None:
        return {}
    if not isinstance(values, dict):
        problems.append(Problem(flag, str(path), "must hold sections (model:, train:, ...) at its top"))
        return {}
    return values


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
        if model_at(Config, [key]) is None:
            values[key] = value
        elif value is None:
            # A section with all its lines commented out.
            values.setdefault(key, {})
        elif isinstance(value, dict):
            values[key] = {**values.get(key, {}), **value}
        else:
            values[key] = value
    steps, warmup_steps = _field(given, "train", "steps"), _field(given, "optim", "warmup_steps")
    is_shorter = isinstance(steps, int) and 0 < steps < preset_train.get("steps", 0)
    if is_shorter and warmup_steps is None and isinstance(values["optim"], dict):
        scaled = -(-preset_optim["warmup_steps"] * steps // preset_train["steps"])
        values["optim"] = {**values["optim"], "warmup_steps": scaled}


def _field(values: dict[str, Any], section: str, name: str) -> Any:
    inner = values.get(section)
    return inner.get(name) if isinstance(inner, dict) else None


def _read_json(path: Path, problems: list[Problem]) -> dict[str, Any]:
    text = read_text(path, "--ds-config", problems)
    if text is None:
        return {}
    try:
        values = parse_json(text, "the file")
    except ValueError as error:
        problems.append(Problem("--ds-config", str(path), str(error).removeprefix("the file ")))
        return {}
    if not isinstance(values, dict):
        problems.append(Problem("--ds-config", str(path), "must be a JSON object: { ... }"))
        return {}
    return values


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
    except ValueError as error:
        problems.append(Problem(path, value, str(error)))
        return set()
    target = values
    for depth, part in enumerate(parts[:-1], start=1):
        if target.get(part) is None:
            target[part] = {}
        if not isinstance(target[part], dict):
            where = ".".join(parts[:depth])
            problems.append(Problem(path, value, f"{where} is already set to {target[part]!r}, which has no fields"))
            return set()
        target = target[part]
    target[parts[-1]] = value
    is_in_section = model_at(Config, parts[:1]) is not None
    return {".".join(parts[: 2 if is_in_section else 1])}


def _split_path(path: str) -> list[str]:
    """Splits a dotted path into keys; raises ValueError with the reason if it leads to no field."""
    parts = path.split(".")
    if parts[0] == "preset":
        raise ValueError("a preset is where values start from, not an override; use --preset")
    model: type[BaseModel] = Config
    for index, part in enumerate(parts):
        if part not in model.model_fields:
            raise ValueError(f"unknown key '{part}'" + nearest(part, model.model_fields))
        inner = model_at(model, [part])
        if inner is not None:
            model = inner
            continue
        rest = parts[index + 1 :]
        if rest and part == "blend":
            # The keys of a blend are paths, which have dots of their own.
            return [*parts[: index + 1], ".".join(rest)]
        if rest and part != "deepspeed":
            raise ValueError(f"'{part}' is a value and has no fields")
        return parts
    raise ValueError(f"is a section; set one of its fields: {', '.join(model.model_fields)}")
