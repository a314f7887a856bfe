"""The configuration schema: every choice a run is made of, each with its meaning, its range and its default.

The models are frozen and strict: an integer field takes no text and no fraction, a key that is not here is an error.
Rules that join several fields, or the number of processes, are in `validation.py`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from mlra_scale.config import yaml_text
from mlra_scale.config.problems import ConfigError, Problem, problems_of

Projection = Literal["q", "k", "v", "o"]
PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v", "o")


def _tuple_of_list(value: Any) -> Any:
    """YAML and JSON know lists only; strict tuples would refuse them."""
    return tuple(value) if isinstance(value, list) else value


Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Quantile = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Text = Annotated[str, Field(min_length=1)]
Tag = Annotated[str, Field(min_length=1, max_length=64)]


class Section(BaseModel):
    """Base of all sections: immutable, strict types, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Shape, attention and initialization of the model (GPT-2: pre-LN, tanh GELU, learned positions, tied head)."""

    vocab_size: int = Field(50257, ge=2, description="Number of real tokens; rows added by padding never count.")
    vocab_padding_multiple: int = Field(
        128,
        ge=1,
        description="The embedding's rows are padded to a multiple of this, whatever the tensor-parallel degree.",
    )
    max_positions: int = Field(1024, ge=1, description="Number of learned positions: the longest possible sequence.")
    num_layers: int = Field(ge=1, description="Number of transformer blocks: the depth.")
    hidden_size: int = Field(ge=1, description="Width D of the residual stream.")
    num_heads: int = Field(ge=1, description="Number of attention heads N; D must be divisible by it.")
    ffn_hidden_size: int | None = Field(None, ge=1, description="Inner width of the MLP; null: 4 D.")
    attention: Literal["mlra", "dense"] = Field(
        "mlra", description="mlra: the projections named below are products of two factors; dense: stock GPT-2."
    )
    attention_rank: int | None = Field(
        None,
        ge=1,
        description="Rank R of the factorised projections; null: attention_rank_ratio times D, rounded. "
        "For a dense model: the rank of the MLRA model that matched-to-mlra pairs it with.",
    )
    attention_rank_ratio: float = Field(
        0.5, gt=0.0, le=1.0, description="R/D when attention_rank is null; 1/2 keeps the parameter count of dense."
    )
    factorised_projections: Annotated[tuple[Projection, ...], BeforeValidator(_tuple_of_list)] = Field(
        ("q", "k", "v"),
        description="Which of q, k, v, o are factorised (for dense: of the MLRA model that matched-to-mlra means).",
    )
    init_std: float = Field(0.02, gt=0.0, le=1.0, description="Standard deviation of the base initialization.")
    init_width_rule: Literal["fixed", "inverse_sqrt_width"] = Field(
        "fixed", description="fixed: init_std as it is; inverse_sqrt_width: init_std * sqrt(768 / D)."
    )
    attention_init: Literal["gpt2", "xavier", "matched", "matched-to-mlra"] = Field(
        "gpt2",
        description="Attention's weights. mlra: gpt2 (both factors N(0, std)), xavier, matched (the product has the "
        "dense variance); dense: gpt2, xavier, matched-to-mlra (the variance of the paired MLRA product: the control).",
    )
    paired_mlra_init: Literal["gpt2", "xavier", "matched"] = Field(
        "gpt2", description="The MLRA initialization that matched-to-mlra copies the variance of; read by nothing else."
    )
    embedding_dropout: Probability = Field(0.0, description="Dropout after the sum of token and position embedding.")
    attention_dropout: Probability = Field(0.0, description="Dropout of attention weights.")
    residual_dropout: Probability = Field(0.0, description="Dropout of each sublayer's output before the residual sum.")
    layer_norm_eps: float = Field(1e-5, gt=0.0, le=1e-2, description="Epsilon of every layer norm.")
    z_loss: float = Field(0.0, ge=0.0, description="Coefficient of the squared log-partition penalty; 0: off.")

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
        return self.init_std

    def is_factorised(self, projection: str) -> bool:
        """Returns whether the projection "q", "k", "v" or "o" is a product of two factors in this model."""
        assert projection in PROJECTIONS, projection
        return self.attention == "mlra" and projection in self.factorised_projections

    def parameter_counts(self) -> dict[str, int]:
        """Counts the parameters of the model by kind, without padded vocabulary rows and with the tied head once.

        With V tokens, P positions, L layers, width D, MLP width F, rank R and n factorised projections:
        embedding V D; positions P D; factor L n 2 D R; matrix L ((4 - n) D^2 + 2 D F); bias L (4 D + F + D);
        norm L 4 D + 2 D.

        Returns:
            Number of parameters for the kinds embedding, positions, factor, matrix, bias, norm.
        """
        depth, width, ffn = self.num_layers, self.hidden_size, self.ffn_size
        num_factorised = sum(self.is_factorised(name) for name in PROJECTIONS)
        return {
            "embedding": self.vocab_size * width,
            "positions": self.max_positions * width,
            "factor": depth * num_factorised * 2 * width * self.rank,
            "matrix": depth * ((4 - num_factorised) * width * width + 2 * width * ffn),
            "bias": depth * (5 * width + ffn),
            "norm": depth * 4 * width + 2 * width,
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
        what they are, 2 D R each, once: neither recomputation nor work that tensor parallelism repeats is useful work.

        Args:
            sequence_length: S, tokens per sequence.

        Returns:
            Operations per token of one forward and backward pass.
        """
        counts = self.parameter_counts()
        num_multiplying = counts["factor"] + counts["matrix"] + counts["embedding"]
        return 6.0 * num_multiplying + 12.0 * self.num_layers * self.hidden_size * sequence_length


