"""YAML by the core schema of version 1.2, without duplicate keys, aliases and tags, through ruamel.yaml.

Version 1.1 reads `on` as true and `1:30` as 90, and ruamel.yaml's 1.2 reads `1_000` as a number and `2024-01-01` as a
date. A learning rate or a run name changes silently that way, so only the core schema's own scalars are resolved here.
`load` and `dump` share these rules: what is written is read back equal.
"""

from __future__ import annotations

import io
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

from mlra_scale.config.json_text import printable

MAX_CHARACTERS = 2**20
"""Longer documents are refused: parsing takes about a second per 50,000 characters."""

_MAX_DIGITS = 300
"""int() takes time that grows with the square of the number of digits."""

_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ("~", "n", "N", "")),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Pattern and possible first characters of every plain scalar that is not text."""


class _Resolver(VersionedResolver):
    """Resolves plain scalars by the core schema, whatever a %YAML directive says."""

    _by_first_character: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (shared, never changed)

    @property
    def versioned_resolver(self) -> Any:
        return self._by_first_character


for _name, (_pattern, _first_characters) in _SCALARS.items():
    for _character in _first_characters:
        _entry = (f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"))
        _Resolver._by_first_character.setdefault(_character, []).append(_entry)


class _Composer(Composer):
    """Refuses references, which can make a value that contains itself, and tags, which make other kinds of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if event.anchor is not None:
            message = "anchors (&name) and aliases (*name) are not used here; write the value"
            raise ComposerError(None, None, message, event.start_mark)
        if event.ctag is not None:
            raise ComposerError(None, None, "tags (!name) are not used here; quote text", event.start_mark)
        return super().compose_node(parent, index)


class _Constructor(SafeConstructor):
    """Makes plain Python values with text as keys."""

    def check_mapping_key(self, node: Any, key_node: Any, mapping: Any, key: Any, value: Any) -> bool:
        if not isinstance(key, str):
            raise ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
        if key in mapping:
            first = next(other for other, _ in node.value if other.value == key_node.value)
            message = f"key '{key}' is given twice, first on line {first.start_mark.line + 1}; keep one of them"
            raise ConstructorError(None, None, message, key_node.start_mark)
        return True

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > _MAX_DIGITS:
            message = f"'{node.value[:40]}' is not an integer of at most {_MAX_DIGITS} digits"
            raise ConstructorError(None, None, message, node.start_mark)
        return int(node.value)

    def construct_yaml_str(self, node: Any) -> str:
        # JSON, which is YAML, writes a character beyond the basic plane as two escapes; ruamel.yaml leaves them apart.
        try:
            return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            message = "text holds half of a surrogate pair"
            raise ConstructorError(None, None, message, node.start_mark) from None


class _Representer(SafeRepresenter):
    """Writes 1e-08 as 1.0e-08, which readers of YAML 1.1 take for a number as well."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_float(self, data: float) -> Any:
        node = super().represent_float(data)
        if "e" in node.value and "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node


_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_yaml_int)
_Constructor.add_constructor("tag:yaml.org,2002:str", _Constructor.construct_yaml_str)
_Representer.add_representer(float, _Representer.represent_float)


def _yaml() -> Any:
    """Returns a reader and writer for one document: ruamel.yaml's keep state after an error."""
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Composer = _Resolver, _Composer
    yaml.Constructor, yaml.Representer = _Constructor, _Representer
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
    yaml.allow_unicode, yaml.width = False, 100
    return yaml


def load(text: str) -> Any:
    """Parses one YAML document into plain Python values.

    Raises:
        ValueError: The text is not YAML, a key is given twice, or it is too long; the message has line and column.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"is longer than {MAX_CHARACTERS} characters, which is too long for such a file")
    try:
        return _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(printable(f"{where}{error.problem or error.context}")) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except YAMLError as error:
        raise ValueError(printable(" ".join(str(error).split()))) from None


def dump(data: Any) -> str:
    """Writes mappings, lists, text, numbers, booleans and None as a YAML document, keys in the order given."""
    stream = io.StringIO()
    _yaml().dump(data, stream)
    return stream.getvalue()
