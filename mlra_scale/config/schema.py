"""The configuration schema: every choice that defines a run, with its meaning, its range and its default.

Rules that join several fields, or the number of processes, are in `validation.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from mlra_scale.config import stored_yaml, yaml_text
from mlra_scale.config.model_config import ModelConfig
from mlra_scale.config.optim_config import OptimConfig
from mlra_scale.config.problems import ConfigError, Problem, problems_of
from mlra_scale.config.section import (
    ActivationsConfig,
    GradientsConfig,
    GuardConfig,
    HubName,
    LanguageCode,
    LicenseName,
    Positive,
    QkClipConfig,
    Section,
    Tag,
    TevConfig,
    Text,
)


class DataConfig(Section):
    """Which tokens are read, and how they are cut into samples."""

    path: Text | None = None
    """Folder made by mlra-scale prepare, or a Megatron prefix (PREFIX.bin, PREFIX.idx)."""
    blend: dict[Text, Positive] | None = None
    """Several data sets instead of path: {path: weight}; weights are relative."""
    validation_path: Text | None = None
    """Validation data; null: the split that belongs to the data."""
    validation_fraction: float = Field(0.01, gt=0.0, lt=1.0)
    """For bare Megatron prefixes: the share of last documents kept for validation."""
    tokenizer: Text | None = None
    """Tokenizer that the data must be made with; null: unchecked."""
    document_attention: Literal["across", "masked"] = "across"
    """across: a sample's documents see each other; masked: attention stops at their borders."""
    reset_positions: bool = False
    """Positions start again at 0 with every document; needs document_attention masked."""
    end_of_document_token: int | None = Field(None, ge=0)
    """For bare Megatron prefixes: the token that ends a document."""
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    """Seed of the data order; null: train.seed."""


class TrainConfig(Section):
    """Length, batch and numerics of the run."""

    steps: int = Field(ge=1)
    """Number of optimizer steps."""
    global_batch_size: int = Field(ge=1)
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = Field(ge=1)
    """Sequences that one data-parallel rank passes at once."""
    sequence_length: int = Field(ge=1)
    """Tokens per sequence."""
    seed: int = Field(1234, ge=0, le=2**63 - 1)
    """Seed of initialization and dropout."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute precision; masters stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""
    log_every: int = Field(10, ge=1)
    """Steps between log lines."""
    peak_tflops: float | None = Field(None, gt=0.0)
    """Peak of one device in TFLOP/s, for MFU; null: looked up, or MFU is left out."""
    compile: bool = False
    """Run the blocks through torch.compile (needs a compiler at run time; not with ZeRO 3, dropout or sigmaReparam)."""
    deterministic: bool = False
    """Refuse operations whose result depends on the order in which a GPU's threads finish, and take slower ones
    instead: a resumed run continues bit by bit on a GPU only with it (not measured there). On CPUs it always does."""
    garbage_every: int = Field(100, ge=0)
    """Steps between runs of Python's garbage collector, at the same step on all ranks; 0: when each rank's collector
    runs by itself."""
    max_consecutive_overflows: int = Field(50, ge=1)
    """fp16: this many loss-scale overflows in a row end the run, or make a guard take it back to its last good
    checkpoint."""


LayoutField = Literal[
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.sequence_parallel",
    "parallel.activation_checkpointing",
    "train.micro_batch_size",
    "deepspeed",
]
"""The fields that parallel.layout=auto chooses."""


def _without_sharded(value: Any) -> Any:
    if value == "sharded":
        raise ValueError(f"{stored_yaml.NO_SHARDED}; use auto, replicated or merged")
    return value


class ParallelConfig(Section):
    """How the model is spread over ranks; the data-parallel degree is what remains of the world."""

    layout: Literal["auto", "manual"] = "manual"
    """auto: at every start the planner chooses tensor, pipeline, sequence_parallel, activation_checkpointing,
    train.micro_batch_size and the deepspeed section for the available nodes, devices and memory; it keeps fields that
    are named. The files of slurm/ that start a training set it, sweep.sh does not. manual: nothing is chosen."""
    named_layout_fields: Annotated[tuple[LayoutField, ...], Field(strict=False)] | None = None
    """Written by the planner: the fields of the layout that were named when it chose the others. A resumed run keeps
    them without naming them again. null: no choice was made."""
    tensor: int = Field(1, ge=1)
    """Tensor-parallel degree."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    engine: Literal["auto", "pipeline", "zero"] = "auto"
    """auto: pipeline if there are several stages, else zero."""
    activation_checkpointing: Literal["none", "selective", "block"] = "none"
    """Activations that the backward pass computes again. selective: layer norms and GELU, a third of what a block
    keeps; block: everything but each block's input."""
    low_rank_plan: Annotated[Literal["auto", "replicated", "merged"], BeforeValidator(_without_sharded)] = "auto"
    """How tensor-parallel ranks share factorised q, k, v. replicated: every rank computes the whole latents; merged:
    each forms its slice of the product first; auto: the faster one by a cost model
    (mlra_scale/model/low_rank_plan.py)."""
    sequence_parallel: bool = False
    """Tensor-parallel ranks split the activations between attention and MLP, and the work on them, along the sequence
    instead of repeating it."""
    timeout_minutes: float = Field(10.0, gt=0.0, le=1440.0)
    """After this long a stuck collective fails."""
    world_size: int | None = Field(None, ge=1)
    """Expected number of ranks: checked at start, and used by --dry-run on one process."""


