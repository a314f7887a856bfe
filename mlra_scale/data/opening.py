"""From the configuration to streams of batches: finds the data sets, checks them, opens them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlra_scale.config import Config, ConfigError, Problem
from mlra_scale.data.errors import DataError
from mlra_scale.data.folder import check_contents
from mlra_scale.data.manifest import Manifest
from mlra_scale.data.mix import DataIdentity, Mix, SampleOrder
from mlra_scale.data.parts import FoundParts, Part, check_blend, find_parts, notices

if TYPE_CHECKING:
    from mlra_scale.data.one_epoch import SequenceRange
    from mlra_scale.data.stream import SampleStream


@dataclass(frozen=True)
class Datasets:
    """The opened data of a run.

    Attributes:
        train: Training samples, shuffled by (seed, epoch).
        validation: Validation samples in a fixed order.
        identity: What tells whether they are the same data, see `identify_data`.
        mixes: The training data from the first sample on; the last mix is the one that is read.
        manifests: The manifests of the data sets that have one, in the order of the blend.
        num_train_tokens: Tokens of all training splits together.
        is_checked: Whether all of it was checked at the start: prepared data whose .bin files are small. Otherwise a
            rank may meet a token that the model does not have, or a damaged block, when it reads a batch.
        notices: What a user should know of the data, a line each.
    """

    train: SampleStream
    validation: SampleStream
    identity: DataIdentity
    mixes: tuple[Mix, ...]
    manifests: tuple[Manifest, ...]
    num_train_tokens: int
    is_checked: bool
    notices: tuple[str, ...]


def check_data(config: Config, is_resumed: bool = False, found: FoundParts | None = None) -> list[Problem]:
    """Finds everything that is wrong with data, tokenizer and manifest, without building anything heavy.

    Needs no process group, and no rank but its own. Content is compared with what was recorded, but for .bin files of
    more than 64 MB: their blocks are checked when they are read.

    Args:
        config: The configuration.
        is_resumed: Whether a run continues with these data; it may have begun with a blend that a new one may not have.
        found: What find_parts returned for these data; None: they are found here.

    Returns:
        All problems; none if the data can be opened.
    """
    parts, validation, problems = _found(config, found)
    if parts:
        problems += _check_contents(parts + ([validation] if validation else []))
        problems += [] if is_resumed else check_blend(parts)
        problems += _check_tokens(config, parts + ([validation] if validation else []))
        problems += _check_lengths(config, parts, validation)
    if config.data.tokenizer is not None:
        problems += _check_tokenizer(config, parts)
    return problems


def _found(config: Config, found: FoundParts | None) -> tuple[list[Part], Part | None, list[Problem]]:
    """Returns the data sets of a configuration; they are found anew where `found` has none, or those of other data."""
    if found is None or found.data != config.data:
        found = find_parts(config)
    return found.parts, found.validation, list(found.problems)


def _check_contents(parts: list[Part]) -> list[Problem]:
    problems = []
    for part in parts:
        try:
            if part.prepared is not None:
                check_contents(part.prepared)
        except (DataError, OSError) as error:
            problems.append(Problem(part.field, part.path, str(error)))
    return problems


def open_datasets(config: Config, mixes: Sequence[Mix] = (), found: FoundParts | None = None) -> Datasets:
    """Opens the data; every rank can do so by itself, at any time, and gets the same samples.

    Args:
        config: The configuration.
        mixes: The history of mixes of a resumed run, the configuration's as the last; empty: there is none.
        found: What find_parts returned for these data in this process; None: they are found here.

    Returns:
        The streams.

    Raises:
        ConfigError: The data cannot be opened; what check_data finds, but for the tokenizer's problems and content.
    """
    parts, validation, problems = _found(config, found)
    if parts:
        problems += _check_tokens(config, parts + ([validation] if validation else []))
        problems += _check_lengths(config, parts, validation)
    if problems:
        raise ConfigError(problems)
    from mlra_scale.data.one_epoch import OneEpoch
    from mlra_scale.data.stream import SampleStream

    identity = _identity(config, parts, validation)
    if mixes and mixes[-1].fingerprints != identity.mix.fingerprints:
        remedy = "holds other data here than on rank 0; copy the same data to all nodes"
        raise ConfigError([Problem("data", list(identity.mix.names), remedy)])
    mixes = tuple(mixes) or (identity.mix,)
    validation_parts = [validation] if validation else parts
    validation_mix = Mix(("validation",), (identity.validation,), (1.0,)) if identity.validation else identity.mix
    length, vocabulary = config.train.sequence_length, config.model.vocab_size
    training_ranges = [_sequence_range(part, "train") for part in parts]
    validation_ranges = [_sequence_range(part, "validation") for part in validation_parts]
    seed = config.train.seed if config.data.seed is None else config.data.seed
    end, reset = _end_of_document(config, parts), config.data.reset_positions
    return Datasets(
        train=SampleStream(
            [OneEpoch(r, length) for r in training_ranges], SampleOrder(mixes), seed, vocabulary, end, reset
        ),
        validation=SampleStream(
            [OneEpoch(r, length) for r in validation_ranges],
            SampleOrder([validation_mix]),
            None,
            vocabulary,
            end,
            reset,
        ),
        identity=identity,
        mixes=mixes,
        manifests=tuple(part.manifest for part in parts if part.manifest is not None),
        num_train_tokens=sum(r.num_tokens for r in training_ranges),
        is_checked=all(part.is_checked for part in parts + validation_parts),
        notices=notices(config, parts, validation),
    )


def identify_data(config: Config, found: FoundParts | None = None) -> DataIdentity:
    """Returns what tells whether the data changed, cheaply; the data must pass check_data.

    Args:
        config: The configuration.
        found: What find_parts returned for these data; None: they are found here.

    Returns:
        The identity. Its fingerprints change when the data do, not when they move, nor with seed or sequence length.
    """
    parts, validation, problems = _found(config, found)
    if problems:
        raise ConfigError(problems)
    return _identity(config, parts, validation)


def _identity(config: Config, parts: list[Part], validation: Part | None) -> DataIdentity:
    weights = tuple(config.data.blend.values()) if config.data.blend else (1.0,)
    mix = Mix(tuple(part.path for part in parts), tuple(part.fingerprint for part in parts), weights)
    everything = [*parts, *([validation] if validation else [])]
    tokenizers = [part.manifest.tokenizer_sha256 for part in parts if part.manifest is not None]
    return DataIdentity(
        mix=mix,
        validation=validation.fingerprint if validation else None,
        tokenizer=tokenizers[0] if tokenizers else None,
        is_blend=bool(config.data.blend),
        earlier={part.fingerprint_of_version_1: part.fingerprint for part in everything},
    )


def _sequence_range(part: Part, split: str) -> SequenceRange:
    from mlra_scale.data.one_epoch import SequenceRange

    files, first, stop = part.training if split == "train" else part.validation
    return SequenceRange(
        prefix=files.prefix,
        first=first,
        stop=stop,
        num_tokens=files.num_tokens(first, stop),
        index_sha256=files.index_sha256,
        cache=part.cache,
        table=files.table,
    )


def _end_of_document(config: Config, parts: list[Part]) -> int | None:
    """Returns the end-of-document token: the manifests' (they agree) or, for bare prefixes, the configuration's."""
    for part in parts:
        if part.manifest is not None:
            return part.manifest.end_of_document_token
    return config.data.end_of_document_token


def _check_tokens(config: Config, parts: list[Part]) -> list[Problem]:
    """Checks that vocabulary and end-of-document token of all data sets suit the model and each other."""
    problems: list[Problem] = []
    vocabulary, data = config.model.vocab_size, config.data
    end = _end_of_document(config, parts)
    first_with_manifest = next((part for part in parts if part.manifest), None)
    for part in parts:
        if part.manifest is not None:
            assert first_with_manifest is not None and first_with_manifest.manifest is not None
            if part.manifest.vocabulary_size > vocabulary:
                remedy = (
                    f"smaller than the {part.manifest.vocabulary_size} tokens of {part.path}; set it to that or more"
                )
                problems.append(Problem("model.vocab_size", vocabulary, remedy))
            if part.manifest.tokenizer_sha256 != first_with_manifest.manifest.tokenizer_sha256:
                remedy = f"made with another tokenizer than {first_with_manifest.path}; one model needs one tokenizer"
                problems.append(Problem(part.field, part.path, remedy))
            continue
        sample = part.training[0].token_sample()
        largest = int(sample.max(initial=0))
        if largest >= vocabulary:
            remedy = f"too small for {part.path}, which holds the token {largest}; set it to the tokenizer's size"
            problems.append(Problem("model.vocab_size", vocabulary, remedy))
        if int(sample.min(initial=0)) < 0:
            problems.append(Problem(part.field, part.path, "holds negative tokens; it is not a text data set"))
        if (
            data.document_attention == "masked"
            and end is not None
            and not (part.training[0].document_ends() == end).any()
        ):
            remedy = f"no document of {part.path} ends with it; was the data set made without --append-eod?"
            problems.append(Problem("data.end_of_document_token", end, remedy))
    if end is None and data.document_attention == "masked":
        remedy = "document_attention=masked has to know which token ends documents; name it"
        problems.append(Problem("data.end_of_document_token", None, remedy))
    if first_with_manifest is not None and data.end_of_document_token not in (None, end):
        remedy = f"the manifest of {first_with_manifest.path} says {end}; leave this null"
        problems.append(Problem("data.end_of_document_token", data.end_of_document_token, remedy))
    return problems


def _check_lengths(config: Config, parts: list[Part], validation: Part | None) -> list[Problem]:
    """Refuses splits without a whole sample: GPTDataset would count epochs over nothing for ever."""
    length = config.train.sequence_length
    wanted = [(part, "train") for part in parts]
    wanted += [(part, "validation") for part in ([validation] if validation else parts)]
    problems = []
    for part, split in wanted:
        if part.num_samples(split, length) == 0:
            files, first, stop = part.training if split == "train" else part.validation
            tokens = files.num_tokens(first, stop)
            what = "no documents" if stop == first else f"only {tokens} tokens"
            remedy = f"its {split} split has {what}, a sample needs {length + 1}; "
            remedy += "give more data, a shorter train.sequence_length"
            remedy += ", or other validation data (data.validation_path)" if split == "validation" else ""
            problems.append(Problem(part.field, part.path, remedy))
    return problems


def _check_tokenizer(config: Config, parts: list[Part]) -> list[Problem]:
    """Compares the tokenizer that the configuration names with those of the manifests."""
    from mlra_scale.data.tokenizer import load_tokenizer, tokenizer_sha256

    name = config.data.tokenizer
    assert name is not None
    try:
        loaded = load_tokenizer([name])
    except DataError as error:
        return [Problem("data.tokenizer", name, str(error))]
    problems = []
    checksum, with_manifest = tokenizer_sha256(loaded.tokenizer), [part for part in parts if part.manifest]
    for part in with_manifest:
        assert part.manifest is not None
        if part.manifest.tokenizer_sha256 != checksum:
            made_with = part.manifest.content["tokenizer"]["name"]
            remedy = f"{part.path} was made with another tokenizer ({made_with}): {part.manifest.tokenizer_folder}"
            problems.append(Problem("data.tokenizer", name, remedy))
    if parts and not with_manifest and loaded.vocabulary_size > config.model.vocab_size:
        remedy = f"smaller than the {loaded.vocabulary_size} tokens of data.tokenizer {name}"
        problems.append(Problem("model.vocab_size", config.model.vocab_size, remedy))
    return problems
