import math
from typing import Any

import pytest

from mlra_scale.config import batch_plan, load_config
from mlra_scale.planning.layout import Stage, num_held, weights_of_stage
from mlra_scale.planning.memory import RankMemory, phases_of_a_step, rank_memory
from mlra_scale.planning.memory_activations import backward_bytes, block_bytes_per_token, logit_bytes
from mlra_scale.planning.memory_state import (
    gradient_bytes,
    master_bytes,
    moment_bytes,
    pinned_bytes,
    reduction_bytes,
    weight_bytes,
)


def stage(world_size: int, *overrides: str, index: int = 0, zero: int = 0, **settings: object) -> Stage:
    """A stage of the debug preset; settings are those of DeepSpeed's section zero_optimization."""
    config = load_config("debug", overrides=list(overrides))
    if zero:
        config = config.model_copy(update={"deepspeed": {"zero_optimization": {"stage": zero, **settings}}})
    return Stage(config, batch_plan(config, world_size), index)


SQUARE = ('optim.rules=[{kind: matrix, optimizer: adamw}, {names: "blocks.*.o.weight", optimizer: muon}]',)
"""With optim.name=muon: o and the factors."""


def memory(of: Stage) -> RankMemory:
    return rank_memory(of.config, of.plan, of.index)


def buffers(of: Stage) -> list[float]:
    return [phase.buffers for phase in phases_of_a_step(of).values()]


def held(of: Stage) -> int:
    return num_held(weights_of_stage(of.model, of.plan.pipeline, of.index), of.plan.tensor)


