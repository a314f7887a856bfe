"""Chooses and builds the engine that a configuration asks for."""

from collections.abc import Mapping

import torch

from mlra_scale.config import BatchPlan, Config, engine_kind
from mlra_scale.model.context import ModelContext
from mlra_scale.model.document_mask import has_flex_attention
from mlra_scale.model.low_rank_plan import low_rank_plan
from mlra_scale.parallel.engine import Engine
from mlra_scale.parallel.pipeline_engine import PipelineEngine
from mlra_scale.parallel.topology import Topology
from mlra_scale.parallel.zero_engine import ZeroEngine


def build_engine(
    config: Config, plan: BatchPlan, topology: Topology, adam_begun_at: Mapping[str, int] | None = None
) -> Engine:
    """Builds the model on this rank, with initial weights, and the engine around it; collective.

    One stage never builds a pipeline unless `parallel.engine` asks for it. `adam_begun_at`: see Engine; that of the
    checkpoint to be loaded.
    """
    if config.train.compile:
        # All blocks share their graphs, but there is one for training and one for evaluation of every shape of a map;
        # above its limit the compiler would stop compiling without an error.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    context = ModelContext(
        model=config.model,
        seed=config.train.seed,
        tensor_group=topology.tensor_group,
        has_document_mask=config.data.document_attention == "masked",
        activation_checkpointing=config.parallel.activation_checkpointing,
        has_compiled_blocks=config.train.compile,
        low_rank_plan=low_rank_plan(config, plan, topology.device.type),
        has_sequence_parallel=config.parallel.sequence_parallel,
        has_flex_attention=has_flex_attention(topology.device.type, config.train.precision, config.model),
    )
    engine_class = PipelineEngine if engine_kind(config) == "pipeline" else ZeroEngine
    return engine_class(config, plan, topology, context, adam_begun_at or {})
