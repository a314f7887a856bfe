"""Rules over several fields: each fails with its field and remedy, and all that fail are told together."""

from typing import Any

import pytest

from mlra_scale.config import BatchPlan, Config, ConfigError, batch_plan, engine_kind, preset, validate

ZERO = {stage: {"zero_optimization": {"stage": stage}} for stage in (0, 1, 2, 3)}


def debug(**sections: dict[str, Any]) -> Config:
    values = preset("debug").to_dict()
    for name, fields in sections.items():
        values[name] = {**values[name], **fields}
    return Config.from_dict(values)


def problems(config: Config, world_size: int = 1, device: str | None = None) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size, device)
    return [(problem.field, problem.remedy) for problem in caught.value.problems]


ZERO_1 = {"deepspeed": {"zero_optimization": {"stage": 1}}}


@pytest.mark.parametrize(
    ("sections", "world_size", "field", "remedy"),
    [
        (
            {"model": {"num_heads": 5}},
            1,
            "model.num_heads",
            "hidden_size 64 is not divisible by it; use one of 1, 2, 4",
        ),
        ({"model": {"attention_rank": 65}}, 1, "model.attention_rank", "use at most 64"),
        ({"model": {"qk_norm": True}, "qk_clip": {"threshold": 90.0}}, 1, "qk_clip.threshold", "model.qk_norm divides"),
        (
            {"model": {"sigma_reparam": True}, "qk_clip": {"threshold": 90.0}},
            1,
            "qk_clip.threshold",
            "model.sigma_reparam divides by their size",
        ),
        (
            {"model": {"sigma_reparam": True}, "gradients": {"spectral_iterations": 3}},
            1,
            "gradients.spectral_iterations",
            "measures weights as they are stored",
        ),
        (
            {"guard": {"enabled": True}, "checkpoint": {"every": 0}},
            1,
            "checkpoint.every",
            "set it to the number of steps that you can afford to lose",
        ),
        ({"train": {"sequence_length": 65}}, 1, "train.sequence_length", "longer than model.max_positions 64"),
        (
            {"parallel": {"tensor": 8}},
            8,
            "parallel.tensor",
            "model.num_heads 4 is not divisible by it; use one of 1, 2, 4",
        ),
        (
            {"parallel": {"tensor": 2}, "model": {"ffn_hidden_size": 7}},
            2,
            "parallel.tensor",
            "model.ffn_hidden_size 7 is not divisible by it; use one of 1, 7",
        ),
        (
            {"parallel": {"tensor": 2}, "model": {"vocab_size": 33, "vocab_padding_multiple": 1}},
            2,
            "parallel.tensor",
            "padded vocabulary of 33 rows is not divisible by it; choose model.vocab_padding_multiple",
        ),
        ({"parallel": {"pipeline": 5}}, 5, "parallel.pipeline", "only 4 layers (model.num_layers)"),
        (
            {"parallel": {"pipeline": 2}, "deepspeed": ZERO[2]},
            2,
            "deepspeed.zero_optimization.stage",
            "DeepSpeed refuses",
        ),
        (
            {"parallel": {"pipeline": 2}, "deepspeed": ZERO[3]},
            2,
            "deepspeed.zero_optimization.stage",
            "use stage 0 or 1",
        ),
        ({"parallel": {"engine": "pipeline"}, "deepspeed": ZERO[2]}, 1, "deepspeed.zero_optimization.stage", "adds up"),
        ({"parallel": {"engine": "zero", "pipeline": 2}}, 2, "parallel.engine", "use pipeline or auto, or one stage"),
        ({"train": {"global_batch_size": 9}}, 1, "train.global_batch_size", "use 8 or 10"),
        ({"train": {"global_batch_size": 1}}, 1, "train.global_batch_size", "use 2, or another micro-batch"),
        ({}, 3, "train.global_batch_size", "micro_batch_size 2 times 3 data-parallel ranks; use 6 or 12"),
        (
            {"parallel": {"tensor": 2, "pipeline": 2}},
            6,
            "parallel.tensor * parallel.pipeline",
            "6 ranks are not divisible by 2 * 2; start a multiple of 4 ranks",
        ),
        (
            {"parallel": {"world_size": 4}},
            2,
            "parallel.world_size",
            "2 ranks are running; start 4 or correct the field",
        ),
        ({"train": {"precision": "fp16", "device": "cpu"}, **ZERO_1}, 1, "train.precision", "on the CPU use bf16"),
        ({"train": {"precision": "fp16"}}, 1, "train.precision", "ds_configs/zero1.json"),
        ({"optim": {"warmup_steps": 21}}, 1, "optim.warmup_steps", "longer than the run of 20 steps"),
        (
            {"optim": {"schedule": "wsd", "warmup_steps": 15, "decay_steps": 6}},
            1,
            "optim.decay_steps",
            "does not fit behind 15 steps of warm-up into train.steps 20",
        ),
        ({"optim": {"schedule": "constant", "decay_steps": 6}}, 1, "optim.decay_steps", "leave it null"),
        ({"profile": {"start": 3}}, 1, "profile.stop", "give profile.start and profile.stop both"),
        ({"profile": {"stop": 3}}, 1, "profile.start", "give profile.start and profile.stop both"),
        ({"profile": {"start": 3, "stop": 3}}, 1, "profile.stop", "must come after profile.start 3"),
        ({"profile": {"start": 21, "stop": 22}}, 1, "profile.start", "is after the last step (train.steps 20)"),
        ({"tev": {"extremes": 513}}, 1, "tev.extremes", "only 512 tokens"),
        ({"qk_clip": {"samples": 9}}, 1, "qk_clip.samples", "more than a step has (train.global_batch_size 8)"),
        ({"model": {"attention_init": "matched-to-mlra"}}, 1, "model.attention_init", "use gpt2, xavier or matched"),
        (
            {"model": {"attention": "dense", "attention_init": "matched"}},
            1,
            "model.attention_init",
            "use gpt2, xavier or matched-to-mlra",
        ),
        ({"model": {"factorised_projections": []}}, 1, "model.factorised_projections", "name some of q, k, v, o"),
        (
            {"model": {"attention": "dense", "attention_init": "matched-to-mlra", "factorised_projections": []}},
            1,
            "model.factorised_projections",
            "name some of q, k, v, o",
        ),
        ({"data": {"path": "a", "blend": {"b": 1}}}, 1, "data.blend", "data.path is set as well"),
        ({"data": {"blend": {}}}, 1, "data.blend", "is empty"),
        ({"data": {"reset_positions": True}}, 1, "data.reset_positions", "set data.document_attention=masked"),
        ({"data": {"end_of_document_token": 512}}, 1, "data.end_of_document_token", "no token of a vocabulary of 512"),
        (
            {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
            1,
            "deepspeed.zero_optimization.offload_optimizer",
            "set zero_optimization.stage to 1, 2 or 3",
        ),
        (
            {
                "parallel": {"pipeline": 2},
                "deepspeed": {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            },
            2,
            "deepspeed.zero_optimization.offload_optimizer",
            "is for the zero engine",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}},
            1,
            "deepspeed.zero_optimization.offload_param",
            "ZeRO stage 3 only, not 2",
        ),
        ({"train": {"compile": True}, "model": {"sigma_reparam": True}}, 1, "train.compile", "leave one of them out"),
        (
            {"train": {"compile": True}, "model": {"residual_dropout": 0.1}},
            1,
            "train.compile",
            "model.residual_dropout",
        ),
        ({"train": {"compile": True}, "deepspeed": ZERO[3]}, 1, "train.compile", "use stage 2 or lower"),
        (
            {"train": {"compile": True}, "parallel": {"activation_checkpointing": "selective"}},
            1,
            "parallel.activation_checkpointing",
            "use none or block",
        ),
        ({"deepspeed": {"train_batch_size": 8}}, 1, "deepspeed.train_batch_size", "set train.global_batch_size"),
        (
            {"parallel": {"sequence_parallel": True}},
            1,
            "parallel.sequence_parallel",
            "parallel.tensor is 1; set it to false, or parallel.tensor to 2 or more",
        ),
        (
            {"parallel": {"sequence_parallel": True, "tensor": 4}, "train": {"sequence_length": 63}},
            4,
            "parallel.sequence_parallel",
            "63 is not divisible by parallel.tensor 4; set it to false, or the length to 60",
        ),
        (
            {
                "parallel": {"sequence_parallel": True, "tensor": 2, "pipeline": 2},
                "deepspeed": {"pipeline": {"pipe_partitioned": True, "grad_partitioned": False}},
            },
            4,
            "deepspeed.pipeline.pipe_partitioned",
            "parallel.sequence_parallel splits them; leave it out",
        ),
        (
            {"cluster": {"hang_minutes": 5.0}, "parallel": {"timeout_minutes": 5.0}},
            1,
            "cluster.hang_minutes",
            "must be less than parallel.timeout_minutes 5.0, after which stuck ranks end by themselves",
        ),
    ],
)
def test_each_rule(sections: dict[str, dict[str, Any]], world_size: int, field: str, remedy: str) -> None:
    found = problems(debug(**sections), world_size)
    assert [name for name, _ in found] == [field]
    assert remedy in found[0][1]


