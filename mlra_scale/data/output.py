"""The output folder of a prepared data set, which appears finished or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mlra_scale.data.errors import DataError
from mlra_scale.data.manifest import MANIFEST_NAME
from mlra_scale.files import new_folder


@contextlib.contextmanager
def atomic_folder(final: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary folder to fill; renames it to `final` at the end, removes it after an error.

    Args:
        final: The folder to make.
        overwrite: Whether a finished data set at `final` may be replaced (at the end, when the new one is complete).

    Yields:
        The temporary folder, empty.

    Raises:
        DataError: `final` exists and may not be replaced, or another run is building it.
    """
    final = final.absolute()
    check_free(final, overwrite)
    with new_folder(final, busy=DataError(f"another run is building {final.name} right now")) as partial:
        check_free(final, overwrite)  # another run may have made it meanwhile
        yield partial


def check_free(final: Path, overwrite: bool) -> None:
    """Raises DataError if the folder cannot be made; a cheap check before any work."""
    if not final.exists():
        return
    if not final.is_dir():
        raise DataError(f"{final} exists and is not a folder; choose another --output")
    if (final / MANIFEST_NAME).is_file():
        if not overwrite:
            raise DataError(f"{final} holds a finished data set; give --overwrite to replace it")
    elif any(final.iterdir()):
        raise DataError(f"{final} exists and was not made by this tool (no {MANIFEST_NAME}); choose another --output")
