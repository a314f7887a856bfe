"""YAML as this project reads and writes it: the scalars of YAML 1.2's core schema, no duplicate keys, no aliases.

YAML 1.1, PyYAML's default, reads `1e-3` as text, `on` as true, `1:30` as 90 and keeps the last of two equal keys
without a word. A learning rate or a run name is easily lost that way, so the loader here has its own rules, and the
dumper writes by the same ones: what is written is read back equal.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from mlra_scale.config.json_text import printable

_RESOLVERS = (
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
)


_INTEGER = _RESOLVERS[2][1]
_MAX_DIGITS = 300

MAX_CHARACTERS = 2**20
"""Longer documents are refused: parsing takes about a second per 50,000 characters."""


def _install_resolvers(target: Any) -> None:
    target.yaml_implicit_resolvers = {}
    for tag, pattern, first in _RESOLVERS:
        target.add_implicit_resolver(tag, pattern, first)


class _Loader(yaml.SafeLoader):
    """SafeLoader with core-schema scalars that refuses a key given twice, and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        # A value that refers to itself would go on for ever, and a configuration is read better without references.
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not used here; write the value", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "expected a mapping", node.start_mark)
        first_seen: dict[Any, Any] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in first_seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key '{key}' is given twice, first on line {first_seen[key].line + 1}; keep one of them",
                    key_node.start_mark,
                )
            first_seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: Any) -> int:
        # PyYAML's own constructor would read 010 as octal; the core schema says decimal. int() takes time that grows
        # with the square of the number of digits.
        text = self.construct_scalar(node)
        if not _INTEGER.match(text) or len(text) > _MAX_DIGITS:
            message = f"'{text[:40]}' is not an integer of at most {_MAX_DIGITS} digits"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return int(text)

    def construct_yaml_str(self, node: Any) -> str:
        # JSON, which is YAML, writes a character beyond the basic plane as two escapes; PyYAML leaves them apart.
        try:
            return self.construct_scalar(node).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            message = "text holds half of a surrogate pair"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes by the loader's rules."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_install_resolvers(_Loader)
_install_resolvers(_Dumper)
# Tags such as !!binary, !!set or !!timestamp make values that neither the schema nor JSON knows.
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "seq", "map", "str")
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


def load(text: str) -> Any:
    """Parses one YAML document.

    Args:
        text: The document.

    Returns:
        Plain Python values.

    Raises:
        ValueError: The text is not YAML, a key is given twice, or it is too long; the message has line and column.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"is longer than {MAX_CHARACTERS} characters, which is too long for such a file")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(printable(f"{place}{error.problem or error.context}")) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(printable(" ".join(str(error).split()))) from None


def dump(data: Any) -> str:
    """Writes plain Python values as a YAML document that `load` reads back equal.

    Args:
        data: Mappings, lists, text, numbers, booleans and None.

    Returns:
        The document, keys in the order given.
    """
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=100)
