"""Memory of one rank by component, from stated formulas. Imports no torch; every function is pure.

Letters: n weights that the rank holds (its stage and tensor shard), d data-parallel degree, t tensor-parallel degree,
e bytes of a number in compute precision (fp32 4, bf16 and fp16 2), S sequence, N heads, D hidden, F MLP width, R rank,
f number of factorised projections, V padded vocabulary.

Training state (DeepSpeed 0.19 as our engines set it up):

    component      bytes
    weights        e n; ZeRO 3: e n / d, and gathered e min(n, stage3_max_reuse_distance): DeepSpeed keeps whole what it
                   will use again within so many elements (1e9 unless the --ds-config file says otherwise)
    gradients      fp32: 4 n; bf16 with ZeRO 1 (without ZeRO there is no bf16): 4 n, in which micro-batches add up, and
                   2 n more at the end of a backward pass; fp16: 2 n; ZeRO 2 and 3: 4 n / d (bf16 and fp32), 2 n / d
                   (fp16; with ZeRO 2 at least 2 D V / t, for what a share touches is kept whole)
    reduction      shown with the gradients: ZeRO's buffers of reduce_bucket_size elements (5e8 unless the --ds-config
                   file says otherwise), whatever the size of the model. ZeRO 3: one in the type of communication.
                   ZeRO 1 and 2: one in compute precision while the backward pass runs (in a pipeline: while gradients
                   are reduced, in the type of communication), two with overlap_comm; none in bf16 with ZeRO 1
    master         fp32 copy of the weights: 4 n; none in fp32 without ZeRO; ZeRO >= 1: 4 n / d
    moments        Adam's two, fp32: 8 n; ZeRO >= 1: 8 n / d
    (offload_optimizer moves master and moments to the host, with ZeRO 2 and 3 the gradients too, offload_param the
    weights)
    snapshot       host memory for asynchronous checkpoints: 12 bytes (fp32 weight, two moments) per weight that the
                   rank owns. Weights divided over d (ZeRO >= 1): n / d; else data rank 0 owns all n. The last stage's
                   copy of the tied embedding is the first stage's. Tensor rank 0 owns what is replicated over t, the
                   others a little less than is shown. For a GPU the memory is page-locked, and torch's allocator rounds
                   it up to a power of two (`pinned_bytes`)

Activations kept for the backward pass, per token:

    block          e (4 D + 4 D / t + 2 F / t + f R): inputs of both norms, their outputs, q k v and the attention's
                   output, both sides of GELU, one latent per factorised projection (replicated over t; o's after the
                   reduction; none of q, k, v with the plan `merged`, which keeps e D^2 / t for each instead, whatever
                   the number of tokens); with QK-norm q and k before it, 2 D / t more. The S x S attention matrix is
                   kept with attention dropout only: (4 + 2 e) S N / t more, and while its mask is made three times
                   8 S N / t; residual dropout keeps 2 e D
    checkpointed   e D instead, and one whole block again while it is recomputed
    selective      without the norms' outputs and GELU's: e (2 D + F / t) less
    end            e D for the final norm's input (last stage)
    mask           masked documents: e S for the additive mask, which all blocks share; flex_attention (on GPUs with
                   Triton, in 16 bits) keeps less, and is planned alike
    passed on      in a pipeline e D for what a stage has received, of which a copy enters its first block (of at least
                   two micro-batches), e D for what it has sent, and once e D for what is on its way

    sequence par.  what has no t above is divided by t, but with checkpointing or sigmaReparam, in a block, the norms'
                   outputs and the latents, which are gathered

times the micro-batches in flight: min(accumulation steps, stages - stage) in a pipeline, else 1. `train.device=auto` is
planned as a GPU.

Head and loss: `logit_bytes`. Temporary results: what the largest moment of the step adds to what is kept,

    loss           nothing: it is in `logit_bytes`
    backward       e (F / t + D) per token, the gradients beside GELU and of the stream (in a pipeline e F / t: the
                   stream's was received), and the gradient of the largest matrix before it is added to the kept one; on
                   a single stage the head's gradient of the tied embedding, which waits for the look-up's; in the first
                   block's with ZeRO 2 and 3 `reduced_bytes`
    its end        copies of the embedding's gradient (`num_embedding_gradients`); in bf16 with ZeRO 1 gradients that
                   are joined before they are added (`joined_bytes`)
    reduction      `flat_gradient_bytes`
    update         ZeRO >= 1: the gradient of the rank's share in one piece, 4 n / d (not in bf16 with ZeRO 1)

Of these moments (`moments_of_a_step`) the one that needs most is shown. Kept gradients are there in all of them
where a step has more micro-batches than are in flight; else they grow while activations go.

tests/distributed/test_memory_plan.py compares this with every tensor that ranks on CPUs hold.
Left out: the allocator's fragments, communication buffers of the backends, and the libraries themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mlra_scale.config import BatchPlan, Config, engine_kind, offload_optimizer, offload_param, zero_stage
from mlra_scale.model.head_chunks import num_chunks
from mlra_scale.model.low_rank_plan import BYTES, low_rank_plan
from mlra_scale.model.parameters import ParameterInfo
from mlra_scale.planning.layout import blocks_of_stage, num_weights_of_stage, weights_of_stage


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        weights: In compute precision.
        gradients: Kept between micro-batches, with the buffers of their reduction.
        master: fp32 copy of the weights.
        moments: Adam's two.
        activations: Kept for the backward pass, logits not included.
        logits: What the head and the loss need at their peak.
        temporary: What the largest moment of a step adds to what is kept.
        host: What offloading put on the host instead (not part of `device`).
        snapshot: The copy of the state that asynchronous checkpoints are written from, on the host as well.
    """

    weights: float
    gradients: float
    master: float
    moments: float
    activations: float
    logits: float
    temporary: float
    host: float
    snapshot: float

    @property
    def device(self) -> float:
        """Sum of the components on the device: the peak."""
        state = self.weights + self.gradients + self.master + self.moments
        return state + self.activations + self.logits + self.temporary


