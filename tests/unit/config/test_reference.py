"""docs/configuration.md is the schema and the key tables, no more and no less."""

from pathlib import Path

from annotated_types import Ge, Lt

from mlra_scale.config.deepspeed_json import TABLES
from mlra_scale.config.reference import _bounds, reference

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


def test_equal_bounds_read_alike() -> None:
    assert _bounds([Ge(0), Lt(1)]) == _bounds([Ge(0.0), Lt(1.0)]) == " >= 0, < 1"
    assert _bounds([Ge(2**63 - 1), Lt(0.01)]) == " >= 9223372036854775807, < 0.01"
