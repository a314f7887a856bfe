"""The tables of docs/configuration.md, drawn from the schema, the presets and the key tables themselves.

`python -m mlra_scale.config.reference` draws them anew; a test fails when the file is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlra_scale.config.deepspeed_json import OURS, TABLES, YOURS
from mlra_scale.config.presets import preset, preset_names
from mlra_scale.config.schema import Config

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"

_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
_TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def _type_name(schema: dict[str, Any]) -> str:
    """Names the type that a JSON schema describes, with its range."""
    if "anyOf" in schema:
        return " or ".join(_type_name(part) for part in reversed(schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        items = schema.get("prefixItems", [schema.get("items")])
        if "$ref" in items[0]:
            return "list of mappings, whose fields are in the next table"
        return f"list of {f'{len(items)} x ' if len(items) > 1 else ''}{_type_name(items[0])}"
    if schema["type"] == "object":
        return f"mapping of text to {_type_name(schema['additionalProperties'])}"
    bounds = [(sign, schema[key]) for key, sign in _BOUNDS.items() if key in schema]
    shown = [f" {sign} {int(bound) if bound == int(bound) else bound}" for sign, bound in bounds]
    return _TYPES[schema["type"]] + ",".join(shown)


def _field_tables() -> Iterator[str]:
    schema = Config.model_json_schema()
    for section, entry in schema["properties"].items():
        if "$ref" not in entry:
            continue
        model = _definition(schema, entry)
        yield f"### {section}\n"
        yield from _table(model, f"{section}.")
        for name, field in model["properties"].items():
            if "$ref" in field.get("items", {}):
                yield f"### {section}.{name}, each item\n"
                yield from _table(_definition(schema, field["items"]), "")


def _definition(schema: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """The model that an entry of the schema refers to."""
    found: dict[str, Any] = schema["$defs"][entry["$ref"].rpartition("/")[2]]
    return found


def _table(model: dict[str, Any], prefix: str) -> Iterator[str]:
    yield f"{model['description'].splitlines()[0]}\n"
    yield "| field | type | default | meaning |\n|---|---|---|---|"
    for name, field in model["properties"].items():
        # JSON is YAML, so that a default can be copied into a file as it stands.
        default = f"`{json.dumps(field['default'])}`" if "default" in field else "required"
        meaning = " ".join(field["description"].split()).replace("|", "\\|")
        yield f"| `{prefix}{name}` | {_type_name(field)} | {default} | {meaning} |"
    yield ""


def _preset_table() -> Iterator[str]:
    yield "| preset | parameters | layers x width, heads | vocabulary | tokens per step | steps | lr | precision |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in preset_names():
        config = preset(name)
        model, train = config.model, config.train
        shape = f"{model.num_layers} x {model.hidden_size}, {model.num_heads}"
        tokens = train.global_batch_size * train.sequence_length
        yield (
            f"| `{name}` | {model.num_parameters():,} | {shape} | {model.vocab_size:,} | {tokens:,} | {train.steps:,} "
            f"| {config.optim.lr:g} | {train.precision} |"
        )


_OWNERS = {YOURS: "DeepSpeed: this file", OURS: "mlra-scale"}
_KINDS = {"bool": "true or false", "count": "whole number >= 0", "positive count": "whole number >= 1"}


def _key_table() -> Iterator[str]:
    yield "| key | owner | value, or where to set it, or why not |\n|---|---|---|"
    for path, table in TABLES.items():
        for key, (owner, note) in table.items():
            shown = _KINDS.get(note, note.replace("|", ", ")) if owner == YOURS else note
            yield f"| `{f'{path}.{key}' if path else key}` | {_OWNERS.get(owner, 'refused')} | {shown} |"


def with_tables(document: str) -> str:
    """Returns a document with its tables, which stand between `<!-- table NAME -->` and `<!-- end -->`, drawn anew."""
    for name, rows in (("fields", _field_tables()), ("presets", _preset_table()), ("deepspeed", _key_table())):
        begin, text = f"<!-- table {name} -->\n", "\n".join(rows).rstrip()
        before, _, rest = document.partition(begin)
        document = f"{before}{begin}\n{text}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return document


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
