"""Rules over several fields: each fails with its field and remedy, and all that fail are reported together."""

import pytest

from mlra_scale.config import BatchPlan, Config, ConfigError, batch_plan, engine_kind, load_config, preset
from mlra_scale.model.validation import validate

# Two lines per rule: overrides of the debug preset and "@ranks" (if not 1), then the field that fails and a part of its
# remedy. "zero." stands for deepspeed.zero_optimization.
RULES = """
model.num_heads=5
    model.num_heads: hidden_size 64 is not divisible by it; use one of 1, 2, 4
model.attention_rank=65
    model.attention_rank: use at most 64
model.qk_norm=true qk_clip.threshold=90.0
    qk_clip.threshold: model.qk_norm divides
model.sigma_reparam=true qk_clip.threshold=90.0
    qk_clip.threshold: model.sigma_reparam divides by their size
model.sigma_reparam=true gradients.spectral_iterations=3
    gradients.spectral_iterations: measures weights as they are stored
model.depth_rule=completep model.layer_norm_scaling=true
    model.depth_rule: is a rule for the depth, and model.layer_norm_scaling is another one; set depth_rule to none, or layer_norm_scaling to false
model.depth_rule=completep model.depth_scaled_init=true
    model.depth_scaled_init: depend on the depth once more, beside model.depth_rule completep; leave it null
guard.enabled=true checkpoint.every=0
    checkpoint.every: set it to the number of steps that you can afford to lose
guard.replay_every=100
    guard.replay_every: only the guard takes a run back from them; set guard.enabled=true, or it to 0
guard.checksum_every=1
    guard.checksum_every: finds steps that were computed wrong
optim.newton_schulz_coefficients=[30,4,2]
    optim.newton_schulz_coefficients: 5 iterations s <- a s + b s^3 + c s^5 (optim.newton_schulz_steps) bring the singular value 1 to inf, and at most 2
optim.newton_schulz_coefficients=[1.0,0.0,0.3] optim.newton_schulz_steps=2
    optim.newton_schulz_coefficients: 2 iterations s <- a s + b s^3 + c s^5 (optim.newton_schulz_steps) bring the singular value 1 to 2.41
optim.newton_schulz_coefficients=[4.0,-7.0,0.5] optim.newton_schulz_steps=1
    optim.newton_schulz_coefficients: bring the singular value 1 to -2.5, and
optim.newton_schulz_coefficients=[8.0,-14.0,7.0] optim.newton_schulz_steps=1
    optim.newton_schulz_coefficients: bring the singular value 0.484 to 2.47
train.sequence_length=65
    train.sequence_length: longer than model.max_positions 64
parallel.tensor=8 @8
    parallel.tensor: model.num_heads 4 is not divisible by it; use one of 1, 2, 4
parallel.tensor=2 model.ffn_hidden_size=7 @2
    parallel.tensor: model.ffn_hidden_size 7 is not divisible by it; use one of 1, 7
parallel.tensor=2 model.vocab_size=33 model.vocab_padding_multiple=1 @2
    parallel.tensor: padded vocabulary of 33 rows is not divisible by it; choose model.vocab_padding_multiple
parallel.pipeline=5 @5
    parallel.pipeline: only 4 layers (model.num_layers)
parallel.pipeline=2 zero.stage=2 @2
    zero.stage: DeepSpeed refuses
parallel.pipeline=2 zero.stage=3 @2
    zero.stage: use stage 0 or 1
parallel.engine=pipeline zero.stage=2
    zero.stage: adds up
parallel.engine=zero parallel.pipeline=2 @2
    parallel.engine: use pipeline or auto, or one stage
train.global_batch_size=9
    train.global_batch_size: use 8 or 10
train.global_batch_size=1
    train.global_batch_size: use 2, or another micro-batch
train.seed=1 @3
    train.global_batch_size: micro_batch_size 2 times 3 data-parallel ranks; use 6 or 12
parallel.tensor=2 parallel.pipeline=2 @6
    parallel.tensor * parallel.pipeline: 6 ranks are not divisible by 2 * 2; start a multiple of 4 ranks
parallel.world_size=4 @2
    parallel.world_size: 2 ranks are running; start 4 or correct the field
train.precision=fp16 train.device=cpu zero.stage=1
    train.precision: on the CPU use bf16
train.precision=fp16
    train.precision: ds_configs/zero1.json
optim.warmup_steps=21
    optim.warmup_steps: longer than the run of 20 steps
optim.schedule=wsd optim.warmup_steps=15 optim.decay_steps=6
    optim.decay_steps: does not fit behind 15 steps of warm-up into train.steps 20
optim.schedule=constant optim.decay_steps=6
    optim.decay_steps: leave it null
profile.start=3
    profile.stop: give profile.start and profile.stop both
profile.stop=3
    profile.start: give profile.start and profile.stop both
profile.start=3 profile.stop=3
    profile.stop: must come after profile.start 3
profile.start=21 profile.stop=22
    profile.start: is after the last step (train.steps 20)
tev.extremes=513
    tev.extremes: only 512 tokens
qk_clip.samples=9
    qk_clip.samples: more than a step has (train.global_batch_size 8)
model.attention_init=matched-to-mlra
    model.attention_init: use gpt2, xavier or matched
model.attention=dense model.attention_init=matched
    model.attention_init: use gpt2, xavier or matched-to-mlra
model.factorised_projections=[]
    model.factorised_projections: name some of q, k, v, o
model.attention=dense model.attention_init=matched-to-mlra model.factorised_projections=[]
    model.factorised_projections: name some of q, k, v, o
data.path=a data.blend={"b":1}
    data.blend: data.path is set as well
data.blend={}
    data.blend: is empty
data.reset_positions=true
    data.reset_positions: set data.document_attention=masked
data.end_of_document_token=512
    data.end_of_document_token: no token of a vocabulary of 512
zero.offload_optimizer.device=cpu
    zero.offload_optimizer: set zero_optimization.stage to 1, 2 or 3
parallel.pipeline=2 zero.stage=1 zero.offload_optimizer.device=cpu @2
    zero.offload_optimizer: is for the zero engine
zero.stage=2 zero.offload_param.device=cpu
    zero.offload_param: ZeRO stage 3 only, not 2
train.compile=true model.sigma_reparam=true
    train.compile: leave one of them out
train.compile=true model.residual_dropout=0.1
    train.compile: model.residual_dropout
train.compile=true zero.stage=3
    train.compile: use stage 2 or lower
train.compile=true parallel.activation_checkpointing=selective
    parallel.activation_checkpointing: use none or block
parallel.sequence_parallel=true
    parallel.sequence_parallel: parallel.tensor is 1; set it to false, or parallel.tensor to 2 or more
parallel.sequence_parallel=true parallel.tensor=4 train.sequence_length=63 @4
    parallel.sequence_parallel: 63 is not divisible by parallel.tensor 4; set it to false, or the length to 60
parallel.sequence_parallel=true parallel.tensor=2 parallel.pipeline=2 deepspeed.pipeline.pipe_partitioned=true deepspeed.pipeline.grad_partitioned=false @4
    deepspeed.pipeline.pipe_partitioned: parallel.sequence_parallel splits them; leave it out
evaluation.tasks=["texts/a.txt","more/a.jsonl"]
    evaluation.tasks: has two texts of the name a, which the record cannot tell apart
evaluation.task_stride=64
    evaluation.task_stride: must be less than a window, which is train.sequence_length 64
export.format=gpt2 model.qk_norm=true
    export.format: gpt2 has no QK-norm (model.qk_norm); use mlra
export.repository=me/model
    export.repository: is where an export goes, and export.format is null; choose gpt2 or mlra
cluster.hang_minutes=5.0 parallel.timeout_minutes=5.0
    cluster.hang_minutes: must be less than parallel.timeout_minutes 5.0, after which stuck ranks end by themselves
"""  # noqa: E501

