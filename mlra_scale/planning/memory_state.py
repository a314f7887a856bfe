"""Memory of the state of training on one rank: weights, gradients, master weights, Adam's moments. Imports no torch.

Letters: n weights that the rank holds (its stage and tensor shard), d data-parallel degree, t tensor-parallel degree,
e bytes of a number in compute precision (fp32 4, bf16 and fp16 2), D hidden, V padded vocabulary. DeepSpeed 0.19 as our
engines set it up:

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
"""

from __future__ import annotations

import math
from typing import Literal

from mlra_scale.config import Config, offload_optimizer
from mlra_scale.model.low_rank_plan import BYTES
from mlra_scale.planning.layout import Stage


def weight_bytes(stage: Stage) -> float:
    """Bytes of the weights in compute precision."""
    if stage.zero < 3:
        return float(stage.element * stage.num_weights)
    return stage.element * (stage.num_weights / stage.plan.data + min(stage.num_weights, reuse_distance(stage.config)))


def reuse_distance(config: Config) -> int:
    """Weights within which ZeRO 3 keeps what it has gathered and will use again."""
    distance: int = config.deepspeed["zero_optimization"].get("stage3_max_reuse_distance", 1_000_000_000)
    return distance


def gradient_bytes(stage: Stage) -> float:
    """Bytes of the gradients on the device."""
    if has_gradients_on_host(stage):
        return 0.0
    if stage.zero >= 2:
        return partitioned_gradient_bytes(stage)
    return float((6 if stage.adds_up_flat else stage.element) * stage.num_weights)


def has_gradients_on_host(stage: Stage) -> bool:
    """Whether reduced gradients are kept on the host."""
    return offload_optimizer(stage.config) and stage.zero >= 2


def partitioned_gradient_bytes(stage: Stage) -> float:
    """Bytes of a rank's share of the gradients with ZeRO 2 and 3.

    In fp16 ZeRO 2 keeps whole what the share touches: on the first rank the embedding.
    """
    if stage.config.train.precision != "fp16":
        return 4 * stage.num_weights / stage.plan.data
    touched = float(min(stage.num_weights, stage.num_embedding)) if stage.zero == 2 else 0.0
    return 2 * max(stage.num_weights / stage.plan.data, touched)


def joined_bytes(stage: Stage) -> float:
    """Bytes of the bf16 gradients that are joined before they are added to the flat buffers (gradient_sums.py).

    A CPU converts them to fp32 before it adds, a GPU while it does.
    """
    element = 6.0 if device_of(stage.config) == "cpu" else 2.0
    return element * min(stage.num_weights, 1 << 24) if stage.adds_up_flat else 0.0


def reduction_bytes(stage: Stage) -> float:
    """Bytes of the buffers through which ZeRO reduces gradients."""
    if stage.zero == 0 or stage.adds_up_flat:
        return 0.0
    zero = stage.config.deepspeed["zero_optimization"]
    if not zero.get("contiguous_gradients", True):
        return 0.0
    size = float(zero.get("reduce_bucket_size", 500_000_000))
    if stage.zero == 3 or stage.is_pipeline:
        return size * communication_bytes(stage.config)
    return size * stage.element * (2 if zero.get("overlap_comm") else 1)


def communication_bytes(config: Config) -> int:
    """Bytes of a number in the reduction of gradients."""
    return BYTES[config.deepspeed.get("communication_data_type", "fp32")]


def reduced_bytes(stage: Stage) -> float:
    """Bytes that ZeRO 2 and 3 add while they reduce a micro-batch's gradients.

    ZeRO 2: the rank's share of this micro-batch, before it is added. ZeRO 3: a bucket in one piece, and a copy of it.
    """
    if stage.zero == 2:
        return partitioned_gradient_bytes(stage)
    if stage.zero == 3:
        bucket = stage.config.deepspeed["zero_optimization"].get("reduce_bucket_size", 500_000_000)
        return 2.0 * communication_bytes(stage.config) * min(bucket, stage.num_weights)
    return 0.0


