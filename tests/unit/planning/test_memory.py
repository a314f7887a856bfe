import math

import pytest

from mlra_scale.config import BatchPlan, Config, batch_plan, load_config
from mlra_scale.planning.layout import num_held, weights_of_stage
from mlra_scale.planning.memory import (
    block_bytes_per_token,
    gradient_bytes,
    in_flight,
    logit_bytes,
    master_bytes,
    moment_bytes,
    moments_of_a_step,
    pinned_bytes,
    rank_memory,
    reduction_bytes,
    weight_bytes,
)


def case(
    world_size: int, *overrides: str, stage: int = 0, preset: str = "debug", offload: bool = False
) -> tuple[Config, BatchPlan]:
    zero: dict[str, object] = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    extra = ["deepspeed.zero_optimization=" + str(zero).replace("'", '"')] if stage else []
    config = load_config(preset, overrides=[*overrides, *extra])
    return config, batch_plan(config, world_size)


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [
        # weights, gradients, master, moments: bytes per weight on 4 data ranks
        ("fp32", 0, (4, 4, 0, 8)),
        ("fp32", 1, (4, 4, 1, 2)),
        ("fp32", 2, (4, 1, 1, 2)),
        ("fp32", 3, (1 + 4, 1, 1, 2)),
        ("bf16", 0, (2, 6, 1, 2)),  # is ZeRO 1
        ("bf16", 1, (2, 6, 1, 2)),
        ("bf16", 2, (2, 1, 1, 2)),
        ("bf16", 3, (0.5 + 2, 1, 1, 2)),
        ("fp16", 1, (2, 2, 1, 2)),
        ("fp16", 2, (2, 2, 1, 2)),  # whole what a rank's share touches
        ("fp16", 3, (0.5 + 2, 0.5, 1, 2)),
    ],
)
def test_training_state_per_weight(precision: str, stage: int, expected: tuple[float, ...]) -> None:
    config, plan = case(4, f"train.precision={precision}", stage=stage)
    parts = (weight_bytes, gradient_bytes, master_bytes, moment_bytes)
    assert tuple(part(config, plan, 1) for part in parts) == expected


def test_state_of_a_rank_counts_its_own_weights() -> None:
    config, plan = case(4, "parallel.tensor=2", "parallel.pipeline=2")
    for stage in range(2):
        held = num_held(weights_of_stage(config.model, 2, stage), 2)
        memory = rank_memory(config, plan, stage)
        assert (memory.weights, memory.gradients, memory.moments) == (4 * held, 4 * held, 8 * held)


def test_offloading_moves_master_moments_and_gradients_to_the_host() -> None:
    config, plan = case(2, stage=2)
    offloaded, _ = case(2, stage=2, offload=True)
    before, after = rank_memory(config, plan, 0), rank_memory(offloaded, plan, 0)
    assert after.master == after.moments == 0.0
    held = num_held(weights_of_stage(config.model, 1, 0), 1)
    assert after.host == before.master + before.moments + gradient_bytes(config, plan, held)
    assert after.device == before.device - after.host


def test_a_factorised_block_keeps_one_latent_per_projection_more() -> None:
    """1.5 D numbers per token at rank D/2 in q, k and v."""
    mlra, plan = case(1)
    dense, _ = case(1, "model.attention=dense")
    difference = block_bytes_per_token(mlra, plan) - block_bytes_per_token(dense, plan)
    assert difference == 4 * 1.5 * mlra.model.hidden_size
    assert block_bytes_per_token(dense, plan) == 4 * 16 * dense.model.hidden_size


def test_dropout_keeps_masks_and_makes_them_from_64_bits() -> None:
    plain, plan = case(2, "parallel.tensor=2", "model.attention=dense")
    width, sequence, heads = plain.model.hidden_size, plan.sequence_length, plain.model.num_heads
    residual, _ = case(2, "parallel.tensor=2", "model.attention=dense", "model.residual_dropout=0.1")
    attention, _ = case(2, "parallel.tensor=2", "model.attention=dense", "model.attention_dropout=0.1")
    kept = [block_bytes_per_token(config, plan) for config in (plain, residual, attention)]
    assert kept[1] - kept[0] == 4 * 2 * width
    assert kept[2] - kept[0] == (4 + 2 * 4) * sequence * heads / 2
    assert len(moments_of_a_step(attention, plan, 0)) == len(moments_of_a_step(plain, plan, 0)) + 1