class DataConfig(Section):
    """Which tokens are read and how they are cut."""

    path: Text | None = Field(
        None, description="Folder made by tools/prepare_data.py, or a Megatron prefix (PREFIX.bin, PREFIX.idx)."
    )
    blend: dict[Text, Positive] | None = Field(
        None, description="Several data sets instead of path: {path: weight}; weights are relative."
    )
    validation_path: Text | None = Field(None, description="Validation data; null: the split that belongs to the data.")
    validation_fraction: float = Field(
        0.01, gt=0.0, lt=1.0, description="For bare Megatron prefixes: the share of last documents kept for validation."
    )
    tokenizer: Text | None = Field(None, description="Tokenizer that the data must be made with; null: unchecked.")
    document_attention: Literal["across", "masked"] = Field(
        "across", description="across: a sample's documents see each other; masked: attention stops at their borders."
    )
    reset_positions: bool = Field(
        False, description="Positions start again at 0 with every document; needs document_attention masked."
    )
    end_of_document_token: int | None = Field(
        None, ge=0, description="For bare Megatron prefixes: the token that ends a document."
    )
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="Seed of the data order; null: train.seed.")


class TrainConfig(Section):
    """Length, batch and numerics of the run."""

    steps: int = Field(ge=1, description="Number of optimizer steps.")
    global_batch_size: int = Field(ge=1, description="Sequences per optimizer step, over all ranks.")
    micro_batch_size: int = Field(ge=1, description="Sequences that one data-parallel rank passes at once.")
    sequence_length: int = Field(ge=1, description="Tokens per sequence.")
    seed: int = Field(1234, ge=0, le=2**63 - 1, description="Seed of initialization and dropout.")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Compute precision; masters stay fp32.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one, else cpu.")
    log_every: int = Field(10, ge=1, description="Steps between log lines.")
    peak_tflops: float | None = Field(
        None, gt=0.0, description="Peak of one device in TFLOP/s, for MFU; null: looked up, or MFU is left out."
    )
    max_consecutive_overflows: int = Field(
        50, ge=1, description="fp16: this many loss-scale overflows in a row end the run."
    )


class OptimConfig(Section):
    """AdamW and the learning-rate schedule."""

    lr: float = Field(gt=0.0, le=10.0, description="Peak learning rate.")
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_tuple_of_list)] = Field(
        (0.9, 0.95), description="Decay rates of Adam's two moments."
    )
    eps: float = Field(1e-8, gt=0.0, le=1.0, description="Epsilon of Adam.")
    weight_decay: float = Field(0.1, ge=0.0, lt=10.0, description="Decoupled weight decay; never on biases and norms.")
    decay_factors: bool = Field(True, description="Decay MLRA factors (which is not decay of their product).")
    decay_embedding: bool = Field(True, description="Decay token and position embedding (this drives TEV).")
    grad_clip: float = Field(1.0, ge=0.0, description="Largest global gradient norm; 0: no clipping.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="After warm-up: cosine decay, stay-then-decay (wsd), or constant."
    )
    warmup_steps: int = Field(
        0, ge=0, description="Steps of linear warm-up to lr. A preset's shrinks with train.steps unless it is given."
    )
    decay_steps: int | None = Field(
        None,
        ge=1,
        description="cosine: length of the decay after warm-up, null: the rest of the run; wsd: length of the final "
        "decay, null: 20 % of the steps.",
    )
    min_lr_ratio: float = Field(0.1, ge=0.0, le=1.0, description="Learning rate at the end of the decay, as a share.")


class ParallelConfig(Section):
    """How the model is spread over ranks; the data-parallel degree is what remains of the world."""

    tensor: int = Field(1, ge=1, description="Tensor-parallel degree.")
    pipeline: int = Field(1, ge=1, description="Pipeline stages.")
    engine: Literal["auto", "pipeline", "zero"] = Field(
        "auto", description="auto: pipeline if there are several stages, else zero."
    )
    activation_checkpointing: Literal["none", "block"] = Field(
        "none", description="block: keep only each block's input and recompute the rest in the backward pass."
    )
    timeout_minutes: float = Field(10.0, gt=0.0, le=1440.0, description="After this long a stuck collective fails.")
    world_size: int | None = Field(
        None, ge=1, description="Expected number of ranks: checked at start, and used by --dry-run on one process."
    )


