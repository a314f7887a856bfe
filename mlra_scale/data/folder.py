"""A prepared folder against its manifest: cheap checks whenever it is opened, and all of it for --verify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mlra_scale.data import DataError
from mlra_scale.data.blocks import CheckedFile, hash_blocks, sha256_of_file, table_bytes
from mlra_scale.data.index_cache import damaged_caches
from mlra_scale.data.indexed import WHOLE_BYTES, IndexedFiles, open_indexed
from mlra_scale.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    VERSION,
    FileSum,
    Manifest,
    Split,
    content_fingerprint,
    manifest_text,
    read_manifest,
)
from mlra_scale.files import write_atomically

_REMEDY = "copy it from where it is whole, or prepare the data again"
_TOKENS_AT_ONCE = 1 << 22


def open_prepared(folder: Path) -> tuple[Manifest, dict[str, IndexedFiles]]:
    """Opens a prepared folder and compares it with its manifest, but for the content of the .bin files.

    What is read of the .bin files is checked through `IndexedFiles.checked`.

    Returns:
        The manifest, and the indexed data set of each split.

    Raises:
        DataError: Something is missing, or is not what was prepared.
    """
    manifest = read_manifest(folder)
    files: dict[str, IndexedFiles] = {split: _open_split(manifest, split) for split in SPLITS}
    if manifest.version > 1:
        for name, recorded in manifest.files.items():
            if name.startswith(f"{TOKENIZER_FOLDER}/"):
                _check_file(folder / name, recorded)
    for problem in _unrecorded(manifest):
        raise DataError(problem)
    return manifest, files


def _open_split(manifest: Manifest, split: Split) -> IndexedFiles:
    table, recorded = manifest.blocks(split), manifest.files
    files = open_indexed(str(manifest.folder / split), table)
    if files.bin_bytes != (wanted := recorded[f"{split}.bin"].bytes):
        raise DataError(f"{files.prefix}.bin has {files.bin_bytes} bytes, its manifest says {wanted}; {_REMEDY}")
    if files.index_sha256 != recorded[f"{split}.idx"].sha256:
        raise DataError(f"{files.prefix}.idx is not the file that its manifest describes; {_REMEDY}")
    if table is not None:
        _check_file(table, recorded[table.name])
    documents, tokens = files.num_documents, files.num_tokens(0, len(files.sequence_lengths))
    entry = manifest.splits[split]
    if (documents, tokens, files.dtype.name) != (entry.documents, entry.tokens, manifest.dtype):
        raise DataError(
            f"{manifest.path} was changed by hand: {files.prefix}.idx has {documents} documents, {tokens} tokens of "
            f"{files.dtype.name}; {_REMEDY}"
        )
    return files


def check_contents(manifest: Manifest, files: Mapping[str, IndexedFiles]) -> None:
    """Checks what a start checks once, before training: small .bin files as a whole, and what version 1 did not record.

    Raises:
        DataError: Something is not what was prepared.
    """
    for split, indexed in files.items():
        if not indexed.is_small:
            continue
        if indexed.checked is not None:
            indexed.checked.check_all()
        else:
            _check_file(manifest.folder / f"{split}.bin", manifest.files[f"{split}.bin"])
    if manifest.version == 1:
        _check_tokenizer(manifest)
        for indexed in files.values():
            _check_ends(manifest, indexed)


def notices_of(manifest: Manifest) -> list[str]:
    """Returns what a user should know of a folder that is read all the same."""
    if manifest.version == VERSION:
        return []
    return [
        f"{manifest.folder} was prepared by an earlier version: what is read of .bin files of more than "
        f"{WHOLE_BYTES // 10**6} MB is not checked; mlra-scale prepare --verify {manifest.folder} "
        "checks all of it and adds the hashes for that"
    ]


def tokenizer_names(folder: Path) -> list[str]:
    """Returns the names of the tokenizer's files in a prepared folder, without hidden ones.

    Hidden files are left there by file systems and desktops. Files may lie deeper: transformers keeps further chat
    templates in a folder of their own.
    """
    tokenizer = folder / TOKENIZER_FOLDER
    names = [path.relative_to(tokenizer) for path in tokenizer.rglob("*") if not path.is_dir()]
    visible = [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]
    return sorted(f"{TOKENIZER_FOLDER}/{name}" for name in visible)


def _unrecorded(manifest: Manifest) -> list[str]:
    """Names the tokenizer's files that are not in the manifest; version 1 recorded none."""
    names = set() if manifest.version == 1 else set(tokenizer_names(manifest.folder)) - manifest.files.keys()
    return [f"{manifest.folder / name} was not there when the data were prepared; remove it" for name in sorted(names)]