def test_qk_norm_keeps_queries_and_keys_twice() -> None:
    plain, plan = case(2, "parallel.tensor=2")
    normed, _ = case(2, "parallel.tensor=2", "model.qk_norm=true", "model.sigma_reparam=true")
    difference = block_bytes_per_token(normed, plan) - block_bytes_per_token(plain, plan)
    assert difference == 4 * 2 * plain.model.hidden_size / 2


def test_sequence_parallelism_divides_what_tensor_ranks_repeat() -> None:
    plain, plan = case(4, "parallel.tensor=4", "model.attention=dense")
    width, tokens = plain.model.hidden_size, plan.micro_batch_size * plan.sequence_length
    split, _ = case(4, "parallel.tensor=4", "model.attention=dense", "parallel.sequence_parallel=true")
    assert block_bytes_per_token(plain, plan) == 4 * width * (4 + 12 / 4)
    assert block_bytes_per_token(split, plan) == 4 * width * 16 / 4
    before, after = (rank_memory(config, plan, 0).activations for config in (plain, split))
    end = 4 * width * (1 - 1 / 4)
    assert before - after == tokens * (plain.model.num_layers * 4 * width * 3 + end)
    split_mlra = ("parallel.tensor=4", "parallel.sequence_parallel=true", "parallel.low_rank_plan=replicated")
    mlra, _ = case(4, *split_mlra)
    assert block_bytes_per_token(mlra, plan) == 4 * width * (16 + 1.5) / 4
    checkpointed, _ = case(4, *split_mlra, "parallel.activation_checkpointing=block")
    # Inputs of blocks are split; of the one that is computed again, what was gathered is whole.
    assert block_bytes_per_token(checkpointed, plan) == 4 * width * (2 / 4 + 2 + 12 / 4 + 1.5)


def test_selective_checkpointing_keeps_no_norms_and_no_gelu() -> None:
    for overrides, kept in (
        ((), 10.0),
        (("parallel.tensor=4",), 2 + 8 / 4),
        (("parallel.tensor=4", "parallel.sequence_parallel=true"), 10 / 4),
    ):
        selective = "parallel.activation_checkpointing=selective"
        config, plan = case(4, "model.attention=dense", selective, *overrides)
        assert block_bytes_per_token(config, plan) == 4 * config.model.hidden_size * kept


def test_checkpointing_keeps_less_but_for_the_logits() -> None:
    config, plan = case(1)
    checkpointed, _ = case(1, "parallel.activation_checkpointing=block")
    before, after = rank_memory(config, plan, 0), rank_memory(checkpointed, plan, 0)
    assert after.activations < 0.5 * before.activations
    # What the loss needs is the same; with checkpointing it may no longer be the moment that needs most.
    at_the_loss = [moments_of_a_step(each, plan, 0)[0].logits for each in (config, checkpointed)]
    assert at_the_loss == [before.logits] * 2 == [logit_bytes(config, plan)] * 2
    state = 12 * num_held(weights_of_stage(config.model, 1, 0), 1)
    assert after.device == state + max(moment.total for moment in moments_of_a_step(checkpointed, plan, 0))