@pytest.mark.parametrize(
    ("precision", "zero", "expected"),
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
def test_training_state_per_weight(precision: str, zero: int, expected: tuple[float, ...]) -> None:
    one = stage(4, f"train.precision={precision}", zero=zero)
    one.num_weights = 1
    assert tuple(part(one) for part in (weight_bytes, gradient_bytes, master_bytes, moment_bytes)) == expected


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_muon_and_spectron_have_one_moment_and_a_round_of_matrices(zero: int) -> None:
    """The debug preset: 4 blocks of 6 factors of 64 x 32, o of 64 x 64, and two matrices of 64 x 256; fp32."""
    shards = 4 if zero else 1
    in_matrices = 4 * (6 * 64 * 32 + 64 * 64 + 2 * 64 * 256)
    for name in ("muon", "spectron"):
        adamw, of = stage(4, zero=zero), stage(4, f"optim.name={name}", zero=zero)
        assert of.num_in_matrices == in_matrices and adamw.num_in_matrices == 0
        assert moment_bytes(adamw) - moment_bytes(of) == 4 * in_matrices / shards
        # On the host: what a checkpoint's copy does without.
        cpu = ("train.device=cpu", f"optim.name={name}")
        owned = 12 * held(of) - 4 * in_matrices
        assert memory(stage(4, *cpu, zero=zero)).snapshot == owned / shards
        phases = phases_of_a_step(of)
        assert phases.keys() - phases_of_a_step(adamw).keys() == {"orthogonalisation"}
        # Without ZeRO directions of four matrices of 64 x 256, and what is sent of them; with it the iteration of one.
        expected = 2 * (64 * 256 + 64 * 64) if zero else 2 * 4 * 64 * 256
        assert phases["orthogonalisation"].temporary == 4 * expected
    # Two states of the matrix and two products.
    alone, square = stage(1, "optim.name=muon"), stage(4, "optim.name=muon", "model.num_layers=1", *SQUARE, zero=3)
    assert phases_of_a_step(alone)["orthogonalisation"].temporary == 4 * 2 * (64 * 256 + 64 * 64)
    assert phases_of_a_step(square)["orthogonalisation"].temporary == 4 * (2 + 2) * 64 * 64


def test_a_rule_takes_matrices_from_their_optimizer() -> None:
    rule = 'optim.rules=[{names: "blocks.*.mlp.*.weight", optimizer: adamw}]'
    assert stage(1, "optim.name=muon", rule).num_in_matrices == 4 * (6 * 64 * 32 + 64 * 64)
    rule = "optim.rules=[{kind: matrix, optimizer: muon}]"
    stages = [stage(2, rule, "parallel.pipeline=2", index=index) for index in range(2)]
    assert [of.num_in_matrices for of in stages] == [2 * (64 * 64 + 2 * 64 * 256)] * 2
    split = stage(2, "optim.name=muon", "parallel.tensor=2")
    # Down factors of q, k, v are whole on every tensor rank.
    assert split.num_in_matrices == 4 * (3 * 64 * 32 + 3 * 64 * 32 / 2 + 64 * 64 / 2 + 64 * 256)


def test_state_of_a_rank_counts_its_own_weights() -> None:
    for index in range(2):
        of = stage(4, "parallel.tensor=2", "parallel.pipeline=2", index=index)
        found, number = memory(of), held(of)
        assert (found.weights, found.gradients, found.moments) == (4 * number, 4 * number, 8 * number)


def test_offloading_moves_master_moments_and_gradients_to_the_host() -> None:
    plain = stage(2, zero=2)
    before, after = memory(plain), memory(stage(2, zero=2, offload_optimizer={"device": "cpu"}))
    assert after.master == after.moments == 0.0
    assert after.host == before.master + before.moments + gradient_bytes(plain)
    assert after.device == before.device - after.host


def test_a_factorised_block_keeps_one_latent_per_projection_more() -> None:
    """1.5 D numbers per token at rank D/2 in q, k and v."""
    mlra, dense = block_bytes_per_token(stage(1)), block_bytes_per_token(stage(1, "model.attention=dense"))
    width = stage(1).model.hidden_size
    assert dense == 4 * 16 * width and mlra - dense == 4 * 1.5 * width


def test_dropout_keeps_masks_and_makes_them_from_64_bits() -> None:
    base = ("parallel.tensor=2", "model.attention=dense")
    plain, attention = stage(2, *base), stage(2, *base, "model.attention_dropout=0.1")
    residual = block_bytes_per_token(stage(2, *base, "model.residual_dropout=0.1"))
    assert residual - block_bytes_per_token(plain) == 4 * 2 * plain.model.hidden_size
    more = (4 + 2 * 4) * plain.plan.sequence_length * plain.model.num_heads / 2
    assert block_bytes_per_token(attention) - block_bytes_per_token(plain) == more
    assert phases_of_a_step(attention).keys() - phases_of_a_step(plain).keys() == {"dropout mask"}


def test_qk_norm_keeps_queries_and_keys_twice() -> None:
    plain = stage(2, "parallel.tensor=2")
    normed = stage(2, "parallel.tensor=2", "model.qk_norm=true", "model.sigma_reparam=true")
    assert block_bytes_per_token(normed) - block_bytes_per_token(plain) == 4 * 2 * plain.model.hidden_size / 2


@pytest.mark.parametrize("options", [(), ("parallel.tensor=2", "parallel.sequence_parallel=true")])
def test_a_branch_with_a_factor_has_a_gradient_of_its_own(options: tuple[str, ...]) -> None:
    plain, scaled = (stage(2, *options, "model.depth_rule=completep", f"model.base_depth={depth}") for depth in (4, 8))
    added = [backward_bytes(each) for each in (plain, scaled)]
    assert added[1] - added[0] == 4 * plain.tokens * plain.model.hidden_size / plain.split
    assert added[0] == backward_bytes(stage(2, *options))


def test_sequence_parallelism_divides_what_tensor_ranks_repeat() -> None:
    tensor, split = "parallel.tensor=4", ("parallel.tensor=4", "parallel.sequence_parallel=true")
    plain, parts = stage(4, tensor, "model.attention=dense"), stage(4, *split, "model.attention=dense")
    width = plain.model.hidden_size
    assert block_bytes_per_token(plain) == 4 * width * (4 + 12 / 4)
    assert block_bytes_per_token(parts) == 4 * width * 16 / 4
    end = 4 * width * (1 - 1 / 4)
    saved = plain.tokens * (plain.num_blocks * 4 * width * 3 + end)
    assert memory(plain).activations - memory(parts).activations == saved
    replicated = (*split, "parallel.low_rank_plan=replicated")
    assert block_bytes_per_token(stage(4, *replicated)) == 4 * width * (16 + 1.5) / 4
    checkpointed = stage(4, *replicated, "parallel.activation_checkpointing=block")
    # Inputs of blocks are split; of the one that is computed again, what was gathered is whole.
    assert block_bytes_per_token(checkpointed) == 4 * width * (2 / 4 + 2 + 12 / 4 + 1.5)


def test_selective_checkpointing_keeps_no_norms_and_no_gelu() -> None:
    for overrides, kept in (
        ((), 10.0),
        (("parallel.tensor=4",), 2 + 8 / 4),
        (("parallel.tensor=4", "parallel.sequence_parallel=true"), 10 / 4),
    ):
        of = stage(4, "model.attention=dense", "parallel.activation_checkpointing=selective", *overrides)
        assert block_bytes_per_token(of) == 4 * of.model.hidden_size * kept


def test_checkpointing_keeps_less_but_for_the_logits() -> None:
    plain, checkpointed = stage(1), stage(1, "parallel.activation_checkpointing=block")
    before, after = memory(plain), memory(checkpointed)
    assert after.activations < 0.5 * before.activations
    # What the loss needs is the same; with checkpointing it may no longer be the phase that needs most.
    at_the_loss = [phases_of_a_step(each)["loss"].logits for each in (plain, checkpointed)]
    assert at_the_loss == [before.logits] * 2 == [logit_bytes(plain)] * 2
    peak = max(phase.total for phase in phases_of_a_step(checkpointed).values())
    assert after.device == 12 * held(plain) + peak


def test_only_the_last_stage_has_logits_and_the_first_most_activations() -> None:
    stages = [stage(4, "parallel.pipeline=4", index=index) for index in range(4)]
    assert [memory(each).logits > 0 for each in stages] == [False, False, False, True]
    assert [each.num_in_flight for each in stages] == [4, 3, 2, 1]
    assert memory(stages[0]).activations > 3 * memory(stages[3]).activations
    few = stage(4, "parallel.pipeline=4", "train.global_batch_size=2")
    assert few.plan.accumulation_steps == few.num_in_flight == 1, "fewer micro-batches than stages"


@pytest.mark.parametrize(
    ("precision", "zero", "settings", "expected"),
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
    precision: str, zero: int, settings: dict[str, Any], expected: int
) -> None:
    of = stage(2, f"train.precision={precision}", zero=zero, **settings)
    assert reduction_bytes(of) == expected
    # ZeRO 3 keeps them; otherwise they are there while the backward pass runs, and not at the loss.
    kept = expected if zero == 3 else 0
    assert buffers(of) == [kept, expected, expected, expected, kept, kept, kept]


def test_a_pipeline_has_the_buffers_of_the_reduction_after_its_last_backward_pass() -> None:
    of = stage(2, "train.precision=fp16", "parallel.pipeline=2", zero=1)
    assert buffers(of) == [0, 0, 0, 0, 0, 4 * 500_000_000, 0]
    # There they make the peak, and are shown with the gradients.
    assert memory(of).gradients == gradient_bytes(of) + 4 * 500_000_000


@pytest.mark.parametrize(
    ("precision", "zero", "pipeline", "divided_by"),
    [("fp32", 0, 1, 1), ("fp32", 0, 2, 1), ("bf16", 0, 2, 2), ("fp32", 1, 2, 2), ("bf16", 3, 1, 4)],
)
def test_a_snapshot_holds_what_a_rank_owns(precision: str, zero: int, pipeline: int, divided_by: int) -> None:
    options = (f"train.precision={precision}", f"parallel.pipeline={pipeline}", "train.device=cpu")
    stages = [stage(4, *options, index=index, zero=zero) for index in range(pipeline)]
    model = stages[0].model
    assert model.padded_vocab_size == model.vocab_size
    assert sum(memory(each).snapshot for each in stages) == 12 * model.num_parameters() / divided_by
    assert memory(stage(4, *options, "checkpoint.asynchronous=false", zero=zero)).snapshot == 0.0


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_page_locked_memory_is_a_power_of_two(device: str) -> None:
    of = stage(1, f"train.device={device}")
    number = 12 * of.model.num_parameters()
    assert number < memory(of).snapshot == 2 ** math.ceil(math.log2(number))
    assert [pinned_bytes(size) for size in (0, 1, 1024, 1025)] == [0, 1, 1024, 2048]


def test_masked_documents_have_one_mask_for_all_blocks() -> None:
    options = ("train.precision=bf16", "parallel.pipeline=2")
    masked, causal = stage(2, *options, "data.document_attention=masked"), stage(2, *options)
    mask = 2 * masked.plan.micro_batch_size * masked.plan.sequence_length**2
    assert masked.num_in_flight > 1
    assert memory(masked).activations - memory(causal).activations == masked.num_in_flight * mask


def test_the_head_is_planned_at_the_larger_of_its_two_peaks() -> None:
    of = stage(1, "train.precision=bf16", "train.device=cuda")
    hidden, rows = of.model.hidden_size, of.model.padded_vocab_size
    assert logit_bytes(of) == 4 * of.tokens * hidden + max(6 * of.tokens * rows, 2 * rows * (of.tokens + hidden))
