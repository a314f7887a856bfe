"""Whether the data of a resumed run are those that it has read so far, and the mix of data sets it continues with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import isfinite
from typing import Any

from mlra_scale.config import Named, Problem
from mlra_scale.data.mix import DataIdentity, Mix, continued
from mlra_scale.training.resume import Change


@dataclass(frozen=True)
class DataHistory:
    """The data of a run as its checkpoint stores them.

    Attributes:
        mixes: The mixes of data sets, each with its first sample.
        validation: Fingerprint of separate validation data.
        tokenizer: SHA-256 of the tokenizer, where it is known.
    """

    mixes: tuple[Mix, ...]
    validation: str | None
    tokenizer: str | None

    @classmethod
    def of(cls, identity: DataIdentity, mixes: Sequence[Mix]) -> DataHistory:
        """Returns the history of a run that now reads the data of `identity`."""
        return cls(tuple(mixes), identity.validation, identity.tokenizer)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        mixes = [mix.to_dict() for mix in self.mixes]
        return {"mixes": mixes, "validation": self.validation, "tokenizer": self.tokenizer}

    def renamed(self, fingerprints: Mapping[str, str]) -> DataHistory:
        """Returns the history with new fingerprints for the same data sets, by those so far."""
        validation = None if self.validation is None else fingerprints.get(self.validation, self.validation)
        return replace(self, mixes=tuple(mix.renamed(fingerprints) for mix in self.mixes), validation=validation)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataHistory:
        """Reverses `to_dict`.

        Raises:
            ValueError: Something is missing or garbled.
        """
        try:
            mixes = tuple(map(Mix.from_dict, values["mixes"]))
            validation, tokenizer = values["validation"], values["tokenizer"]
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a history of data: {error!r}") from error
        starts = [mix.from_sample for mix in mixes]
        is_in_order = starts[:1] == [0] and all(one < next_one for one, next_one in pairwise(starts))
        if not is_in_order or not all(isinstance(name, str | None) for name in (validation, tokenizer)):
            raise ValueError(f"not a history of data: mixes from samples {starts}, {validation!r}, {tokenizer!r}")
        if not all(isfinite(weight) for mix in mixes for weight in mix.weights):
            raise ValueError("not a history of data: a weight is not finite")
        return cls(mixes, validation, tokenizer)


@dataclass(frozen=True)
class DataComparison:
    """The data of a start, compared with those of the run that it continues.

    Attributes:
        mixes: The history of mixes to continue with.
        changes: Differences from the run so far.
        problems: Differences that are not allowed.
    """

    mixes: tuple[Mix, ...]
    changes: list[Change] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def compare_data(identity: DataIdentity, stored: DataHistory, consumed_samples: int, named: Named) -> DataComparison:
    """Compares data by their fingerprints, wherever they are stored.

    Another mix of data sets takes effect with the next sample if `data.blend` is named on the command line.

    Args:
        identity: Of the data of this start.
        stored: Of the checkpoint.
        consumed_samples: Samples that the run has read.
        named: Which fields a person named.
    """
    changes, problems, converted = [], [], stored.renamed(identity.earlier)
    if converted != stored:
        changes.append(Change("form of the data's fingerprints", 1, 2))
        stored = converted
    if None not in (identity.tokenizer, stored.tokenizer) and identity.tokenizer != stored.tokenizer:
        remedy = f"the run to be resumed was trained with tokenizer {_short(stored.tokenizer)}; the same token would "
        remedy += "mean another text: use data made with that one, or start a new run"
        problems.append(Problem("data (tokenizer)", _short(identity.tokenizer), remedy))
    problems += _validation_problems(identity.validation, stored.validation)
    current, last = replace(identity.mix, from_sample=consumed_samples), stored.mixes[-1]
    if last.reads_like(current):
        return DataComparison(stored.mixes, changes, problems)
    if "data.blend" not in named.on_command_line:
        return DataComparison(stored.mixes, changes, problems + _mix_problems(identity, last))
    problems += _replaced_problems(identity.mix, last)
    changes.append(Change("data.blend", _blend(last), _blend(current)))
    return DataComparison(continued(stored.mixes, current), changes, problems)


def _validation_problems(now: str | None, was: str | None) -> list[Problem]:
    if now == was:
        return []
    if was is None:
        remedy = "the run to be resumed has no separate validation data; leave them out, or start a new run"
    elif now is None:
        remedy = f"the run to be resumed has validation data of fingerprint {_short(was)}; name them"
    else:
        remedy = f"not the data of the run to be resumed, whose fingerprint is {_short(was)}; they may have moved, but "
        remedy += "must be the same, or start a new run"
    return [Problem("data.validation_path", f"fingerprint {_short(now)}", remedy)]


def _mix_problems(identity: DataIdentity, last: Mix) -> list[Problem]:
    """Returns the differences of a mix that was not changed on purpose, field by field."""
    blend = ", ".join(f"{name}: {weight:g}" for name, weight in _blend(identity.mix).items())
    remedy = f"to continue with other data from here on, name them on the command line: 'data.blend={{{blend}}}'"
    remedy += "" if identity.is_blend else " data.path=null"
    now, was = identity.mix.fingerprints, last.fingerprints
    fields = list(identity.fingerprints)[: len(now)]
    problems = []
    for index in range(max(len(now), len(was))):
        if index >= len(was):
            fault = f"the run to be resumed has {len(was)} data set(s)"
            problems.append(Problem(fields[index], f"fingerprint {_short(now[index])}", f"{fault}; {remedy}"))
        elif index >= len(now):
            fault = f"the run to be resumed reads {last.names[index]} (fingerprint {_short(was[index])}) too"
            problems.append(Problem(f"data set {index + 1}", None, f"{fault}; {remedy}"))
        elif now[index] != was[index]:
            fault = f"not the data of the run to be resumed, whose fingerprint is {_short(was[index])} "
            fault += f"({last.names[index]}); they may have moved, but must be the same"
            problems.append(Problem(fields[index], f"fingerprint {_short(now[index])}", f"{fault}; {remedy}"))
    if not problems:
        fault = f"the run to be resumed has the weights {list(last.weights)}, in this order"
        problems.append(Problem("data.blend", list(identity.mix.weights), f"{fault}; {remedy}"))
    return problems


def _replaced_problems(now: Mix, was: Mix) -> list[Problem]:
    """Returns data sets that have the same path as before but other content, which naming the blend cannot mean."""
    before = dict(zip(was.names, was.fingerprints, strict=True))
    return [
        Problem(
            f"data.blend.{name}",
            f"fingerprint {_short(fingerprint)}",
            f"the data here were replaced: the run to be resumed read data of fingerprint {_short(before[name])} from "
            "this path; put them back, or give the new ones a path of their own",
        )
        for name, fingerprint in zip(now.names, now.fingerprints, strict=True)
        if before.get(name, fingerprint) != fingerprint
    ]


def _blend(mix: Mix) -> dict[str, float]:
    return dict(zip(mix.names, mix.weights, strict=True))


def _short(fingerprint: str | None) -> str | None:
    return None if fingerprint is None else fingerprint[:16]
