"""Verifying an exported folder: it is loaded as its users load it, and its logits are compared with the trainer's.

In float32 the largest difference of any logit may be 1e-4 (or 1e-5 of the largest logit, where logits are above 10:
float32 itself is no finer). In a 16-bit type the export is compared with the float32 logits too, and may differ from
them by at most twice what the training's own layers do in that type.

Shape suffixes: N sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from mlra_scale.checkpoint.files import FileEntry, entry_of
from mlra_scale.checkpoint.huggingface.configuration import quiet_transformers
from mlra_scale.checkpoint.huggingface.tensors import Format
from mlra_scale.checkpoint.huggingface.training_side import POSITIONS_AT_ONCE, TrainingSide, distributed_of_one

if TYPE_CHECKING:
    from mlra_scale.checkpoint.reader import Store

ABSOLUTE_BOUND = 1e-4
RELATIVE_BOUND = 1e-5
OWN_ERROR_FACTOR = 2.0


class VerificationError(Exception):
    """An exported folder differs from the trained model; the message says how."""


class LogitComparison:
    """Accumulates how far logits are from those that are expected."""

    def __init__(self) -> None:
        self.num_tokens = self._num_logits = 0
        self._maxima = torch.zeros(2, dtype=torch.float64)  # of a difference, of an expected logit
        # Of squared differences, divergences, positions that agree, and both losses.
        self._sums = torch.zeros(5, dtype=torch.float64)

    def add(self, expected_SV: torch.Tensor, actual_SV: torch.Tensor, targets_S: torch.Tensor) -> None:
        """Adds the logits of some positions, with the tokens that follow them."""
        expected_SV, actual_SV = expected_SV.double(), actual_SV.double()
        difference_SV = (expected_SV - actual_SV).abs()
        log_p_SV, log_q_SV = expected_SV.log_softmax(-1), actual_SV.log_softmax(-1)
        agreeing_S = expected_SV.argmax(-1) == actual_SV.argmax(-1)
        losses = [-log_SV.gather(-1, targets_S[:, None]).sum() for log_SV in (log_p_SV, log_q_SV)]
        divergence = (log_p_SV.exp() * (log_p_SV - log_q_SV)).sum()
        self._sums += torch.stack([difference_SV.square().sum(), divergence, agreeing_S.sum().double(), *losses])
        # Not Python's max(), which would lose a NaN.
        self._maxima = torch.maximum(self._maxima, torch.stack([difference_SV.max(), expected_SV.abs().max()]))
        self._num_logits += difference_SV.numel()
        self.num_tokens += len(targets_S)

    @property
    def max_difference(self) -> float:
        return float(self._maxima[0])

    @property
    def largest_logit(self) -> float:
        return float(self._maxima[1])

    @property
    def rms_difference(self) -> float:
        """Root mean square of the differences."""
        return math.sqrt(self._sums[0] / self._num_logits)

    @property
    def divergence(self) -> float:
        """Mean Kullback-Leibler divergence of the next-token distributions from the expected ones, in nats."""
        return float(self._sums[1]) / self.num_tokens

    @property
    def agreement(self) -> float:
        """Share of positions where the likeliest token is the same."""
        return float(self._sums[2]) / self.num_tokens

    @property
    def perplexities(self) -> tuple[float, float]:
        """Perplexity of the text under the expected and the actual logits."""
        expected, actual = (self._sums[3:] / self.num_tokens).exp().tolist()
        return expected, actual


@dataclass(frozen=True)
class Verification:
    """The figures of a verification, against the trained model in float32.

    Attributes:
        dtype: Type of the export.
        exported: The exported folder.
        own: The training's own layers in `dtype`; None for float32.
    """

    dtype: torch.dtype
    exported: LogitComparison
    own: LogitComparison | None

    @property
    def max_bound(self) -> float:
        """Largest difference of a logit that is allowed."""
        if self.own is not None:
            return OWN_ERROR_FACTOR * self.own.max_difference
        return max(ABSOLUTE_BOUND, RELATIVE_BOUND * self.exported.largest_logit)

    @property
    def rms_bound(self) -> float:
        """Largest root mean square difference that is allowed."""
        return self.max_bound if self.own is None else OWN_ERROR_FACTOR * self.own.rms_difference

    @property
    def has_passed(self) -> bool:
        """Whether the differences are within their bounds; NaN is not."""
        exported = self.exported
        return exported.max_difference <= self.max_bound and exported.rms_difference <= self.rms_bound

    def lines(self) -> list[tuple[str, str]]:
        """Returns the figures as (name, value) for people."""
        exported = self.exported
        expected, actual = exported.perplexities
        against = "" if self.own is None else f", twice that of the trainer's own layers in {dtype_name(self.dtype)}"
        found = [
            ("largest difference of a logit", f"{exported.max_difference:.3g} (bound {self.max_bound:.3g}{against})"),
            ("root mean square difference", f"{exported.rms_difference:.3g} (bound {self.rms_bound:.3g})"),
            ("mean KL divergence", f"{exported.divergence:.3g} nats"),
            ("same likeliest token", f"{100 * exported.agreement:.2f} % of {exported.num_tokens:,} positions"),
            ("perplexity", f"{actual:.6g} (trained model {expected:.6g})"),
        ]
        return found if self.own is not None else found[:1] + found[2:]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a type, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def verify_folder(
    folder: Path,
    export_format: Format,
    dtype: torch.dtype,
    store: Store,
    tokens_NS: torch.Tensor,
    files: Mapping[str, FileEntry],
) -> Verification:
    """Compares an exported folder, and the files as they were written, with the checkpoint that it was made from.

    `tokens_NS` is real text: token ids, one more per sequence than are passed to the models.

    Returns:
        The figures, whether they pass or not.

    Raises:
        VerificationError: The folder cannot be loaded, lacks weights, or holds other bytes than were written.
    """
    for name, entry in files.items():
        # The logits depend only on the weights that the text uses, not on those of other tokens and later positions.
        if entry_of(folder / name) != entry:
            raise VerificationError(f"{name} reads back other than it was written: check the disk of {folder.parent}")
    exported, own = LogitComparison(), None if dtype == torch.float32 else LogitComparison()
    inputs_NS, targets_NS = tokens_NS[:, :-1], tokens_NS[:, 1:]
    with loaded_model(folder, export_format, dtype) as model, distributed_of_one(), torch.no_grad():
        is_tied = export_format == "mlra" or store.model.embedding_factor == 1.0
        _check_loaded(model, store, dtype, is_tied)
        expected = TrainingSide(store, torch.float32).logits(inputs_NS)
        own_logits = None if own is None else TrainingSide(store, dtype).logits(inputs_NS)
        for inputs_S, targets_S in zip(inputs_NS, targets_NS, strict=True):
            logits_SV = model(inputs_S[None], use_cache=False).logits[0]
            parts = (whole.split(POSITIONS_AT_ONCE) for whole in (logits_SV, targets_S))
            for actual_SV, following_S in zip(*parts, strict=True):
                expected_SV = next(expected)
                exported.add(expected_SV, actual_SV, following_S)
                if own is not None and own_logits is not None:
                    own.add(expected_SV, next(own_logits), following_S)
    return Verification(dtype, exported, own)


@contextlib.contextmanager
def loaded_model(folder: Path, export_format: Format, dtype: torch.dtype) -> Iterator[Any]:
    """Yields an export in evaluation mode, loaded by stock GPT-2 or by the code in the folder; weights stay mapped.

    Raises:
        VerificationError: It cannot be loaded, or not all weights fit.
    """
    with _code_of(folder, export_format) as factory:
        try:
            with quiet_transformers():
                model, report = factory.from_pretrained(
                    folder, dtype=dtype, local_files_only=True, output_loading_info=True
                )
        except Exception as error:  # of any kind: each means that the folder does not load
            raise VerificationError(f"{folder.name} does not load: {type(error).__name__}: {error}") from error
        faults = {kind: names for kind, names in report.items() if names}
        if faults:
            raise VerificationError(f"{folder.name} does not load with all of its weights: {faults}")
        yield model.eval()


@contextlib.contextmanager
def _code_of(folder: Path, export_format: Format) -> Iterator[Any]:
    """Yields the class that loads a folder.

    Code is imported from the folder itself, as a package, since its files import each other: loading it as remote code
    would leave a copy in the user's cache.
    """
    if export_format == "gpt2":
        yield transformers.GPT2LMHeadModel
        return
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]["AutoModelForCausalLM"]
    module_name, class_name = named.split(".")
    package = types.ModuleType(f"_exported_{id(folder)}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    importlib.invalidate_caches()  # the folder may be a new one in the place of another
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # or the export would hold a __pycache__
    try:
        yield getattr(importlib.import_module(f"{package.__name__}.{module_name}"), class_name)
    finally:
        sys.dont_write_bytecode = bytecode
        for name in [name for name in sys.modules if name.partition(".")[0] == package.__name__]:
            del sys.modules[name]


def _check_loaded(model: Any, store: Store, dtype: torch.dtype, is_tied: bool) -> None:
    """Checks what the logits do not show."""
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if (head is inputs) != is_tied:
        raise VerificationError(f"the output head is {'not ' if is_tied else ''}the token embedding")
    if inputs.shape[0] != store.model.vocab_size:
        raise VerificationError(f"the model has {inputs.shape[0]} tokens and not {store.model.vocab_size}")
    others = sorted({dtype_name(parameter.dtype) for parameter in model.parameters()} - {dtype_name(dtype)})
    if others:
        raise VerificationError(f"the model has weights in {', '.join(others)} and not in {dtype_name(dtype)} alone")
