"""Every layout with every kind of attention, exported: `python -m tests.parity.all_exports` prints the table.

A cell has the largest difference between a logit of the engine, on the ranks that trained, and of the exports (gpt2,
mlra). A case that fails stops the command.
"""

import tempfile
from pathlib import Path

from transformers.utils import logging

from tests.parity.export_matrix import ATTENTIONS, LARGE_LAYOUTS, LAYOUTS, run_case
from tests.support.pool import PoolRegistry


def main() -> None:
    logging.disable_progress_bar()
    pools = PoolRegistry()
    try:
        print("| layout | " + " | ".join(ATTENTIONS) + " |")
        print("|---" * (len(ATTENTIONS) + 1) + "|")
        for name, layout in (LAYOUTS | LARGE_LAYOUTS).items():
            cells = []
            for overrides in ATTENTIONS.values():
                with tempfile.TemporaryDirectory(prefix="export") as folder:
                    outcome = run_case(pools, Path(folder), layout, **overrides)
                assert max(outcome.gpt2, outcome.mlra) < 1e-4, (name, overrides, outcome)
                cells.append(f"{outcome.gpt2:.1e}, {outcome.mlra:.1e}")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    finally:
        pools.close()


if __name__ == "__main__":
    main()
