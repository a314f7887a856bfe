"""Text to a prepared data set: a folder with Megatron indexed data sets, the tokenizer and a manifest.

The folder's bytes are a function of the documents, the tokenizer and the options alone: not of the number of workers,
of time, of the path, or of interruptions. A mixture is a folder of such folders with one tokenizer.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

from mlra_scale.data import DataError
from mlra_scale.data.build import build_data_set, versions
from mlra_scale.data.corpus import Corpus
from mlra_scale.data.manifest import MANIFEST_NAME, TOKENIZER_FOLDER, VERSION, Manifest, read_manifest
from mlra_scale.data.mixture import MIXTURE_NAME, mixture_text
from mlra_scale.data.options import PrepareOptions
from mlra_scale.data.sources import Source, open_sources
from mlra_scale.data.tokenizer import (
    END_OF_TEXT,
    LoadedTokenizer,
    load_tokenizer,
    tokenizer_sha256,
    train_bpe,
    trained_bpe,
)
from mlra_scale.data.unfinished import identity_of, read_progress, remove_progress
from mlra_scale.files import empty, new_folder, partial_of, sync_tree

_logger = logging.getLogger(__name__)


def prepare(options: PrepareOptions) -> list[Manifest]:
    """Makes the data sets, or what an interrupted preparation with the same options left to do.

    Returns:
        The manifests of the finished folders, in the order of the components.

    Raises:
        DataError: A source, the tokenizer or the output cannot be used. Nothing is left behind, or what is done so far
            if that is much; the message says so.
    """
    if not 0.0 < options.validation_fraction < 1.0:
        raise DataError(f"--validation-fraction {options.validation_fraction} is not between 0 and 1")
    if options.train_bpe is not None and options.end_of_document is not None:
        raise DataError(
            f"--end-of-document {options.end_of_document} is for a tokenizer that exists; documents of a BPE that is "
            f"trained here end with {END_OF_TEXT}"
        )
    check_free(options.output, options.overwrite)
    named = [source for component in options.components for source in component.sources]
    sources = open_sources(named)
    identity = _identity(options, sources)
    is_kept = partial(_is_kept, options, identity)
    try:
        with output_folder(options.output, options.overwrite, is_kept) as folder:
            try:
                _build(folder, _corpora(options, sources), options, identity)
            except (DataError, OSError) as error:
                if is_kept(folder):
                    reason = _cannot_be_written(error, options.output) if isinstance(error, OSError) else error
                    raise DataError(f"{reason}; {note_of_kept(options.output)}") from error
                raise
            for component in options.components:
                read_manifest(folder / component.name)  # what cannot be read back does not replace anything
    except OSError as error:
        raise _cannot_be_written(error, options.output) from error
    return [read_manifest(options.output / component.name) for component in options.components]


def _cannot_be_written(error: OSError, output: Path) -> DataError:
    return DataError(f"{error.filename or output} cannot be written: {error.strerror}")


def note_of_kept(output: Path) -> str:
    """Returns what is to be said after an interruption of what is left behind."""
    kept = partial_of(output)
    if not kept.is_dir():
        return "nothing was left behind"
    return f"what is done so far is kept in {kept}: the same command continues there if the sources are as they were"


def _corpora(options: PrepareOptions, sources: Sequence[Source]) -> list[Corpus]:
    """Returns the corpus of every component; `sources` are theirs, in order."""
    left = iter(sources)
    return [Corpus(list(islice(left, len(component.sources))), options) for component in options.components]


def _build(folder: Path, corpora: Sequence[Corpus], options: PrepareOptions, identity: str) -> None:
    folders = [folder / component.name for component in options.components]
    tokenizer = _tokenizer(corpora, options, folders[0])
    now = (tokenizer_sha256(tokenizer.tokenizer), tokenizer.end_of_document_token)
    begun = [progress for progress in map(read_progress, folders) if progress is not None]
    if any((progress.tokenizer, progress.end_of_document_token) != now for progress in begun):
        _logger.warning("the tokenizer is another one than that of the interrupted preparation; starting over")
        empty(folder)
    for each, corpus in zip(folders, corpora, strict=True):
        build_data_set(each, corpus, tokenizer, options, identity)
    if options.is_mixture:
        text = mixture_text(options.output, options.components, tokenizer.vocabulary_size)
        (folder / MIXTURE_NAME).write_text(text, encoding="utf-8")
    sync_tree(folder)
    for each in folders:
        remove_progress(each)


def _identity(options: PrepareOptions, sources: Sequence[Source]) -> str:
    """Returns a hash of all that decides the bytes of the data, but for the content of the files that are named."""
    settings = asdict(options)
    for name in ("output", "workers", "overwrite", "progress"):
        del settings[name]
    return identity_of([VERSION, versions(), settings, [source.state for source in sources]])


def _is_kept(options: PrepareOptions, identity: str, folder: Path) -> bool:
    """Returns whether an unfinished folder is continued."""
    found = [read_progress(folder / component.name) for component in options.components]
    begun = [progress.identity for progress in found if progress is not None]
    if set(begun) - {identity}:
        _logger.warning(
            "%s was begun with other options, inputs or versions of libraries; starting over", options.output
        )
        return False
    return bool(begun)


@contextlib.contextmanager
def output_folder(
    final: Path, overwrite: bool, is_kept: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `final` at the end; see `new_folder`.

    Raises:
        DataError: `final` exists and may not be replaced, or another run is building it.
    """
    final = final.absolute()
    check_free(final, overwrite)
    busy = DataError(f"another run is building {final.name} right now")
    with new_folder(final, busy, is_kept) as partial:
        check_free(final, overwrite)  # another run may have made it meanwhile
        yield partial


def check_free(final: Path, overwrite: bool) -> None:
    """Raises DataError if the folder cannot be made; a cheap check before any work."""
    if not os.path.exists(final):  # what cannot be looked at, as a name that is too long, cannot be made either
        return
    if not final.is_dir():
        raise DataError(f"{final} exists and is not a folder; choose another --output")
    if (final / MANIFEST_NAME).is_file() or (final / MIXTURE_NAME).is_file():
        if not overwrite:
            raise DataError(f"{final} holds a finished data set; give --overwrite to replace it")
    elif any(final.iterdir()):
        raise DataError(f"{final} exists and was not made by this tool (no {MANIFEST_NAME}); choose another --output")


def _tokenizer(corpora: Sequence[Corpus], options: PrepareOptions, folder: Path) -> LoadedTokenizer:
    """Loads or trains the tokenizer; `folder` is that of the first data set, which may have it from before."""
    if options.train_bpe is None:
        return load_tokenizer(options.tokenizer, options.end_of_document)
    if read_progress(folder) is not None:
        with contextlib.suppress(DataError):  # damaged or gone: the same one is trained again
            return trained_bpe(folder / TOKENIZER_FOLDER, options.train_bpe)
    whole = sum(component.weight for component in options.components)

    def texts() -> Iterator[str]:
        for component, corpus in zip(options.components, corpora, strict=True):
            share = math.ceil(options.train_bpe_bytes * component.weight / whole)
            with corpus.progress_bar("reading for the BPE") as bar:
                for text, moves in corpus.training_texts(share):
                    bar.update(moves)
                    yield text

    return train_bpe(texts(), options.train_bpe)
