"""The tables of docs/configuration.md are the schema, the presets and the key tables, no more and no less."""

from mlra_scale.config.deepspeed_json import TABLES
from mlra_scale.config.reference import DOCUMENT, with_tables


def test_the_document_is_up_to_date() -> None:
    written = DOCUMENT.read_text(encoding="utf-8")
    assert written == with_tables(written), "run: python -m mlra_scale.config.reference"
    assert written.isascii()


def test_the_key_table_is_in_it() -> None:
    rows = {line.split("`")[1] for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `")}
    for path, table in TABLES.items():
        for key in table:
            assert ".".join(filter(None, (path, key))) in rows