@dataclass(frozen=True)
class Moment:
    """What one moment of a step needs beside weights, master and Adam's moments, in bytes.

    Attributes:
        gradients: Without the buffers of the reduction.
        buffers: Those of the reduction, where they are there at this moment.
        activations: As in RankMemory.
        logits: As in RankMemory.
        temporary: As in RankMemory.
    """

    gradients: float
    buffers: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    temporary: float = 0.0

    @property
    def total(self) -> float:
        """Sum of the five."""
        return self.gradients + self.buffers + self.activations + self.logits + self.temporary


def rank_memory(config: Config, plan: BatchPlan, stage: int) -> RankMemory:
    """Estimates the memory of a rank of one pipeline stage (all tensor and data ranks of a stage are alike).

    Args:
        config: A validated configuration.
        plan: Its batch plan.
        stage: The pipeline stage.
    """
    num_weights = num_weights_of_stage(config.model, plan, stage, low_rank_plan(config, plan))
    peak = max(moments_of_a_step(config, plan, stage), key=lambda moment: moment.total)
    state = {
        "weights": weight_bytes(config, plan, num_weights),
        "gradients": peak.gradients + peak.buffers,
        "master": master_bytes(config, plan, num_weights),
        "moments": moment_bytes(config, plan, num_weights),
    }
    on_host = ["master", "moments"] if offload_optimizer(config) else []
    on_host += ["weights"] if offload_param(config) else []
    host = sum(state[name] for name in on_host)
    if has_gradients_on_host(config):
        host += partitioned_gradient_bytes(config, plan, num_weights)
    state |= dict.fromkeys(on_host, 0.0)
    return RankMemory(
        **state,
        activations=peak.activations,
        logits=peak.logits,
        temporary=peak.temporary,
        host=host,
        snapshot=snapshot_bytes(config, plan, stage),
    )


