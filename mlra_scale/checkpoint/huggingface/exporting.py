"""Exporting a checkpoint to a Hugging Face folder, which is verified before it gets its name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mlra_scale.checkpoint.files import CheckpointError, system_errors
from mlra_scale.checkpoint.huggingface.card import CARD_MARK, CardDetails, model_card
from mlra_scale.checkpoint.huggingface.configuration import SpecialTokens, write_configuration
from mlra_scale.checkpoint.huggingface.tensors import Format, check_expressible, export_tensors, write_shards
from mlra_scale.checkpoint.huggingface.tokenizer import EncodedText, check_tokenizer, write_tokenizer
from mlra_scale.checkpoint.huggingface.verification import Verification, VerificationError, dtype_name, verify_folder
from mlra_scale.checkpoint.reader import Store
from mlra_scale.files import new_folder

DEFAULT_SHARD_BYTES = 5 * 10**9
MIN_VERIFIED_TOKENS = 16
"""Of one sequence: with a single token the logits depend on no attention and no further position."""
_CARD = "README.md"


@dataclass(frozen=True)
class VerificationText:
    """Real text for the verification, with its source for the model card.

    Attributes:
        tokens_NS: Token ids, one more per sequence than are passed to the models.
        documents: Texts with their ids in training, which the exported tokenizer must reproduce.
    """

    tokens_NS: torch.Tensor
    description: str
    documents: tuple[EncodedText, ...] = ()


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export: "gpt2" is stock GPT-2, "mlra" keeps the factors and ships code.

    Attributes:
        tokenizer: Folder of a tokenizer to write instead of the checkpoint's own.
        is_replacing: Whether an export at the target is replaced.
        card: What the model card says beside what the checkpoint records.
    """

    export_format: Format = "gpt2"
    dtype: torch.dtype = torch.float32
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    tokenizer: Path | None = None
    is_replacing: bool = False
    card: CardDetails = field(default_factory=CardDetails)


def export_checkpoint(
    store: Store,
    target: Path,
    options: ExportOptions,
    text: VerificationText | None,
    say: Callable[[str], None] = lambda line: None,
) -> Verification | None:
    """Writes a checkpoint as a Hugging Face folder; a failed export leaves nothing behind.

    At most one tensor is held in memory, and the verification maps the written files and computes layer by layer.
    Without a text the export is not verified. `say` gets each line about the progress.

    Returns:
        The figures of the verification, which it has passed; None without one.

    Raises:
        CheckpointError: The target exists or cannot be written, the format cannot express the model, or the tokenizer,
            text or type does not suit.
        VerificationError: The folder is not the trained model.
    """
    target = target.absolute()
    check_target(target, options.is_replacing)
    check_expressible(store.model, options.export_format)
    tensors = export_tensors(store, options.export_format)
    if store.folder.resolve() in target.resolve().parents:
        raise CheckpointError(f"{target} lies in the checkpoint, and would be removed with it; name another output")
    if text is not None:
        _check_text(text, store)
    busy = CheckpointError(f"another export to {target} is at work; wait for it or name another output")
    with system_errors("written", target, "name another output"), new_folder(target, busy) as folder:
        began = time.monotonic()
        # Where the configuration names it, the token that ends documents is known without a tokenizer.
        special = SpecialTokens(end=None if store.config is None else store.config.data.end_of_document_token)
        documents = () if text is None else text.documents
        source, tokenizer = options.tokenizer or store.tokenizer_folder, None
        if source is not None:
            is_trained_here, is_prepared_here = store.config is not None, recorded_tokenizer(store) is not None
            tokenizer = write_tokenizer(
                source, folder, store.model, is_trained_here, special.end, documents, is_prepared_here
            )
            special = tokenizer.special
            for note in tokenizer.notes:
                say(note)
        write_configuration(folder, options.export_format, store.model, options.dtype, special)
        if tokenizer is not None:
            check_tokenizer(folder, tokenizer, documents)
        files = write_shards(folder, tensors, options.dtype, options.max_shard_bytes)
        size = sum(entry.bytes for entry in files.values())
        say(f"wrote {len(tensors)} tensors, {size / 1e9:.3g} GB, in {time.monotonic() - began:.1f} s")
        verification = None
        if text is not None:
            began = time.monotonic()
            verification = verify_folder(folder, options.export_format, options.dtype, store, text.tokens_NS, files)
            for name, value in verification.lines():
                say(f"  {name}: {value}")
            if not verification.has_passed:
                raise VerificationError(f"its logits are not the trained model's: {verification.lines()[0][1]}")
            say(f"verified on {text.description} in {time.monotonic() - began:.1f} s")
        description = None if text is None else text.description
        card = model_card(
            store, options.export_format, dtype_name(options.dtype), verification, description, options.card
        )
        (folder / _CARD).write_text(card, encoding="utf-8")
    return verification


def recorded_tokenizer(store: Store) -> str | None:
    """Returns the checksum of the tokenizer that the manifests of the training data name; None: they have none."""
    recorded = (store.state.get("data") or {}).get("tokenizer")
    return None if recorded is None else str(recorded)


def check_target(target: Path, is_replacing: bool) -> None:
    """Raises CheckpointError if an export may not be made at a path; a cheap check before any work."""
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise CheckpointError(f"{target} exists and is not a folder; name another output")
    if not any(target.iterdir()):
        return
    card = target / _CARD
    if not (target / "config.json").is_file() or not card.is_file() or CARD_MARK not in card.read_bytes():
        raise CheckpointError(f"{target} holds something that is not an export of this tool; name another output")
    if not is_replacing:
        raise CheckpointError(f"{target} exists; name another output, or give --force to replace it")


def _check_text(text: VerificationText, store: Store) -> None:
    tokens_NS, model = text.tokens_NS, store.model
    assert tokens_NS.ndim == 2 and tokens_NS.shape[0] >= 1
    fewest = min(MIN_VERIFIED_TOKENS, model.max_positions) + 1  # the last one is predicted only
    if not fewest <= tokens_NS.shape[1] <= model.max_positions + 1:
        raise CheckpointError(
            f"{text.description} gives sequences of {tokens_NS.shape[1]} tokens, the verification needs {fewest} to "
            f"{model.max_positions + 1}; name a text that is as long"
        )
    largest = int(tokens_NS.max())
    if largest >= model.vocab_size:
        raise CheckpointError(
            f"{text.description} has a token {largest}, the model has {model.vocab_size} tokens; name the tokenizer "
            "and the data that it was trained with"
        )
