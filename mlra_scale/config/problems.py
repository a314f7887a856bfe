"""Configuration mistakes: the field, its value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mlra_scale.config.json_text import printable
from mlra_scale.console import InputError

REQUIRED = "is required and has no default; set it, or start from a preset"


@dataclass(frozen=True)
class Problem:
    """One mistake: the dotted field, its value, and what is wrong with the value and what to write instead."""

    field: str
    value: Any
    remedy: str

    def __str__(self) -> str:
        # Names and remedies may quote a file, which may hold control characters for the terminal.
        return printable(f"{self.field} = {_shown(self.value)}: {self.remedy}")


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except (RecursionError, ValueError):
        shown = f"<{type(value).__name__} that is too large to show>"
    return f"{shown[:80]} ... {shown[-75:]}" if len(shown) > 160 else shown


class ConfigError(InputError, ValueError):
    """All problems of a configuration; its text has one line per problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a ConfigError needs at least one problem"
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @property
    def in_one_line(self) -> str:
        """All problems in one line, for a message that quotes them."""
        return "; ".join(str(problem) for problem in self.problems)


_MOST_NAMES = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the known name closest to `name`, or all known names if none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.55)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""


def unknown_key(name: str, owner: type[BaseModel] | None, whole: type[BaseModel] | None = None) -> str:
    """Returns what is wrong with a name that is no field of a model: what is probably meant, or all its fields.

    Args:
        name: The name.
        owner: The model, or what has no fields.
        whole: The model of which `owner` is a part: the name may be that of a field elsewhere in it.
    """
    unknown, wanted = f"unknown key '{name}'", name.lower()
    if owner is None:
        return unknown
    fields = {**dict.fromkeys(owner.model_fields), **dict.fromkeys(_fields_of_sections(owner))}
    elsewhere = [] if whole is None or whole is owner else _fields_of_sections(whole)
    for known, is_alike in ((fields, str.__eq__), (fields, _are_alike), (elsewhere, str.__eq__)):
        if found := [repr(field) for field in known if is_alike(wanted, field.rpartition(".")[2])]:
            more = f" or {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
            return f"{unknown}; did you mean {' or '.join(found[:_MOST_NAMES])}{more}?"
    return f"{unknown}{nearest(name, owner.model_fields)}"


def _are_alike(name: str, field: str) -> bool:
    """Returns whether one is short for the other: attention_rank and rank, learning_rate and lr."""
    return len(name) > 1 and (_is_short_for(name, field) or _is_short_for(field, name))


def _is_short_for(short: str, name: str) -> bool:
    """Returns whether a name has the words of another, which may be cut short, or is that of its initials."""
    words, rest = short.split("_"), iter(name.split("_"))
    has_words = all(word and any(each.startswith(word) for each in rest) for word in words)
    return has_words or ("_" in name and short == "".join(word[:1] for word in name.split("_")))


def _fields_of_sections(model: type[BaseModel]) -> list[str]:
    """Returns the dotted names of the fields of a model's sections."""
    sections = {name: model_at(model, [name]) for name in model.model_fields}
    return [f"{name}.{field}" for name, section in sections.items() if section for field in section.model_fields]


def replacement(name: str, owner: type[BaseModel] | None) -> str | None:
    """Returns what to write instead of a field that a model had in an earlier version; None if it never had it."""
    replaced: Mapping[str, str] = getattr(owner, "replaced", {})
    return replaced.get(name)


def model_at(model: type[BaseModel], path: Sequence[Any]) -> type[BaseModel] | None:
    """Returns the model at the dotted path `path` below `model`; None if there is a plain field or nothing.

    A part of the path that follows a list is the number of one of its items.
    """
    current: Any = model
    for part in path:
        if get_origin(current) is tuple:
            current = get_args(current)[0]
        else:
            field = current.model_fields.get(str(part)) if _is_model(current) else None
            current = None if field is None else field.annotation
    return current if _is_model(current) else None


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


_GIVEN = {str: "text", bool: "true/false", int: "an integer", float: "a fraction", type(None): "null", list: "a list"}
_GIVEN |= {tuple: "a list", dict: "a mapping"}

_WANTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (quote it if it looks like a number or true/false)",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}

_OFF_WORDS = ("off", "no", "false", "none", "never", False)
_OFF = ("disabled", "none")
"""Words that people write for leaving something out, and the words that the fields here use."""

# By pydantic's type of error; filled in with the error's context.
_TEMPLATES = {
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "string_too_short": "must not be empty; use null to leave it out",
    "string_too_long": "has {length} characters where {max_length} are allowed",
    "too_long": "has {actual_length} values where {max_length} belong",
    "finite_number": "must be a finite number",
    "value_error": "{error}",
}


def _remedy(error: Any, model: type[BaseModel]) -> str:
    """Turns one pydantic error into a sentence that says what to write instead."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        owner, name = model_at(model, error["loc"][:-1]), str(error["loc"][-1])
        return replacement(name, owner) or unknown_key(name, owner, model)
    if kind == "missing":
        return REQUIRED
    if kind in _WANTED:
        given = _GIVEN.get(type(value), type(value).__name__)
        if value == "auto":
            given = "the text 'auto' (give the value itself: derived values are derived here, not filled in later)"
        return f"must be {_WANTED[kind]}, not {given}"
    if kind == "literal_error":
        choices = context["expected"].split("'")[1::2]
        meant = [choice for choice in _OFF if choice in choices] if value in _OFF_WORDS else []
        close = meant or (difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else [])
        return f"must be one of {', '.join(choices)}" + (f"; did you mean '{close[0]}'?" if close else "")
    if kind in _TEMPLATES:
        return _TEMPLATES[kind].format(**context, length=len(value) if isinstance(value, str) else 0)
    text = str(error["msg"])
    return text[0].lower() + text[1:]


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Translates the errors that pydantic raised while validating `model`: one problem per field, in their order."""
    found: dict[str, Problem] = {}
    for entry in error.errors():
        path = [str(part) for part in entry["loc"]]
        is_missing = entry["type"] == "missing"
        if is_missing and model_at(model, path[:-1]) is None:
            # An item of a list of fixed length.
            problem = Problem(".".join(path[:-1]), entry["input"], "has too few values")
        else:
            problem = Problem(".".join(path), None if is_missing else entry["input"], _remedy(entry, model))
        found.setdefault(problem.field, problem)
    return list(found.values())
