"""Rules that join several fields or the number of ranks: all of them are checked, all that fail are told."""

from __future__ import annotations

from collections.abc import Iterator

from mlra_scale.config.batch import batch_problems
from mlra_scale.config.deepspeed_json import (
    SEQUENCE_PARALLEL_FORBIDS,
    offload_optimizer,
    offload_param,
    zero_stage,
)
from mlra_scale.config.deepspeed_keys import check_deepspeed_keys
from mlra_scale.config.problems import ConfigError, Problem
from mlra_scale.config.schema import Config


def engine_kind(config: Config) -> str:
    """Returns the engine that "auto" stands for: "pipeline" with several stages, otherwise "zero"."""
    if config.parallel.engine != "auto":
        return config.parallel.engine
    return "pipeline" if config.parallel.pipeline > 1 else "zero"


def validate(config: Config, world_size: int, device: str | None = None) -> None:
    """Checks everything that needs more than one field.

    Args:
        config: The configuration.
        world_size: Number of ranks that run (or, for a dry run, would run) it.
        device: "cpu" or "cuda" where train.device "auto" has been resolved; None takes train.device as it stands.

    Raises:
        ConfigError: With every problem found.
    """
    problems = [
        *_shape_problems(config),
        *_attention_problems(config),
        *_layout_problems(config),
        *_sequence_parallel_problems(config),
        *batch_problems(config, world_size),
        *_engine_problems(config),
        *_run_problems(config, device or config.train.device),
        *_data_problems(config),
        *_stability_problems(config, world_size),
        *_cluster_problems(config),
        *check_deepspeed_keys(config.deepspeed),
    ]
    if problems:
        raise ConfigError(problems)


def _divisors(number: int, limit: int = 64) -> str:
    """Lists the divisors of a number up to a limit, for remedies that say what would fit."""
    return ", ".join(str(d) for d in range(1, min(number, limit) + 1) if number % d == 0)


def _shape_problems(config: Config) -> Iterator[Problem]:
    model, train = config.model, config.train
    if model.hidden_size % model.num_heads:
        yield Problem(
            "model.num_heads",
            model.num_heads,
            f"model.hidden_size {model.hidden_size} is not divisible by it; use one of {_divisors(model.hidden_size)}",
        )
    if train.sequence_length > model.max_positions:
        yield Problem(
            "train.sequence_length",
            train.sequence_length,
            f"is longer than model.max_positions {model.max_positions}; shorten it or raise model.max_positions",
        )


