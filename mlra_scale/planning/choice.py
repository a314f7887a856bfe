"""The planner's choice of a layout, for `parallel.layout=auto`. Imports no torch.

It is the fastest layout by the estimate; of those within SAME of it the plainest one, with the lowest ZeRO stage, the
least recomputation and the fewest tensor ranks and stages, because estimates do not distinguish them. Another layout is
chosen if this one depends too much on assumed constants: each constant of the cluster is taken 30 % better and 30 %
worse, one at a time. The loss of a layout under such a change is how much longer its step takes than that of the layout
that is then the fastest. If the chosen layout loses more than LARGEST_LOSS under some change, the layout with the
smallest worst loss is chosen instead. The memory of a device is known, not assumed: there is no loss for it, but
FREE_SHARE of it stays free (cluster.py).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from textwrap import wrap
from typing import Any, get_args

from mlra_scale import bundled
from mlra_scale.config import Config, ConfigError, Named, Problem, zero_stage
from mlra_scale.config.json_text import read_json_object
from mlra_scale.config.schema import LayoutField
from mlra_scale.planning.cluster import FREE_SHARE, GIB, Cluster
from mlra_scale.planning.plan_text import TIME_LEGEND, nothing_fits, time_table
from mlra_scale.planning.search import CHECKPOINTING, Candidate, EngineSettings, SearchResult, changed, search
from mlra_scale.planning.step_time import step_time

SAME = 0.02
LARGEST_LOSS = 0.15
BETTER, WORSE = 1.3, 0.7
OTHERS = 2
FIELDS: tuple[LayoutField, ...] = get_args(LayoutField)
"""The fields that are chosen; a field that is named stays as it is."""
RECORD = "parallel.named_layout_fields"
"""The field of a configuration with a chosen layout that lists which of them were named."""

_RATES = ("utilization", "memory_bandwidth", "update_bandwidth", "link_intra", "link_inter")
_CONSTANTS: dict[str, tuple[str, ...]] = {
    "utilization": ("utilization",),
    "memory bandwidth": ("memory_bandwidth", "update_bandwidth"),
    "links within a node": ("link_intra", "latency_intra"),
    "links between nodes": ("link_inter", "latency_inter"),
    "overheads": (
        *("block_overhead", "zero_overhead", "pipeline_overhead", "micro_batch_overhead", "step_overhead"),
        *("launch", "wait"),
    ),
}
"""Fields of a cluster that are changed together; those that are no rates are times."""

_ENGINE_FILES = {"zero1": False, "zero1_pipeline": True, "zero2": False, "zero3": False}
"""Files of ds_configs/ that are tried, and whether they are meant for pipelines. Offloading is never chosen."""


@dataclass(frozen=True)
class LayoutChoice:
    """A chosen layout, and what it was compared with."""

    cluster: Cluster
    chosen: Candidate
    fastest: Candidate  # the fastest layout by the estimate
    others: tuple[Candidate, ...]  # the next best, fastest first
    losses: Mapping[str, float]  # of the chosen layout, by changed constant
    # Likewise of a faster layout that was passed over because a changed constant costs it too much; or None.
    losses_of_fragile: Mapping[str, float] | None
    num_fitting: int  # how many layouts fit
    kept: tuple[str, ...] = ()  # fields that were named and stayed as they were

    @property
    def worst(self) -> tuple[str, float]:
        """The changed constant under which the chosen layout loses most, and its loss."""
        return max(self.losses.items(), key=lambda item: item[1])

    @property
    def overrides(self) -> list[str]:
        """Dotted overrides that name the chosen layout, and list which of its fields were named."""
        return [*self.by_hand, f"{RECORD}={json.dumps(self.kept)}"]

    @property
    def by_hand(self) -> list[str]:
        """Dotted overrides that name the chosen layout, DeepSpeed's settings included."""
        return [*self.chosen.overrides(), f"deepspeed={json.dumps(self.chosen.config.deepspeed)}"]


def engines_for(config: Config) -> tuple[EngineSettings, ...]:
    """Returns the settings to choose from. In bf16 empty settings mean ZeRO 1, for which the files hold better ones.

    Raises:
        ConfigError: A file of ds_configs/ cannot be read.
    """
    return engines()[1:] if config.train.precision == "bf16" else engines()


@cache
def engines() -> tuple[EngineSettings, ...]:
    """Returns all settings: no ZeRO, and files of ds_configs/.

    Raises:
        ConfigError: A file of ds_configs/ cannot be read.
    """
    found = [EngineSettings(None, {})]
    for name, is_for_pipelines in _ENGINE_FILES.items():
        try:
            settings = read_json_object(bundled.folder("ds_configs") / f"{name}.json")
        except ValueError as error:
            remedy = f"{error}; it is one of the settings to choose from: put the file back"
            raise ConfigError([Problem("parallel.layout", "auto", remedy)]) from None
        found.append(EngineSettings(f"ds_configs/{name}.json", settings, is_for_pipelines))
    return tuple(found)


