"""`mlra-scale plan`: ranks the layouts that a cluster could run by their estimated step time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import add_overrides, configuration, count, place, positive
from mlra_scale.console import InputError

if TYPE_CHECKING:
    from mlra_scale.planning.cluster import Cluster
    from mlra_scale.planning.search import Candidate, SearchResult

EXAMPLES = """examples:
  PROG --preset gpt2-mlra-72l --cluster h100 --nodes 4
  PROG --preset gpt2-xl --cluster a100 --memory-gib 40 --top 20 --json plan.json --plot plan.png
  PROG --preset gpt2-mlra-72l --cluster h100 parallel.tensor=2 train.micro_batch_size=4
  PROG --preset laptop --cluster cpu
  PROG --preset gpt2-mlra-72l --cluster-file runs/check-1234/cluster.json --nodes 8

Fields that are named, by an override or in the --config file, stay as they are; the rest of the layout is searched.
What the estimates are made of, and their limits: docs/planning.md.
exit codes: 0; 2 bad input, nothing fits, or --plot without the extra `report`
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--cluster", default="h100", metavar="NAME", help="h100 (default), a100, h200 or cpu, which the rest changes"
    )
    start.add_argument(
        "--cluster-file",
        type=place,
        metavar="FILE",
        help="constants that sbatch slurm/check.sh has measured, instead",
    )
    add = parser.add_argument
    add("--nodes", type=count, metavar="N", help="number of nodes (default: 1)")
    add("--devices-per-node", type=count, metavar="M", help="devices, and ranks, of a node")
    add("--memory-gib", type=positive, metavar="G", help="memory of a device")
    add("--peak-tflops", type=positive, metavar="P", help="peak of a device in TFLOP/s")
    add("--utilization", type=_share, metavar="U", help="share of the peak that matrix products reach, up to 1")
    add("--link-gbps-intra", type=positive, metavar="X", help="Gbit/s that a device sends within its node")
    add("--link-gbps-inter", type=positive, metavar="Y", help="Gbit/s that a device sends to other nodes")
    add("--top", type=count, default=10, metavar="K", help="how many layouts to list (default: 10)")
    add("--json", type=place, metavar="FILE", help="write every layout that fits, with all numbers")
    add("--plot", type=place, metavar="FILE.png", help="draw memory and step time of the listed layouts")
    add_overrides(parser, "single fields, such as parallel.tensor=2")


def _share(text: str) -> float:
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than the peak; give a share of at most 1")
    return value


def _run(options: argparse.Namespace) -> int:
    from mlra_scale.config import load_named_config
    from mlra_scale.planning.choice import chosen_of, engines_for
    from mlra_scale.planning.plan_text import commands, found_text, listed, nothing_fits
    from mlra_scale.planning.search import search

    for flag, file in (("--plot", options.plot), ("--json", options.json)):
        if file is not None and not file.absolute().parent.is_dir():
            raise InputError(f"{flag} {file}: there is no folder {file.parent}")
    if options.plot is not None:
        _check_plot(options.plot)
    cluster = _cluster(options)
    config, named = load_named_config(options.preset, options.config, options.ds_config, options.overrides)
    if not cluster.runs_ahead:
        config = config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})
    found = search(config, named, cluster, engines_for(config))
    if not found.feasible:
        raise InputError(nothing_fits(found, cluster))
    chosen = chosen_of(found, cluster).chosen
    flags = {"--preset": options.preset, "--config": options.config, "--ds-config": options.ds_config}
    start = [part for flag, value in flags.items() if value is not None for part in (flag, value)]
    lines = commands(chosen, cluster, start, options.overrides)
    print(found_text(found, cluster, chosen, options.top))
    print("\nthe planner's choice (*), which parallel.layout=auto runs:")
    print("\n".join(f"  {line}" for line in lines))
    if options.json is not None:
        _write(options.json, _as_json(found, cluster, chosen, lines))
    if options.plot is not None:
        model = options.preset or (options.config and Path(options.config).stem) or "model"
        _write(options.plot, _picture(listed(found, chosen, options.top), cluster, model))
        print(f"\npicture of the listed layouts: {options.plot}")
    return 0


def _check_plot(path: Path) -> None:
    """Refuses a picture that cannot be drawn, before the search.

    Raises:
        InputError: The name is not that of a PNG file, or a library is missing.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"--plot {path}: the picture is a PNG file; give it a name that ends in .png")
    try:
        import mlra_scale.study.report.plan_figure  # noqa: F401
    except ImportError as error:
        reason = f"--plot needs more libraries ({error}); install them with: pip install 'mlra-scale[report]'"
        raise InputError(reason) from None


def _picture(layouts: Sequence[tuple[str, Candidate]], cluster: Cluster, model: str) -> bytes:
    from mlra_scale.planning.plan_text import plain
    from mlra_scale.study.report.plan_figure import plan_figure

    title = f"{model} on {cluster.nodes} x {cluster.devices_per_node} devices of {cluster.name}"
    return plan_figure([(number, plain(candidate)) for number, candidate in layouts], cluster.usable_memory, title)


def _cluster(options: argparse.Namespace) -> Cluster:
    """Returns the named cluster, or that of a file, with the constants that the command line replaces."""
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


def _as_json(found: SearchResult, cluster: Cluster, chosen: Candidate, lines: list[str]) -> bytes:
    """Returns all that was found as JSON."""
    from mlra_scale.planning.plan_text import plain

    values = {
        "cluster": asdict(cluster),
        "layouts": [plain(candidate) for candidate in found.feasible],
        "chosen": next(index for index, each in enumerate(found.feasible) if each is chosen),
        "left_out": dict(found.left_out),
        "commands": lines,
    }
    return (json.dumps(values, indent=2) + "\n").encode("ascii")


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror})") from None


COMMAND = Command(
    name="plan",
    summary="rank the layouts that a cluster could run, with memory, step time and communication",
    description="Every layout of a preset that passes the validation and fits into the memory: memory per rank by "
    "component, step time, MFU, bubble and communication as estimates, and the command of the planner's choice.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    parents=[configuration()],
    is_intermixed=True,
)
