"""The planner's choice: what is named stays, a fragile choice gives way, and a tenth of the memory stays free."""

from collections import Counter
from dataclasses import replace

import pytest

from mlra_scale.config import Config, ConfigError, load_config, load_named_config, zero_stage
from mlra_scale.model.validation import validate
from mlra_scale.planning.choice import (
    FIELDS,
    LARGEST_LOSS,
    SAME,
    LayoutChoice,
    changed_clusters,
    choice_lines,
    choose,
    chosen_of,
    comparison_line,
    engines,
)
from mlra_scale.planning.cluster import FREE_SHARE, Cluster, cluster_of_device, named_cluster
from mlra_scale.planning.memory import rank_memory
from mlra_scale.planning.search import Candidate, SearchResult, evaluate, heavy_stages, search
from mlra_scale.planning.step_time import step_time

NODE = replace(named_cluster("h100"), devices_per_node=4)


def chosen(cluster: Cluster, *overrides: str, preset: str = "gpt2") -> LayoutChoice:
    config, named = load_named_config(preset, overrides=["parallel.layout=auto", *overrides])
    return choose(config, named, cluster)


def test_the_choice_names_itself_and_loads_back() -> None:
    choice = chosen(NODE)
    config, named = load_named_config("gpt2", overrides=["parallel.layout=auto", *choice.overrides])
    assert named.on_command_line >= set(FIELDS)
    assert config == choice.chosen.config
    validate(config, 4, "cuda")


def test_what_is_named_stays_and_the_rest_is_chosen() -> None:
    free, fixed = chosen(NODE), chosen(NODE, "parallel.tensor=2", "deepspeed.zero_optimization.stage=1")
    assert free.kept == () and fixed.kept == ("parallel.tensor", "deepspeed")
    assert free.chosen.plan.tensor == 1 and fixed.chosen.plan.tensor == 2 and zero_stage(fixed.chosen.config) == 1
    config, named = load_named_config("gpt2", overrides=["parallel.tensor=2", "deepspeed.zero_optimization.stage=1"])
    found = search(config, named, NODE, engines())
    fastest = min(each.time.seconds for each in found.feasible)
    assert fixed.fastest.time.seconds == fastest and fixed.chosen.time.seconds <= (1 + SAME) * fastest
    assert "kept as named: parallel.tensor, deepspeed" in "\n".join(choice_lines(fixed))


def test_the_two_next_best_are_shown_with_estimates() -> None:
    choice = chosen(NODE)
    seconds = sorted(each.time.seconds for each in (choice.chosen, *choice.others))
    assert len(choice.others) == 2 and choice.chosen not in choice.others
    config, named = load_named_config("gpt2")
    found = search(config, named, NODE, engines()[1:])
    assert seconds[0] == found.feasible[0].time.seconds and seconds[-1] <= (1 + SAME) * found.feasible[2].time.seconds
    text = "\n".join(choice_lines(choice))
    assert all(f"{each:.4g}" in text for each in seconds) and "not measured" in text


def test_a_tenth_of_the_device_stays_free() -> None:
    config, named = load_named_config("gpt2")
    for each in search(config, named, NODE, engines()).feasible:
        assert each.memory.device + NODE.reserved <= (1 - FREE_SHARE) * NODE.memory
    need = chosen(NODE).chosen.memory.device + NODE.reserved
    # Exactly what the choice needs is no longer enough for it.
    assert chosen(replace(NODE, memory=need)).chosen.memory.device < need - NODE.reserved


def test_every_constant_is_changed_both_ways_and_nothing_else() -> None:
    changed = changed_clusters(NODE)
    assert len(changed) == 10
    fields = {name for each in changed.values() for name in vars(each) if getattr(each, name) != getattr(NODE, name)}
    unchanged = {"name", "source", "nodes", "devices_per_node", "memory", "reserved", "peak_flops", "runs_ahead"}
    assert fields == set(vars(NODE)) - unchanged
    plan = chosen(NODE).chosen
    for name, each in changed.items():
        change = step_time(plan.config, plan.plan, each).seconds - plan.time.seconds
        assert change <= 1e-12 if name.endswith("better") else change >= -1e-12, name


def layouts() -> tuple[Candidate, Candidate]:
    """A layout that lives by the links between nodes, and one that does not need them."""
    overrides = ["train.global_batch_size=16", "train.micro_batch_size=2", "deepspeed.zero_optimization.stage=1"]
    data = load_config("gpt2-large", overrides=overrides)
    stages = load_config("gpt2-large", overrides=[*overrides, "parallel.pipeline=4"])
    cluster = _two_nodes(1e9)
    return evaluate(data, cluster, engines()[0]), evaluate(stages, cluster, engines()[0])


def _two_nodes(link: float) -> Cluster:
    return replace(NODE, nodes=2, devices_per_node=2, link_inter=link)