def flat_gradient_bytes(stage: Stage) -> float:
    """Bytes that the reduction over data ranks adds where it takes all gradients (at most 5e8) in one piece.

    That is without ZeRO, and in bf16 with ZeRO 1; not for a single data rank.
    """
    takes_all = stage.zero == 0 or stage.adds_up_flat
    return 4.0 * min(stage.num_weights, 500_000_000) if takes_all and stage.plan.data > 1 else 0.0


def embedding_gradient_bytes(stage: Stage) -> float:
    """Bytes of one gradient of the token embedding."""
    return stage.element * stage.model.padded_vocab_size * stage.model.hidden_size / stage.plan.tensor


def num_embedding_gradients(stage: Stage) -> int:
    """Copies of the embedding's gradient beside the kept one at the end of a backward pass.

    The head's, the look-up's and their sum where one stage has both; the look-up's alone on the first of several.
    """
    copies = 3 if stage.plan.pipeline == 1 else 1 if stage.is_first else 0
    becomes_the_kept_one = stage.adds_up_flat or (stage.plan.accumulation_steps == 1 and stage.zero < 2)
    return max(0, copies - becomes_the_kept_one)


def early_gradient_bytes(stage: Stage) -> float:
    """Bytes of gradients that are there before the first backward pass of a step: buffers that are never given back."""
    return 4.0 * stage.num_weights if stage.adds_up_flat else 0.0


def update_gradient_bytes(stage: Stage) -> float:
    """Bytes of gradients that are left when the update begins: ZeRO 1 has then reduced them to its share."""
    if stage.adds_up_flat:
        return early_gradient_bytes(stage)
    return stage.element * stage.num_weights / stage.plan.data if stage.zero == 1 else gradient_bytes(stage)


def update_bytes(stage: Stage) -> float:
    """Bytes that the update adds: the gradient in fp32 where it is not, and ZeRO's in one piece."""
    is_plain_fp32 = stage.zero == 0 and stage.config.train.precision == "fp32"
    if offload_optimizer(stage.config) or is_plain_fp32 or stage.adds_up_flat:
        return 0.0
    return 4.0 * stage.num_weights / (stage.plan.data if stage.zero else 1)


def master_bytes(stage: Stage) -> float:
    """Bytes of the fp32 copy of the weights."""
    if stage.zero == 0:
        return 0.0 if stage.config.train.precision == "fp32" else 4.0 * stage.num_weights
    return 4.0 * stage.num_weights / stage.plan.data


def moment_bytes(stage: Stage) -> float:
    """Bytes of Adam's two moments."""
    return 8.0 * stage.num_weights / (stage.plan.data if stage.zero >= 1 else 1)


def snapshot_bytes(stage: Stage) -> float:
    """Bytes of host memory of the rank of a stage that owns most, for the copy of an asynchronous checkpoint."""
    if not stage.config.checkpoint.asynchronous:
        return 0.0
    num_owned = stage.num_weights
    if stage.is_last and not stage.is_first:
        num_owned -= stage.num_embedding
    num_bytes = 12.0 * num_owned / (stage.plan.data if stage.zero >= 1 else 1)
    return num_bytes if device_of(stage.config) == "cpu" else pinned_bytes(num_bytes)


def pinned_bytes(num_bytes: float) -> float:
    """Bytes of host memory that torch takes for a page-locked tensor: the next power of two.

    ATen/core/CachingHostAllocator.h of torch 2.13; `pinned_max_round_threshold_mb` in PYTORCH_ALLOC_CONF limits it.
    """
    return float(1 << (math.ceil(num_bytes) - 1).bit_length()) if num_bytes > 0 else 0.0


def device_of(config: Config) -> Literal["cpu", "cuda"]:
    """Returns the kind of device that is planned: `auto` is a GPU, for that is what plans are made for."""
    return "cpu" if config.train.device == "cpu" else "cuda"