ALLOWED = """
parallel.tensor=4 @4
parallel.pipeline=4 zero.stage=1 @8
parallel.tensor=2 parallel.pipeline=2 parallel.world_size=4 @4
parallel.engine=pipeline zero.stage=1
parallel.engine=zero zero.stage=3 @2
model.attention=dense model.attention_init=matched-to-mlra
model.attention=dense model.factorised_projections=[]
model.attention_rank=64 model.factorised_projections=["q","k","v","o"]
optim.warmup_steps=20
optim.schedule=wsd optim.warmup_steps=14 optim.decay_steps=6
profile.start=20 profile.stop=22
data.reset_positions=true data.document_attention=masked
train.precision=fp16 zero.stage=1
zero.stage=3 zero.offload_optimizer.device=cpu
zero.stage=0 zero.offload_optimizer.device=none
evaluation.tasks=["lambada","ptb","texts/a.txt"] evaluation.task_stride=63
export.format=mlra model.qk_norm=true export.repository=me/model
cluster.hang_minutes=4.9 parallel.timeout_minutes=5.0
model.qk_norm=true model.sigma_reparam=true model.layer_norm_scaling=true model.depth_scaled_init=true
optim.newton_schulz_coefficients=[2.0,-1.5,0.5] optim.newton_schulz_steps=100
optim.newton_schulz_steps=100
model.depth_rule=completep model.qk_norm=true model.sigma_reparam=true model.embedding_scale=sqrt_width
model.depth_rule=completep model.depth_scaled_init=false model.base_depth=1 train.compile=true
model.depth_rule=completep gradients.spectral_iterations=3 qk_clip.threshold=90.0 optim.name=spectron
model.qk_norm=true gradients.spectral_iterations=3
model.layer_norm_scaling=true qk_clip.threshold=90.0
parallel.sequence_parallel=true parallel.tensor=2 model.attention=dense @2
train.compile=true parallel.tensor=2 @4
parallel.sequence_parallel=true parallel.tensor=2 parallel.pipeline=2 model.sigma_reparam=true @4
parallel.tensor=2 parallel.pipeline=2 deepspeed.pipeline.pipe_partitioned=true @4
"""


