"""What an unfinished preparation keeps on disk, from which the same command continues.

While a data set is made, its folder holds progress.json, written from time to time after the documents so far are on
disk. It names the last portion that was read, and has the counts and hashes up to there. The bytes of the finished
folder are those of an uninterrupted preparation.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mlra_scale.data.corpus import Position
from mlra_scale.data.manifest import Split
from mlra_scale.data.tally import Tally
from mlra_scale.data.writer import Written
from mlra_scale.files import write_atomically

_NAME = "progress.json"


class Progress(BaseModel):
    """How far a data set is made.

    Attributes:
        identity: Hash of all that decides the result: options, inputs, versions.
        tokenizer: Its checksum.
        end_of_document_token: Its token behind each document.
        position: The last portion of which all documents are written; text_bytes are those of the documents.
        without_tokens: Documents of which the tokenizer makes no token.
        is_exact: Whether decoding gives back the first documents.
        tallies: Of the sources.
        splits: What is on disk.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    identity: str
    tokenizer: str
    end_of_document_token: int
    position: Position
    without_tokens: int
    is_exact: bool
    tallies: list[Tally]
    splits: dict[Split, Written]

    def write(self, folder: Path) -> None:
        """Writes it into the folder of the data set."""
        write_atomically(folder / _NAME, self.model_dump_json())


def read_progress(folder: Path) -> Progress | None:
    """Reads how far the data set in a folder is made; None: nothing there can be continued."""
    try:
        return Progress.model_validate_json((folder / _NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def remove_progress(folder: Path) -> None:
    """Removes what only an unfinished data set has."""
    (folder / _NAME).unlink(missing_ok=True)


def identity_of(values: Any) -> str:
    """Returns a hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
