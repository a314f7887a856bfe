"""What `auto` makes of the cost model of the low-rank projections; tests/distributed/test_low_rank_costs.py counts."""

from dataclasses import replace

import pytest

from mlra_scale.config import batch_plan, load_config
from mlra_scale.model.low_rank_plan import (
    CPU_CORE,
    H100,
    PLANS,
    DeviceRates,
    Shape,
    low_rank_plan,
    multiply_adds,
    numbers_sent,
    seconds,
    shape_of,
)
from tests.support.layouts import Layout, layout_config

SHAPE = Shape(tokens=4096, hidden_size=1024, rank=512, ranks=8)


def test_one_rank_sends_nothing_and_merges_only_large_ranks() -> None:
    alone = {rank: Shape(4096, 1024, rank, ranks=1) for rank in (256, 512, 900)}
    assert all(numbers_sent(plan, alone[512]) == 0 for plan in PLANS)
    best = {rank: min(PLANS, key=lambda plan: seconds(plan, shape, H100)) for rank, shape in alone.items()}
    assert best == {256: "replicated", 512: "replicated", 900: "merged"}


def test_merging_pays_for_many_tokens_and_the_latents_are_repeated_for_few() -> None:
    slow = DeviceRates(1e15, 1e9)
    for device in (DeviceRates(1e12, 1e15), slow):
        assert min(PLANS, key=lambda plan: seconds(plan, SHAPE, device)) == "merged"
    few_tokens = Shape(tokens=64, hidden_size=1024, rank=256, ranks=8)
    assert min(PLANS, key=lambda plan: seconds(plan, few_tokens, slow)) == "replicated"


def test_whole_factors_are_needed_with_sigma_reparam() -> None:
    config = layout_config(Layout(tensor=2), model__sigma_reparam=True, model__attention_rank=31)
    assert low_rank_plan(config, batch_plan(config, 2)) == "replicated"


@pytest.mark.parametrize("attention", ["mlra", "dense"])
def test_auto_takes_the_cheapest_and_a_name_is_taken_at_its_word(attention: str) -> None:
    config = layout_config(Layout(tensor=2), model__attention=attention, parallel__low_rank_plan="merged")
    assert low_rank_plan(config, batch_plan(config, 2)) == "merged"
    config = layout_config(Layout(tensor=2), model__attention=attention)
    chosen = low_rank_plan(config, batch_plan(config, 2))
    if attention == "dense":
        assert chosen == "replicated"
    else:
        shape = shape_of(config, batch_plan(config, 2))
        assert chosen == min(PLANS, key=lambda plan: seconds(plan, shape, CPU_CORE))


@pytest.mark.parametrize("tensor", [2, 4, 8])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", ["gpt2-mlra-72l", "gpt2-mlra-192l"])
def test_auto_does_not_repeat_the_down_projection_of_the_deep_presets(preset: str, device: str, tensor: int) -> None:
    # With few tokens, as the preset's one sample at 192 layers, latencies cost a GPU more than the repeated work.
    named = [f"parallel.tensor={tensor}", f"train.device={device}", "train.micro_batch_size=8"]
    config = load_config(preset, overrides=named)
    plan = batch_plan(config, tensor)
    shape = shape_of(config, plan)
    chosen = low_rank_plan(config, plan)
    assert chosen != "replicated"
    # Of all ranks together, merged computes at most what dense attention does.
    alone = multiply_adds("replicated", replace(shape, ranks=1))
    extra = 3 * shape.rank * shape.hidden_size**2 if chosen == "merged" else 0
    assert tensor * multiply_adds(chosen, shape) <= alone + extra


def test_a_device_that_was_found_goes_before_the_configuration() -> None:
    config = load_config("gpt2-mlra-72l", overrides=["parallel.tensor=2", "parallel.low_rank_plan=auto"])
    plan = batch_plan(config, 2)
    for found in ("cpu", "cuda"):
        named = load_config("gpt2-mlra-72l", overrides=["parallel.tensor=2", f"train.device={found}"])
        assert low_rank_plan(config, plan, found) == low_rank_plan(named, plan)
