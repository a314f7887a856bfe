"""The model's section of the schema."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator

from mlra_scale.config.section import Probability, Section

Projection = Literal["q", "k", "v", "o"]
MAX_LAYERS = 10_000
"""Far beyond any model that trains; a damaged file with 300,000,000 layers would take hours to describe."""
PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v", "o")


class ModelConfig(Section):
    """Shape, attention and initialization of the model (GPT-2: pre-LN, tanh GELU, learned positions, tied head)."""

    vocab_size: int = Field(50257, ge=2, le=10**7)
    """Number of real tokens; rows added by padding never count."""
    vocab_padding_multiple: int = Field(128, ge=1)
    """The embedding's rows are padded to a multiple of this, whatever the tensor-parallel degree."""
    max_positions: int = Field(1024, ge=1, le=10**7)
    """Number of learned positions: the longest possible sequence."""
    num_layers: int = Field(ge=1, le=MAX_LAYERS)
    """Number of transformer blocks: the depth."""
    hidden_size: int = Field(ge=1)
    """Width D of the residual stream."""
    num_heads: int = Field(ge=1)
    """Number of attention heads N; D must be divisible by it."""
    ffn_hidden_size: int | None = Field(None, ge=1)
    """Inner width of the MLP; null: 4 D."""
    attention: Literal["mlra", "dense"] = "mlra"
    """mlra: the projections named below are products of two factors; dense: stock GPT-2."""
    attention_rank: int | None = Field(None, ge=1)
    """Rank R of the factorised projections; null: attention_rank_ratio times D, rounded. For a dense model: the rank of
    the MLRA model that matched-to-mlra pairs it with."""
    attention_rank_ratio: float = Field(0.5, gt=0.0, le=1.0)
    """R/D when attention_rank is null; 1/2 keeps the parameter count of dense."""
    factorised_projections: tuple[Projection, ...] = Field(("q", "k", "v"), strict=False)
    """Which of q, k, v, o are factorised (for dense: of the MLRA model that matched-to-mlra means)."""
    init_std: float = Field(0.02, gt=0.0, le=1.0)
    """Standard deviation of the base initialization."""
    init_width_rule: Literal["fixed", "inverse_sqrt_width", "small"] = "fixed"
    """fixed: init_std as it is; inverse_sqrt_width: init_std * sqrt(768 / D); small: sqrt(2 / (5 D)) whatever init_std
    is."""
    attention_init: Literal["gpt2", "xavier", "matched", "matched-to-mlra"] = "gpt2"
    """Attention's weights. mlra: gpt2 (both factors N(0, std)), xavier, matched (the product has the dense variance);
    dense: gpt2, xavier, matched-to-mlra (the variance of the paired MLRA product: the control)."""
    paired_mlra_init: Literal["gpt2", "xavier", "matched"] = "gpt2"
    """The MLRA initialization that matched-to-mlra copies the variance of; read by nothing else."""
    depth_scaled_init: bool | None = None
    """Whether o and fc_out, which write to the residual stream, start smaller by 1/sqrt(2 L), as in GPT-2; null: unless
    layer_norm_scaling, which works better without, or depth_rule completep, which scales the branches themselves."""
    embedding_dropout: Probability = 0.0
    """Dropout after the sum of token and position embedding."""
    attention_dropout: Probability = 0.0
    """Dropout of attention weights."""
    residual_dropout: Probability = 0.0
    """Dropout of each sublayer's output before the residual sum."""
    layer_norm_eps: float = Field(1e-5, gt=0.0, le=1e-2)
    """Epsilon of every layer norm."""
    qk_norm: bool = False
    """Layer norm (no bias, one weight for all heads) of every query and key, over a head's width."""
    sigma_reparam: bool = False
    """Each of q, k, v, o, fc_in, fc_out is multiplied by a learned gain over its largest singular value (of the product
    where it is factorised)."""
    layer_norm_scaling: bool = False
    """Both layer norms of block l (counted from 1) are multiplied by 1/sqrt(l)."""
    depth_rule: Literal["none", "completep"] = "none"
    """completep: both branches of every block are multiplied by base_depth / num_layers, and so is Adam's epsilon for
    all parameters of blocks, so that the best learning rate stays the same over depth (CompleteP, arXiv 2505.01618,
    alpha = 1)."""
    base_depth: int = Field(48, ge=1, le=MAX_LAYERS)
    """depth_rule completep: the depth L0 at which branches and epsilon are multiplied by 1."""
    embedding_scale: Literal["none", "sqrt_width"] = "none"
    """sqrt_width: token embeddings enter times sqrt(D); the tied head is not scaled."""
    z_loss: float = Field(0.0, ge=0.0)
    """Coefficient of the squared log-partition penalty; 0: off."""

    @field_validator("factorised_projections", mode="after")
    @classmethod
    def _in_canonical_order(cls, value: tuple[Projection, ...]) -> tuple[Projection, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names a projection twice; name each of q, k, v, o at most once")
        return tuple(name for name in PROJECTIONS if name in value)

    @property
    def head_dim(self) -> int:
        """Width H of one head."""
        return self.hidden_size // self.num_heads

    @property
    def rank(self) -> int:
        """Rank R of the factorised projections."""
        if self.attention_rank is not None:
            return self.attention_rank
        return max(1, round(self.attention_rank_ratio * self.hidden_size))

    @property
    def ffn_size(self) -> int:
        """Inner width F of the MLP."""
        return 4 * self.hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding as stored: vocab_size rounded up to vocab_padding_multiple."""
        return -(-self.vocab_size // self.vocab_padding_multiple) * self.vocab_padding_multiple

    @property
    def base_std(self) -> float:
        """Standard deviation of the base initialization after the width rule."""
        if self.init_width_rule == "inverse_sqrt_width":
            return self.init_std * math.sqrt(768 / self.hidden_size)
        if self.init_width_rule == "small":
            return math.sqrt(2 / (5 * self.hidden_size))
        return self.init_std

    @property
    def residual_scale(self) -> float:
        """Factor of the initialization of what writes to the residual stream."""
        is_scaled = self.depth_scaled_init
        if is_scaled is None:
            is_scaled = not self.layer_norm_scaling and self.depth_rule == "none"
        return 1.0 / math.sqrt(2.0 * self.num_layers) if is_scaled else 1.0

    @property
    def embedding_factor(self) -> float:
        """What token embeddings are multiplied by where they enter the blocks."""
        return math.sqrt(self.hidden_size) if self.embedding_scale == "sqrt_width" else 1.0

    @property
    def branch_factor(self) -> float:
        """What both branches of every block, and Adam's epsilon for the blocks, are multiplied by: L0 / L."""
        return self.base_depth / self.num_layers if self.depth_rule == "completep" else 1.0

    def norm_factor(self, block: int) -> float:
        """Returns what the layer norms of a block (counted from 0) are multiplied by."""
        return 1.0 / math.sqrt(block + 1) if self.layer_norm_scaling else 1.0

    def is_factorised(self, projection: str) -> bool:
        """Returns whether the projection "q", "k", "v" or "o" is a product of two factors in this model."""
        assert projection in PROJECTIONS, projection
        return self.attention == "mlra" and projection in self.factorised_projections

    def parameter_counts(self) -> dict[str, int]:
        """Counts the parameters of the model by kind, without padded vocabulary rows and with the tied head once.

        With V tokens, P positions, L layers, width D, MLP width F, rank R and n factorised projections:
        embedding V D; positions P D; factor L n 2 D R; matrix L ((4 - n) D^2 + 2 D F); bias L (4 D + F + D);
        norm L 4 D + 2 D, with qk_norm L 2 H more and with sigma_reparam 6 L gains more.

        Returns:
            Number of parameters for the kinds embedding, positions, factor, matrix, bias, norm.
        """
        depth, width, ffn = self.num_layers, self.hidden_size, self.ffn_size
        num_factorised = sum(self.is_factorised(name) for name in PROJECTIONS)
        num_gains = 6 * self.sigma_reparam + 2 * self.head_dim * self.qk_norm
        return {
            "embedding": self.vocab_size * width,
            "positions": self.max_positions * width,
            "factor": depth * num_factorised * 2 * width * self.rank,
            "matrix": depth * ((4 - num_factorised) * width * width + 2 * width * ffn),
            "bias": depth * (5 * width + ffn),
            "norm": depth * (4 * width + num_gains) + 2 * width,
        }

    def num_parameters(self) -> int:
        """Returns the number of parameters, without padded vocabulary rows and with the tied head counted once."""
        return sum(self.parameter_counts().values())

    def flops_per_token(self, sequence_length: int) -> float:
        """Counts the floating-point operations of one token in training, the numerator of MFU.

        6 N + 12 L D S: two operations per multiply-add, forward once and backward twice, for the N weights that
        multiply activations (blocks and head; embedding and position look-ups, norms and biases are left out), and for
        the attention products q k^T and a v over a sequence of S (the causal half that could be skipped is counted, as
        is the custom). The formula is that of Chowdhery et al. 2022 (PaLM), appendix B. Factored projections count as
        what they are, 2 D R each, once: neither recomputation nor work that tensor parallelism repeats is useful work,
        and what norms and sigmaReparam add is not counted.

        Args:
            sequence_length: S, tokens per sequence.

        Returns:
            Operations per token of one forward and backward pass.
        """
        counts = self.parameter_counts()
        num_multiplying = counts["factor"] + counts["matrix"] + counts["embedding"]
        return 6.0 * num_multiplying + 12.0 * self.num_layers * self.hidden_size * sequence_length