def moments_of_a_step(config: Config, plan: BatchPlan, stage: int) -> list[Moment]:
    """Returns the moments of a step of which one is the peak.

    In order: the loss; the backward pass of the last block and of the first; its end; adding up; reduction; update; and
    with attention dropout the last block's mask.
    """
    num_weights = num_weights_of_stage(config.model, plan, stage, low_rank_plan(config, plan))
    whole = gradient_bytes(config, plan, num_weights)
    # With as many micro-batches in flight as there are in all, no backward pass has ended when they are at their most.
    has_ended = plan.accumulation_steps > in_flight(config, plan, stage)
    kept_early = early_gradient_bytes(config, num_weights)
    early = whole if has_ended and not adds_up_flat(config) else kept_early
    reduced_at_once = kept_early if adds_up_flat(config) else whole
    kept = activation_bytes(config, plan, stage)
    recomputed = recomputed_bytes(config, plan)
    num_blocks = len(blocks_of_stage(config.model.num_layers, plan.pipeline, stage))
    at_the_end = kept - (num_blocks - 1) * kept_per_block(config, plan)
    output = output_bytes(config, plan) if stage == plan.pipeline - 1 else 0.0
    logits = logit_bytes(config, plan) if stage == plan.pipeline - 1 else 0.0
    # The head's gradient of the tied embedding waits in autograd until the embedding's is there to be added.
    waiting = embedding_gradient_bytes(config, plan) if plan.pipeline == 1 else 0.0
    backward = backward_bytes(config, plan) + waiting
    reduced = reduced_bytes(config, plan, num_weights)  # of a bucket, which fills while activations go
    summing = embedding_gradient_bytes(config, plan) * num_embedding_gradients(config, plan, stage)
    buffers = reduction_bytes(config, plan)
    always = buffers if zero_stage(config) == 3 else 0.0
    # A pipeline reduces after its last backward pass, the other engine in each.
    passing, reducing = (0.0, buffers) if engine_kind(config) == "pipeline" else (buffers, always)
    update = update_bytes(config, plan, num_weights)
    masking = [Moment(early, always, kept, temporary=dropout_bytes(config, plan))]
    return [
        Moment(early, always, kept, logits),
        Moment(early, passing, kept + recomputed, output, backward),
        Moment(whole, passing, at_the_end + recomputed, output, backward + reduced),
        Moment(whole, passing, at_the_end, output, summing + reduced),
        Moment(whole, always, temporary=joined_bytes(config, num_weights)),
        Moment(reduced_at_once, reducing, temporary=flat_gradient_bytes(config, plan, num_weights)),
        Moment(update_gradient_bytes(config, plan, num_weights), always, temporary=update),
        *(masking if config.model.attention_dropout > 0.0 else []),
    ]


def held_weights(config: Config, plan: BatchPlan, stage: int) -> list[ParameterInfo]:
    """Returns the weights that a stage of a run holds, split as the run splits them."""
    return weights_of_stage(config.model, plan.pipeline, stage, low_rank_plan(config, plan))


def weight_bytes(config: Config, plan: BatchPlan, num_weights: int) -> float:
    """Bytes of the weights in compute precision."""
    element = BYTES[config.train.precision]
    if zero_stage(config) < 3:
        return float(element * num_weights)
    return element * (num_weights / plan.data + min(num_weights, reuse_distance(config)))


def reuse_distance(config: Config) -> int:
    """Weights within which ZeRO 3 keeps what it has gathered and will use again."""
    distance: int = config.deepspeed["zero_optimization"].get("stage3_max_reuse_distance", 1_000_000_000)
    return distance


def gradient_bytes(config: Config, plan: BatchPlan, num_weights: int) -> float:
    """Bytes of the gradients on the device."""
    if has_gradients_on_host(config):
        return 0.0
    if zero_stage(config) >= 2:
        return partitioned_gradient_bytes(config, plan, num_weights)
    if adds_up_flat(config):
        return 6.0 * num_weights
    return float(BYTES[config.train.precision] * num_weights)


def has_gradients_on_host(config: Config) -> bool:
    """Whether reduced gradients are kept on the host."""
    return offload_optimizer(config) and zero_stage(config) >= 2


def partitioned_gradient_bytes(config: Config, plan: BatchPlan, num_weights: int) -> float:
    """Bytes of a rank's share of the gradients with ZeRO 2 and 3.

    In fp16 ZeRO 2 keeps whole what the share touches: on the first rank the embedding.
    """
    if config.train.precision != "fp16":
        return 4 * num_weights / plan.data
    embedding = config.model.padded_vocab_size * config.model.hidden_size / plan.tensor
    touched = min(num_weights, embedding) if zero_stage(config) == 2 else 0.0
    return 2 * max(num_weights / plan.data, touched)