def test_only_the_last_stage_has_logits_and_the_first_most_activations() -> None:
    config, plan = case(4, "parallel.pipeline=4")
    memory = [rank_memory(config, plan, stage) for stage in range(4)]
    assert [part.logits > 0 for part in memory] == [False, False, False, True]
    assert [in_flight(config, plan, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert memory[0].activations > 3 * memory[3].activations


def test_fewer_micro_batches_than_stages_limit_what_is_in_flight() -> None:
    config, plan = case(4, "parallel.pipeline=4", "train.global_batch_size=2")
    assert plan.accumulation_steps == 1
    assert in_flight(config, plan, 0) == 1


@pytest.mark.parametrize(
    ("precision", "stage", "settings", "expected"),
    [
        ("fp32", 1, {}, 4 * 500_000_000),
        ("bf16", 1, {"overlap_comm": True}, 0),
        ("bf16", 2, {"reduce_bucket_size": 1000, "overlap_comm": True}, 2 * 2 * 1000),
        ("fp16", 2, {"reduce_bucket_size": 1000}, 2 * 1000),
        ("bf16", 3, {"reduce_bucket_size": 1000, "overlap_comm": True}, 4 * 1000),
        ("bf16", 3, {"reduce_bucket_size": 1000, "contiguous_gradients": False}, 0),
    ],
)
def test_buffers_of_the_reduction_have_the_size_of_the_file(
    precision: str, stage: int, settings: dict[str, object], expected: int
) -> None:
    config, plan = case(2, f"train.precision={precision}", stage=stage)
    config = config.model_copy(update={"deepspeed": {"zero_optimization": {"stage": stage, **settings}}})
    assert reduction_bytes(config, plan) == expected
    # ZeRO 3 keeps them; otherwise they are there while the backward pass runs, and not at the loss.
    is_kept = expected if stage == 3 else 0
    at = [moment.buffers for moment in moments_of_a_step(config, plan, 0)]
    assert at == [is_kept, expected, expected, expected, is_kept, is_kept, is_kept]


def test_a_pipeline_has_the_buffers_of_the_reduction_after_its_last_backward_pass() -> None:
    config, plan = case(2, "train.precision=fp16", "parallel.pipeline=2", stage=1)
    assert [moment.buffers for moment in moments_of_a_step(config, plan, 0)] == [0, 0, 0, 0, 0, 4 * 500_000_000, 0]
    # There they make the peak, and are shown with the gradients.
    held = num_held(weights_of_stage(config.model, 2, 0), 1)
    assert rank_memory(config, plan, 0).gradients == gradient_bytes(config, plan, held) + 4 * 500_000_000


@pytest.mark.parametrize(
    ("precision", "stage", "pipeline", "divided_by"),
    [("fp32", 0, 1, 1), ("fp32", 0, 2, 1), ("bf16", 0, 2, 2), ("fp32", 1, 2, 2), ("bf16", 3, 1, 4)],
)
def test_a_snapshot_holds_what_a_rank_owns(precision: str, stage: int, pipeline: int, divided_by: int) -> None:
    options = (f"train.precision={precision}", f"parallel.pipeline={pipeline}", "train.device=cpu")
    config, plan = case(4, *options, stage=stage)
    total = sum(rank_memory(config, plan, each).snapshot for each in range(pipeline))
    padding = config.model.padded_vocab_size - config.model.vocab_size
    assert padding == 0 and total == 12 * config.model.num_parameters() / divided_by
    off, _ = case(4, f"parallel.pipeline={pipeline}", "checkpoint.asynchronous=false", stage=stage)
    assert rank_memory(off, plan, 0).snapshot == 0.0


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_page_locked_memory_is_a_power_of_two(device: str) -> None:
    config, plan = case(1, f"train.device={device}")
    held = 12 * config.model.num_parameters()
    assert held < rank_memory(config, plan, 0).snapshot == 2 ** math.ceil(math.log2(held))
    assert [pinned_bytes(size) for size in (0, 1, 1024, 1025)] == [0, 1, 1024, 2048]


def test_masked_documents_have_one_mask_for_all_blocks() -> None:
    options = ("train.precision=bf16", "data.document_attention=masked", "parallel.pipeline=2")
    (config, plan), (without, _) = case(2, *options), case(2, *options[::2])
    num_in_flight = in_flight(config, plan, 0)
    mask = 2 * plan.micro_batch_size * plan.sequence_length**2
    assert num_in_flight > 1
    masked, causal = (rank_memory(each, plan, 0).activations for each in (config, without))
    assert masked - causal == num_in_flight * mask


def test_the_head_is_planned_at_the_larger_of_its_two_moments() -> None:
    config, plan = case(1, "train.precision=bf16", "train.device=cuda")
    tokens, hidden = plan.micro_batch_size * plan.sequence_length, config.model.hidden_size
    rows, around = config.model.padded_vocab_size, 4 * tokens * hidden
    assert logit_bytes(config, plan) == around + max(6 * tokens * rows, 2 * rows * (tokens + hidden))
