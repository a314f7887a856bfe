"""What to prepare: the choices that decide the bytes of a data set, and how the work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlra_scale.data.mixture import Component


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare; `mlra-scale prepare --help` describes the fields that are its flags.

    Attributes:
        output: Folder to make.
        components: The data sets: one without a name, or those of a mixture.
        tokenizer: See load_tokenizer; empty: train a BPE of `train_bpe` tokens.
        train_bpe_bytes: The BPE is trained on this many bytes of training text, of each data set its weight's share
            from the beginning of its corpus.
        max_bytes: Of each data set: stop after the document with which this many bytes of text are reached; None: read
            all.
        validation_fraction: Expected share of documents in the validation split.
    """

    output: Path
    components: Sequence[Component]
    tokenizer: Sequence[str] = ()
    train_bpe: int | None = None
    train_bpe_bytes: int = 100_000_000
    end_of_document: str | None = None
    max_bytes: int | None = None
    validation_fraction: float = 0.01
    seed: int = 0
    workers: int = 1
    overwrite: bool = False
    progress: bool = True

    @property
    def is_mixture(self) -> bool:
        """Whether the output is a folder of data sets."""
        return bool(self.components[0].name)
