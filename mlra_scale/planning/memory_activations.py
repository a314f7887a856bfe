"""Memory of activations, logits and temporary results on one rank. Imports no torch.

In the formulas t is the tensor-parallel degree, e the bytes of a number in compute precision, S the sequence, N heads,
D hidden, F MLP width, R rank, f the number of factorised projections, V the padded vocabulary.
"""

from __future__ import annotations

from mlra_scale.model.head_chunks import num_chunks
from mlra_scale.planning.layout import Stage


def block_bytes_per_token(stage: Stage) -> float:
    """Bytes that one block keeps of one token for its backward pass.

    e (4 D + 4 D / t + 2 F / t + f R): inputs and outputs of both norms; q, k, v and the attention's output; both sides
    of GELU; a latent per factorised projection (replicated over t; with the plan `merged` of o only). Selective
    checkpointing keeps no output of norms and GELU. QK-norm adds q and k before it, residual dropout 2 e D, attention
    dropout the attention matrix with its mask. With sequence parallelism what has no t is divided by t, but not the
    norms' outputs and the latents where gathered inputs are kept.
    """
    model, tensor, element, split = stage.model, stage.plan.tensor, stage.element, stage.split
    split_of_gathered = 1 if stage.keeps_gathered else split
    num_latents = sum(model.is_factorised(name) for name in ("o" if stage.low_rank_plan == "merged" else "qkvo"))
    norms = 2 * model.hidden_size / split_of_gathered
    gelu = model.ffn_size / tensor
    if stage.checkpointing == "selective":
        # What is gathered from a norm's output is a copy, which is kept.
        gelu, norms = 0.0, norms if split > 1 and stage.keeps_gathered else 0.0
    width = 2 * model.hidden_size / split + norms + 4 * model.hidden_size / tensor + model.ffn_size / tensor + gelu
    width += 2 * model.hidden_size / tensor * model.qk_norm
    kept = element * (width + num_latents * model.rank / split_of_gathered)
    if model.residual_dropout > 0.0:
        kept += element * 2 * model.hidden_size / split
    if model.attention_dropout > 0.0:
        kept += (4 + 2 * element) * stage.plan.sequence_length * model.num_heads / tensor
    return kept


def dropout_bytes(stage: Stage) -> float:
    """Bytes that the mask of attention weights adds while it is made, less what the rest of its block keeps later.

    Three tensors of 64-bit integers, see model/randomness.py.
    """
    model, tensor = stage.model, stage.plan.tensor
    made = (24 - stage.element) * stage.plan.sequence_length * model.num_heads / tensor
    later = 2 * model.hidden_size + model.hidden_size / tensor + 2 * model.ffn_size / tensor
    return max(0.0, stage.tokens * (made - stage.element * later))


def kept_per_block(stage: Stage) -> float:
    """Bytes that a block keeps of one micro-batch until its backward pass."""
    return stage.hidden / stage.split if stage.checkpointing == "block" else whole_block_bytes(stage)


def whole_block_bytes(stage: Stage) -> float:
    """Bytes that a block without checkpointing keeps of one micro-batch; with the plan `merged` the products too."""
    merged = 0.0
    if stage.low_rank_plan == "merged":
        num_products = sum(stage.model.is_factorised(name) for name in "qkv")
        merged = stage.element * num_products * stage.model.hidden_size**2 / stage.plan.tensor
    return stage.tokens * block_bytes_per_token(stage) + merged


def recomputed_bytes(stage: Stage) -> float:
    """Bytes of what checkpointing has computed again in a block's backward pass: all of it, or GELU's output."""
    if stage.checkpointing == "block":
        return whole_block_bytes(stage)
    if stage.checkpointing == "selective":
        return stage.element * stage.tokens * stage.model.ffn_size / stage.plan.tensor
    return 0.0


def activation_bytes(stage: Stage) -> float:
    """Bytes of the activations that a stage keeps for its backward passes, without what is recomputed and logits.

    For each micro-batch in flight: blocks, masks, the final norm's input. A pipeline also keeps what a stage has
    received (its first block gets a copy, of at least two micro-batches), what it has sent, and one in transfer.
    """
    hidden, in_flight = stage.hidden / stage.split, stage.num_in_flight
    end = hidden * (stage.is_last + (stage.is_first and stage.model.embedding_dropout > 0.0))
    kept = in_flight * (stage.num_blocks * kept_per_block(stage) + end + mask_bytes(stage))
    if stage.plan.pipeline == 1:
        return kept
    received = max(in_flight, min(2, stage.plan.accumulation_steps)) * (not stage.is_first)
    sent = in_flight * (not stage.is_last)
    return kept + hidden * (received + sent + 1)


def mask_bytes(stage: Stage) -> float:
    """Bytes of the additive mask of documents of one micro-batch, which its blocks share; flex_attention needs less."""
    if stage.config.data.document_attention != "masked":
        return 0.0
    return float(stage.element * stage.plan.micro_batch_size * stage.plan.sequence_length**2)


def logit_bytes(stage: Stage) -> float:
    """Bytes of the head and the loss at their peak, per micro-batch of T tokens.

    The larger of two times within a chunk of tokens (model/head_chunks.py). First the logits, which become their
    softmax and its gradient in place: 4 bytes each, and in bf16 and fp16 e more; with several chunks beside the sum of
    the weight's gradients so far, 4 D V / t. Then the gradient, e per logit, beside this sum and the summand, e D V / t
    (in fp32 they are one). At both times the final norm's output and its gradient, 2 e D per token.
    """
    model, element = stage.model, stage.element
    rows = model.padded_vocab_size // stage.plan.tensor
    chunks = num_chunks(stage.tokens, rows, stage.device, stage.config.train.precision == "fp16")
    logits, weight = -(-stage.tokens // chunks) * rows, rows * model.hidden_size
    summed = 4 * weight if chunks > 1 else 0
    if element == 4:
        largest = 4 * logits + 4 * weight
    else:
        largest = max((4 + element) * logits + summed, element * (logits + weight) + summed)
    return largest + 2.0 * stage.hidden


def output_bytes(stage: Stage) -> float:
    """Bytes of the final hidden state, which DeepSpeed's pipeline holds until the backward pass has ended."""
    return stage.hidden / stage.split if stage.is_pipeline else 0.0


def backward_bytes(stage: Stage) -> float:
    """Bytes that the backward pass of a block adds: gradients beside GELU and of the stream, the largest matrix's.

    A branch with a factor (`model.depth_rule`) has a gradient of its own instead of the stream's.
    """
    model, tokens, tensor = stage.model, stage.tokens, stage.plan.tensor
    num_streams = (stage.plan.pipeline == 1) + (model.branch_factor != 1.0)
    stream = num_streams * model.hidden_size / stage.split
    passing = tokens * (model.ffn_size / tensor + stream)
    if stage.split > 1:
        # The whole gradient of the stream. Gathered inputs and packed copies come when GELU's sides have gone, unless
        # these are not kept.
        whole = 1 if stage.checkpointing == "none" else 4
        passing += whole * tokens * model.hidden_size
    return stage.element * (passing + model.ffn_size * model.hidden_size / tensor)
