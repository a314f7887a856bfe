"""Every layout that a cluster could run, by the real validation, with its memory and its time. Imports no torch.

Fields that are named (on the command line or in a file) stay as they are. All combinations of the others are tried:
tensor degrees within a node, pipeline stages, DeepSpeed settings (ZeRO stages), micro-batches of powers of two,
activation checkpointing (none, selective, whole blocks), sequence parallelism on and off. The data-parallel degree is
what remains of the ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mlra_scale.config import BatchPlan, Config, ConfigError, Named, Problem, batch_plan
from mlra_scale.model.validation import validate
from mlra_scale.planning.cluster import Cluster
from mlra_scale.planning.memory import RankMemory, rank_memory
from mlra_scale.planning.step_time import StepTime, step_time

LARGEST_MICRO_BATCH = 64
CHECKPOINTING = ("none", "selective", "block")
"""Values of parallel.activation_checkpointing, in the order of what they recompute."""
MEMORY = "does not fit into the memory"
_STAGE_0 = {"zero_optimization": {"stage": 0}}
"""Written out where other settings are named, so that these name the stage too."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings of DeepSpeed that a layout may run with."""

    file: str | None  # the --ds-config file that holds them; None: the configuration's own
    settings: dict[str, Any]
    for_pipelines: bool | None = None  # whether they are meant for several stages; None: for any number


@dataclass(frozen=True)
class Candidate:
    """A layout that the validation accepts, with its estimates."""

    config: Config
    plan: BatchPlan
    engine: EngineSettings
    memory: RankMemory  # of a rank of the stage that needs most
    stage: int  # that stage
    time: StepTime  # of a step

    def overrides(self) -> list[str]:
        """Returns the dotted overrides that choose this layout, beside the engine's file."""
        parallel = self.config.parallel
        return [
            f"parallel.tensor={parallel.tensor}",
            f"parallel.pipeline={parallel.pipeline}",
            f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}",
            f"parallel.activation_checkpointing={parallel.activation_checkpointing}",
            f"train.micro_batch_size={self.config.train.micro_batch_size}",
        ]


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    feasible: list[Candidate]  # layouts that fit, fastest first
    left_out: Counter[str]  # how many combinations were left out, by reason
    smallest: Candidate  # the valid layout that needs least memory, whether or not it fits
    too_large: list[Candidate] = field(default_factory=list)  # layouts that do not, fastest first


def search(config: Config, named: Named, cluster: Cluster, engines: Sequence[EngineSettings]) -> SearchResult:
    """Finds every layout that a cluster could run; `engines` are to choose from where the configuration names none.

    Raises:
        ConfigError: The validation accepts no layout; with the problems of the first one.
    """
    valid: list[Candidate] = []
    left_out: Counter[str] = Counter()
    refused: ConfigError | None = None
    for each, engine in _combinations(config, named, cluster, engines):
        try:
            validate(each, cluster.world_size, "cuda" if cluster.runs_ahead else "cpu")
        except ConfigError as error:
            refused = refused or error
            left_out[_reason(error.problems[0])] += 1
        else:
            valid.append(evaluate(each, cluster, engine))
    if not valid:
        if refused is None:  # the named degrees need more ranks than there are: nothing was tried
            validate(config, cluster.world_size)
        assert refused is not None
        raise refused
    valid.sort(key=_order)
    feasible = [candidate for candidate in valid if candidate.memory.device <= cluster.usable_memory]
    too_large = [candidate for candidate in valid if candidate.memory.device > cluster.usable_memory]
    if too_large:
        left_out[MEMORY] = len(too_large)
    return SearchResult(feasible, left_out, min(valid, key=lambda candidate: candidate.memory.device), too_large)


def _order(candidate: Candidate) -> tuple[float, int, float]:
    """Fastest first; of layouts with equal estimates the one that recomputes least."""
    recomputing = CHECKPOINTING.index(candidate.config.parallel.activation_checkpointing)
    return candidate.time.seconds, recomputing, candidate.memory.device


def evaluate(config: Config, cluster: Cluster, engine: EngineSettings) -> Candidate:
    """Estimates memory and time of one valid configuration."""
    plan = batch_plan(config, cluster.world_size)
    memories = {stage: rank_memory(config, plan, stage) for stage in heavy_stages(plan)}
    stage = max(memories, key=lambda each: memories[each].device)
    return Candidate(config, plan, engine, memories[stage], stage, step_time(config, plan, cluster))


