"""The data sets that a configuration names: found, compared with what was recorded of them, and checked together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mlra_scale.config import Config, DataConfig, Problem
from mlra_scale.data import DataError
from mlra_scale.data.blend import BLOCK, BlendPattern
from mlra_scale.data.blocks import sha256_of_file
from mlra_scale.data.folder import check_contents, notices_of, open_prepared
from mlra_scale.data.indexed import SequenceRange, open_indexed
from mlra_scale.data.manifest import MANIFEST_NAME, SPLITS, Manifest, Split, sha256_of_lines

_LARGEST_DEVIATION = 0.01


@dataclass(frozen=True)
class DataSet:
    """A data set of a configuration, with its splits.

    Attributes:
        field: The configuration's field.
        path: As the configuration names it.
        manifest: Of a prepared folder; None: a bare Megatron prefix.
        splits: The sequences of "train" and "validation".
    """

    field: str
    path: str
    manifest: Manifest | None
    splits: dict[Split, SequenceRange]

    @property
    def is_checked(self) -> bool:
        """Whether all of its content is compared at every start with what was prepared."""
        return self.manifest is not None and all(split.files.is_small for split in self.splits.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what says whether the data changed, cheap enough to compute at every start."""
        if self.manifest is not None:
            return self.manifest.fingerprint
        files = self.splits["train"].files
        if not files.is_small:
            return self.fingerprint_of_version_1
        # Nothing recorded the content when it was written.
        content = sha256_of_file(Path(f"{files.prefix}.bin"))
        return sha256_of_lines(["version 2", files.index_sha256, str(files.bin_bytes), content])

    @cached_property
    def fingerprint_of_version_1(self) -> str:
        """The fingerprint that checkpoints of version 1 have of these data."""
        lines = [self.manifest.fingerprint_of_version_1] if self.manifest else []
        for files in {split.files.prefix: split.files for split in self.splits.values()}.values():
            lines += [files.index_sha256, str(files.bin_bytes)]
            if self.manifest is None:
                # A sample of the content stands for the rest.
                lines.append(hashlib.sha256(np.ascontiguousarray(files.token_sample()).tobytes()).hexdigest())
        return sha256_of_lines(lines)


@dataclass(frozen=True, eq=False)
class FoundData:
    """The data sets of a configuration; it maps their index files into memory, so it stays in its process.

    Attributes:
        config: The section of the configuration that names them.
        training: The data sets, in the order of the blend.
        validation: The separate validation data, if any.
        problems: What is wrong with those that are missing here.
    """

    config: DataConfig
    training: list[DataSet]
    validation: DataSet | None
    problems: tuple[Problem, ...]

    @property
    def everything(self) -> list[DataSet]:
        """All data sets, the separate validation data last."""
        return self.training + ([self.validation] if self.validation else [])

    @property
    def validating(self) -> list[DataSet]:
        """The data sets whose validation splits are read."""
        return [self.validation] if self.validation else self.training

    @property
    def manifests(self) -> list[Manifest]:
        """The manifests of the training data that have one, in the order of the blend."""
        return [data_set.manifest for data_set in self.training if data_set.manifest is not None]

    @property
    def end_of_document(self) -> int | None:
        """The end-of-document token: the manifests' (they agree) or, for bare prefixes, the configuration's."""
        return (
            self.manifests[0].tokenizer.end_of_document_token if self.manifests else self.config.end_of_document_token
        )


def find_data(config: Config) -> FoundData:
    """Finds the data sets that the configuration names and the separate validation data, if any.

    All of every index is read: a minute for 500 million documents.
    """
    data = config.data
    named = {f"data.blend.{path}": path for path in data.blend or ()}
    if not named and data.path is not None:
        named = {"data.path": data.path}
    if not named:
        problem = Problem("data.path", None, "no data: name a folder made by mlra-scale prepare")
        return FoundData(data, [], None, (problem,))
    if data.validation_path is not None:
        named["data.validation_path"] = data.validation_path
    found: dict[str, DataSet] = {}
    problems = []
    for field, path in named.items():
        try:
            found[field] = _find_data_set(field, path, data)
        except (DataError, OSError) as error:
            problems.append(Problem(field, path, str(error)))
    validation = found.pop("data.validation_path", None)
    return FoundData(data, list(found.values()), validation, tuple(problems))