def choose(config: Config, named: Named, cluster: Cluster) -> LayoutChoice:
    """Chooses the layout of a job; the fields that are named stay as they are.

    Raises:
        ConfigError: The validation accepts no layout, or none fits into the memory.
    """
    kept = tuple(name for name in FIELDS if name in fixed_fields(config, named))
    config = changed(config, {"parallel": {"named_layout_fields": kept}})
    found = search(config, Named(frozenset(kept)), cluster, engines_for(config))
    if not found.feasible:
        raise ConfigError([Problem("parallel.layout", config.parallel.layout, nothing_fits(found, cluster))])
    return replace(chosen_of(found, cluster), kept=kept)


def fixed_fields(config: Config, named: Named) -> frozenset[str]:
    """Returns the fields that a choice leaves as they are.

    A configuration whose layout was chosen lists the fields that were named then: they stay, and the chosen ones do not
    count as named, although the file has them.
    """
    record = config.parallel.named_layout_fields
    return named.on_command_line | (named.in_file if record is None else frozenset[str](record))


def chosen_of(found: SearchResult, cluster: Cluster) -> LayoutChoice:
    """Chooses among the layouts that a search for a cluster found to fit."""
    fastest = found.feasible[0]
    # A layout that is slower by more than the largest change cannot become the fastest one.
    pool = [each for each in found.feasible if each.time.seconds <= fastest.time.seconds / WORSE]
    losses: list[dict[str, float]] = [{} for _ in pool]
    for name, other in changed_clusters(cluster).items():
        seconds = [step_time(each.config, each.plan, other).seconds for each in pool]
        for index, each in enumerate(seconds):
            losses[index][name] = each / min(seconds) - 1.0
    near = [number for number, each in enumerate(pool) if each.time.seconds <= (1.0 + SAME) * fastest.time.seconds]
    index, fragile = min(near, key=lambda number: plainness(pool[number])), None
    if max(losses[index].values()) > LARGEST_LOSS:
        fragile = losses[index]
        index = min(range(len(pool)), key=lambda number: max(losses[number].values()))
    others = [each for each in found.feasible[: OTHERS + 1] if each is not pool[index]][:OTHERS]
    return LayoutChoice(cluster, pool[index], fastest, tuple(others), losses[index], fragile, len(found.feasible))


def plainness(candidate: Candidate) -> tuple[float, ...]:
    """Orders layouts that take equally long: a plainer one has fewer costs that an estimate leaves out."""
    parallel = candidate.config.parallel
    return (
        zero_stage(candidate.config),
        CHECKPOINTING.index(parallel.activation_checkpointing),
        parallel.tensor * parallel.pipeline,
        candidate.time.seconds,
    )


def changed_clusters(cluster: Cluster) -> dict[str, Cluster]:
    """Returns the cluster with each constant 30 % better and 30 % worse, by the change."""
    clusters = {}
    for word, rate in (("better", BETTER), ("worse", WORSE)):
        for constant, names in _CONSTANTS.items():
            values: dict[str, Any] = {}
            for name in names:
                value = getattr(cluster, name)
                factor = rate if name in _RATES else 2.0 - rate
                values[name] = tuple(factor * each for each in value) if isinstance(value, tuple) else factor * value
            clusters[f"{constant} 30 % {word}"] = replace(cluster, **values)
    return clusters


def choice_lines(choice: LayoutChoice) -> list[str]:
    """Returns what was chosen, the next best, and how much it depends on assumed constants, as text."""
    cluster, (change, loss) = choice.cluster, choice.worst
    kept = f"; kept as named: {', '.join(choice.kept)}" if choice.kept else ""
    rows = [(str(number), each) for number, each in enumerate((choice.chosen, *choice.others), start=1)]
    lines = [
        f"for {cluster.nodes} x {cluster.devices_per_node} {cluster.name} of {cluster.memory / GIB:.1f} GiB, of which "
        f"{100 * FREE_SHARE:.0f} % stay free; {choice.num_fitting} layouts fit{kept}",
        "chosen, and the next best, by estimates, not measured:",
        *time_table(rows).splitlines(),
        *wrap(TIME_LEGEND, 116, subsequent_indent=" "),
    ]
    if choice.losses_of_fragile is not None:
        constant, largest = max(choice.losses_of_fragile.items(), key=lambda item: item[1])
        lines.append(
            f"a faster one is not chosen: with {constant} it would take {100 * largest:.0f} % longer than the then "
            "fastest layout"
        )
    elif choice.chosen is not choice.fastest:
        lines.append(f"(within {100 * SAME:.0f} % the plainest layout is chosen: estimates do not distinguish them)")
    lines.append(f"the chosen one loses at most {100 * loss:.0f} % to another one ({change})")
    lines.append(f"the same by hand: {shlex.join(choice.by_hand)}")
    return lines


def comparison_line(seconds: float, best: LayoutChoice) -> str:
    """Compares a named layout, whose step takes so many seconds, with the planner's choice where nothing is named."""
    chosen = best.chosen
    layout = " ".join(chosen.overrides())
    zero = "" if chosen.engine.file is None else f" with {chosen.engine.file}"
    more = seconds / chosen.time.seconds - 1.0
    if abs(more) <= 0.005:
        verdict = "is as fast as"
    else:
        verdict = f"takes {100 * abs(more):.0f} % {'longer' if more > 0 else 'less'} than"
    return (
        f"by these estimates this layout {verdict} the planner's choice, {chosen.time.seconds:.3g} s: {layout}{zero} "
        "(parallel.layout=auto)"
    )
