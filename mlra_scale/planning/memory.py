"""Memory of one rank by component, from stated formulas. Imports no torch; every function is pure.

Letters: n weights that the rank holds (its stage and tensor shard), d data-parallel degree, t tensor-parallel degree,
e bytes of a number in compute precision (fp32 4, bf16 and fp16 2), S sequence, N heads, D hidden, F MLP width, R rank,
f number of factorised projections, V padded vocabulary.

Training state (DeepSpeed 0.19 as our engines set it up):

    component      bytes
    weights        e n; ZeRO 3: e n / d, and gathered e min(n, stage3_max_reuse_distance): DeepSpeed keeps whole what it
                   will use again within so many elements (1e9 unless the --ds-config file says otherwise)
    gradients      fp32: 4 n; bf16: 2 n without ZeRO (twice that in a pipeline: a flat copy), (2 + 4) n with ZeRO 1
                   (micro-batches add up in fp32); fp16: 2 n; ZeRO 2 and 3: 4 n / d (bf16 and fp32), 2 n / d (fp16)
    reduction      shown with the gradients: ZeRO's buffers of reduce_bucket_size elements (5e8 unless the --ds-config
                   file says otherwise), whatever the size of the model. ZeRO 3: one in the type of communication.
                   ZeRO 1 and 2: one in compute precision while the backward pass runs (in a pipeline: while gradients
                   are reduced, in the type of communication), two with overlap_comm; none in bf16 with ZeRO 1
    master         fp32 copy of the weights: 4 n; none in fp32 without ZeRO; ZeRO >= 1: 4 n / d
    moments        Adam's two, fp32: 8 n; ZeRO >= 1: 8 n / d
    (offload_optimizer moves master and moments to the host, offload_param the weights)
    snapshot       host memory for asynchronous checkpoints: 12 bytes (fp32 weight, two moments) per weight that the
                   rank owns. Weights divided over d (ZeRO >= 1; bf16 in a pipeline): n / d; else data rank 0 owns all
                   n. The last stage's copy of the tied embedding is the first stage's. Tensor rank 0 owns what is
                   replicated over t, the others a little less than is shown

Activations kept for the backward pass, per token:

    block          e (4 D + 4 D / t + 2 F / t + f R): inputs of both norms, their outputs, q k v and the attention's
                   output, both sides of GELU, one latent per factorised projection (replicated over t; o's after the
                   reduction); with QK-norm q and k before it, 2 D / t more. The S x S attention matrix is kept with
                   attention dropout only: (4 + e) S N / t more
    checkpointed   e D instead, and one whole block again while it is recomputed
    ends           e D for the embedding's output (first stage), 2 e D for the final norm (last stage)
    sequence par.  what has no t above is divided by t, but the final norm's output, gathered for the head, and with
                   checkpointing or sigmaReparam, in a block, the norms' outputs and the latents, which are gathered
    logits         (e + 4 + 4) V / t on the last stage: logits, fp32 softmax and its gradient, of one micro-batch

All but the logits, times the micro-batches in flight: min(accumulation steps, stages - stage) in a pipeline, else 1.

tests/distributed/test_memory_plan.py compares the training state with the tensors that ranks on CPUs really hold.
Activations and logits are estimates that nothing has measured yet. Left out: temporary results inside an operation and
inside the optimizer's step, further communication buffers, the allocator's fragments, and the libraries themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlra_scale.config import BatchPlan, Config, engine_kind, offload_optimizer, offload_param, zero_stage
from mlra_scale.model.low_rank_plan import low_rank_plan
from mlra_scale.model.parameters import ParameterInfo
from mlra_scale.planning.layout import blocks_of_stage, num_held, weights_of_stage

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        weights: In compute precision.
        gradients: Kept between micro-batches, with the buffers of their reduction.
        master: fp32 copy of the weights.
        moments: Adam's two.
        activations: Kept for the backward pass, logits not included.
        logits: Logits, softmax and its gradient.
        host: What offloading put on the host instead (not part of `device`).
        snapshot: The copy of the state that asynchronous checkpoints are written from, on the host as well.
    """

    weights: float
    gradients: float
    master: float
    moments: float
    activations: float
    logits: float
    host: float
    snapshot: float

    @property
    def device(self) -> float:
        """Sum of the components on the device."""
        return self.weights + self.gradients + self.master + self.moments + self.activations + self.logits


def rank_memory(config: Config, plan: BatchPlan, stage: int) -> RankMemory:
    """Estimates the memory of a rank of one pipeline stage (all tensor and data ranks of a stage are alike).

    Args:
        config: A validated configuration.
        plan: Its batch plan.
        stage: The pipeline stage.
    """
    num_weights = num_held(held_weights(config, plan, stage), plan.tensor)
    state = {
        "weights": weight_bytes(config, plan, num_weights),
        "gradients": gradient_bytes(config, plan, num_weights) + reduction_bytes(config, plan),
        "master": master_bytes(config, plan, num_weights),
        "moments": moment_bytes(config, plan, num_weights),
    }
    on_host = ["master", "moments"] if offload_optimizer(config) else []
    on_host += ["weights"] if offload_param(config) else []
    host = sum(state[name] for name in on_host)
    state |= dict.fromkeys(on_host, 0.0)
    return RankMemory(
        **state,
        activations=activation_bytes(config, plan, stage),
        logits=logit_bytes(config, plan) if stage == plan.pipeline - 1 else 0.0,
        host=host,
        snapshot=snapshot_bytes(config, plan, stage),
    )


