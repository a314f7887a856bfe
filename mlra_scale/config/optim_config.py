"""The optimizer's section of the schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mlra_scale.config.section import Probability, Section, Text

OptimizerName = Literal["adamw", "muon", "spectron"]
ParameterKind = Literal["embedding", "positions", "factor", "matrix", "bias", "norm"]


class ParameterRule(Section):
    """What is different for some parameters; a field that is null stays as it is without the rule."""

    names: Text | None = None
    """The parameters, by a pattern of canonical names such as `blocks.*.attention.q.*.weight`: * stands for any text, ?
    for any character, [05] for one of these."""
    kind: ParameterKind | None = None
    """The parameters, by their kind, instead of names. factor: of a low-rank map; matrix: other weights of blocks;
    norm: weights and biases of norms, and gains; bias: of linear maps."""
    lr_factor: float | None = Field(None, ge=0.0, le=1000.0)
    """Their learning rate as a multiple of the schedule's."""
    weight_decay: float | None = Field(None, ge=0.0, lt=10.0)
    """Their decoupled weight decay."""
    optimizer: OptimizerName | None = None
    """Their optimizer; muon and spectron are for kinds factor and matrix."""

    @model_validator(mode="after")
    def _selects_and_changes(self) -> ParameterRule:
        if (self.names is None) is (self.kind is None):
            raise ValueError("must name its parameters by names or by kind, and by one of the two only")
        if self.lr_factor is None and self.weight_decay is None and self.optimizer is None:
            raise ValueError("changes nothing; give lr_factor, weight_decay or optimizer")
        return self


class OptimConfig(Section):
    """The optimizer and the learning-rate schedule."""

    replaced: ClassVar[Mapping[str, str]] = {
        "decay_factors": "was replaced by optim.rules; leave true out, and instead of false write "
        "optim.rules=[{kind: factor, weight_decay: 0}]",
        "decay_embedding": "was replaced by optim.rules; leave true out, and instead of false write "
        "optim.rules=[{kind: embedding, weight_decay: 0}, {kind: positions, weight_decay: 0}]",
    }

    name: OptimizerName = "adamw"
    """Optimizer of the matrices of the blocks (kinds factor and matrix); embedding, positions, norms and biases always
    stay with AdamW. muon: momentum, orthogonalised by Newton-Schulz iterations; spectron: likewise, and the step of a
    low-rank map's two factors is divided by the sum of their largest singular values and 1 (other matrices as muon)."""
    lr: float = Field(gt=0.0, le=10.0)
    """Peak learning rate, of all optimizers; matrix_scale brings updates of muon to about the size of AdamW's."""
    betas: tuple[Probability, Probability] = Field((0.9, 0.95), strict=False)
    """Decay rates of Adam's two moments."""
    eps: float = Field(1e-8, gt=0.0, le=1.0)
    """Epsilon of Adam."""
    momentum: Probability = 0.95
    """muon, spectron: decay rate of the momentum."""
    nesterov: bool = True
    """muon, spectron: orthogonalise the mean of gradient and momentum that Nesterov's method takes; false: the momentum
    itself."""
    newton_schulz_steps: int = Field(5, ge=1, le=100)
    """muon, spectron: Newton-Schulz iterations of an orthogonalisation."""
    newton_schulz_coefficients: tuple[float, float, float] = Field((3.4445, -4.775, 2.0315), strict=False)
    """muon, spectron: a, b, c of an iteration X <- a X + (b A + c A A) X with A = X X^T."""
    newton_schulz_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """muon, spectron: type in which the iterations compute, and in which updates are sent; auto: fp32 where
    train.precision is fp32, else bf16."""
    matrix_scale: Literal["match_rms_adamw", "none"] = "match_rms_adamw"
    """muon, spectron: what an orthogonalised update of an m x n matrix is multiplied by beside the learning rate.
    match_rms_adamw: 0.2 sqrt(max(m, n)), so that AdamW's learning rates carry over; none: 1, the rule of Spectron's
    paper."""
    weight_decay: float = Field(0.1, ge=0.0, lt=10.0)
    """Decoupled weight decay; by default not on biases and norms."""
    rules: tuple[ParameterRule, ...] = Field((), strict=False)
    """What is different for some parameters: their learning rate, weight decay or optimizer. Where several rules match,
    the last one that gives a field counts. A rule that matches nothing is an error; --dry-run shows what each
    matches."""
    grad_clip: float = Field(1.0, ge=0.0)
    """Largest global gradient norm; 0: no clipping."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine decay, stay-then-decay (wsd), or constant."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up to lr. A preset's shrinks with train.steps unless it is given."""
    decay_steps: int | None = Field(None, ge=1)
    """cosine: length of the decay after warm-up, null: the rest of the run; wsd: length of the final decay, null: 20 %
    of the steps."""
    min_lr_ratio: float = Field(0.1, ge=0.0, le=1.0)
    """Learning rate at the end of the decay, as a share."""
