"""Configuration: schema, presets, loading, validation and the DeepSpeed merge. Imports neither torch nor deepspeed."""

from mlra_scale.config.batch import BatchPlan, batch_plan
from mlra_scale.config.deepspeed_json import deepspeed_config, offload_optimizer, offload_param, zero_stage
from mlra_scale.config.loading import Named, load_config, load_named_config
from mlra_scale.config.model_config import ModelConfig
from mlra_scale.config.optim_config import OptimConfig, OptimizerName, ParameterRule
from mlra_scale.config.presets import preset, preset_names
from mlra_scale.config.problems import ConfigError, Problem
from mlra_scale.config.schema import ClusterConfig, Config, DataConfig, ExportConfig, ProfileConfig, TrainConfig
from mlra_scale.config.section import ActivationsConfig, GradientsConfig, GuardConfig, QkClipConfig, TevConfig
from mlra_scale.config.validation import config_problems, engine_kind