def _attention_problems(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.attention_rank is not None and model.attention_rank > model.hidden_size:
        yield Problem(
            "model.attention_rank",
            model.attention_rank,
            f"is larger than model.hidden_size {model.hidden_size}, where a factorisation only adds parameters; "
            f"use at most {model.hidden_size}",
        )
    if model.attention == "mlra" and model.attention_init == "matched-to-mlra":
        yield Problem(
            "model.attention_init",
            model.attention_init,
            "is the control for a dense model; with model.attention mlra use gpt2, xavier or matched",
        )
    if model.attention == "dense" and model.attention_init == "matched":
        yield Problem(
            "model.attention_init",
            model.attention_init,
            "is for factors; with model.attention dense use gpt2, xavier or matched-to-mlra",
        )
    needs_factors = model.attention == "mlra" or model.attention_init == "matched-to-mlra"
    if needs_factors and not model.factorised_projections:
        yield Problem(
            "model.factorised_projections",
            list(model.factorised_projections),
            "names nothing to factorise; name some of q, k, v, o, or use model.attention=dense",
        )


def _layout_problems(config: Config) -> Iterator[Problem]:
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor
    for name, value in (
        ("model.num_heads", model.num_heads),
        ("model.ffn_hidden_size", model.ffn_size),
        ("model.hidden_size", model.hidden_size),
    ):
        if value % tensor:
            yield Problem(
                "parallel.tensor", tensor, f"{name} {value} is not divisible by it; use one of {_divisors(value)}"
            )
    if model.padded_vocab_size % tensor:
        yield Problem(
            "parallel.tensor",
            tensor,
            f"the padded vocabulary of {model.padded_vocab_size} rows is not divisible by it; choose "
            "model.vocab_padding_multiple divisible by every tensor-parallel degree you want to use",
        )
    if parallel.low_rank_plan == "merged" and model.sigma_reparam:
        yield Problem(
            "parallel.low_rank_plan",
            parallel.low_rank_plan,
            "takes factors apart that model.sigma_reparam scales together; use replicated or auto",
        )
    if model.num_layers < parallel.pipeline:
        yield Problem(
            "parallel.pipeline",
            parallel.pipeline,
            f"there are only {model.num_layers} layers (model.num_layers); use at most that many stages",
        )


def _sequence_parallel_problems(config: Config) -> Iterator[Problem]:
    parallel, length = config.parallel, config.train.sequence_length
    if not parallel.sequence_parallel:
        return
    if parallel.tensor == 1:
        yield Problem(
            "parallel.sequence_parallel",
            True,
            "splits the sequence over tensor-parallel ranks, and parallel.tensor is 1; set it to false, or "
            "parallel.tensor to 2 or more",
        )
    elif length % parallel.tensor:
        yield Problem(
            "parallel.sequence_parallel",
            True,
            f"train.sequence_length {length} is not divisible by parallel.tensor {parallel.tensor}; set it to false, "
            f"or the length to {length - length % parallel.tensor or parallel.tensor}",
        )
    pipeline = config.deepspeed.get("pipeline", {})
    for key in SEQUENCE_PARALLEL_FORBIDS:
        if isinstance(pipeline, dict) and pipeline.get(key) is True:
            yield Problem(
                f"deepspeed.pipeline.{key}",
                True,
                "takes activations for the same on all tensor-parallel ranks, and parallel.sequence_parallel splits "
                "them; leave it out",
            )


def _engine_problems(config: Config) -> Iterator[Problem]:
    parallel, stage = config.parallel, zero_stage(config)
    if parallel.engine == "zero" and parallel.pipeline > 1:
        yield Problem(
            "parallel.engine",
            "zero",
            f"cannot run parallel.pipeline {parallel.pipeline} stages; use pipeline or auto, or one stage",
        )
    elif engine_kind(config) == "pipeline" and stage >= 2:
        yield Problem(
            "deepspeed.zero_optimization.stage",
            stage,
            "cannot be used with the pipeline engine: a pipeline adds up the whole gradient over its micro-batches and "
            "reduces it once at the end, while stages 2 and 3 cut it up after each of them, so DeepSpeed refuses the "
            "pair; use stage 0 or 1, or parallel.pipeline=1 with the zero engine",
        )
    if offload_optimizer(config) and stage == 0:
        yield Problem(
            "deepspeed.zero_optimization.offload_optimizer",
            "cpu",
            "needs ZeRO: without a stage the optimizer stays where it is; set zero_optimization.stage to 1, 2 or 3",
        )
    if offload_optimizer(config) and engine_kind(config) == "pipeline":
        yield Problem(
            "deepspeed.zero_optimization.offload_optimizer",
            "cpu",
            "is for the zero engine; use parallel.pipeline=1 or take it out",
        )
    if offload_param(config) and stage != 3:
        yield Problem(
            "deepspeed.zero_optimization.offload_param",
            "cpu",
            f"works with ZeRO stage 3 only, not {stage}; set zero_optimization.stage to 3 or take it out",
        )
    if config.train.compile and stage == 3:
        yield Problem(
            "train.compile",
            True,
            "is not for ZeRO stage 3, whose layers fetch their weights between the operations; use stage 2 or lower",
        )
    random = [name for name in ("embedding", "attention", "residual") if getattr(config.model, f"{name}_dropout") > 0]
    if config.train.compile and (config.model.sigma_reparam or random):
        field = "model.sigma_reparam" if config.model.sigma_reparam else f"model.{random[0]}_dropout"
        yield Problem(
            "train.compile",
            True,
            f"was not tested with {field}, which does more in a block than compute; leave one of them out",
        )
    if config.train.compile and parallel.activation_checkpointing == "selective":
        yield Problem(
            "parallel.activation_checkpointing",
            "selective",
            "is what the compiler does by itself (train.compile); use none or block",
        )


def _run_problems(config: Config, device: str) -> Iterator[Problem]:
    train, optim, profile = config.train, config.optim, config.profile
    if train.precision == "fp16" and device == "cpu":
        yield Problem("train.precision", "fp16", "runs on cuda only; on the CPU use bf16 or fp32")
    if train.precision == "fp16" and zero_stage(config) == 0:
        yield Problem(
            "train.precision",
            "fp16",
            "at ZeRO stage 0 DeepSpeed does not scale the loss; use --ds-config ds_configs/zero1.json, or bf16",
        )
    if optim.warmup_steps > train.steps:
        yield Problem(
            "optim.warmup_steps",
            optim.warmup_steps,
            f"is longer than the run of {train.steps} steps (train.steps): the rate would never reach optim.lr",
        )
    elif optim.schedule == "wsd" and optim.warmup_steps + (optim.decay_steps or 0) > train.steps:
        yield Problem(
            "optim.decay_steps",
            optim.decay_steps,
            f"does not fit behind {optim.warmup_steps} steps of warm-up into train.steps {train.steps}; shorten it",
        )
    if optim.schedule == "constant" and optim.decay_steps is not None:
        yield Problem("optim.decay_steps", optim.decay_steps, "a constant schedule has no decay; leave it null")
    if (profile.start is None) != (profile.stop is None):
        missing = "profile.start" if profile.start is None else "profile.stop"
        yield Problem(missing, None, "give profile.start and profile.stop both, or neither")
    elif profile.start is not None and profile.stop is not None:
        if profile.stop <= profile.start:
            yield Problem("profile.stop", profile.stop, f"must come after profile.start {profile.start}")
        if profile.start > train.steps:
            yield Problem("profile.start", profile.start, f"is after the last step (train.steps {train.steps})")
    if config.tev.extremes > config.model.vocab_size:
        yield Problem(
            "tev.extremes", config.tev.extremes, f"there are only {config.model.vocab_size} tokens (model.vocab_size)"
        )


def _stability_problems(config: Config, world_size: int) -> Iterator[Problem]:
    guard, train, parallel = config.guard, config.train, config.parallel
    if guard.min_window > guard.window:
        yield Problem("guard.min_window", guard.min_window, f"is more than guard.window {guard.window}")
    if guard.enabled and config.checkpoint.every == 0:
        yield Problem(
            "checkpoint.every",
            0,
            "leaves the guard nothing to go back to but where the run began (guard.enabled is true); set it to the "
            "number of steps that you can afford to lose, or guard.enabled=false",
        )
    data = world_size // (parallel.tensor * parallel.pipeline)
    if config.gradients.noise_every > 0 and train.global_batch_size < 2 * data * train.micro_batch_size:
        yield Problem(
            "gradients.noise_every",
            config.gradients.noise_every,
            "compares the gradient of one micro-batch per data rank with that of the global batch, and these are the "
            "same here; lower train.micro_batch_size, raise train.global_batch_size, or set it to 0",
        )
    samples = config.qk_clip.samples
    if samples is not None and samples > train.global_batch_size:
        yield Problem(
            "qk_clip.samples",
            samples,
            f"is more than a step has (train.global_batch_size {train.global_batch_size}); set it to null for all",
        )
    undoing = [name for name in ("qk_norm", "sigma_reparam") if getattr(config.model, name)]
    if config.qk_clip.threshold is not None and undoing:
        yield Problem(
            "qk_clip.threshold",
            config.qk_clip.threshold,
            f"makes query and key weights smaller, and model.{undoing[0]} divides by their size: it would clip for "
            "ever and change nothing; leave it null, or the option false",
        )
    if config.gradients.spectral_iterations > 0 and config.model.sigma_reparam:
        yield Problem(
            "gradients.spectral_iterations",
            config.gradients.spectral_iterations,
            "measures weights as they are stored, and model.sigma_reparam computes with others; set it to 0 (the gain "
            "of a map is its largest singular value)",
        )


def _cluster_problems(config: Config) -> Iterator[Problem]:
    minutes, timeout = config.cluster.hang_minutes, config.parallel.timeout_minutes
    if minutes is not None and minutes >= timeout:
        yield Problem(
            "cluster.hang_minutes",
            minutes,
            f"must be less than parallel.timeout_minutes {timeout}, after which stuck ranks end by themselves and "
            "nobody can say any more which of them was the first",
        )


def _data_problems(config: Config) -> Iterator[Problem]:
    data, model = config.data, config.model
    if data.path is not None and data.blend is not None:
        yield Problem("data.blend", data.blend, "data.path is set as well; give one of them and leave the other null")
    if data.blend is not None and not data.blend:
        yield Problem("data.blend", data.blend, "is empty; name at least one data set, or use data.path")
    if data.reset_positions and data.document_attention != "masked":
        yield Problem(
            "data.reset_positions",
            True,
            "two documents that see each other would share positions; set data.document_attention=masked",
        )
    if data.end_of_document_token is not None and data.end_of_document_token >= model.vocab_size:
        yield Problem(
            "data.end_of_document_token",
            data.end_of_document_token,
            f"is no token of a vocabulary of {model.vocab_size} (model.vocab_size)",
        )
