"""An export with all that it needs: the checkpoint, checked; its tokenizer; a text to verify on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mlra_scale.checkpoint.huggingface.card import CardDetails
from mlra_scale.checkpoint.huggingface.configuration import DTYPES
from mlra_scale.checkpoint.huggingface.exporting import (
    DEFAULT_SHARD_BYTES,
    ExportOptions,
    VerificationText,
    check_target,
    export_checkpoint,
    recorded_tokenizer,
)
from mlra_scale.checkpoint.huggingface.tensors import Format
from mlra_scale.checkpoint.reader import Store
from mlra_scale.checkpoint.retention import checkpoint_at
from mlra_scale.console import InputError
from mlra_scale.data.tokenizer import LoadedTokenizer, load_tokenizer, names_its_end, save_tokenizer
from mlra_scale.evaluation.models import check_same_tokens
from mlra_scale.evaluation.verification_text import (
    check_checksum,
    documents_of_sequences,
    text_tokens,
    validation_documents,
    validation_tokens,
)

DEFAULT_TOKENS = 1024


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and where to.

    Attributes:
        checkpoint: A checkpoint, or a run directory (its newest one).
        output: The folder to make.
        dtype: Type of the written weights, a name of DTYPES.
        tokenizer: Folder or name of another tokenizer than the checkpoint's copy.
        text: Text to verify on, a source as of mlra-scale prepare; None: the run's validation data.
        num_tokens: About how many tokens to verify on.
        is_verified: Whether the folder is compared with the checkpoint.
        has_checksums: Whether the checkpoint's files are compared with their checksums first.
        is_replacing: Whether an export at `output` is replaced, once the new one is verified.
        card: What the model card says beside what the checkpoint records.
    """

    checkpoint: Path
    output: Path
    export_format: Format = "gpt2"
    dtype: str = "float32"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    tokenizer: str | None = None
    text: str | None = None
    num_tokens: int = DEFAULT_TOKENS
    is_verified: bool = True
    has_checksums: bool = True
    is_replacing: bool = False
    card: CardDetails = field(default_factory=CardDetails)


def export(request: ExportRequest, say: Callable[[str], None]) -> None:
    """Exports a checkpoint; a failed export leaves nothing behind. `say` gets each line about the progress.

    Raises:
        InputError: The checkpoint is damaged, or tokenizer, text or output do not suit.
        VerificationError: The folder is not the trained model.
    """
    check_target(request.output, request.is_replacing)
    store = Store.open(checkpoint_at(request.checkpoint))
    say(f"checkpoint {store.folder}: {store.manifest.total_bytes / 1e9:.3g} GB in {len(store.manifest.files)} files")
    if request.has_checksums and (faults := store.verify()):
        raise InputError(f"{'; '.join(faults)}; use another checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _exported_tokenizer(request.tokenizer, store, Path(folder, "tokenizer"))
        trained_with = _training_tokenizer(tokenizer, store)
        text = _text(request, store, trained_with) if request.is_verified else None
        if trained_with is None:
            say("the checkpoint has no copy of a tokenizer: none is exported; name one with --tokenizer")
        options = ExportOptions(
            request.export_format,
            DTYPES[request.dtype],
            request.max_shard_bytes,
            tokenizer,
            request.is_replacing,
            request.card,
        )
        export_checkpoint(store, request.output, options, text, say)
    say(f"exported to {request.output}" + ("" if request.is_verified else ", not verified"))


def _exported_tokenizer(name: str | None, store: Store, folder: Path) -> Path | None:
    """Converts the tokenizer, named or imported, to a Hugging Face folder; None: the checkpoint's copy will do."""
    own = store.tokenizer_folder
    # An imported one may be vocab.json and merges.txt alone, or leave its eos token to GPT-2's class.
    if name is None and (own is None or names_its_end(own)):
        return None
    loaded = load_tokenizer([name or str(own)])
    if name is not None and own is not None:
        check_same_tokens(loaded, own)
    save_tokenizer(loaded, folder)
    return folder


def _training_tokenizer(named: Path | None, store: Store) -> LoadedTokenizer | None:
    """Loads the tokenizer of the training: the checkpoint's own copy, or the named one where there is none."""
    folder = store.tokenizer_folder or named
    if folder is None:
        return None
    loaded = load_tokenizer([str(folder)])
    check_checksum(loaded, recorded_tokenizer(store))
    return loaded


def _text(request: ExportRequest, store: Store, trained_with: LoadedTokenizer | None) -> VerificationText:
    if request.text is None:
        if store.config is None:
            raise InputError(
                f"{store.folder} was not trained by this project, so it names no validation data; name a text to "
                "verify on with --text, or leave the verification out with --no-verify"
            )
        tokens_NS = validation_tokens(store.config, request.num_tokens)
        documents = [] if trained_with is None else validation_documents(store.config, trained_with, request.num_tokens)
        return VerificationText(tokens_NS, "the run's validation data", tuple(documents))
    if trained_with is None:
        raise InputError("--text needs a tokenizer, and the checkpoint has no copy of one; name it (--tokenizer)")
    length = store.model.max_positions if store.config is None else store.config.train.sequence_length
    tokens_NS = text_tokens([request.text], trained_with, length, request.num_tokens)
    # Of an imported model it is not known how its text was encoded.
    documents = [] if store.config is None else documents_of_sequences(trained_with, tokens_NS)
    return VerificationText(tokens_NS, Path(request.text).name, tuple(documents))
