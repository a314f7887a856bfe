"""The licences of the dependencies: all are listed, as the metadata have them, and none is strong copyleft."""

import email.message

import pytest

from tests import licences


def test_every_locked_package_is_listed() -> None:
    assert list(licences.written()) == licences.locked()


def test_the_table_has_what_the_metadata_have() -> None:
    installed = {name: found for name in licences.locked() if (found := licences.licence_of(name)) is not None}
    assert len(installed) > 40
    assert {name: licences.written()[name] for name in installed} == installed, "run python -m tests.licences"


def test_no_licence_is_strong_copyleft() -> None:
    assert [each for each in licences.written().items() if licences.STRONG_COPYLEFT.search(each[1])] == []


@pytest.mark.parametrize(
    ("licence", "is_strong"),
    [
        ("AGPL-3.0-only", True),
        ("GNU General Public License v3 (GPLv3)", True),
        ("GPL-2.0-or-later", True),
        ("LGPL-2.1-or-later", False),
        ("MPL-2.0 AND MIT", False),
        ("GNU Lesser General Public License v3", False),
    ],
)
def test_strong_copyleft_is_seen(licence: str, is_strong: bool) -> None:
    assert bool(licences.STRONG_COPYLEFT.search(licence)) == is_strong


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([("License-Expression", "MIT"), ("License", "other")], "MIT"),
        ([("Classifier", "License :: OSI Approved :: BSD License"), ("License", "a\nlong\ntext")], "BSD"),
        ([("License", "Apache 2.0")], "Apache 2.0"),
    ],
)
def test_where_a_licence_is_read(fields: list[tuple[str, str]], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = email.message.Message()
    for name, value in fields:
        metadata[name] = value
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: metadata)
    assert licences.licence_of("x") == expected
    del metadata["License-Expression"], metadata["License"], metadata["Classifier"]
    with pytest.raises(ValueError, match="no licence in its metadata"):
        licences.licence_of("x")
