"""The manifest beside a prepared data set: what it was made of, with which tokenizer, and the sums of its files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlra_scale.data.counts import find_contradiction
from mlra_scale.data.errors import DataError

MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "validation")
FORMAT = "mlra-scale-data"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The manifest of a folder made by tools/prepare_data.py.

    Attributes:
        folder: The folder.
        content: What manifest.json holds.
    """

    folder: Path
    content: dict[str, Any]

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids that the tokenizer can produce (largest id + 1)."""
        return int(self.content["tokenizer"]["vocabulary_size"])

    @property
    def end_of_document_token(self) -> int:
        """Id of the token that ends every document."""
        return int(self.content["tokenizer"]["end_of_document_token"])

    @property
    def tokenizer_sha256(self) -> str:
        """Checksum of the tokenizer (mlra_scale.data.tokenizer.tokenizer_sha256)."""
        return str(self.content["tokenizer"]["sha256"])

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer in Hugging Face format; AutoTokenizer reads it."""
        return self.folder / TOKENIZER_FOLDER

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of the data files and of the tokenizer; independent of where the folder lies."""
        return str(self.content["fingerprint"])

    def prefix(self, split: str) -> str:
        """Returns the Megatron prefix of "train" or "validation"."""
        return str(self.folder / split)

    def file(self, name: str) -> dict[str, Any]:
        """Returns {"bytes": ..., "sha256": ...} of a data file such as "train.idx"."""
        return dict(self.content["files"][name])


def content_fingerprint(files: dict[str, dict[str, Any]], tokenizer_sha256: str) -> str:
    """Joins the checksums of the data files and of the tokenizer to one."""
    lines = [f"{name} {files[name]['bytes']} {files[name]['sha256']}" for name in sorted(files)]
    return hashlib.sha256("\n".join([*lines, tokenizer_sha256]).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a prepared folder.

    Args:
        folder: The folder.

    Returns:
        The manifest, with the keys that this package needs present.

    Raises:
        DataError: There is none, or it is not one of ours.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST_NAME}: it was not made, or not finished, by tools/prepare_data.py")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of tools/prepare_data.py")
    if content.get("version") != VERSION:
        raise DataError(f"{path} has version {content.get('version')}; this program reads version {VERSION}")
    manifest = Manifest(folder, content)
    try:
        sizes = (manifest.vocabulary_size, manifest.end_of_document_token)
        files = {name: manifest.file(name) for split in SPLITS for name in (f"{split}.bin", f"{split}.idx")}
        contradiction = find_contradiction(content)
        whole = min(sizes) >= 0 and manifest.fingerprint == content_fingerprint(files, manifest.tokenizer_sha256)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} lacks or garbles an entry ({error}); prepare the data again") from error
    if not whole:
        raise DataError(f"{path} was changed by hand: its fingerprint does not fit its entries; prepare the data again")
    if contradiction:
        raise DataError(f"{path} was changed by hand: {contradiction}; prepare the data again")
    return manifest
