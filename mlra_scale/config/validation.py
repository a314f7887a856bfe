"""Rules that join several fields or the number of ranks; all that fail are reported together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from math import isfinite
from typing import Any

from mlra_scale.config.batch import batch_problems
from mlra_scale.config.deepspeed_json import (
    SEQUENCE_PARALLEL_FORBIDS,
    check_deepspeed_keys,
    offload_optimizer,
    offload_param,
    section_at,
    zero_stage,
)
from mlra_scale.config.problems import Problem
from mlra_scale.config.schema import Config
from mlra_scale.config.text_tasks import equal_names

Failures = Iterator[tuple[str, str]]
"""The dotted field and the remedy of every rule that fails."""


def engine_kind(config: Config) -> str:
    """Returns the engine that "auto" stands for: "pipeline" with several stages, otherwise "zero"."""
    if config.parallel.engine != "auto":
        return config.parallel.engine
    return "pipeline" if config.parallel.pipeline > 1 else "zero"


def config_problems(config: Config, world_size: int, device: str | None = None) -> list[Problem]:
    """Returns what is wrong among the fields; `mlra_scale.model.validation.validate` also checks optim.rules.

    Args:
        config: The configuration.
        world_size: Number of ranks that run (or, for a dry run, would run) it.
        device: "cpu" or "cuda" where train.device "auto" has been resolved; None takes train.device as it stands.
    """
    failures = chain(
        _model(config),
        _layout(config),
        _sequence_parallel(config),
        _engine(config),
        _compile(config),
        _precision(config, device or config.train.device),
        _newton_schulz(config),
        _schedule(config),
        _data(config),
        _stability(config, world_size),
        _evaluation(config),
        _cluster(config),
    )
    problems = [Problem(field, _value_at(config, field), remedy) for field, remedy in failures]
    return [*problems, *batch_problems(config, world_size), *check_deepspeed_keys(config.deepspeed)]


def _value_at(config: Config, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


def _divisors(number: int, limit: int = 64) -> str:
    """Lists the divisors of a number up to a limit, for remedies that say what would fit."""
    return ", ".join(str(d) for d in range(1, min(number, limit) + 1) if number % d == 0)


def _model(config: Config) -> Failures:
    model, width = config.model, config.model.hidden_size
    if width % model.num_heads:
        yield "model.num_heads", f"model.hidden_size {width} is not divisible by it; use one of {_divisors(width)}"
    if config.train.sequence_length > model.max_positions:
        yield (
            "train.sequence_length",
            f"is longer than model.max_positions {model.max_positions}; shorten it or raise model.max_positions",
        )
    if model.attention_rank is not None and model.attention_rank > width:
        yield (
            "model.attention_rank",
            f"is larger than model.hidden_size {width}, where a factorisation only adds parameters; use at most "
            f"{width}",
        )
    if model.attention == "mlra" and model.attention_init == "matched-to-mlra":
        yield (
            "model.attention_init",
            "is the control for a dense model; with model.attention mlra use gpt2, xavier or matched",
        )
    if model.attention == "dense" and model.attention_init == "matched":
        yield ("model.attention_init", "is for factors; with model.attention dense use gpt2, xavier or matched-to-mlra")
    if model.depth_rule == "completep" and model.layer_norm_scaling:
        yield (
            "model.depth_rule",
            "is a rule for the depth, and model.layer_norm_scaling is another one; set depth_rule to none, or "
            "layer_norm_scaling to false",
        )
    if model.depth_rule == "completep" and model.depth_scaled_init:
        yield (
            "model.depth_scaled_init",
            "makes the branches depend on the depth once more, beside model.depth_rule completep; leave it null, or "
            "set depth_rule to none",
        )
    needs_factors = model.attention == "mlra" or model.attention_init == "matched-to-mlra"
    if needs_factors and not model.factorised_projections:
        yield (
            "model.factorised_projections",
            "names nothing to factorise; name some of q, k, v, o, or use model.attention=dense",
        )


def _layout(config: Config) -> Failures:
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor
    sizes = {"num_heads": model.num_heads, "ffn_hidden_size": model.ffn_size, "hidden_size": model.hidden_size}
    for name, size in sizes.items():
        if size % tensor:
            yield "parallel.tensor", f"model.{name} {size} is not divisible by it; use one of {_divisors(size)}"
    if model.padded_vocab_size % tensor:
        yield (
            "parallel.tensor",
            f"the padded vocabulary of {model.padded_vocab_size} rows is not divisible by it; choose "
            "model.vocab_padding_multiple divisible by every tensor-parallel degree you want to use",
        )
    if parallel.low_rank_plan == "merged" and model.sigma_reparam:
        yield (
            "parallel.low_rank_plan",
            "takes factors apart that model.sigma_reparam scales together; use replicated or auto",
        )
    if model.num_layers < parallel.pipeline:
        yield (
            "parallel.pipeline",
            f"there are only {model.num_layers} layers (model.num_layers); use at most that many stages",
        )


def _sequence_parallel(config: Config) -> Failures:
    parallel, length = config.parallel, config.train.sequence_length
    if not parallel.sequence_parallel:
        return
    if parallel.tensor == 1:
        yield (
            "parallel.sequence_parallel",
            "splits the sequence over tensor-parallel ranks, and parallel.tensor is 1; set it to false, or "
            "parallel.tensor to 2 or more",
        )
    elif length % parallel.tensor:
        yield (
            "parallel.sequence_parallel",
            f"train.sequence_length {length} is not divisible by parallel.tensor {parallel.tensor}; set it to false, "
            f"or the length to {length - length % parallel.tensor or parallel.tensor}",
        )
    for key in SEQUENCE_PARALLEL_FORBIDS:
        if section_at(config.deepspeed, "pipeline").get(key) is True:
            yield (
                f"deepspeed.pipeline.{key}",
                "needs activations to be equal on all tensor-parallel ranks, and parallel.sequence_parallel splits "
                "them; leave it out",
            )


def _engine(config: Config) -> Failures:
    parallel, stage = config.parallel, zero_stage(config)
    if parallel.engine == "zero" and parallel.pipeline > 1:
        yield (
            "parallel.engine",
            f"cannot run parallel.pipeline {parallel.pipeline} stages; use pipeline or auto, or one stage",
        )
    elif engine_kind(config) == "pipeline" and stage >= 2:
        yield (
            "deepspeed.zero_optimization.stage",
            "cannot be used with the pipeline engine: a pipeline adds up the whole gradient over its micro-batches and "
            "reduces it once at the end, while stages 2 and 3 cut it up after each of them, so DeepSpeed refuses the "
            "pair; use stage 0 or 1, or parallel.pipeline=1 with the zero engine",
        )
    if offload_optimizer(config) and stage == 0:
        yield (
            "deepspeed.zero_optimization.offload_optimizer",
            "needs ZeRO: without a stage the optimizer stays where it is; set zero_optimization.stage to 1, 2 or 3",
        )
    if offload_optimizer(config) and engine_kind(config) == "pipeline":
        yield (
            "deepspeed.zero_optimization.offload_optimizer",
            "is for the zero engine; use parallel.pipeline=1 or take it out",
        )
    if offload_param(config) and stage != 3:
        yield (
            "deepspeed.zero_optimization.offload_param",
            f"works with ZeRO stage 3 only, not {stage}; set zero_optimization.stage to 3 or take it out",
        )


def _compile(config: Config) -> Failures:
    if not config.train.compile:
        return
    if zero_stage(config) == 3:
        yield (
            "train.compile",
            "is not for ZeRO stage 3, whose layers fetch their weights between the operations; use stage 2 or lower",
        )
    options = ("sigma_reparam", "embedding_dropout", "attention_dropout", "residual_dropout")
    untested = [name for name in options if getattr(config.model, name)]
    if untested:
        yield (
            "train.compile",
            f"was not tested with model.{untested[0]}, which does more in a block than compute; leave one of them out",
        )
    if config.parallel.activation_checkpointing == "selective":
        yield (
            "parallel.activation_checkpointing",
            "is what the compiler does by itself (train.compile); use none or block",
        )


def _precision(config: Config, device: str) -> Failures:
    if config.train.precision != "fp16":
        return
    if device == "cpu":
        yield "train.precision", "runs on cuda only; on the CPU use bf16 or fp32"
    if zero_stage(config) == 0:
        yield (
            "train.precision",
            "at ZeRO stage 0 DeepSpeed does not scale the loss; use --ds-config ds_configs/zero1.json, or bf16",
        )


LARGEST_VALUE = 2.0
"""Up to which Newton-Schulz iterations may bring a singular value; the usual ones bring them to 0.68 to 1.21."""
_VALUES = [0.985**power for power in range(1000)]  # from 1 to 3e-7: where iterations begin


def _newton_schulz(config: Config) -> Failures:
    optim = config.optim
    start, end = _worst_value(optim.newton_schulz_coefficients, optim.newton_schulz_steps)
    if not abs(end) <= LARGEST_VALUE:
        yield (
            "optim.newton_schulz_coefficients",
            f"{optim.newton_schulz_steps} iterations s <- a s + b s^3 + c s^5 (optim.newton_schulz_steps) bring the "
            f"singular value {start:.3g} to {end:.3g}, and at most {LARGEST_VALUE:g} is allowed; use others, such as "
            "[3.4445, -4.775, 2.0315] with 5 iterations",
        )


@lru_cache(maxsize=16)
def _worst_value(coefficients: tuple[float, float, float], steps: int) -> tuple[float, float]:
    """Returns the singular value that the iterations bring furthest away, and where to."""
    a, b, c = coefficients
    worst = (0.0, 0.0)
    for start in _VALUES:
        value = start
        for _ in range(steps):
            square = value * value
            value *= a + (b + c * square) * square
        if not abs(value) <= abs(worst[1]):
            worst = (start, value)
        if not isfinite(value):
            break
    return worst


def _schedule(config: Config) -> Failures:
    steps, optim, profile = config.train.steps, config.optim, config.profile
    if optim.warmup_steps > steps:
        yield (
            "optim.warmup_steps",
            f"is longer than the run of {steps} steps (train.steps): the rate would never reach optim.lr",
        )
    elif optim.schedule == "wsd" and optim.warmup_steps + (optim.decay_steps or 0) > steps:
        yield (
            "optim.decay_steps",
            f"does not fit behind {optim.warmup_steps} steps of warm-up into train.steps {steps}; shorten it",
        )
    if optim.schedule == "constant" and optim.decay_steps is not None:
        yield "optim.decay_steps", "a constant schedule has no decay; leave it null"
    if profile.start is not None and profile.stop is not None:
        if profile.stop <= profile.start:
            yield "profile.stop", f"must come after profile.start {profile.start}"
        if profile.start > steps:
            yield "profile.start", f"is after the last step (train.steps {steps})"
    elif profile.start is not None or profile.stop is not None:
        missing = "profile.start" if profile.start is None else "profile.stop"
        yield missing, "give profile.start and profile.stop both, or neither"


def _data(config: Config) -> Failures:
    data, vocabulary = config.data, config.model.vocab_size
    if data.path is not None and data.blend is not None:
        yield "data.blend", "data.path is set as well; give one of them and leave the other null"
    if data.blend is not None and not data.blend:
        yield "data.blend", "is empty; name at least one data set, or use data.path"
    if data.reset_positions and data.document_attention != "masked":
        yield (
            "data.reset_positions",
            "two documents that see each other would share positions; set data.document_attention=masked",
        )
    if data.end_of_document_token is not None and data.end_of_document_token >= vocabulary:
        yield "data.end_of_document_token", f"is no token of a vocabulary of {vocabulary} (model.vocab_size)"


def _stability(config: Config, world_size: int) -> Failures:
    guard, train, parallel, model = config.guard, config.train, config.parallel, config.model
    if config.tev.extremes > model.vocab_size:
        yield "tev.extremes", f"there are only {model.vocab_size} tokens (model.vocab_size)"
    if guard.min_window > guard.window:
        yield "guard.min_window", f"is more than guard.window {guard.window}"
    if guard.enabled and config.checkpoint.every == 0:
        yield (
            "checkpoint.every",
            "leaves the guard no checkpoint to roll back to but the start of the run (guard.enabled is true); set it "
            "to the number of steps that you can afford to lose, or guard.enabled=false",
        )
    for name in ("replay_every", "checksum_every"):
        if getattr(guard, name) > 0 and not guard.enabled:
            yield (
                f"guard.{name}",
                "finds steps that were computed wrong, and only the guard takes a run back from them; set "
                "guard.enabled=true, or it to 0",
            )
    data = world_size // (parallel.tensor * parallel.pipeline)
    if config.gradients.noise_every > 0 and train.global_batch_size < 2 * data * train.micro_batch_size:
        yield (
            "gradients.noise_every",
            "compares the gradient of one micro-batch per data rank with that of the global batch, and these are the "
            "same here; lower train.micro_batch_size, raise train.global_batch_size, or set it to 0",
        )
    if config.qk_clip.samples is not None and config.qk_clip.samples > train.global_batch_size:
        yield (
            "qk_clip.samples",
            f"is more than a step has (train.global_batch_size {train.global_batch_size}); set it to null for all",
        )
    undoing = [name for name in ("qk_norm", "sigma_reparam") if getattr(model, name)]
    if config.qk_clip.threshold is not None and undoing:
        yield (
            "qk_clip.threshold",
            f"makes query and key weights smaller, and model.{undoing[0]} divides by their size: it would clip for "
            "ever and change nothing; leave it null, or the option false",
        )
    if config.gradients.spectral_iterations > 0 and model.sigma_reparam:
        yield (
            "gradients.spectral_iterations",
            "measures weights as they are stored, and model.sigma_reparam computes with others; set it to 0 (the gain "
            "of a map is its largest singular value)",
        )


def _evaluation(config: Config) -> Failures:
    evaluation, export = config.evaluation, config.export
    if equal := equal_names(evaluation.tasks):
        yield (
            "evaluation.tasks",
            f"has two texts of the name {equal[0]}, which the record cannot tell apart; name one NAME=SOURCE",
        )
    if evaluation.task_stride is not None and evaluation.task_stride >= config.train.sequence_length:
        yield (
            "evaluation.task_stride",
            f"must be less than a window, which is train.sequence_length {config.train.sequence_length}",
        )
    if export.format == "gpt2" and config.model.qk_norm:
        yield "export.format", "gpt2 has no QK-norm (model.qk_norm); use mlra"
    if export.format is None and export.repository is not None:
        yield "export.repository", "is where an export goes, and export.format is null; choose gpt2 or mlra"


def _cluster(config: Config) -> Failures:
    minutes, timeout = config.cluster.hang_minutes, config.parallel.timeout_minutes
    if minutes is not None and minutes >= timeout:
        yield (
            "cluster.hang_minutes",
            f"must be less than parallel.timeout_minutes {timeout}, after which stuck ranks end by themselves and the "
            "first stuck rank cannot be found any more",
        )
