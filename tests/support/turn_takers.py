"""What processes that take turns do in tests; a module of its own, so that they need not import more than that."""

from collections.abc import Mapping

from benchmarks.turns import Action


def count_turns(name: str) -> Mapping[str, Action]:
    return {"count": lambda number: {"number": float(number), "length": float(len(name))}}


def fail(name: str) -> Mapping[str, Action]:
    raise ValueError(f"{name} cannot be built")