def adds_up_flat(config: Config) -> bool:
    """Whether micro-batches add up in flat fp32 buffers, and gradients go as soon as they are added (bf16, ZeRO 1)."""
    return config.train.precision == "bf16" and zero_stage(config) == 1


def joined_bytes(config: Config, num_weights: int) -> float:
    """Bytes of the bf16 gradients that are joined before they are added to the flat buffers (gradient_sums.py).

    A CPU converts them to fp32 before it adds, a GPU while it does.
    """
    element = 6.0 if device_of(config) == "cpu" else 2.0
    return element * min(num_weights, 1 << 24) if adds_up_flat(config) else 0.0


def reduction_bytes(config: Config, plan: BatchPlan) -> float:
    """Bytes of the buffers through which ZeRO reduces gradients."""
    stage, precision = zero_stage(config), config.train.precision
    if stage == 0 or adds_up_flat(config):
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
    num_owned = num_weights_of_stage(config.model, plan, stage, low_rank_plan(config, plan))
    if 0 < stage == plan.pipeline - 1:
        num_owned -= config.model.padded_vocab_size * config.model.hidden_size // plan.tensor
    num_bytes = 12.0 * num_owned / (plan.data if zero_stage(config) >= 1 else 1)
    return num_bytes if device_of(config) == "cpu" else pinned_bytes(num_bytes)


def pinned_bytes(num_bytes: float) -> float:
    """Bytes of host memory that torch takes for a page-locked tensor: the next power of two.

    ATen/core/CachingHostAllocator.h of torch 2.13; `pinned_max_round_threshold_mb` in PYTORCH_ALLOC_CONF limits it.
    """
    return float(1 << (math.ceil(num_bytes) - 1).bit_length()) if num_bytes > 0 else 0.0


def device_of(config: Config) -> Literal["cpu", "cuda"]:
    """Returns the kind of device that is planned: `auto` is a GPU, for that is what plans are made for."""
    return "cpu" if config.train.device == "cpu" else "cuda"


def block_bytes_per_token(config: Config, plan: BatchPlan) -> float:
    """Bytes that one block keeps of one token for its backward pass."""
    model, tensor = config.model, plan.tensor
    split = sequence_split(config, plan)
    split_of_gathered = 1 if keeps_gathered(config) else split
    num_latents = sum(model.is_factorised(name) for name in "qkvo")
    if low_rank_plan(config, plan) == "merged":
        num_latents = int(model.is_factorised("o"))
    norms = 2 * model.hidden_size / split_of_gathered
    gelu = model.ffn_size / tensor
    if config.parallel.activation_checkpointing == "selective":
        # What is gathered from a norm's output is a copy, which is kept.
        gelu, norms = 0.0, norms if split > 1 and keeps_gathered(config) else 0.0
    width = 2 * model.hidden_size / split + norms + 4 * model.hidden_size / tensor + model.ffn_size / tensor + gelu
    width += 2 * model.hidden_size / tensor * model.qk_norm
    kept = BYTES[config.train.precision] * (width + num_latents * model.rank / split_of_gathered)
    if model.residual_dropout > 0.0:
        kept += BYTES[config.train.precision] * 2 * model.hidden_size / split
    if model.attention_dropout > 0.0:
        kept += (4 + 2 * BYTES[config.train.precision]) * config.train.sequence_length * model.num_heads / tensor
    return kept


def dropout_bytes(config: Config, plan: BatchPlan) -> float:
    """Bytes that the mask of attention weights adds while it is made, less what the rest of its block keeps later.

    Three tensors of 64-bit integers, see model/randomness.py.
    """
    model, element, tokens = config.model, BYTES[config.train.precision], plan.micro_batch_size * plan.sequence_length
    made = (24 - element) * plan.sequence_length * model.num_heads / plan.tensor
    later = 2 * model.hidden_size + model.hidden_size / plan.tensor + 2 * model.ffn_size / plan.tensor
    return max(0.0, tokens * (made - element * later))


def sequence_split(config: Config, plan: BatchPlan) -> int:
    """Returns over how many tensor-parallel ranks the stream between blocks is split."""
    return plan.tensor if config.parallel.sequence_parallel else 1


def keeps_gathered(config: Config) -> bool:
    """Whether, with sequence parallelism, blocks keep what was gathered instead of gathering it again."""
    return config.parallel.activation_checkpointing == "block" or config.model.sigma_reparam


