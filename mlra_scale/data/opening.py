"""From the configuration to streams of batches: finds the data sets, checks them, opens them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlra_scale.config import Config, ConfigError, Problem
from mlra_scale.data.data_sets import (
    FoundData,
    blend_problems,
    content_problems,
    find_data,
    length_problems,
    notices,
    token_problems,
    tokenizer_problems,
)
from mlra_scale.data.manifest import Manifest
from mlra_scale.data.mix import DataIdentity, Mix, SampleOrder

if TYPE_CHECKING:
    from mlra_scale.data.stream import SampleStream


@dataclass(frozen=True)
class OpenData:
    """The opened data of a run.

    Attributes:
        train: Training samples, shuffled by (seed, epoch).
        validation: Validation samples in a fixed order.
        identity: Says whether they are the same data, see `identify_data`.
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


def check_data(config: Config, is_resumed: bool = False, found: FoundData | None = None) -> list[Problem]:
    """Finds everything that is wrong with data, tokenizer and manifest, without building anything heavy.

    Needs no process group, and no rank but its own. Content is compared with what was recorded, but for .bin files of
    more than 64 MB: their blocks are checked when they are read.

    Args:
        config: The configuration.
        is_resumed: Whether a run continues with these data; it may have begun with a blend that a new one may not have.
        found: What find_data returned for these data; None: they are found here.
    """
    found = _found(config, found)
    problems = list(found.problems)
    if found.training:
        problems += content_problems(found)
        problems += () if is_resumed else blend_problems(found.training)
        problems += token_problems(config, found)
        problems += length_problems(found, config.train.sequence_length)
    return [*problems, *tokenizer_problems(config, found)]


def open_datasets(config: Config, mixes: Sequence[Mix] = (), found: FoundData | None = None) -> OpenData:
    """Opens the data; every rank can do so by itself, at any time, and gets the same samples.

    Args:
        config: The configuration.
        mixes: The history of mixes of a resumed run, the configuration's as the last; empty: there is none.
        found: What find_data returned for these data in this process; None: they are found here.

    Raises:
        ConfigError: The data cannot be opened; what check_data finds, but for the tokenizer's problems and content.
    """
    found = _found(config, found)
    problems = list(found.problems)
    if found.training:
        problems += [*token_problems(config, found), *length_problems(found, config.train.sequence_length)]
    if problems:
        raise ConfigError(problems)
    from mlra_scale.data.one_epoch import OneEpoch
    from mlra_scale.data.stream import SampleStream

    identity = _identity(found)
    if mixes and mixes[-1].fingerprints != identity.mix.fingerprints:
        remedy = "holds other data here than on rank 0; copy the same data to all nodes"
        raise ConfigError([Problem("data", list(identity.mix.names), remedy)])
    mixes = tuple(mixes) or (identity.mix,)
    validation_mix = Mix(("validation",), (identity.validation,), (1.0,)) if identity.validation else identity.mix
    training = [data_set.splits["train"] for data_set in found.training]
    validation = [data_set.splits["validation"] for data_set in found.validating]
    length, vocabulary = config.train.sequence_length, config.model.vocab_size
    seed = config.train.seed if config.data.seed is None else config.data.seed
    end, reset = found.end_of_document, config.data.reset_positions
    epochs, validation_epochs = ([OneEpoch(split, length) for split in splits] for splits in (training, validation))
    return OpenData(
        train=SampleStream(epochs, SampleOrder(mixes), seed, vocabulary, end, reset),
        validation=SampleStream(validation_epochs, SampleOrder([validation_mix]), None, vocabulary, end, reset),
        identity=identity,
        mixes=mixes,
        manifests=tuple(found.manifests),
        num_train_tokens=sum(split.num_tokens for split in training),
        is_checked=all(data_set.is_checked for data_set in found.everything),
        notices=notices(found),
    )


def identify_data(config: Config, found: FoundData | None = None) -> DataIdentity:
    """Returns the identity of data that pass check_data, cheaply; `found` is as for check_data.

    Its fingerprints change when the data do, not when they move, nor with seed or sequence length.
    """
    found = _found(config, found)
    if found.problems:
        raise ConfigError(found.problems)
    return _identity(found)


def _found(config: Config, found: FoundData | None) -> FoundData:
    """Returns the data sets of a configuration; they are found anew where `found` is None or of other data."""
    return found if found is not None and found.config == config.data else find_data(config)


def _identity(found: FoundData) -> DataIdentity:
    blend, data_sets = found.config.blend, found.training
    return DataIdentity(
        mix=Mix(
            names=tuple(data_set.path for data_set in data_sets),
            fingerprints=tuple(data_set.fingerprint for data_set in data_sets),
            weights=tuple(blend.values()) if blend else (1.0,),
        ),
        validation=found.validation.fingerprint if found.validation else None,
        tokenizer=found.manifests[0].tokenizer.sha256 if found.manifests else None,
        is_blend=bool(blend),
        earlier={data_set.fingerprint_of_version_1: data_set.fingerprint for data_set in found.everything},
    )
