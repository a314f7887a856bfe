"""Configuration: schema, presets, loading, validation and the DeepSpeed merge. Imports neither torch nor deepspeed."""

from mlra_scale.config.batch import BatchPlan, batch_plan
from mlra_scale.config.deepspeed_json import deepspeed_config, offload_optimizer, offload_param, zero_stage
from mlra_scale.config.loading import Named, load_config, load_named_config
from mlra_scale.config.presets import preset, preset_names
from mlra_scale.config.problems import ConfigError, Problem
from mlra_scale.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
    TevConfig,
    TrainConfig,
    WandbConfig,
)
from mlra_scale.config.validation import engine_kind, validate

__all__ = [
    "BatchPlan",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "Named",
    "OptimConfig",
    "ParallelConfig",
    "Problem",
    "ProfileConfig",
    "TevConfig",
    "TrainConfig",
    "WandbConfig",
    "batch_plan",
    "deepspeed_config",
    "engine_kind",
    "load_config",
    "load_named_config",
    "offload_optimizer",
    "offload_param",
    "preset",
    "preset_names",
    "validate",
    "zero_stage",
]