def kept_per_block(config: Config, plan: BatchPlan) -> float:
    """Bytes that a block keeps of one micro-batch until its backward pass."""
    tokens = plan.micro_batch_size * plan.sequence_length
    if config.parallel.activation_checkpointing == "block":
        hidden = tokens * BYTES[config.train.precision] * config.model.hidden_size
        return hidden / sequence_split(config, plan)
    return whole_block_bytes(config, plan)


def whole_block_bytes(config: Config, plan: BatchPlan) -> float:
    """Bytes of all that a block without checkpointing keeps of one micro-batch."""
    tokens = plan.micro_batch_size * plan.sequence_length
    merged = 0.0
    if low_rank_plan(config, plan) == "merged":
        num_products = sum(config.model.is_factorised(name) for name in "qkv")
        merged = BYTES[config.train.precision] * num_products * config.model.hidden_size**2 / plan.tensor
    return tokens * block_bytes_per_token(config, plan) + merged


def recomputed_bytes(config: Config, plan: BatchPlan) -> float:
    """Bytes of what checkpointing has computed again in a block's backward pass: all of it, or GELU's output."""
    if config.parallel.activation_checkpointing == "block":
        return whole_block_bytes(config, plan)
    if config.parallel.activation_checkpointing == "selective":
        tokens = plan.micro_batch_size * plan.sequence_length
        return BYTES[config.train.precision] * tokens * config.model.ffn_size / plan.tensor
    return 0.0


def activation_bytes(config: Config, plan: BatchPlan, stage: int) -> float:
    """Bytes of the activations that a stage keeps for its backward passes, without what is recomputed and logits."""
    tokens = plan.micro_batch_size * plan.sequence_length
    hidden = tokens * BYTES[config.train.precision] * config.model.hidden_size / sequence_split(config, plan)
    num_blocks = len(blocks_of_stage(config.model.num_layers, plan.pipeline, stage))
    end = hidden * ((stage == plan.pipeline - 1) + (stage == 0 and config.model.embedding_dropout > 0.0))
    flying = in_flight(config, plan, stage)
    kept = flying * (num_blocks * kept_per_block(config, plan) + end + mask_bytes(config, plan))
    if plan.pipeline == 1:
        return kept
    received = max(flying, min(2, plan.accumulation_steps)) * (stage > 0)
    sent = flying * (stage < plan.pipeline - 1)
    return kept + hidden * (received + sent + 1)


def mask_bytes(config: Config, plan: BatchPlan) -> float:
    """Bytes of the mask of documents of one micro-batch (model/document_mask.py), which its blocks share."""
    if config.data.document_attention != "masked":
        return 0.0
    return float(BYTES[config.train.precision] * plan.micro_batch_size * plan.sequence_length**2)


def in_flight(config: Config, plan: BatchPlan, stage: int) -> int:
    """Micro-batches whose activations a stage holds at once (one forward, one backward in turns)."""
    if engine_kind(config) != "pipeline":
        return 1
    return min(plan.accumulation_steps, plan.pipeline - stage)