@pytest.mark.parametrize(
    ("sections", "world_size"),
    [
        ({"parallel": {"tensor": 4}}, 4),
        ({"parallel": {"pipeline": 4}, "deepspeed": ZERO[1]}, 8),
        ({"parallel": {"tensor": 2, "pipeline": 2, "world_size": 4}}, 4),
        ({"parallel": {"engine": "pipeline"}, "deepspeed": ZERO[1]}, 1),
        ({"parallel": {"engine": "zero"}, "deepspeed": ZERO[3]}, 2),
        ({"model": {"attention": "dense", "attention_init": "matched-to-mlra"}}, 1),
        ({"model": {"attention": "dense", "factorised_projections": []}}, 1),
        ({"model": {"attention_rank": 64, "factorised_projections": ["q", "k", "v", "o"]}}, 1),
        ({"optim": {"warmup_steps": 20}}, 1),
        ({"optim": {"schedule": "wsd", "warmup_steps": 14, "decay_steps": 6}}, 1),
        ({"profile": {"start": 20, "stop": 22}}, 1),
        ({"data": {"reset_positions": True, "document_attention": "masked"}}, 1),
        ({"train": {"precision": "fp16"}, **ZERO_1}, 1),
        ({"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}}, 1),
        ({"deepspeed": {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "none"}}}}, 1),
        ({"cluster": {"hang_minutes": 4.9}, "parallel": {"timeout_minutes": 5.0}}, 1),
        ({"model": {"qk_norm": True, "sigma_reparam": True, "layer_norm_scaling": True, "depth_scaled_init": True}}, 1),
        ({"model": {"qk_norm": True}, "gradients": {"spectral_iterations": 3}}, 1),
        ({"model": {"layer_norm_scaling": True}, "qk_clip": {"threshold": 90.0}}, 1),
        ({"parallel": {"sequence_parallel": True, "tensor": 2}, "model": {"attention": "dense"}}, 2),
        ({"train": {"compile": True}, "parallel": {"tensor": 2}}, 4),
        ({"parallel": {"sequence_parallel": True, "tensor": 2, "pipeline": 2}, "model": {"sigma_reparam": True}}, 4),
        ({"parallel": {"tensor": 2, "pipeline": 2}, "deepspeed": {"pipeline": {"pipe_partitioned": True}}}, 4),
    ],
)
def test_what_is_allowed(sections: dict[str, dict[str, Any]], world_size: int) -> None:
    validate(debug(**sections), world_size)


