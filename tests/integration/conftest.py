"""Fixtures of the integration tests."""

from pathlib import Path

import pytest

from tests.support.training_runs import make_data


@pytest.fixture(scope="session")
def training_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set whose vocabulary is that of the debug preset."""
    return make_data(tmp_path_factory.mktemp("data") / "python-docs")
