"""The step-time model against counts by hand, at a size where every number can be written down."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.config import BatchPlan, Config, batch_plan, load_config
from mlra_scale.model.matrix_rounds import rounds_of
from mlra_scale.planning.cluster import named_cluster
from mlra_scale.planning.communication import (
    all_reduce,
    data_traffic_per_micro_batch,
    data_traffic_per_step,
    groups_of,
    matrix_traffic,
    pipeline_traffic,
    scatter_or_gather,
    tensor_traffic,
    tensor_traffic_of_block,
    tied_traffic,
)
from mlra_scale.planning.layout import Stage, num_held, num_weights_of_stage, weights_of_stage
from mlra_scale.planning.step_time import (
    block_flops,
    computed_flops,
    matrix_time,
    sent_per_step,
    stage_time,
    step_time,
    update_seconds,
)

# The debug preset: 4 layers, D 64, F 256, R 32, 4 heads, V 512, micro-batches of 2 x 64 tokens, batch 8, fp32.
T, D, F, R, V, S = 128, 64, 256, 32, 512, 64
IDLE = replace(
    named_cluster("cpu"),
    devices_per_node=8,
    block_overhead=0.0,
    zero_overhead=(0.0, 0.0, 0.0, 0.0),
    pipeline_overhead=0.0,
    micro_batch_overhead=0.0,
    step_overhead=0.0,
)


def case(world_size: int, *overrides: str, stage: int = 0) -> tuple[Config, BatchPlan]:
    zero = [f"deepspeed.zero_optimization.stage={stage}"] if stage else []
    config = load_config("debug", overrides=[*overrides, *zero])
    return config, batch_plan(config, world_size)


def stages_of(config: Config, plan: BatchPlan) -> list[Stage]:
    return [Stage(config, plan, index) for index in range(plan.pipeline)]


def test_a_block_counts_every_product_once_without_tensor_parallelism() -> None:
    config, plan = case(1)
    factors, output, mlp = 3 * 2 * 2 * T * D * R, 2 * T * D * D, 2 * 2 * T * D * F
    assert block_flops(Stage(config, plan, 0)) == (factors + output + mlp, 2 * T * S * D)
    dense, _ = case(1, "model.attention=dense")
    assert block_flops(Stage(dense, plan, 0)) == (4 * 2 * T * D * D + mlp, 2 * T * S * D)


def test_only_the_plan_replicated_repeats_the_down_projection() -> None:
    counts = {}
    for name in ("replicated", "merged"):
        config, plan = case(2, "parallel.tensor=2", f"parallel.low_rank_plan={name}")
        counts[name] = block_flops(Stage(config, plan, 0))[0]
    others = 2 * T * D * D / 2 + 4 * T * D * F / 2
    assert counts["replicated"] == 3 * 2 * (T * D * R + T * R * D / 2) + others
    assert counts["merged"] == 3 * 2 * (R * D * D / 2 + T * D * D / 2) + others


def test_a_factorised_output_computes_its_up_factor_on_every_rank() -> None:
    config, plan = case(2, "parallel.tensor=2", 'model.factorised_projections=["o"]')
    inputs = 3 * 2 * T * D * D / 2
    assert block_flops(Stage(config, plan, 0))[0] == inputs + 2 * T * R * D / 2 + 2 * T * R * D + 4 * T * D * F / 2


def test_the_backward_pass_the_head_and_recomputation() -> None:
    config, plan = case(1)
    products, attention = block_flops(Stage(config, plan, 0))
    head = 6 * T * D * V
    assert computed_flops(Stage(config, plan, 0)) == 4 * (3 * products + 3.5 * attention) + head
    again, _ = case(1, "parallel.activation_checkpointing=block")
    # What is kept last is fc_out's input: its product is not computed again.
    assert computed_flops(Stage(again, plan, 0)) == 4 * (4 * products + 4.5 * attention - 2 * T * D * F) + head
    split, plan = case(2, "parallel.pipeline=2")
    assert computed_flops(Stage(split, plan, 1)) - computed_flops(Stage(split, plan, 0)) == head


def test_what_collectives_send() -> None:
    assert all_reduce(100.0, 4).sent == 150.0 and scatter_or_gather(100.0, 4).sent == 75.0
    assert all_reduce(100.0, 1).sent == all_reduce(100.0, 1).messages == 0


def test_tensor_parallel_blocks_reduce_twice_each_way() -> None:
    hidden = 4 * T * D
    config, plan = case(2, "parallel.tensor=2", "model.attention=dense")
    # Over two ranks an all-reduce sends as many bytes as it reduces.
    assert tensor_traffic_of_block(Stage(config, plan, 0)).sent == 4 * hidden
    again, _ = case(2, "parallel.tensor=2", "model.attention=dense", "parallel.activation_checkpointing=block")
    assert tensor_traffic_of_block(Stage(again, plan, 0)).sent == 5 * hidden, "fc_out's sum is not repeated"
    latents, _ = case(2, "parallel.tensor=2", "parallel.low_rank_plan=replicated")
    assert tensor_traffic_of_block(Stage(latents, plan, 0)).sent == 3 * hidden + 3 * 4 * T * R
    # And both ends one of the hidden state: the embedding's output, the gradient of the head's input.
    assert tensor_traffic(Stage(config, plan, 0)).sent == 4 * 4 * hidden + 2 * hidden
    assert tensor_traffic(Stage(*case(1), 0)).sent == 0.0


def test_with_sequence_parallelism_the_first_stage_sums_the_gradient_of_positions() -> None:
    overrides = ("parallel.pipeline=4", "parallel.tensor=2", "parallel.sequence_parallel=true")
    config, plan = case(8, *overrides)
    first, second = (tensor_traffic(Stage(config, plan, stage)) for stage in (0, 1))
    hidden = plan.micro_batch_size * plan.sequence_length * config.model.hidden_size
    positions = config.model.max_positions * config.model.hidden_size
    assert first.sent - second.sent == 4 * (hidden + positions)


def test_stages_send_the_hidden_state_to_every_neighbour() -> None:
    config, plan = case(4, "parallel.pipeline=4")
    sent = [pipeline_traffic(Stage(config, plan, stage)).sent for stage in range(4)]
    assert sent == [4 * T * D, 8 * T * D, 8 * T * D, 4 * T * D]
    assert [tied_traffic(Stage(config, plan, stage)).sent for stage in range(4)] == [4 * V * D, 0, 0, 4 * V * D]


@pytest.mark.parametrize(
    ("stage", "gradients", "weights", "once"),
    # DeepSpeed sums whole buckets at stages 1 and 2. At stage 3 these weights are near enough to be kept.
    [(0, 0, 0, 2), (1, 0, 0, 3), (2, 2, 0, 1), (3, 1, 1, 0)],
)
def test_zero_stages_differ_in_what_they_send_and_when(stage: int, gradients: int, weights: int, once: int) -> None:
    """In units of the whole gradient over two ranks, each of which sends half of what is scattered or gathered."""
    config, plan = case(2, stage=stage)
    unit = 4 * num_held(weights_of_stage(config.model, 1, 0), 1) / 2
    scattered, gathered = data_traffic_per_micro_batch(Stage(config, plan, 0))
    assert (scattered.sent, gathered.sent) == (gradients * unit, weights * unit)
    assert sum(traffic.sent for traffic in data_traffic_per_step(Stage(config, plan, 0))) == once * unit
    m = plan.accumulation_steps
    assert sent_per_step(stages_of(config, plan)) == {
        "tensor": 0.0,
        "pipeline": 0.0,
        "data": (m * (gradients + weights) + once) * unit,
    }


def test_bf16_reduces_in_fp32_and_gathers_in_bf16() -> None:
    config, plan = case(2, "train.precision=bf16", stage=1)
    weights = num_held(weights_of_stage(config.model, 1, 0), 1)
    gradients, gathered = data_traffic_per_step(Stage(config, plan, 0))
    assert (gradients.sent, gathered.sent) == (2 * 4 * weights / 2, 2 * weights / 2)


def test_the_ends_of_a_pipeline_sum_the_tied_gradient_once_more_over_many_data_ranks() -> None:
    for data, times in ((2, 1), (4, 2)):
        config, plan = case(3 * data, "parallel.pipeline=3")
        sent = [data_traffic_per_step(Stage(config, plan, stage))[0].sent for stage in range(3)]
        held = [num_held(weights_of_stage(config.model, 3, stage), 1) for stage in range(3)]
        tied = 4 * V * D * (times - 1)
        each = 2 * (data - 1) / data
        assert sent == pytest.approx([each * (4 * held[0] + tied), each * 4 * held[1], each * (4 * held[2] + tied)])


def test_zero_3_gathers_twice_what_it_does_not_keep() -> None:
    config, plan = case(2, "deepspeed.zero_optimization.stage3_max_reuse_distance=0", stage=3)
    weights = num_held(weights_of_stage(config.model, 1, 0), 1)
    assert data_traffic_per_micro_batch(Stage(config, plan, 0))[1].sent == 2 * 4 * weights / 2


@pytest.mark.parametrize(("stages", "batch"), [(2, 8), (4, 8), (4, 64)])
def test_equal_stages_have_the_bubble_of_the_book(stages: int, batch: int) -> None:
    config, plan = case(stages, f"parallel.pipeline={stages}", f"train.global_batch_size={batch}")
    # A head that costs nothing, and ends that send nothing, leave stages that are equal.
    equal = replace(IDLE, link_intra=1e30, latency_intra=0.0, memory_bandwidth=1e30, update_bandwidth=1e30)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"vocab_size": 1, "vocab_padding_multiple": 1})}
    )
    head = 6 * T * D / equal.flops
    time = step_time(config, plan, equal)
    shortest = time.stages[0].total
    assert time.stages[-1].total - shortest == pytest.approx(head)
    m = plan.accumulation_steps
    assert time.bubble == pytest.approx((stages - 1) / (m + stages - 1), rel=0.02)
    assert time.seconds == pytest.approx((m + stages - 1) * shortest, rel=0.02)


def test_the_slowest_stage_sets_the_pace() -> None:
    config, plan = case(3, "parallel.pipeline=3", "train.global_batch_size=24")
    time = step_time(config, plan, IDLE)
    slowest, passage = max(stage.total for stage in time.stages), sum(stage.total for stage in time.stages)
    assert time.bubble == pytest.approx(1 - 12 * slowest / (passage + 11 * slowest))
    assert time.seconds == pytest.approx(passage + 11 * slowest + time.reduction + time.update)


def test_mfu_counts_useful_work_only() -> None:
    config, plan = case(1)
    again, _ = case(1, "parallel.activation_checkpointing=block")
    useful = config.model.flops_per_token(64) * plan.tokens_per_step
    for each in (config, again):
        time = step_time(each, plan, IDLE)
        assert time.mfu == pytest.approx(useful / (time.seconds * IDLE.peak_flops))
    assert step_time(again, plan, IDLE).mfu < step_time(config, plan, IDLE).mfu


def test_a_device_that_runs_ahead_hides_overhead_and_reductions() -> None:
    config, plan = case(2, stage=2)
    slow = replace(IDLE, block_overhead=1e-3)
    plain = step_time(config, plan, slow)
    assert plain.stages[0].overhead == pytest.approx(4e-3)
    ahead = step_time(config, plan, replace(slow, runs_ahead=True))
    busy = ahead.stages[0].compute + ahead.stages[0].elementwise
    assert ahead.stages[0].overhead == pytest.approx(max(0.0, 4e-3 - busy))
    overlapping = config.model_copy(update={"deepspeed": {"zero_optimization": {"stage": 2, "overlap_comm": True}}})
    hidden = step_time(overlapping, plan, replace(slow, runs_ahead=True))
    assert hidden.stages[0].data < ahead.stages[0].data == plain.stages[0].data


def numbers_moved(of: Stage) -> int:
    """Numbers that go to the owners of matrices and back; of ranks that hold the same one sends it."""
    tensor, data, groups = of.plan.tensor, of.plan.data, {matrix.group for matrix in of.matrices}
    whole = {group: sum(each.num_held(tensor) for each in of.matrices if each.group == group) for group in groups}
    starts, held = dict.fromkeys(whole, 0), []
    for matrix in of.matrices:
        size, start = matrix.num_held(tensor), starts[matrix.group]
        starts[matrix.group] += size
        elements = [list(range(size)) for _ in range(data)]
        if of.zero == 1:  # a number of the group is the data rank's in whose piece it is
            piece = whole[matrix.group] // data
            elements = [[each for each in range(size) if (start + each) // piece == rank] for rank in range(data)]
        held.append([len(each) // (data if of.zero == 3 else 1) for each in elements])
    moved = 0
    ranks = range(tensor * data)
    holders = [{rank: by_data[rank // tensor] for rank in ranks if by_data[rank // tensor]} for by_data in held]
    for indices in rounds_of([matrix[:2] for matrix in of.matrices], tensor * data, holders):
        for owner, index in indices.items():
            for rank in {*range(tensor * data)} - {owner}:
                (data_rank, tensor_rank), (of_data, of_tensor) = divmod(rank, tensor), divmod(owner, tensor)
                is_alone = of.matrices[index].shard_dim is not None or tensor_rank == of_tensor
                sends = is_alone and (of.zero > 0 or data_rank == of_data)
                moved += held[index][data_rank] * (1 + sends)
    return moved


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("tensor", [1, 2])
def test_matrices_go_to_their_owners_and_back(stage: int, tensor: int) -> None:
    for precision, element in (("fp32", 4), ("bf16", 2)):
        zero = f"deepspeed.zero_optimization.stage={stage}"
        overrides = (f"parallel.tensor={tensor}", f"train.precision={precision}", zero)
        config, plan = case(4, *overrides, "optim.name=muon")
        of = Stage(config, plan, 0)
        traffic = matrix_traffic(of)
        assert traffic.sent == pytest.approx(element * numbers_moved(of) / 4)
        # At ZeRO 1 (and in bf16 without ZeRO) four data ranks hold whole matrices; in fp32 without it, all hold all.
        # Of nine rounds three have down factors only, which no tensor rank splits.
        all_to_alls = {(0, 1): 9, (1, 1): 0, (1, 2): 9 + 6}.get((of.zero, tensor), 9 + 9)
        assert (traffic.messages, traffic.rings) == (0, all_to_alls)
        of = Stage(*case(4, *overrides, "optim.name=spectron"), 0)
        sums = matrix_traffic(of)
        # Two sums over four ranks, of a number per row and per column of 24 factors.
        of_sums = 2 * 3 / 4 * 4 * 24 * (D + R)
        assert sums.sent == pytest.approx(element * numbers_moved(of) / 4 + of_sums)
        assert (sums.messages, sums.rings) == (2, traffic.rings)
    assert matrix_traffic(Stage(*case(4), 0)).sent == 0.0
    assert matrix_traffic(Stage(*case(1, "optim.name=spectron"), 0)).sent == 0.0


def test_ranks_orthogonalise_matrices_of_equal_work_at_the_same_time() -> None:
    """36 matrices on 8 ranks: fc_in and fc_out; o and 4 factors; 20 factors in three rounds."""
    plain = replace(IDLE, latency_intra=0.0, link_intra=1e30, update_bandwidth=1e30)
    products = {name: 2 * m * m * n + m**3 for name, (m, n) in {"mlp": (D, F), "o": (D, D), "factor": (R, D)}.items()}
    on_eight = products["mlp"] + products["o"] + 3 * products["factor"]
    on_one = 8 * products["mlp"] + 4 * products["o"] + 24 * products["factor"]
    for ranks, number in ((8, on_eight), (1, on_one)):
        for steps in (5, 7):
            names = ("optim.name=muon", f"optim.newton_schulz_steps={steps}", "train.global_batch_size=16")
            time = matrix_time(Stage(*case(ranks, *names), 0), plain)
            assert time is not None and time.seconds == pytest.approx(time.orthogonalisation)
            assert time.orthogonalisation == pytest.approx(2 * steps * number / plain.flops)


def test_the_update_includes_matrices() -> None:
    adamw, muon = case(2, stage=3), case(2, "optim.name=muon", stage=3)
    before, after = (step_time(*each, IDLE) for each in (adamw, muon))
    assert before.matrices is None and after.matrices is not None
    of = Stage(*muon, 0)
    rest = (of.num_weights - of.num_in_matrices) / of.num_weights * before.update
    assert after.update == pytest.approx(rest + after.matrices.seconds)
    assert after.seconds - before.seconds == pytest.approx(after.update - before.update)
    assert after.sent == {**before.sent, "optimizer": after.matrices.sent}
    slow = replace(IDLE, launch=1e-3)
    assert update_seconds(of, slow) > update_seconds(of, IDLE) + 36 / 2 * 1e-3, "operations have to be started"
    # A device that runs ahead starts operations while it computes.
    ahead = matrix_time(of, replace(slow, runs_ahead=True, latency_intra=0.0, link_intra=1e30))
    busy = matrix_time(of, replace(IDLE, latency_intra=0.0, link_intra=1e30))
    both = matrix_time(of, replace(slow, latency_intra=0.0, link_intra=1e30))
    assert ahead is not None and busy is not None and both is not None
    assert ahead.seconds == pytest.approx(both.seconds - busy.seconds)


def test_stages_with_other_matrices_take_other_times() -> None:
    """Stages that are alike are estimated once: a rule may make them differ."""
    config, plan = case(4, "parallel.pipeline=4", 'optim.rules=[{names: "blocks.2.mlp.*.weight", optimizer: muon}]')
    times = [matrix_time(Stage(config, plan, index), IDLE) for index in range(4)]
    assert [time is not None for time in times] == [False, False, True, False]
    assert step_time(config, plan, IDLE).matrices == times[2]


def test_groups_follow_the_mesh() -> None:
    config, plan = case(8, "parallel.tensor=2", "parallel.pipeline=2")
    assert groups_of(plan, 0) == {"tensor": [0, 1], "data": [0, 2], "pipeline": [0, 4], "ends": [0, 4]}
    assert groups_of(plan, 1) == {"tensor": [4, 5], "data": [4, 6], "pipeline": [0, 4], "ends": [0, 4]}
    assert config.parallel.tensor == 2


def test_weights_of_a_stage_are_counted_without_a_table() -> None:
    for stages in (1, 2, 3, 4):
        config, plan = case(2 * stages, "parallel.tensor=2", f"parallel.pipeline={stages}")
        for stage in range(stages):
            held = weights_of_stage(config.model, stages, stage)
            assert num_weights_of_stage(config.model, plan, stage) == num_held(held, 2)


def overlapping(precision: str, stage: int, *overrides: str) -> tuple[Config, BatchPlan]:
    """Data parallelism over two ranks with ZeRO and overlap_comm."""
    config, plan = case(2, f"train.precision={precision}", *overrides, stage=stage)
    zero = {"stage": stage, "overlap_comm": True}
    return config.model_copy(update={"deepspeed": {"zero_optimization": zero}}), plan


def test_reductions_that_begin_late_and_gathers_after_the_update_hide_behind_nothing() -> None:
    ahead = replace(IDLE, devices_per_node=2, runs_ahead=True)
    for precision, hidden in (("fp32", True), ("bf16", False)):
        config, plan = overlapping(precision, 1)
        gradients, weights = (each.seconds(ahead, [0, 1]) for each in data_traffic_per_step(Stage(config, plan, 0)))
        exposed = step_time(config, plan, ahead).reduction
        # bf16's optimizer of ZeRO 1 reduces after the last backward pass; the updated weights come after the update.
        assert exposed == pytest.approx(gradients + weights) or hidden
        assert exposed >= weights and (exposed < gradients + weights) == hidden


def test_gathers_and_scatters_of_zero_3_share_the_links() -> None:
    config, plan = overlapping("fp32", 3)
    slow = replace(IDLE, devices_per_node=2, runs_ahead=True, link_intra=1e8, latency_intra=0.0)
    scattered, gathered = (each.seconds(slow, [0, 1]) for each in data_traffic_per_micro_batch(Stage(config, plan, 0)))
    stage = step_time(config, plan, slow).stages[0]
    busy = stage.compute + stage.elementwise + stage.overhead
    assert stage.data == pytest.approx(scattered + gathered - busy), "the computation hides its own length once"


def test_a_ring_takes_longer_the_more_ranks_it_has() -> None:
    cluster = replace(IDLE, devices_per_node=256, latency_intra=1.0)
    for ranks, ring in ((2, 1.0), (8, 3.0), (64, 0.2 * 63), (256, 0.2 * 255)):
        group = list(range(ranks))
        assert all_reduce(0.0, ranks).seconds(cluster, group) == pytest.approx(math.log2(ranks))
        assert scatter_or_gather(0.0, ranks).seconds(cluster, group) == pytest.approx(ring)


def test_what_checkpointing_starts_again_and_waits_cost_host_time() -> None:
    config, plan = case(1)
    again, _ = case(1, "parallel.activation_checkpointing=block")
    host = replace(IDLE, launch=1e-3, wait=1e-2)
    assert step_time(config, plan, host).seconds == pytest.approx(step_time(config, plan, IDLE).seconds + 2 * 1e-2)
    more = step_time(again, plan, host).stages[0].overhead - step_time(config, plan, host).stages[0].overhead
    assert more == pytest.approx(4 * 20 * 1e-3)


def test_every_stage_has_the_time_that_it_has_by_itself() -> None:
    """Stages that are alike are estimated once."""
    cluster = replace(named_cluster("h100"), nodes=3, devices_per_node=4)
    for layers, overrides in ((13, ("parallel.pipeline=6",)), (12, ("parallel.pipeline=12",))):
        config, plan = case(12, f"model.num_layers={layers}", "train.global_batch_size=8", *overrides)
        expected = tuple(stage_time(stage, cluster) for stage in stages_of(config, plan))
        assert step_time(config, plan, cluster).stages == expected
        m, stages = plan.accumulation_steps, range(plan.pipeline)
        sent = [
            m * pipeline_traffic(Stage(config, plan, each)).sent + tied_traffic(Stage(config, plan, each)).sent
            for each in stages
        ]
        assert sent_per_step(stages_of(config, plan))["pipeline"] == max(sent)


@settings(deadline=None)
@given(
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from(["peak_flops", "memory_bandwidth", "link_intra", "link_inter"]),
    st.floats(-6, 6),
    st.floats(-6, 6),
    st.floats(-6, 6),
)
def test_nothing_that_gets_slower_makes_a_step_faster(
    stage: int, slower: str, links: float, rates: float, hosts: float
) -> None:
    """What runs beside something else hides behind it once: in no regime does more work take less time."""
    config, plan = overlapping("bf16", stage) if stage else case(2, "train.precision=bf16")
    cluster = replace(
        named_cluster("h100"),
        devices_per_node=1,
        nodes=2,
        link_inter=4e10 * 10**links,
        memory_bandwidth=2.7e12 * 10**rates,
        block_overhead=4e-4 * 10**hosts,
    )
    worse = replace(cluster, **{slower: 0.7 * getattr(cluster, slower)})
    assert step_time(config, plan, worse).seconds >= step_time(config, plan, cluster).seconds * (1 - 1e-9)