def heavy_stages(plan: BatchPlan) -> list[int]:
    """Returns the pipeline stages of which one needs most memory: both ends, and the earliest between them.

    Later ones hold no more blocks and fewer micro-batches. But in some a backward pass ends while activations are at
    their most, so that they hold whole gradients too: the earliest of these is included.
    """
    last = plan.pipeline - 1
    return sorted({0, min(1, last), min(max(0, plan.pipeline - plan.accumulation_steps + 1), last), last})


def _combinations(
    config: Config, named: Named, cluster: Cluster, engines: Sequence[EngineSettings]
) -> Iterator[tuple[Config, EngineSettings]]:
    """Yields the configurations to try; the validation refuses some of them."""
    fixed = named.on_command_line | named.in_file
    parallel, train = config.parallel, config.train
    degrees = [parallel.tensor] if "parallel.tensor" in fixed else _divisors(cluster.devices_per_node)
    stages = [parallel.pipeline] if "parallel.pipeline" in fixed else _divisors(cluster.world_size)
    checkpointing = list(CHECKPOINTING)
    if "parallel.activation_checkpointing" in fixed:
        checkpointing = [parallel.activation_checkpointing]
    sizes = [train.micro_batch_size]
    if "train.micro_batch_size" not in fixed:
        powers = [2**power for power in range(LARGEST_MICRO_BATCH.bit_length())]
        sizes = sorted({*sizes, *(size for size in powers if size <= train.global_batch_size)})
    if "deepspeed" in fixed:
        engines = _engines_with(config.deepspeed, engines)
    for tensor, pipeline, engine in product(degrees, stages, engines):
        if tensor * pipeline > cluster.world_size or engine.for_pipelines not in (None, pipeline > 1):
            continue
        splits = [False, True] if tensor > 1 else [False]
        if "parallel.sequence_parallel" in fixed:
            splits = [parallel.sequence_parallel]
        for is_split, recomputing, size in product(splits, checkpointing, sizes):
            layout = {"tensor": tensor, "pipeline": pipeline, "sequence_parallel": is_split}
            sections: dict[str, dict[str, Any]] = {
                "parallel": {**layout, "activation_checkpointing": recomputing},
                "train": {"micro_batch_size": size},
                "deepspeed": engine.settings,
            }
            yield changed(config, sections), engine


def _engines_with(settings: dict[str, Any], engines: Sequence[EngineSettings]) -> list[EngineSettings]:
    """Returns the settings to choose from where some are named: those alone if they name the ZeRO stage."""
    if not settings or "stage" in _section(settings, "zero_optimization"):
        return [EngineSettings(None, settings)]
    return [
        EngineSettings(each.file, _over(_STAGE_0 | each.settings, settings), each.for_pipelines) for each in engines
    ]


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    section = settings.get(name, {})
    return section if isinstance(section, dict) else {}


def _over(settings: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Merges named settings into others, section by section."""
    sections = {
        name: _over(_section(settings, name), value) for name, value in named.items() if isinstance(value, dict)
    }
    return settings | named | sections


def changed(config: Config, sections: dict[str, dict[str, Any]]) -> Config:
    """Returns a configuration with some fields replaced, by section and field; `deepspeed` as a whole."""
    updated: dict[str, Any] = {"deepspeed": sections.get("deepspeed", config.deepspeed)}
    for name, values in sections.items():
        if name != "deepspeed":
            updated[name] = getattr(config, name).model_copy(update=values)
    return config.model_copy(update=updated)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _reason(problem: Problem) -> str:
    """Returns why the validation refused, without the numbers."""
    reasons = {
        "parallel.tensor": "the tensor degree does not divide the model",
        "parallel.pipeline": "there are more stages than layers",
        "parallel.tensor * parallel.pipeline": "the degrees do not divide the ranks",
        "train.global_batch_size": "the batch does not divide over micro-batches and data ranks",
        "deepspeed.zero_optimization.stage": "ZeRO 2 and 3 are not for pipelines",
    }
    return reasons.get(problem.field, problem.field)
