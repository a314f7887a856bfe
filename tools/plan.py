#!/usr/bin/env python
"""Lists the layouts that a cluster could run, fastest first by estimate: python tools/plan.py --help."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from mlra_scale.config import Config, Named
    from mlra_scale.planning.cluster import Cluster
    from mlra_scale.planning.search import Candidate, Found

EXAMPLES = """examples:
  python tools/plan.py --preset gpt2-mlra-72l --cluster h100 --nodes 4
  python tools/plan.py --preset gpt2-xl --cluster a100 --memory-gib 40 --top 20 --json plan.json
  python tools/plan.py --preset gpt2-mlra-72l --cluster h100 parallel.tensor=2 train.micro_batch_size=4
  python tools/plan.py --preset laptop --cluster cpu
  python tools/plan.py --preset gpt2-mlra-72l --cluster-file runs/check-1234/cluster.json --nodes 8

Fields that are named, by an override or in the --config file, stay as they are; the rest of the layout is searched.
What the estimates are made of, and their limits: docs/planning.md.
exit codes: 0; 2 bad input, or nothing fits
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    result = argparse.ArgumentParser(
        prog="plan.py",
        description="Every layout of a preset that passes the validation and fits into the memory: memory per rank by "
        "component, step time, MFU, bubble and communication as estimates, and the command of the planner's choice.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--preset", help="starting point, as for mlra_scale.train")
    add("--config", metavar="FILE.yaml", help="fields that replace the preset's")
    add("--ds-config", metavar="FILE.json", help="DeepSpeed's own knobs; without it those of ds_configs/ are tried")
    start = result.add_mutually_exclusive_group()
    start.add_argument(
        "--cluster", default="h100", metavar="NAME", help="h100 (default), a100, h200 or cpu, which the rest changes"
    )
    start.add_argument(
        "--cluster-file", type=Path, metavar="FILE", help="constants that sbatch slurm/check.sh has measured, instead"
    )
    add("--nodes", type=_count, metavar="N", help="number of nodes (default: 1)")
    add("--devices-per-node", type=_count, metavar="M", help="devices, and ranks, of a node")
    add("--memory-gib", type=_positive, metavar="G", help="memory of a device")
    add("--peak-tflops", type=_positive, metavar="P", help="peak of a device in TFLOP/s")
    add("--utilization", type=_share, metavar="U", help="share of the peak that matrix products reach, up to 1")
    add("--link-gbps-intra", type=_positive, metavar="X", help="Gbit/s that a device sends within its node")
    add("--link-gbps-inter", type=_positive, metavar="Y", help="Gbit/s that a device sends to other nodes")
    add("--top", type=_count, default=10, metavar="K", help="how many layouts to list (default: 10)")
    add("--json", type=Path, metavar="FILE", help="write every layout that fits, with all numbers")
    add("overrides", nargs="*", metavar="section.field=value", help="single fields, such as parallel.tensor=2")
    return result


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than the peak; give a share of at most 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    options = parser().parse_intermixed_args(arguments)
    from mlra_scale.config import ConfigError, load_named_config
    from mlra_scale.planning.choice import chosen_of, engines_for
    from mlra_scale.planning.plan_text import found_text, nothing_fits
    from mlra_scale.planning.search import search

    try:
        cluster = cluster_of(options)
        config, named = load_named_config(options.preset, options.config, options.ds_config, options.overrides)
        if not cluster.runs_ahead:
            config = config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})
        found = search(config, named, cluster, engines_for(config))
        if not found.feasible:
            print(f"plan: {nothing_fits(found, cluster)}", file=sys.stderr)
            return 2
        chosen = chosen_of(found, cluster).chosen
        lines = commands_of(chosen, cluster, options)
    except ConfigError as error:
        print("\n".join(["plan: bad input", *(f"  {problem}" for problem in error.problems)]), file=sys.stderr)
        return 2
    print(found_text(found, cluster, chosen, options.top))
    print("\nthe planner's choice (*), which parallel.layout=auto runs:")
    print("\n".join(f"  {line}" for line in lines))
    if options.json is not None:
        return write(options.json, found, cluster, chosen, lines)
    return 0


def cluster_of(options: argparse.Namespace) -> Cluster:
    """Returns the named cluster, or that of a file, with what the command line replaces."""
    from mlra_scale.planning.cluster import GIB, named_cluster
    from mlra_scale.planning.cluster_file import read_cluster_file

    file = options.cluster_file
    cluster = named_cluster(options.cluster) if file is None else read_cluster_file(file)
    given: dict[str, Any] = {
        "nodes": options.nodes,
        "devices_per_node": options.devices_per_node,
        "memory": options.memory_gib and options.memory_gib * GIB,
        "peak_flops": options.peak_tflops and options.peak_tflops * 1e12,
        "utilization": options.utilization,
        "link_intra": options.link_gbps_intra and options.link_gbps_intra * 1e9 / 8,
        "link_inter": options.link_gbps_inter and options.link_gbps_inter * 1e9 / 8,
    }
    return replace(cluster, **{name: value for name, value in given.items() if value is not None})


def commands_of(best: Candidate, cluster: Cluster, options: argparse.Namespace) -> list[str]:
    """Returns the commands of a layout, after reading back what they say."""
    from mlra_scale.planning.plan_text import commands

    flags = {"--preset": options.preset, "--config": options.config, "--ds-config": options.ds_config}
    start = [part for flag, value in flags.items() if value is not None for part in (flag, value)]
    loaded, _ = reload(best, options)
    assert loaded.parallel == best.config.parallel and loaded.deepspeed == best.config.deepspeed
    assert loaded.train.micro_batch_size == best.config.train.micro_batch_size
    return commands(best, cluster, start, options.overrides)


def reload(best: Candidate, options: argparse.Namespace) -> tuple[Config, Named]:
    """Loads and validates what a layout's command says, as the training would."""
    from mlra_scale.config import load_named_config, validate

    file = best.engine.file
    ds_config = options.ds_config if file is None else ROOT / file
    more = [*best.overrides(), *options.overrides, f"train.device={best.config.train.device}"]
    loaded = load_named_config(options.preset, options.config, ds_config, more)
    validate(loaded[0], best.plan.world_size)
    return loaded


def write(path: Path, found: Found, cluster: Cluster, chosen: Candidate, lines: list[str]) -> int:
    """Writes everything that was found; returns the exit code."""
    from mlra_scale.planning.plan_text import plain

    values = {
        "cluster": asdict(cluster),
        "layouts": [plain(candidate) for candidate in found.feasible],
        "chosen": next(index for index, each in enumerate(found.feasible) if each is chosen),
        "left_out": dict(found.left_out),
        "commands": lines,
    }
    try:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"plan: {path} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from mlra_scale.console import run_tool

    sys.exit(run_tool(main, has_side_effects=False))