class EvaluationConfig(Section):
    """Validation during training."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only at the end."""
    batches: int = Field(8, ge=1)
    """Global batches per evaluation."""
    tasks: tuple[Text, ...] = Field((), strict=False)
    """What is measured at every checkpoint (docs/evaluation.md): the perplexity of texts (files, folders, globs,
    folders made by mlra-scale prepare, hf:NAME, or lambada, ptb, wikitext-2, wikitext-103 of the Hugging Face hub;
    with a name of yours: NAME=SOURCE), and tasks of lm-evaluation-harness (harness:NAME, or harness:FILE.yaml)."""
    task_stride: int | None = Field(None, ge=1)
    """Distance of the windows of train.sequence_length tokens in which texts are scored; null: half a window."""
    task_tokens: int | None = Field(None, ge=1)
    """Tokens of each text that are read; null: all."""


class CheckpointConfig(Section):
    """Checkpoints during training."""

    every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of steps that are multiples of this are kept as well; 0: none of them."""
    asynchronous: bool = True
    """Copy the state to host memory and write the files during training (the end of a run waits for its last
    checkpoint); false: training waits for the files."""
    differing_copies: Literal["refuse", "report"] = "refuse"
    """If copies of a weight that several ranks hold are not equal bit by bit. refuse: the save fails and the run stops;
    report: the owner's copy is saved, and an event names the weight and the ranks."""


class ExportConfig(Section):
    """The export to Hugging Face's format at the end of a run, into the folder `exported` of the run directory."""

    format: Literal["gpt2", "mlra"] | None = None
    """gpt2: for stock GPT-2; mlra: the factors are kept, and code is shipped; null: nothing is exported."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the written weights."""
    repository: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository of the Hugging Face hub, OWNER/NAME, that the verified export is pushed to; null: none."""
    private: bool = False
    """Make the repository private; one that exists must be private."""
    license: LicenseName | None = None
    """License in the model card, as the hub names it (apache-2.0, cc-by-4.0, ...); null: the card names none."""
    languages: tuple[LanguageCode, ...] = Field((), strict=False)
    """Languages in the model card, by their codes (en)."""
    datasets: tuple[HubName, ...] = Field((), strict=False)
    """Data sets of the hub in the model card that the model was trained on."""


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with a key, otherwise offline, and as WANDB_MODE says where it asks for less; disabled: not at
    all. One rule for all presets."""
    project: Text = "mlra-scale"
    """Project name."""
    name: Text | None = None
    """Run name; null: the run directory's name."""
    tags: tuple[Tag, ...] = Field((), strict=False)
    """Tags of the run, of 64 characters at most."""


class TensorBoardConfig(Section):
    """TensorBoard."""

    enabled: bool = False
    """Write the numbers of the record as event files into RUN/tensorboard; needs the extra tensorboard."""


class ProfileConfig(Section):
    """torch.profiler over a span of steps."""

    start: int | None = Field(None, ge=1)
    """First profiled step, counted from 1; null: no profile."""
    stop: int | None = Field(None, ge=2)
    """First step after start that is no longer profiled."""