def test_fp16_is_judged_by_the_device_it_will_run_on() -> None:
    config = debug(train={"precision": "fp16"}, **ZERO_1)
    validate(config, 1, device="cuda")
    assert [field for field, _ in problems(config, device="cpu")] == ["train.precision"]


def test_all_problems_are_told_at_once() -> None:
    config = debug(
        model={"num_heads": 3, "attention_rank": 100},
        train={"global_batch_size": 3, "sequence_length": 65},
        optim={"warmup_steps": 100},
        parallel={"tensor": 2, "pipeline": 8},
        deepspeed={"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}},
    )
    fields = [field for field, _ in problems(config, 16)]
    assert fields == [
        "model.num_heads",
        "train.sequence_length",
        "model.attention_rank",
        "parallel.tensor",
        "parallel.pipeline",
        "train.global_batch_size",
        "deepspeed.zero_optimization.stage",
        "optim.warmup_steps",
        "deepspeed.fp16",
    ]
    with pytest.raises(ConfigError) as caught:
        validate(config, 16)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).split("\n") == [str(problem) for problem in caught.value.problems]


def test_the_batch_plan() -> None:
    config = debug(parallel={"tensor": 2, "pipeline": 2}, train={"global_batch_size": 24, "micro_batch_size": 2})
    assert batch_plan(config, 12) == BatchPlan(
        world_size=12,
        tensor=2,
        pipeline=2,
        data=3,
        micro_batch_size=2,
        accumulation_steps=4,
        global_batch_size=24,
        sequence_length=64,
        tokens_per_step=24 * 64,
    )
    with pytest.raises(ConfigError, match=r"not divisible by 2 \* 2"):
        batch_plan(config, 6)
    with pytest.raises(ConfigError, match=r"train\.global_batch_size"):
        batch_plan(config, 20)


@pytest.mark.parametrize(
    ("engine", "pipeline", "kind"),
    [("auto", 1, "zero"), ("auto", 2, "pipeline"), ("pipeline", 1, "pipeline"), ("zero", 1, "zero")],
)
def test_the_engine_that_auto_stands_for(engine: str, pipeline: int, kind: str) -> None:
    assert engine_kind(debug(parallel={"engine": engine, "pipeline": pipeline})) == kind
