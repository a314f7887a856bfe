"""Every pair of layouts, run and shown: `python -m tests.distributed.all_layouts` prints what docs/checkpoints.md has.

A pair that fails stops the command with the tensor or the losses that differ. test_all_layouts.py runs the same pairs
as tests of the nightly tier.
"""

import tempfile
from pathlib import Path
from typing import Any

from tests.distributed.layout_matrix import (
    BF16_TOLERANCE,
    LAYOUTS,
    OTHERS,
    Matrix,
    assert_same_run,
    assert_same_tensors,
    largest_difference,
)
from tests.support.pool import PoolRegistry

BF16 = {"train__precision": "bf16"}
MATRIX_OPTIMIZERS = ("muon", "spectron")
CHANGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tp2pp2 fp32 to bf16": ("tp2pp2", "fp32", BF16),
    "zero3-tp2dp2 bf16 to fp32": ("zero3-tp2dp2", "bf16", {}),
    "tp2pp2, 128 rows of vocabulary to 150": ("tp2pp2", "fp32", {"model__vocab_padding_multiple": 50}),
    "zero3-tp2dp2, 128 rows to 122": ("zero3-tp2dp2", "fp32", {"model__vocab_padding_multiple": 2}),
}
"""Layout and precision that save, and what differs in the run that continues."""


def cell(
    matrix: Matrix, saved_in: str, name: str, was: str = "fp32", optimizer: str = "adamw", **overrides: Any
) -> str:
    """Continues from one layout in another: tensors bitwise, losses within the tolerance, the same run bitwise."""
    before = matrix.saved(saved_in, was, optimizer)
    after = matrix.loaded(saved_in, name, was, optimizer, **overrides)
    assert_same_tensors(before, after)
    difference = largest_difference(before, after)
    now = after.config.train.precision
    allowed = 1e-6 if was == now == "fp32" else BF16_TOLERANCE
    assert difference < allowed, (saved_in, was, optimizer, name, now, difference)
    if saved_in == name and before.config == after.config:
        assert_same_run(before, after)
        return "bitwise"
    return f"{difference:.0e}" if difference else "0"


def table(
    title: str, matrix: Matrix, rows: dict[str, tuple[str, str, dict[str, Any]]], optimizer: str = "adamw"
) -> None:
    """Prints a row for every way to save and continue, a column for every layout that continues."""
    print(f"\n| {title} | " + " | ".join(LAYOUTS) + " |")
    print("|---" * (len(LAYOUTS) + 1) + "|")
    for label, (saved_in, was, overrides) in rows.items():
        cells = [cell(matrix, saved_in, name, was, optimizer, **overrides) for name in LAYOUTS]
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Runs all of it, in a few minutes on two cores."""
    pools = PoolRegistry()
    try:
        with tempfile.TemporaryDirectory(prefix="layouts") as folder:
            matrix = Matrix(pools, Path(folder))
            table("fp32 to fp32", matrix, {name: (name, "fp32", {}) for name in LAYOUTS})
            table("bf16 to bf16", matrix, {name: (name, "bf16", BF16) for name in LAYOUTS})
            table("change", matrix, CHANGES)
            for name in OTHERS:
                found = [cell(matrix, name, name, was, train__precision=was) for was in ("fp32", "bf16")]
                print(f"\n{name} to itself, fp32 and bf16: {', '.join(found)}")
            for optimizer in MATRIX_OPTIMIZERS:
                table(f"{optimizer}, fp32", matrix, {name: (name, "fp32", {}) for name in LAYOUTS}, optimizer)
                table(f"{optimizer}, bf16", matrix, {name: (name, "bf16", BF16) for name in LAYOUTS}, optimizer)
    finally:
        pools.close()


if __name__ == "__main__":
    main()