class ClusterConfig(Section):
    """How a job on a cluster reacts to failures, for the launcher of slurm/; and the planner's cluster."""

    device: Literal["h100", "a100", "h200", "cpu"] | None = None
    """Device whose constants the planner takes; null: the device found here, and where there is none (a login node)
    h100, or cpu with train.device=cpu."""
    device_memory_gib: float | None = Field(None, gt=0.0, lt=1e6)
    """Memory of a device in GiB that the planner may plan with; null: all memory of the device (a rank's share of the
    node's memory on CPUs), and where there is none that of the device's data sheet."""

    file: Text | None = None
    """Constants of the cluster that `sbatch slurm/check.sh` has measured (docs/cluster_check.md), which the planner
    takes instead of those of a device; null: none."""
    elastic: bool = False
    """Continue with fewer nodes after the loss of one: the data-parallel degree shrinks, the global batch and the
    samples stay. false: the job is queued again for its full size."""
    hang_minutes: float | None = Field(None, gt=0.0)
    """No step, no batch of an evaluation and no save for this long is a hang; null: half of
    parallel.timeout_minutes."""
    start_minutes: float = Field(30.0, gt=0.0)
    """How long ranks may take from their start to the first step."""
    stop_minutes: float = Field(4.0, gt=0.0)
    """How long ranks may take to finish the step and save after a stop signal."""
    max_failures: int = Field(3, ge=1)
    """The job stops after this many failures in a row without a newer checkpoint."""
    max_preemptions: int = Field(10, ge=1)
    """The job stops after this many preemptions in a row without a completed checkpoint."""
    lost_node_seconds: float = Field(30.0, gt=0.0)
    """A node without a heartbeat for this long is lost."""
    spares: bool = False
    """Keep a second set of ranks on the nodes, which have loaded their libraries and wait: a restart on the same nodes
    then takes seconds less. They take host memory (0.37 GB per rank on CPUs, and that of an agent per node) and no
    device; where memory runs out, the system kills them first."""
    step_memory: str = Field("0", pattern=r"^\d+[KMGT]?$")
    """Memory of the ranks on each node, as srun's --mem takes it, such as 400G; 0: all memory that the job has
    there."""
    cpu_bind: str = Field("none", pattern=r"^(none|(map|mask)_(cpu|ldom):[0-9a-fA-Fx,]+)$")
    """Binding of the ranks on each node to its cores, as srun's --cpu-bind takes it for one task per node, such as
    mask_cpu:0xffff; none: the ranks may use all cores that the job has there."""


class Config(Section):
    """The configuration of a run: all that defines it."""

    preset: str | None = None
    """The preset that gives the values of fields that a --config file leaves out. In the config.yaml of a run, which
    has every field, it is a note."""
    model: ModelConfig
    """Shape and initialization of the model."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Training and validation data."""
    train: TrainConfig
    """Length, batch and numerics."""
    optim: OptimConfig
    """Optimizer and schedule."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """Layout over ranks."""
    tev: TevConfig = Field(default_factory=TevConfig)
    """Token embedding variability."""
    gradients: GradientsConfig = Field(default_factory=GradientsConfig)
    """Gradient statistics."""
    activations: ActivationsConfig = Field(default_factory=ActivationsConfig)
    """Activation probe."""
    qk_clip: QkClipConfig = Field(default_factory=QkClipConfig)
    """Bound on attention logits."""
    guard: GuardConfig = Field(default_factory=GuardConfig)
    """Reaction to instability."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Validation."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""
    export: ExportConfig = Field(default_factory=ExportConfig)
    """Export to Hugging Face."""
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    """Weights & Biases."""
    tensorboard: TensorBoardConfig = Field(default_factory=TensorBoardConfig)
    """TensorBoard."""
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    """Profiler."""
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    """Failures on a cluster; the planner's cluster."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own knobs, the content of a --ds-config file; {}: ZeRO stage 0, in bf16 1."""

    @model_validator(mode="before")
    @classmethod
    def _without_idle_rules(cls, values: Any) -> Any:
        return stored_yaml.without_idle_rules(values)

    @property
    def newton_schulz_precision(self) -> Literal["fp32", "bf16"]:
        """Type in which Newton-Schulz iterations compute, and in which matrices are sent for them."""
        given = self.optim.newton_schulz_precision
        if given == "auto":
            return "fp32" if self.train.precision == "fp32" else "bf16"
        return given

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as plain mappings, lists and scalars, every field written out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Returns the configuration as a YAML document that `from_yaml` reads back equal."""
        return yaml_text.dump(stored_yaml.with_version(self.to_dict()))

    @classmethod
    def from_dict(cls, values: Any) -> Config:
        """Builds a configuration from nested mappings as `to_dict` returns them; defaults may be left out.

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

        Raises:
            ConfigError: The text is not YAML, or a field is wrong.
        """
        try:
            values = stored_yaml.parse(text)
        except ValueError as error:
            raise ConfigError([Problem("config", "YAML", str(error))]) from None
        return cls.from_dict(values)
