"""How a configuration mistake is told: which field, what it holds, what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from mlra_scale.config.json_text import printable

REQUIRED = "is required and has no default; set it, or start from a preset"


@dataclass(frozen=True)
class Problem:
    """One mistake: the dotted field, the value found there and what is wrong with it and how to mend it."""

    field: str
    value: Any
    remedy: str

    def __str__(self) -> str:
        # Names and remedies may quote a file: what a terminal would obey is escaped, in repr() too.
        return printable(f"{self.field} = {_shown(self.value)}: {self.remedy}")


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except (RecursionError, ValueError):
        shown = f"<{type(value).__name__} that is too large to show>"
    return f"{shown[:80]} ... {shown[-75:]}" if len(shown) > 160 else shown


class ConfigError(ValueError):
    """Every problem of a configuration at once; its text has one line per problem, `in_one_line` joins them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a ConfigError needs at least one problem"
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @property
    def in_one_line(self) -> str:
        """Every problem, for a message that quotes them."""
        return "; ".join(str(problem) for problem in self.problems)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the known name closest to `name`, or all known names if none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.55)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""


def model_at(model: type[BaseModel], path: Sequence[Any]) -> type[BaseModel] | None:
    """Returns the model that the dotted path `path` of `model` leads to, or None if it leads to no model."""
    current: type[BaseModel] | None = model
    for part in path:
        field = current.model_fields.get(str(part)) if current is not None else None
        kind = field.annotation if field is not None else None
        current = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return current


def _value_hint(value: Any) -> str:
    """Says what kind of thing was given where the type was wrong, in the words of YAML."""
    names = {str: "text", bool: "true/false", int: "an integer", float: "a fraction", type(None): "null"}
    names |= {list: "a list", tuple: "a list", dict: "a mapping"}
    hint = names.get(type(value), type(value).__name__)
    if value == "auto":
        return "the text 'auto' (give the value itself: derived values are derived here, not filled in later)"
    return hint


_WANTED_TYPE = {
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
"""Words for leaving something out: what people write, and what our fields call it."""

_BOUNDS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}


def _remedy(error: Any, model: type[BaseModel]) -> str:
    """Turns one pydantic error into a sentence that says what to write instead."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        owner = model_at(model, error["loc"][:-1])
        return "unknown key" + nearest(str(error["loc"][-1]), owner.model_fields if owner else ())
    if kind == "missing":
        return REQUIRED
    if kind in _WANTED_TYPE:
        return f"must be {_WANTED_TYPE[kind]}, not {_value_hint(value)}"
    if kind == "literal_error":
        choices = context["expected"].split("'")[1::2]
        meant = [choice for choice in _OFF if choice in choices] if value in _OFF_WORDS else []
        close = meant or (difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else [])
        return f"must be one of {', '.join(choices)}" + (f"; did you mean '{close[0]}'?" if close else "")
    if kind in _BOUNDS:
        sign, key = _BOUNDS[kind]
        return f"must be {sign} {context[key]}"
    if kind == "string_too_short":
        return "must not be empty; use null to leave it out"
    if kind == "string_too_long":
        return f"has {len(value)} characters where {context['max_length']} are allowed"
    if kind == "too_long":
        return f"has {context['actual_length']} values where {context['max_length']} belong"
    if kind == "finite_number":
        return "must be a finite number"
    if kind == "value_error":
        return str(context["error"])
    text = str(error["msg"])
    return text[0].lower() + text[1:]


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Translates pydantic's errors into problems.

    Args:
        error: What pydantic raised while validating `model`.
        model: The model whose fields the error speaks of (used to find the nearest known key).

    Returns:
        One problem per field, in the order of the fields.
    """
    found: dict[str, Problem] = {}
    for entry in error.errors():
        path = [str(part) for part in entry["loc"]]
        value = entry["input"]
        if entry["type"] == "missing" and model_at(model, path[:-1]) is None:
            # An item of a list of fixed length.
            problem = Problem(".".join(path[:-1]), value, "has too few values")
        else:
            shown = None if entry["type"] == "missing" else value
            problem = Problem(".".join(path), shown, _remedy(entry, model))
        found.setdefault(problem.field, problem)
    return list(found.values())