def test_a_choice_that_could_lose_much_gives_way_to_a_more_robust_one() -> None:
    data, stages = layouts()
    # The rate of the links at which both take equally long: a little above it data parallelism is the fastest, and
    # with links that are 30 % worse it loses much.
    slow, fast = 1e8, 1e12
    for _ in range(60):
        link = (slow * fast) ** 0.5
        times = [step_time(each.config, each.plan, _two_nodes(link)).seconds for each in (data, stages)]
        slow, fast = (link, fast) if times[0] > times[1] else (slow, link)
    cluster = _two_nodes(1.02 * fast)
    pair = [evaluate(each.config, cluster, each.engine) for each in (data, stages)]
    assert pair[0].time.seconds < pair[1].time.seconds
    choice = chosen_of(SearchResult(pair, Counter(), pair[0]), cluster)
    assert choice.fastest is pair[0] and choice.losses_of_fragile is not None
    assert max(choice.losses_of_fragile.values()) > LARGEST_LOSS
    assert choice.chosen is pair[1] and choice.worst[1] < max(choice.losses_of_fragile.values())
    assert "a faster one is not chosen: with links between nodes 30 % worse" in "\n".join(choice_lines(choice))
    # Where it is the fastest by far it is chosen.
    cluster = _two_nodes(100 * fast)
    pair = [evaluate(each.config, cluster, each.engine) for each in (data, stages)]
    choice = chosen_of(SearchResult(pair, Counter(), pair[0]), cluster)
    assert choice.chosen is choice.fastest is pair[0] and choice.worst[1] <= LARGEST_LOSS


def test_of_layouts_that_cannot_be_told_apart_the_plainest_is_chosen() -> None:
    """ZeRO 3 and ZeRO 1 of one model on fast links: which of them is a little faster depends on assumptions."""
    cluster = replace(NODE, link_intra=1e15, latency_intra=0.0, zero_overhead=(0.0, 0.0, 0.0, 0.0))
    overrides = ["train.precision=bf16", "train.micro_batch_size=16"]
    candidates = [
        evaluate(
            load_config("gpt2", overrides=[*overrides, f"deepspeed.zero_optimization.stage={stage}"]),
            cluster,
            engines()[0],
        )
        for stage in (3, 2, 1)
    ]
    candidates.sort(key=lambda each: each.time.seconds)
    assert candidates[-1].time.seconds < (1 + SAME) * candidates[0].time.seconds
    choice = chosen_of(SearchResult(candidates, Counter(), candidates[0]), cluster)
    assert zero_stage(choice.chosen.config) == 1 and choice.fastest is candidates[0]
    slow = replace(cluster, zero_overhead=(0.0, 0.1, 0.0, 0.0))
    candidates = sorted(
        (evaluate(each.config, slow, each.engine) for each in candidates), key=lambda each: each.time.seconds
    )
    assert zero_stage(chosen_of(SearchResult(candidates, Counter(), candidates[0]), slow).chosen.config) == 2


@pytest.mark.parametrize(
    ("nodes", "preset"), [(1, "gpt2"), pytest.param(4, "gpt2-mlra-72l-wide", marks=pytest.mark.slow)]
)
def test_losses_are_against_all_layouts_that_fit(nodes: int, preset: str) -> None:
    """Only layouts near the fastest one are looked at; none of the others is better under any change."""
    cluster = replace(named_cluster("h100"), nodes=nodes, devices_per_node=4)
    config, named = load_named_config(preset)
    found = search(config, named, cluster, engines())
    choice = chosen_of(found, cluster)
    for name, changed in changed_clusters(cluster).items():
        times = [step_time(each.config, each.plan, changed).seconds for each in found.feasible]
        mine = step_time(choice.chosen.config, choice.chosen.plan, changed).seconds
        assert choice.losses[name] == pytest.approx(mine / min(times) - 1, abs=1e-12)


def test_nothing_that_fits_is_one_error_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.layout = 'auto': no layout fits: the smallest needs"):
        chosen(replace(NODE, memory=5e9), preset="gpt2-xl")


def test_a_named_layout_is_compared_with_the_best() -> None:
    best = chosen(NODE)
    line = comparison_line(1.5 * best.chosen.time.seconds, best)
    assert "takes 50 % longer than the planner's choice" in line and "parallel.layout=auto" in line
    assert "takes 10 % less than" in comparison_line(0.9 * best.chosen.time.seconds, best)
    assert "is as fast as" in comparison_line(best.chosen.time.seconds, best)


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A10", None),
    ],
)
def test_devices_are_known_by_their_name(name: str, cluster: str | None) -> None:
    assert cluster_of_device(name) == cluster


@pytest.mark.parametrize("accumulation", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_stage_that_needs_most_is_among_the_heavy_ones(stages: int, accumulation: int, precision: str) -> None:
    batch = f"train.global_batch_size={4 * accumulation}"
    for overrides in ((), ("parallel.activation_checkpointing=block",), ("deepspeed.zero_optimization.stage=1",)):
        config = load_config(
            "debug",
            overrides=[
                *(f"train.precision={precision}", f"parallel.pipeline={stages}", "train.micro_batch_size=4", batch),
                *("model.num_layers=17", "model.vocab_size=64", *overrides),
            ],
        )
        candidate = evaluate(config, replace(NODE, devices_per_node=stages), engines()[0])
        every = [rank_memory(config, candidate.plan, stage).device for stage in range(stages)]
        assert max(every) == candidate.memory.device, (heavy_stages(candidate.plan), every)


def test_configurations_of_before_load_as_manual() -> None:
    values = load_config("debug").to_dict()
    del values["parallel"]["layout"], values["cluster"]["device"], values["cluster"]["device_memory_gib"]
    assert Config.from_dict(values).parallel.layout == "manual"