class TevConfig(Section):
    """Token embedding variability: how often and what of its distribution."""

    every: int = Field(10, ge=0, description="Steps between measurements; 0: off.")
    quantiles: Annotated[tuple[Quantile, ...], BeforeValidator(_tuple_of_list)] = Field(
        (0.05, 0.25, 0.5, 0.75, 0.95), description="Quantiles of the distribution over tokens to record."
    )
    extremes: int = Field(0, ge=0, description="How many of the highest and of the lowest tokens to record.")


class EvaluationConfig(Section):
    """Validation during training."""

    every: int = Field(0, ge=0, description="Steps between evaluations; 0: only at the end.")
    batches: int = Field(8, ge=1, description="Global batches per evaluation.")


class CheckpointConfig(Section):
    """Checkpoints during training."""

    every: int = Field(0, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep_last: int = Field(2, ge=1, description="How many of the newest checkpoints are kept.")
    keep_every: int = Field(
        0, ge=0, description="Checkpoints of steps that are multiples of this are kept as well; 0: none of them."
    )
    asynchronous: bool = Field(
        True,
        description="Copy the state to host memory and write the files while training goes on (the last checkpoint "
        "of a run is always waited for); false: training waits for the files.",
    )
    differing_copies: Literal["refuse", "report"] = Field(
        "refuse",
        description="If copies of a weight that several ranks hold are not equal bit by bit. refuse: the save fails "
        "and the run stops; report: the owner's copy is saved, and an event names the weight and the ranks.",
    )


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a key, otherwise offline; disabled: not at all."
    )
    project: Text = Field("mlra-scale", description="Project name.")
    name: Text | None = Field(None, description="Run name; null: the run directory's name.")
    tags: Annotated[tuple[Tag, ...], BeforeValidator(_tuple_of_list)] = Field(
        (), description="Tags of the run, of 64 characters at most."
    )


class ProfileConfig(Section):
    """torch.profiler over a span of steps."""

    start: int | None = Field(None, ge=1, description="First profiled step, counted from 1; null: no profile.")
    stop: int | None = Field(None, ge=2, description="First step after start that is no longer profiled.")


class ClusterConfig(Section):
    """What a job on a cluster does when something goes wrong; read by the launcher of slurm/, not by the training."""

    elastic: bool = Field(
        False,
        description="Go on with fewer nodes where one is lost: the data-parallel degree shrinks, the global batch and "
        "the samples stay. false: the job is queued again for its full size.",
    )
    hang_minutes: float | None = Field(
        None,
        gt=0.0,
        description="No step, no batch of an evaluation and no save for this long is a hang; null: half of "
        "parallel.timeout_minutes.",
    )
    start_minutes: float = Field(
        30.0, gt=0.0, description="How long ranks may take from their start to the first step."
    )
    stop_minutes: float = Field(
        4.0, gt=0.0, description="How long ranks may take, once a signal asked for it, to finish the step and save."
    )
    max_failures: int = Field(
        3, ge=1, description="After so many failures in a row without a newer checkpoint the job stops."
    )
    max_preemptions: int = Field(
        10, ge=1, description="After so many preemptions in a row in which no checkpoint was completed the job stops."
    )
    lost_node_seconds: float = Field(
        30.0, gt=0.0, description="A node that the job has heard nothing from for this long is lost."
    )


class Config(Section):
    """Everything that defines a run."""

    preset: str | None = Field(None, description="The preset that the values started from; a note, no longer read.")
    model: ModelConfig = Field(description="Shape and initialization of the model.")
    data: DataConfig = Field(default_factory=DataConfig, description="Training and validation data.")
    train: TrainConfig = Field(description="Length, batch and numerics.")
    optim: OptimConfig = Field(description="Optimizer and schedule.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="Layout over ranks.")
    tev: TevConfig = Field(default_factory=TevConfig, description="Token embedding variability.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Validation.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Checkpoints.")
    wandb: WandbConfig = Field(default_factory=WandbConfig, description="Weights & Biases.")
    profile: ProfileConfig = Field(default_factory=ProfileConfig, description="Profiler.")
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="Failures on a cluster.")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="DeepSpeed's own knobs, the content of a --ds-config file; {}: ZeRO stage 0."
    )

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as plain mappings, lists and scalars, every field written out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Returns the configuration as a YAML document that `from_yaml` reads back equal."""
        return yaml_text.dump(self.to_dict())

    @classmethod
    def from_dict(cls, values: Any) -> Config:
        """Builds a configuration from plain values.

        Args:
            values: Nested mappings as `to_dict` returns them; fields with a default may be left out.

        Returns:
            The configuration, every field checked for type and range.

        Raises:
            ConfigError: With every wrong, unknown or missing field.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(problems_of(error, cls)) from None

    @classmethod
    def from_yaml(cls, text: str) -> Config:
        """Reads what `to_yaml` wrote.

        Args:
            text: The YAML document.

        Returns:
            The configuration.

        Raises:
            ConfigError: The text is not YAML, or a field is wrong.
        """
        try:
            values = yaml_text.load(text)
        except ValueError as error:
            raise ConfigError([Problem("config", "YAML", str(error))]) from None
        return cls.from_dict(values)
