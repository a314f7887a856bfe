"""docs/configuration.md is the schema and the key tables, no more and no less."""

from pathlib import Path

from mlra_scale.config.deepspeed_keys import TABLES
from mlra_scale.config.reference import reference

DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_document_is_up_to_date() -> None:
    written = DOCUMENT.read_text(encoding="utf-8")
    assert written == reference(), "run: python -m mlra_scale.config.reference > docs/configuration.md"
    assert written.isascii()


def test_the_key_table_is_in_it() -> None:
    rows = {line.split("`")[1] for line in reference().splitlines() if line.startswith("| `")}
    for path, table in TABLES.items():
        for key in table:
            assert ".".join(filter(None, (path, key))) in rows
