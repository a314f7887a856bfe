"""Memory of the state of training on one rank: weights, gradients, master weights, moments. Imports no torch.

In the formulas n is the number of weights that the rank holds (its stage and tensor shard), d the data-parallel degree
and e the bytes of a number in compute precision. They describe DeepSpeed 0.19 as our engines set it up.
"""

from __future__ import annotations

import math

from mlra_scale.config import offload_optimizer
from mlra_scale.planning.layout import Matrix, Stage


def weight_bytes(stage: Stage) -> float:
    """Bytes of the weights in compute precision: e n; with ZeRO 3 e n / d, and e times what is gathered and kept."""
    if stage.zero < 3:
        return float(stage.element * stage.num_weights)
    return stage.element * (stage.num_weights / stage.plan.data + min(stage.num_weights, stage.reuse_distance))


def gradient_bytes(stage: Stage) -> float:
    """Bytes of the gradients on the device: e n, in bf16 with ZeRO 1 4 n of sums and 2 n that are added to them."""
    if has_gradients_on_host(stage):
        return 0.0
    if stage.zero >= 2:
        return partitioned_gradient_bytes(stage)
    return float((6 if stage.adds_up_flat else stage.element) * stage.num_weights)


def has_gradients_on_host(stage: Stage) -> bool:
    """Whether reduced gradients are kept on the host."""
    return offload_optimizer(stage.config) and stage.zero >= 2


def partitioned_gradient_bytes(stage: Stage) -> float:
    """Bytes of a rank's share of the gradients with ZeRO 2 and 3: 4 n / d, in fp16 2 n / d.

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
    element = 6.0 if stage.device == "cpu" else 2.0
    return element * min(stage.num_weights, 1 << 24) if stage.adds_up_flat else 0.0


def reduction_bytes(stage: Stage) -> float:
    """Bytes of the buffers through which ZeRO reduces gradients, shown with the gradients.

    They have reduce_bucket_size elements (5e8 unless the --ds-config file differs), whatever the size of the model.
    ZeRO 3: one in the type of communication. ZeRO 1 and 2: one in compute precision, two with overlap_comm; in a
    pipeline one in the type of communication. None in bf16 with ZeRO 1.
    """
    if stage.zero == 0 or stage.adds_up_flat or not stage.has_buckets:
        return 0.0
    if stage.zero == 3 or stage.is_pipeline:
        return float(stage.bucket_size * stage.reduced_element)
    return float(stage.bucket_size * stage.element * (2 if stage.overlaps else 1))


def reduced_bytes(stage: Stage) -> float:
    """Bytes that ZeRO 2 and 3 add while they reduce a micro-batch's gradients.

    ZeRO 2: the rank's share of this micro-batch, before it is added. ZeRO 3: a bucket in one piece, and a copy of it.
    """
    if stage.zero == 2:
        return partitioned_gradient_bytes(stage)
    if stage.zero == 3:
        return 2.0 * stage.reduced_element * min(stage.bucket_size, stage.num_weights)
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


def matrix_bytes(stage: Stage) -> float:
    """Bytes that a round of muon and spectron adds: the larger one of (4 + e) p, 2 e (N + m^2), e (N + s), e (s + p).

    N = m n are the numbers of the largest matrix, m <= n, and p those of the parts that the rank holds, of as many
    matrices as the stage has ranks. One after the other there are: directions in fp32 and what is sent of them; of an
    iteration, two states of the whole matrix and two products of m x m; the result and what is sent to all who hold
    parts of it (s, N unless several hold the same); this and what comes back; what came back, also in fp32.
    """
    if not stage.matrices:
        return 0.0
    largest, tensor, data = max(stage.matrices, key=Matrix.numel), stage.plan.tensor, stage.plan.data
    element, whole, held = stage.transported_element, largest.numel(), largest.num_held(tensor)
    parts = min(len(stage.matrices), tensor * data) * held / (data if stage.zero else 1)
    sent_back = tensor * held * (1 if stage.zero else data)
    iteration = 2 * (whole + min(largest.rows, largest.columns) ** 2)
    return max((4 + element) * parts, element * max(iteration, whole + sent_back, sent_back + parts))


def master_bytes(stage: Stage) -> float:
    """Bytes of the fp32 copy of the weights: 4 n, with ZeRO 4 n / d; none in fp32 without ZeRO."""
    if stage.zero == 0:
        return 0.0 if stage.config.train.precision == "fp32" else 4.0 * stage.num_weights
    return 4.0 * stage.num_weights / stage.plan.data


def moment_bytes(stage: Stage) -> float:
    """Bytes of the moments in fp32: Adam's two, 8 n, with ZeRO 8 n / d; half of it for weights of muon and spectron."""
    return (8.0 * stage.num_weights - 4.0 * stage.num_in_matrices) / (stage.plan.data if stage.zero >= 1 else 1)


def snapshot_bytes(stage: Stage) -> float:
    """Bytes of host memory of the rank of a stage that owns most, for the copy of an asynchronous checkpoint.

    12 bytes (fp32 weight, two moments) per weight that the rank owns, 8 where muon or spectron updates it: with ZeRO
    n / d, else data rank 0 owns all n. The last stage's copy of the tied embedding belongs to the first stage. Tensor
    rank 0 owns the replicated weights, the other tensor ranks a little less than is shown. For a GPU the memory is
    page-locked.
    """
    if not stage.config.checkpoint.asynchronous:
        return 0.0
    num_owned = stage.num_weights
    if stage.is_last and not stage.is_first:
        num_owned -= stage.num_embedding
    num_bytes = (12.0 * num_owned - 4.0 * stage.num_in_matrices) / (stage.plan.data if stage.zero >= 1 else 1)
    return num_bytes if stage.device == "cpu" else pinned_bytes(num_bytes)


def pinned_bytes(num_bytes: float) -> float:
    """Bytes of host memory that torch takes for a page-locked tensor: the next power of two.

    ATen/core/CachingHostAllocator.h of torch 2.13; `pinned_max_round_threshold_mb` in PYTORCH_ALLOC_CONF limits it.
    """
    return float(1 << (math.ceil(num_bytes) - 1).bit_length()) if num_bytes > 0 else 0.0