def debug(overrides: str) -> tuple[Config, int]:
    """The debug preset with overrides, and the number of ranks."""
    text, _, ranks = overrides.replace("zero.", "deepspeed.zero_optimization.").partition(" @")
    return load_config("debug", overrides=text.split()), int(ranks or 1)


def problems(config: Config, world_size: int = 1, device: str | None = None) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size, device)
    return [(problem.field, problem.remedy) for problem in caught.value.problems]


LINES = RULES.strip().split("\n")


@pytest.mark.parametrize(("overrides", "failure"), list(zip(LINES[::2], LINES[1::2], strict=True)))
def test_each_rule(overrides: str, failure: str) -> None:
    field, _, remedy = failure.strip().partition(": ")
    found = problems(*debug(overrides))
    assert [name for name, _ in found] == [field.replace("zero.", "deepspeed.zero_optimization.")]
    assert remedy in found[0][1]


@pytest.mark.parametrize("overrides", ALLOWED.strip().split("\n"))
def test_what_is_allowed(overrides: str) -> None:
    validate(*debug(overrides))


def test_a_stored_configuration_is_checked_for_deepspeeds_keys_too() -> None:
    values = preset("debug").to_dict() | {"deepspeed": {"train_batch_size": 8}}
    ((field, remedy),) = problems(Config.from_dict(values))
    assert field == "deepspeed.train_batch_size" and "set train.global_batch_size" in remedy


def test_fp16_is_judged_by_the_device_it_will_run_on() -> None:
    config, _ = debug("train.precision=fp16 zero.stage=1")
    validate(config, 1, device="cuda")
    assert [field for field, _ in problems(config, device="cpu")] == ["train.precision"]


def test_all_problems_are_reported_together() -> None:
    config, _ = debug(
        "model.num_heads=3 model.attention_rank=100 train.global_batch_size=3 train.sequence_length=65 "
        "optim.warmup_steps=100 parallel.tensor=2 parallel.pipeline=8 zero.stage=3"
    )
    config = config.model_copy(update={"deepspeed": config.deepspeed | {"fp16": {"enabled": True}}})
    assert [field for field, _ in problems(config, 16)] == [
        "model.num_heads",
        "train.sequence_length",
        "model.attention_rank",
        "parallel.tensor",
        "parallel.pipeline",
        "deepspeed.zero_optimization.stage",
        "optim.warmup_steps",
        "train.global_batch_size",
        "deepspeed.fp16",
    ]
    with pytest.raises(ConfigError) as caught:
        validate(config, 16)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).split("\n") == [str(problem) for problem in caught.value.problems]


def test_the_batch_plan() -> None:
    config, _ = debug("parallel.tensor=2 parallel.pipeline=2 train.global_batch_size=24 train.micro_batch_size=2")
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
    config, _ = debug(f"parallel.engine={engine} parallel.pipeline={pipeline}")
    assert engine_kind(config) == kind