def _find_data_set(field: str, path: str, data: DataConfig) -> DataSet:
    """Opens a prepared folder or a bare prefix.

    A bare prefix that is trained on keeps its last documents for validation, unless other data are named for that.
    """
    folder = Path(path)
    if folder.is_dir() and not (Path(f"{path}.idx").is_file() and not (folder / MANIFEST_NAME).is_file()):
        manifest, opened = open_prepared(folder)
        splits: dict[Split, SequenceRange] = {
            split: SequenceRange(opened[split], 0, len(opened[split].sequence_lengths), folder / "cache")
            for split in SPLITS
        }
        return DataSet(field, path, manifest, splits)
    if not folder.parent.is_dir() or not (Path(f"{path}.idx").exists() or Path(f"{path}.bin").exists()):
        raise DataError(f"{path} is neither a folder made by mlra-scale prepare nor a Megatron prefix (PREFIX.bin)")
    files, cache = open_indexed(path), Path(f"{path}.cache")
    border = end = len(files.sequence_lengths)
    if field == "data.validation_path":
        border = 0
    elif data.validation_path is None:
        kept = min(max(1, round(data.validation_fraction * files.num_documents)), files.num_documents)
        border = int(files.document_borders[files.num_documents - kept])
    train, validation = SequenceRange(files, 0, border, cache), SequenceRange(files, border, end, cache)
    return DataSet(field, path, None, {"train": train, "validation": validation})


def blend_problems(training: Sequence[DataSet]) -> Iterator[Problem]:
    """Refuses a blend of more data sets than its pattern has slots, and one that names the same data twice."""
    if len(training) > BLOCK:
        yield Problem("data.blend", f"{len(training)} data sets", f"at most {BLOCK} can be blended; join some")
        return
    seen: dict[str, DataSet] = {}
    for data_set in training if len(training) > 1 else ():
        first = seen.setdefault(data_set.fingerprint, data_set)
        if first is not data_set:
            remedy = f"holds the same data as {first.path}; name them once, with the sum of the weights"
            yield Problem(data_set.field, data_set.path, remedy)


def content_problems(found: FoundData) -> Iterator[Problem]:
    """Compares the content of prepared folders with what was recorded, but for large .bin files."""
    for data_set in found.everything:
        try:
            if data_set.manifest is not None:
                check_contents(data_set.manifest, {name: split.files for name, split in data_set.splits.items()})
        except (DataError, OSError) as error:
            yield Problem(data_set.field, data_set.path, str(error))


def token_problems(config: Config, found: FoundData) -> Iterator[Problem]:
    """Checks that vocabulary and end-of-document token of all data sets suit the model and each other."""
    vocabulary, data, end = config.model.vocab_size, config.data, found.end_of_document
    is_masked = data.document_attention == "masked"
    prepared = [(data_set, data_set.manifest) for data_set in found.everything if data_set.manifest is not None]
    for data_set in found.everything:
        if data_set.manifest is None:
            yield from _bare_token_problems(data_set, vocabulary, end if is_masked else None)
            continue
        tokenizer, (first, manifest) = data_set.manifest.tokenizer, prepared[0]
        if tokenizer.vocabulary_size > vocabulary:
            remedy = f"smaller than the {tokenizer.vocabulary_size} tokens of {data_set.path}; set it to that or more"
            yield Problem("model.vocab_size", vocabulary, remedy)
        if tokenizer.sha256 != manifest.tokenizer.sha256:
            remedy = f"made with another tokenizer than {first.path}; one model needs one tokenizer"
            yield Problem(data_set.field, data_set.path, remedy)
    if end is None and is_masked:
        remedy = "document_attention=masked has to know which token ends documents; name it"
        yield Problem("data.end_of_document_token", None, remedy)
    if prepared and data.end_of_document_token not in (None, end):
        remedy = f"the manifest of {prepared[0][0].path} says {end}; leave this null"
        yield Problem("data.end_of_document_token", data.end_of_document_token, remedy)


