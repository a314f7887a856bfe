"""The data sets that a configuration names, found and compared with what was recorded of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mlra_scale.config import Config, DataConfig, Problem
from mlra_scale.data.blend import BLOCK, BlendPattern
from mlra_scale.data.errors import DataError
from mlra_scale.data.folder import Prepared, notices_of, open_prepared
from mlra_scale.data.indexed import IndexedFiles, open_indexed, sha256_of_file
from mlra_scale.data.manifest import MANIFEST_NAME, Manifest

_LARGEST_DEVIATION = 0.01


@dataclass(frozen=True)
class Part:
    """A data set that was found whole: its split into training and validation, not opened yet.

    Attributes:
        field: The configuration's field.
        path: As the configuration names it.
        prepared: The folder; None: a bare Megatron prefix.
        training: (files, first sequence, one past the last sequence).
        validation: The same for validation.
        cache: Folder for large indices.
    """

    field: str
    path: str
    prepared: Prepared | None
    training: tuple[IndexedFiles, int, int]
    validation: tuple[IndexedFiles, int, int]
    cache: Path

    @property
    def manifest(self) -> Manifest | None:
        """The manifest; None for a bare prefix."""
        return None if self.prepared is None else self.prepared.manifest

    @property
    def is_checked(self) -> bool:
        """Whether all of its content is compared at every start with what was prepared."""
        return self.prepared is not None and all(files.is_small for files, _, _ in (self.training, self.validation))

    def num_samples(self, split: str, sequence_length: int) -> int:
        """Returns how many whole samples a split has."""
        files, first, stop = self.training if split == "train" else self.validation
        return max(0, files.num_tokens(first, stop) - 1) // sequence_length

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what says whether the data changed, cheap enough to compute at every start."""
        if self.manifest is not None:
            return self.manifest.fingerprint
        files = self.training[0]
        if not files.is_small:
            return self.fingerprint_of_version_1
        # Nothing recorded the content when it was written.
        content = sha256_of_file(Path(f"{files.prefix}.bin"))
        return _sum_of_lines(["version 2", files.index_sha256, str(files.bin_bytes), content])

    @cached_property
    def fingerprint_of_version_1(self) -> str:
        """The fingerprint that checkpoints of version 1 have of these data."""
        lines = [self.manifest.fingerprint_of_version_1] if self.manifest else []
        for files in {files.prefix: files for files, _, _ in (self.training, self.validation)}.values():
            lines += [files.index_sha256, str(files.bin_bytes)]
            if self.manifest is None:
                # A sample of the content stands for the rest.
                lines.append(hashlib.sha256(np.ascontiguousarray(files.token_sample()).tobytes()).hexdigest())
        return _sum_of_lines(lines)


def _sum_of_lines(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class FoundParts:
    """The data sets of a configuration; it maps their index files into memory, so it stays in its process.

    Attributes:
        data: The section of the configuration that names them.
        parts: The data sets, in the order of the blend.
        validation: The separate validation data, if any.
        problems: What is wrong with those that are missing here.
    """

    data: DataConfig
    parts: list[Part]
    validation: Part | None
    problems: tuple[Problem, ...]


def find_parts(config: Config) -> FoundParts:
    """Finds the data sets that the configuration names and the separate validation data, if any.

    All of every index is read: a minute for 500 million documents.
    """
    data = config.data
    problems: list[Problem] = []
    parts: list[Part] = []
    if data.blend:
        named = [(f"data.blend.{path}", path) for path in data.blend]
    elif data.path is not None:
        named = [("data.path", data.path)]
    else:
        problem = Problem("data.path", None, "no data: name a folder made by tools/prepare_data.py")
        return FoundParts(data, [], None, (problem,))
    for field, path in named:
        try:
            parts.append(_find_part(field, path, data.validation_fraction, data.validation_path is None))
        except (DataError, OSError) as error:
            problems.append(Problem(field, path, str(error)))
    validation = None
    if data.validation_path is not None:
        try:
            validation = _find_part("data.validation_path", data.validation_path, None, True)
        except (DataError, OSError) as error:
            problems.append(Problem("data.validation_path", data.validation_path, str(error)))
    return FoundParts(data, parts, validation, tuple(problems))


def _find_part(field: str, path: str, fraction: float | None, has_own_validation: bool) -> Part:
    """Opens a prepared folder or a bare prefix.

    Args:
        field: The configuration's field.
        path: Folder or prefix.
        fraction: Share of a bare prefix's last documents for validation; None: all of them are for validation.
        has_own_validation: False if validation data are named elsewhere; all documents of a prefix are then trained on.

    Returns:
        The part.

    Raises:
        DataError: It is not whole.
        OSError: It cannot be read.
    """
    folder = Path(path)
    if folder.is_dir() and not (Path(f"{path}.idx").is_file() and not (folder / MANIFEST_NAME).is_file()):
        prepared = open_prepared(folder)
        whole = {split: (opened, 0, len(opened.sequence_lengths)) for split, opened in prepared.files.items()}
        return Part(field, path, prepared, whole["train"], whole["validation"], folder / "cache")
    if not folder.parent.is_dir() or not (Path(f"{path}.idx").exists() or Path(f"{path}.bin").exists()):
        raise DataError(f"{path} is neither a folder made by tools/prepare_data.py nor a Megatron prefix (PREFIX.bin)")
    opened = open_indexed(path)
    border, end = len(opened.sequence_lengths), len(opened.sequence_lengths)
    if has_own_validation and fraction is not None:
        kept = min(max(1, round(fraction * opened.num_documents)), opened.num_documents)
        border = int(opened.document_borders[opened.num_documents - kept])
    elif fraction is None:
        border = 0
    return Part(field, path, None, (opened, 0, border), (opened, border, end), Path(f"{path}.cache"))


def check_blend(parts: Sequence[Part]) -> list[Problem]:
    """Refuses a blend of more data sets than its pattern has places, and one that names the same data twice."""
    if len(parts) > BLOCK:
        return [Problem("data.blend", f"{len(parts)} data sets", f"at most {BLOCK} can be blended; join some")]
    problems, seen = [], dict[str, Part]()
    for part in parts if len(parts) > 1 else ():
        first = seen.setdefault(part.fingerprint, part)
        if first is not part:
            remedy = f"holds the same data as {first.path}; name them once, with the sum of the weights"
            problems.append(Problem(part.field, part.path, remedy))
    return problems


def notices(config: Config, parts: Sequence[Part], validation: Part | None) -> tuple[str, ...]:
    """Returns what a user should know of data that are read all the same, a line each."""
    everything = [*parts, *([validation] if validation else [])]
    found = [line for part in everything if part.prepared for line in notices_of(part.prepared)]
    weights = list(config.data.blend.values()) if config.data.blend else [1.0]
    for part, weight, share in zip(parts, weights, BlendPattern(weights).proportions, strict=True):
        wanted = weight / sum(weights)
        if abs(share - wanted) > _LARGEST_DEVIATION * wanted:
            found.append(
                f"data.blend: the weight of {part.path} asks for {wanted:.3g} of the samples and gets {share:.3g}: "
                f"every data set gives at least one of {BLOCK} samples"
            )
    trained = [part for part in parts if part.prepared is None and validation and validation.prepared is None]
    for part in trained:
        assert validation is not None
        if part.fingerprint == validation.fingerprint:
            found.append(f"data.validation_path: {validation.path} holds the data that are trained on")
    return tuple(dict.fromkeys(found))