def held_weights(config: Config, plan: BatchPlan, stage: int) -> list[ParameterInfo]:
    """Returns the weights that a stage of a run holds, split as the run splits them."""
    return weights_of_stage(config.model, plan.pipeline, stage, low_rank_plan(config, plan))


def weight_bytes(config: Config, plan: BatchPlan, num_weights: int) -> float:
    """Bytes of the weights in compute precision."""
    element = BYTES[config.train.precision]
    if zero_stage(config) < 3:
        return float(element * num_weights)
    reuse_distance = config.deepspeed["zero_optimization"].get("stage3_max_reuse_distance", 1_000_000_000)
    return element * (num_weights / plan.data + min(num_weights, reuse_distance))


def gradient_bytes(config: Config, plan: BatchPlan, num_weights: int) -> float:
    """Bytes of the gradients."""
    precision, stage = config.train.precision, zero_stage(config)
    if stage >= 2:
        return (2 if precision == "fp16" else 4) * num_weights / plan.data
    if precision == "bf16" and stage == 1:
        return 6.0 * num_weights
    if precision == "bf16" and engine_kind(config) == "pipeline":
        return 4.0 * num_weights
    return float(BYTES[precision] * num_weights)


def reduction_bytes(config: Config, plan: BatchPlan) -> float:
    """Bytes of the buffers through which ZeRO reduces gradients."""
    stage, precision = zero_stage(config), config.train.precision
    if stage == 0 or (stage == 1 and precision == "bf16"):
        return 0.0
    zero = config.deepspeed["zero_optimization"]
    if not zero.get("contiguous_gradients", True):
        return 0.0
    communication = BYTES[config.deepspeed.get("communication_data_type", "fp32")]
    size = float(zero.get("reduce_bucket_size", 500_000_000))
    if stage == 3 or engine_kind(config) == "pipeline":
        return size * communication
    return size * BYTES[precision] * (2 if zero.get("overlap_comm") else 1)


def master_bytes(config: Config, plan: BatchPlan, num_weights: int) -> float:
    """Bytes of the fp32 copy of the weights."""
    if zero_stage(config) == 0:
        return 0.0 if config.train.precision == "fp32" else 4.0 * num_weights
    return 4.0 * num_weights / plan.data


def moment_bytes(config: Config, plan: BatchPlan, num_weights: int) -> float:
    """Bytes of Adam's two moments."""
    return 8.0 * num_weights / (plan.data if zero_stage(config) >= 1 else 1)


def snapshot_bytes(config: Config, plan: BatchPlan, stage: int) -> float:
    """Bytes of host memory of the rank of a stage that owns most, for the copy of an asynchronous checkpoint."""
    if not config.checkpoint.asynchronous:
        return 0.0
    held = held_weights(config, plan, stage)
    owned = [info for info in held if stage == 0 or info.kind != "embedding"]
    is_divided = zero_stage(config) >= 1 or (config.train.precision == "bf16" and engine_kind(config) == "pipeline")
    return 12.0 * num_held(owned, plan.tensor) / (plan.data if is_divided else 1)


def block_bytes_per_token(config: Config, plan: BatchPlan) -> float:
    """Bytes that one block keeps of one token for its backward pass."""
    model, tensor = config.model, plan.tensor
    num_factorised = sum(model.is_factorised(name) for name in "qkvo")
    split = sequence_split(config, plan)
    keeps_gathered = config.parallel.activation_checkpointing == "block" or model.sigma_reparam
    split_of_gathered = 1 if keeps_gathered else split
    width = 2 * model.hidden_size / split + 2 * model.hidden_size / split_of_gathered
    width += 4 * model.hidden_size / tensor + 2 * model.ffn_size / tensor
    width += 2 * model.hidden_size / tensor * model.qk_norm
    kept = BYTES[config.train.precision] * (width + num_factorised * model.rank / split_of_gathered)
    if model.attention_dropout > 0.0:
        kept += (4 + BYTES[config.train.precision]) * config.train.sequence_length * model.num_heads / tensor
    return kept


def sequence_split(config: Config, plan: BatchPlan) -> int:
    """Returns over how many tensor-parallel ranks the stream between blocks is split."""
    return plan.tensor if config.parallel.sequence_parallel else 1


def activation_bytes(config: Config, plan: BatchPlan, stage: int) -> float:
    """Bytes of the activations that a stage keeps for its backward passes, logits not included."""
    element, width = BYTES[config.train.precision], config.model.hidden_size
    tokens = plan.micro_batch_size * plan.sequence_length
    num_blocks = len(blocks_of_stage(config.model.num_layers, plan.pipeline, stage))
    num_in_flight = in_flight(config, plan, stage)
    split = sequence_split(config, plan)
    ends = element * width * ((stage == 0) / split + (1 + 1 / split) * (stage == plan.pipeline - 1))
    block = block_bytes_per_token(config, plan)
    if config.parallel.activation_checkpointing == "block":
        return tokens * (num_in_flight * (num_blocks * element * width / split + ends) + block)
    return tokens * num_in_flight * (num_blocks * block + ends)


def in_flight(config: Config, plan: BatchPlan, stage: int) -> int:
    """Micro-batches whose activations a stage holds at once (one forward, one backward in turns)."""
    if engine_kind(config) != "pipeline":
        return 1
    return min(plan.accumulation_steps, plan.pipeline - stage)


def logit_bytes(config: Config, plan: BatchPlan) -> float:
    """Bytes of logits, fp32 softmax and its gradient of one micro-batch."""
    tokens = plan.micro_batch_size * plan.sequence_length
    return tokens * (BYTES[config.train.precision] + 8) * config.model.padded_vocab_size / plan.tensor