def logit_bytes(config: Config, plan: BatchPlan) -> float:
    """Bytes of the head and the loss at their peak, per micro-batch of T tokens.

    The larger of two moments of a chunk of tokens (model/head_chunks.py). First the logits, which become their softmax
    and its gradient in place: 4 bytes each, and in bf16 and fp16 e more; with several chunks beside the sum of the
    weight's gradients so far, 4 D V / t. Then the gradient, e per logit, beside this sum and the summand, e D V / t (in
    fp32 they are one). At both moments the final norm's output and its gradient, 2 e D per token.
    """
    model, element = config.model, BYTES[config.train.precision]
    tokens, rows = plan.micro_batch_size * plan.sequence_length, model.padded_vocab_size // plan.tensor
    chunks = num_chunks(tokens, rows, device_of(config), config.train.precision == "fp16")
    logits, weight = -(-tokens // chunks) * rows, rows * model.hidden_size
    summed = 4 * weight if chunks > 1 else 0
    if element == 4:
        largest = 4 * logits + 4 * weight
    else:
        largest = max((4 + element) * logits + summed, element * (logits + weight) + summed)
    return largest + 2.0 * element * tokens * model.hidden_size


def output_bytes(config: Config, plan: BatchPlan) -> float:
    """Bytes of the final hidden state, which DeepSpeed's pipeline holds until the backward pass has ended."""
    if engine_kind(config) != "pipeline":
        return 0.0
    hidden = BYTES[config.train.precision] * plan.micro_batch_size * plan.sequence_length * config.model.hidden_size
    return hidden / sequence_split(config, plan)


def backward_bytes(config: Config, plan: BatchPlan) -> float:
    """Bytes that the backward pass of a block adds: gradients beside GELU and of the stream, the largest matrix's."""
    model, tokens = config.model, plan.micro_batch_size * plan.sequence_length
    stream = 0.0 if plan.pipeline > 1 else model.hidden_size / sequence_split(config, plan)
    passing = tokens * (model.ffn_size / plan.tensor + stream)
    if config.parallel.sequence_parallel:
        # The whole gradient of the stream. Gathered inputs and packed copies come when GELU's sides have gone, unless
        # these are not kept.
        whole = 1 if config.parallel.activation_checkpointing == "none" else 4
        passing += whole * tokens * model.hidden_size
    return BYTES[config.train.precision] * (passing + model.ffn_size * model.hidden_size / plan.tensor)


def early_gradient_bytes(config: Config, num_weights: int) -> float:
    """Bytes of gradients that are there before the first backward pass of a step: buffers that are never given back."""
    return 4.0 * num_weights if adds_up_flat(config) else 0.0


def update_gradient_bytes(config: Config, plan: BatchPlan, num_weights: int) -> float:
    """Bytes of gradients that are left when the update begins: ZeRO 1 has then reduced them to its share."""
    if adds_up_flat(config):
        return early_gradient_bytes(config, num_weights)
    if zero_stage(config) == 1:
        return BYTES[config.train.precision] * num_weights / plan.data
    return gradient_bytes(config, plan, num_weights)


def update_bytes(config: Config, plan: BatchPlan, num_weights: int) -> float:
    """Bytes that the update adds: the gradient in fp32 where it is not, and ZeRO's in one piece."""
    precision, stage = config.train.precision, zero_stage(config)
    if offload_optimizer(config) or (precision, stage) in (("fp32", 0), ("bf16", 1)):
        return 0.0
    return 4.0 * num_weights / (plan.data if stage else 1)


def embedding_gradient_bytes(config: Config, plan: BatchPlan) -> float:
    """Bytes of one gradient of the token embedding."""
    return BYTES[config.train.precision] * config.model.padded_vocab_size * config.model.hidden_size / plan.tensor


def num_embedding_gradients(config: Config, plan: BatchPlan, stage: int) -> int:
    """Copies of the embedding's gradient beside the kept one at the end of a backward pass.

    The head's, the look-up's and their sum where one stage has both; the look-up's alone on the first of several.
    """
    copies = 3 if plan.pipeline == 1 else 1 if stage == 0 else 0
    becomes_the_kept_one = adds_up_flat(config) or (plan.accumulation_steps == 1 and zero_stage(config) < 2)
    return max(0, copies - becomes_the_kept_one)


def reduced_bytes(config: Config, plan: BatchPlan, num_weights: int) -> float:
    """Bytes that ZeRO 2 and 3 add while they reduce a micro-batch's gradients.

    ZeRO 2: the rank's share of this micro-batch, before it is added. ZeRO 3: a bucket in one piece, and a copy of it.
    """
    stage = zero_stage(config)
    if stage == 2:
        return partitioned_gradient_bytes(config, plan, num_weights)
    if stage == 3:
        communication = BYTES[config.deepspeed.get("communication_data_type", "fp32")]
        bucket = config.deepspeed["zero_optimization"].get("reduce_bucket_size", 500_000_000)
        return 2.0 * communication * min(bucket, num_weights)
    return 0.0


def flat_gradient_bytes(config: Config, plan: BatchPlan, num_weights: int) -> float:
    """Bytes that the reduction over data ranks adds where it takes all gradients (at most 5e8) in one piece.

    That is without ZeRO, and in bf16 with ZeRO 1; not for a single data rank.
    """
    takes_all = zero_stage(config) == 0 or adds_up_flat(config)
    return 4.0 * min(num_weights, 500_000_000) if takes_all and plan.data > 1 else 0.0