def _check_file(path: Path, recorded: FileSum, table: Path | None = None) -> None:
    """Raises DataError unless a file is the one that the manifest describes; the hashes in `table` tell where not."""
    if not path.is_file():
        raise DataError(f"{path} does not exist, its manifest names it; {_REMEDY}")
    if (size := path.stat().st_size) != recorded.bytes:
        raise DataError(f"{path} has {size} bytes, its manifest says {recorded.bytes}; {_REMEDY}")
    if sha256_of_file(path) != recorded.sha256:
        if table is not None and table.is_file() and table.stat().st_size == table_bytes(size):
            CheckedFile(path, table).check_all()
        raise DataError(f"{path} is damaged: it is not the file that its manifest describes; {_REMEDY}")


def _check_tokenizer(manifest: Manifest) -> None:
    """Raises DataError unless the tokenizer beside the data is the one that made them."""
    from mlra_scale.data.tokenizer import load_tokenizer, tokenizer_sha256

    path, entry = manifest.tokenizer_folder / "tokenizer.json", manifest.tokenizer
    loaded = load_tokenizer([str(path)], entry.end_of_document_text)
    if tokenizer_sha256(loaded.tokenizer) != entry.sha256:
        raise DataError(f"{path} is damaged: it is not the tokenizer that made the data; {_REMEDY}")
    if (loaded.vocabulary_size, loaded.end_of_document_token) != (entry.vocabulary_size, entry.end_of_document_token):
        raise DataError(
            f"{manifest.path} was changed by hand: {path} has {loaded.vocabulary_size} tokens, and "
            f"{loaded.end_of_document_token} ends documents; {_REMEDY}"
        )


def _check_ends(manifest: Manifest, files: IndexedFiles, limit: int = 1000) -> None:
    """Raises DataError unless up to `limit` documents, evenly spaced, end as the manifest says."""
    end = manifest.tokenizer.end_of_document_token
    if (files.document_ends(limit) != end).any():
        raise DataError(
            f"{manifest.path} does not fit {files.prefix}.bin: not every document ends with the token {end}; "
            "prepare the data again"
        )


def verify_folder(folder: Path, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Reads all of a prepared folder and compares it with its manifest; adds what an earlier version did not record.

    `say` receives a line per file that is whole, and what was added.

    Returns:
        Everything that is wrong, one line each, with file and offset.

    Raises:
        DataError: There is no manifest, or it is damaged.
    """
    manifest = read_manifest(folder)
    problems = []
    for name, recorded in manifest.files.items():
        path = folder / name
        try:
            _check_file(
                path, recorded, manifest.blocks(path.stem) if name in (f"{split}.bin" for split in SPLITS) else None
            )
            say(f"{path}: {recorded.bytes:,} bytes, as prepared")
        except DataError as error:
            problems.append(str(error))
    problems += _unrecorded(manifest)
    problems += [
        f"{path} is damaged: an index that training keeps there; remove the folder {path.parent}, it is made again"
        for path in damaged_caches(folder / "cache")
    ]
    if problems:
        return problems
    _check_tokenizer(manifest)
    for files in open_prepared(folder)[1].values():
        _check_ends(manifest, files, files.num_documents)
        _check_tokens(manifest, files)
    if manifest.version == 1:
        _upgrade(manifest, say)
    return []


def _check_tokens(manifest: Manifest, files: IndexedFiles) -> None:
    """Raises DataError unless every token is in the vocabulary."""
    tokens, size = files.tokens(), manifest.tokenizer.vocabulary_size
    for first in range(0, len(tokens), _TOKENS_AT_ONCE):
        part = tokens[first : first + _TOKENS_AT_ONCE]
        if (is_bad := (part < 0) | (part >= size)).any():
            position = first + int(np.argmax(is_bad))
            raise DataError(
                f"{files.prefix}.bin holds the token {tokens[position]} at offset {position * files.dtype.itemsize}; "
                f"the vocabulary has {size}; prepare the data again"
            )


def _upgrade(manifest: Manifest, say: Callable[[str], None]) -> None:
    """Makes a folder of version 1 one of today: adds block hashes, sums of the tokenizer's files and its own sum."""
    folder, names = manifest.folder, [f"{split}.blocks" for split in SPLITS]
    try:
        for split in SPLITS:
            write_atomically(folder / f"{split}.blocks", hash_blocks(folder / f"{split}.bin").table)
        files = manifest.files | {name: FileSum.of(folder / name) for name in [*names, *tokenizer_names(folder)]}
        tokenizer = manifest.tokenizer
        fingerprint = content_fingerprint(files, tokenizer.sha256, tokenizer.end_of_document_token)
        sums = {name: entry.model_dump() for name, entry in files.items()}
        content = manifest.content | {"version": VERSION, "fingerprint": fingerprint, "files": sums}
        write_atomically(folder / MANIFEST_NAME, manifest_text(content))
    except OSError as error:
        say(f"{folder} is whole; the hashes of its blocks could not be added: {error.strerror}")
        return
    say(f"{folder}: added the hashes of its blocks and the sums of its tokenizer; it has version {VERSION} now")
