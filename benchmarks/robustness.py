"""Which layouts the shipped jobs run by the planner's estimates, and how far they depend on its constants, as tables.

    python -m benchmarks.robustness [--preset NAME ...] [--device NAME ...] [--nodes N ...]

For every number of nodes of 8 devices: the chosen layout, what a rank needs and a step takes; and how the time of the
best layout changes if one constant is 30 % better or 30 % worse, with a star where that is another layout than the
chosen one. Memory 30 % better or worse is that of the device. All numbers are estimates; nothing is measured.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mlra_scale.config import Config, Named, load_named_config, zero_stage
from mlra_scale.planning.choice import BETTER, WORSE, LayoutChoice, changed_clusters, chosen_of, engines_for
from mlra_scale.planning.cluster import GIB, Cluster, named_cluster
from mlra_scale.planning.search import Candidate, SearchResult, search
from mlra_scale.planning.step_time import step_time

DEVICES = ("h100", "a100", "h200")
NODES = (1, 2, 4, 8, 32)
PRESETS = {"gpt2-mlra-72l": NODES, "gpt2-mlra-72l-wide": (*NODES, 64, 128)}
"""The shipped jobs' models, and the numbers of nodes that the documentation shows."""
CONSTANTS = ("utilization", "memory bandwidth", "links within a node", "links between nodes", "overheads")
HEADER = (
    *("device", "nodes", "tensor x pipeline x data", "ZeRO", "micro-batch", "recompute", "GiB", "step, s", "MFU, %"),
    *(*CONSTANTS, "memory", "worst loss"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table for each preset."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.robustness", description="How far the planner's choices depend on its constants."
    )
    parser.add_argument("--preset", nargs="+", default=[*PRESETS])
    parser.add_argument("--device", nargs="+", default=DEVICES, choices=DEVICES)
    parser.add_argument("--nodes", nargs="+", type=int, help="default: as in the documentation")
    arguments = parser.parse_args(argv)
    for preset in arguments.preset:
        config, named = load_named_config(preset, overrides=["parallel.layout=auto"])
        print(f"\n`{preset}`:\n\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
        for device in arguments.device:
            for nodes in arguments.nodes or PRESETS.get(preset, NODES):
                cluster = replace(named_cluster(device), nodes=nodes)
                print(f"| {' | '.join(row(config, named, cluster))} |", flush=True)
    return 0


def row(config: Config, named: Named, cluster: Cluster) -> tuple[str, ...]:
    """Returns the cells of one cluster."""
    found = search(config, named, cluster, engines_for(config))
    choice = chosen_of(found, cluster)
    chosen = choice.chosen
    plan, time = chosen.plan, chosen.time
    change, loss = choice.worst
    return (
        *(cluster.name, str(cluster.nodes), f"{plan.tensor} x {plan.pipeline} x {plan.data}"),
        *(str(zero_stage(chosen.config)), str(plan.micro_batch_size), chosen.config.parallel.activation_checkpointing),
        *(f"{chosen.memory.device / GIB:.0f}", f"{time.seconds:.3g}", f"{100 * time.mfu:.0f}"),
        *cells(choice),
        memory_cell(found, choice),
        f"{100 * loss:.0f} %" + (f" ({change})" if loss >= 0.005 else ""),
    )


def cells(choice: LayoutChoice) -> Iterator[str]:
    """Yields, for every constant, by how much the time of the best layout changes."""
    changed = changed_clusters(choice.cluster)
    for constant in CONSTANTS:
        parts = []
        for word in ("better", "worse"):
            name = f"{constant} 30 % {word}"
            mine = step_time(choice.chosen.config, choice.chosen.plan, changed[name]).seconds
            best = mine / (1.0 + choice.losses[name])
            parts.append(_change(best, choice.chosen, best < mine * (1 - 1e-9)))
        yield " / ".join(parts)


def memory_cell(found: SearchResult, choice: LayoutChoice) -> str:
    """Returns the same for devices with more or less memory."""
    parts = []
    for factor in (BETTER, WORSE):
        usable = replace(choice.cluster, memory=factor * choice.cluster.memory).usable_memory
        fitting = [each for each in (*found.feasible, *found.too_large) if each.memory.device <= usable]
        if not fitting:
            parts.append("none fits")
            continue
        fastest = min(fitting, key=lambda each: each.time.seconds)
        is_other = choice.chosen.memory.device > usable or fastest.time.seconds < choice.chosen.time.seconds * (
            1 - 1e-9
        )
        parts.append(_change(fastest.time.seconds, choice.chosen, is_other))
    return " / ".join(parts)


def _change(seconds: float, chosen: Candidate, is_other: bool) -> str:
    return f"{100 * (seconds / chosen.time.seconds - 1):+.0f}{'*' * is_other}"


if __name__ == "__main__":
    sys.exit(main())
