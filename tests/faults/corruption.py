"""Flips bits in training steps at random, and prints which share of them the checks find.

    python -m tests.faults.corruption [--flips N] [--seed S]

Two ranks of a small model, as two data ranks at ZeRO stage 1 and as two pipeline stages, in fp32 and in bf16. Every
flip is one bit of one element on one rank, in a step that is replayed and whose state is summed up. It is without
effect where the gradients that the update would use are the same bits as without it: what it changed was rounded away.
The exit code is 1 if a flip with an effect was missed, or found on a wrong rank.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mlra_scale.config import Config
from mlra_scale.console import table
from tests.support.flips import PLACES, STORED, Flip, bench
from tests.support.layouts import Layout, layout_config
from tests.support.pool import PoolRegistry

LAYOUTS = {"data 2": Layout(data=2, stage=1), "pipeline 2": Layout(pipeline=2)}
CHECKS = {"guard__enabled": True, "guard__replay_every": 1, "guard__checksum_every": 1}
BITS = {
    "fp32": {"sign": [31], "exponent": range(23, 31), "mantissa, high": range(12, 23), "mantissa, low": range(12)},
    "bf16": {"sign": [15], "exponent": range(7, 15), "mantissa": range(7)},
}


def attack(rank: int, world_size: int, config: Config, flips: Sequence[Flip]) -> list[tuple[bool, bool, set[int]]]:
    """Returns of each flip whether it came to pass here and changed a gradient here, and which ranks are named."""
    this = bench(config, world_size)
    this.step(0)
    gradients: list[torch.Tensor] = []

    def look(proposal: Any) -> bool:
        gradients[:] = [fragment.values.clone() for fragment in this.engine._view.gradients()]
        this.check.before_update(proposal)
        return False

    this.step(1, decide=look)
    undisturbed = [*gradients]
    found = []
    for flip in flips:
        _, is_done = this.step(1, flip, look)
        is_same = all(map(torch.equal, map(_bits, gradients), map(_bits, undisturbed)))
        found.append((is_done, not is_same, set(this.named[-1])))
    return found


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view({2: torch.int16, 4: torch.int32}[values.element_size()])


def flips_of(layout: Layout, num: int, generator: random.Random) -> list[Flip]:
    """Draws flips, equally many of each place."""
    number = 2 if layout.data > 1 else 1  # in the step's own pass
    draw = generator.randrange
    return [Flip(PLACES[i % len(PLACES)], number, draw(2), draw(32), draw(2**31)) for i in range(num)]


def outcome_of(flip: Flip, of_ranks: Sequence[tuple[bool, bool, set[int]]]) -> str | None:
    """Returns what came of a flip; None: it did not come to pass, as where a stage receives nothing."""
    named = of_ranks[0][2]
    if not any(is_done for is_done, _, _ in of_ranks):
        return None
    if named:
        return "found" if named == {flip.rank} else "wrong rank"
    has_effect = flip.place in STORED or any(has_changed for _, has_changed, _ in of_ranks)
    return "missed" if has_effect else "no effect"


def bit_class(flip: Flip, precision: str) -> str:
    """Returns the part of a number that a flipped bit belongs to."""
    bits = {"bf16": 16, "fp32": 32}[precision]
    return next(name for name, members in BITS[precision].items() if flip.bit % bits in members)


def rows_of(outcomes: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Counts outcomes by the first of the pair."""
    counted: dict[str, Counter[str]] = {}
    for name, outcome in outcomes:
        counted.setdefault(name, Counter())[outcome] += 1
    rows = []
    for name, counts in counted.items():
        total, harmless = counts.total(), counts["no effect"]
        share = f"{100 * counts['found'] / (total - harmless):.1f} %" if total > harmless else "-"
        rows.append(
            [name, *map(str, (total, harmless, counts["found"], counts["missed"], counts["wrong rank"])), share]
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="tests.faults.corruption", description="Flips bits in training steps.")
    parser.add_argument("--flips", type=int, default=1600, metavar="N", help="of all layouts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="draws them (default: %(default)s)")
    options = parser.parse_args(argv)
    generator, pools = random.Random(options.seed), PoolRegistry()
    places, bits, bad = [], [], []
    try:
        for name, layout in LAYOUTS.items():
            for precision in BITS:
                config = layout_config(layout, train__precision=precision, **CHECKS)
                flips = flips_of(layout, options.flips // 4, generator)
                of_ranks = pools(2).run(attack, config, flips, timeout=3600.0)
                for flip, *found in zip(flips, *of_ranks, strict=True):
                    if (outcome := outcome_of(flip, found)) is None:
                        continue
                    places.append((flip.place, outcome))
                    if flip.place == "activation":
                        bits.append((f"{precision}, {bit_class(flip, precision)}", outcome))
                    if outcome in ("missed", "wrong rank"):
                        bad.append(f"{name}, {precision}: {flip}: {outcome}, {found}")
    finally:
        pools.close()
    headers = ["", "flips", "no effect", "found", "missed", "wrong rank", "found of those with an effect"]
    print(table(["where", *headers[1:]], rows_of(places), width=None))
    print(f"\nactivations\n{table(['bit', *headers[1:]], rows_of(bits), width=None)}")
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