def _bare_token_problems(data_set: DataSet, vocabulary: int, end: int | None) -> Iterator[Problem]:
    """Looks at a sample of a bare prefix: ids outside the vocabulary, and (end given) no document that ends with it."""
    files = data_set.splits["train"].files
    sample = files.token_sample()
    if (largest := int(sample.max(initial=0))) >= vocabulary:
        remedy = f"too small for {data_set.path}, which holds the token {largest}; set it to the tokenizer's size"
        yield Problem("model.vocab_size", vocabulary, remedy)
    if int(sample.min(initial=0)) < 0:
        yield Problem(data_set.field, data_set.path, "holds negative tokens; it is not a text data set")
    if end is not None and not (files.document_ends() == end).any():
        remedy = f"no document of {data_set.path} ends with it; was the data set made without --append-eod?"
        yield Problem("data.end_of_document_token", end, remedy)


def length_problems(found: FoundData, length: int) -> Iterator[Problem]:
    """Refuses splits without a whole sample, which make no epoch."""
    wanted: list[tuple[DataSet, Split]] = [(data_set, "train") for data_set in found.training]
    wanted += [(data_set, "validation") for data_set in found.validating]
    for data_set, split in wanted:
        sequences = data_set.splits[split]
        if sequences.num_samples(length) == 0:
            what = f"only {sequences.num_tokens} tokens" if sequences.stop > sequences.first else "no documents"
            others = ", or other validation data (data.validation_path)" if split == "validation" else ""
            remedy = f"its {split} split has {what}, a sample needs {length + 1}; "
            yield Problem(
                data_set.field, data_set.path, f"{remedy}give more data, a shorter train.sequence_length{others}"
            )


def tokenizer_problems(config: Config, found: FoundData) -> Iterator[Problem]:
    """Compares the tokenizer that the configuration names, if any, with those of the manifests."""
    from mlra_scale.data.tokenizer import load_tokenizer, tokenizer_sha256

    if (name := config.data.tokenizer) is None:
        return
    try:
        loaded = load_tokenizer([name])
    except DataError as error:
        yield Problem("data.tokenizer", name, str(error))
        return
    checksum = tokenizer_sha256(loaded.tokenizer)
    for manifest in found.manifests:
        if manifest.tokenizer.sha256 != checksum:
            made_with = f"another tokenizer ({manifest.tokenizer.name}): {manifest.tokenizer_folder}"
            yield Problem("data.tokenizer", name, f"{manifest.folder} was made with {made_with}")
    if found.training and not found.manifests and loaded.vocabulary_size > config.model.vocab_size:
        remedy = f"smaller than the {loaded.vocabulary_size} tokens of data.tokenizer {name}"
        yield Problem("model.vocab_size", config.model.vocab_size, remedy)


def notices(found: FoundData) -> tuple[str, ...]:
    """Returns what a user should know of data that are read all the same, a line each."""
    lines = [line for data_set in found.everything if data_set.manifest for line in notices_of(data_set.manifest)]
    weights = list(found.config.blend.values()) if found.config.blend else [1.0]
    for data_set, weight, share in zip(found.training, weights, BlendPattern(weights).proportions, strict=True):
        wanted = weight / sum(weights)
        if abs(share - wanted) > _LARGEST_DEVIATION * wanted:
            lines.append(
                f"data.blend: the weight of {data_set.path} asks for {wanted:.3g} of the samples and gets {share:.3g}: "
                f"every data set gives at least one of {BLOCK} samples"
            )
    if (validation := found.validation) is not None and validation.manifest is None:
        bare = (data_set.fingerprint for data_set in found.training if data_set.manifest is None)
        if validation.fingerprint in bare:
            lines.append(f"data.validation_path: {validation.path} holds the data that are trained on")
    return tuple(dict.fromkeys(lines))
