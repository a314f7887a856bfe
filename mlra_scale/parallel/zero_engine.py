"""The ZeRO engine: TP x DP, ZeRO stages 0 to 3, the whole model on every rank."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from mlra_scale.config import BatchPlan, Config, zero_stage
from mlra_scale.model.attention import SelfAttention
from mlra_scale.model.context import ModelContext
from mlra_scale.model.gpt import GPT, OutputHead
from mlra_scale.parallel.engine import Engine
from mlra_scale.parallel.optimizer import build_optimizer, parameter_groups
from mlra_scale.parallel.step import Between, MicroBatch
from mlra_scale.parallel.topology import Topology


class ZeroEngine(Engine):
    """DeepSpeed's plain engine around the whole model."""

    def __init__(
        self,
        config: Config,
        plan: BatchPlan,
        topology: Topology,
        context: ModelContext,
        adam_begun_at: Mapping[str, int],
    ) -> None:
        super().__init__(config, plan, topology, adam_begun_at)
        unit = _model_parallel_unit(topology)
        # The data group must be given to zero.Init too: with mpu alone, parameters are partitioned over the world.
        with deepspeed.zero.Init(
            enabled=zero_stage(config) == 3,
            data_parallel_group=topology.data_group,
            config_dict_or_path=self._settings,
            mpu=unit,
        ):
            model = GPT(context)
        if zero_stage(config) == 3:
            _register_read_parameters(model)
        named = dict(model.named_parameters())
        assert set(named) == set(self.table), set(named) ^ set(self.table)
        optimizer = build_optimizer(config, parameter_groups(named, self.rules, self.adam_begun_at))
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._settings, mpu=unit, dist_init_required=False
        )
        self._assert_same_groups(engine)
        self._losses = torch.zeros((), device=topology.device)
        self._install(engine, named, tied_copies=frozenset())

    def _assert_same_groups(self, engine: Any) -> None:
        """DeepSpeed must reduce gradients over our data group, or they mix silently."""
        theirs = dist.get_process_group_ranks(engine.seq_data_parallel_group)
        assert theirs == dist.get_process_group_ranks(self.topology.data_group), theirs
        assert engine.mp_world_size == self.topology.tensor, engine.mp_world_size

    def _run(self, batches: Sequence[MicroBatch], between: Between | None) -> None:
        engine = self.deepspeed_engine
        engine.train()
        self._losses.zero_()
        for batch in batches:
            if between is not None:
                between()
            loss = engine(*self._inputs(batch))
            engine.backward(loss)
            self._losses += loss.detach()
            engine.step()

    def _local_loss(self) -> torch.Tensor:
        return self._losses if self.topology.tensor_rank == 0 else torch.zeros_like(self._losses)

    @torch.no_grad()
    def eval_batch(self, batches: Sequence[MicroBatch], between: Between | None = None) -> float:
        """See Engine."""
        self.deepspeed_engine.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.topology.device)
        for batch in batches:
            if between is not None:
                between()
            total[0] += self.deepspeed_engine(*self._inputs(batch))
            total[1] += 1
        dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def _inputs(self, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
        return self._on_device(
            batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.sample_ids_B, batch.targets_BS
        )


def _model_parallel_unit(topology: Topology) -> SimpleNamespace:
    """The object through which DeepSpeed's ZeRO engine learns of tensor parallelism (its argument `mpu`).

    It must not offer `initialize_sequence_parallel`: ZeRO 3 would then drop the model-parallel group.
    """
    return SimpleNamespace(
        get_model_parallel_rank=lambda: topology.tensor_rank,
        get_model_parallel_world_size=lambda: topology.tensor,
        get_model_parallel_group=lambda: topology.tensor_group,
        get_tensor_model_parallel_rank=lambda: topology.tensor_rank,
        get_tensor_model_parallel_world_size=lambda: topology.tensor,
        get_tensor_model_parallel_group=lambda: topology.tensor_group,
        get_data_parallel_rank=lambda: topology.data_rank,
        get_data_parallel_world_size=lambda: topology.data,
        get_data_parallel_group=lambda: topology.data_group,
    )


def _register_read_parameters(model: GPT) -> None:
    """Registers with ZeRO 3 the weights that a module reads without calling their owner.

    In its first pass DeepSpeed records which module uses which weight, and it ends with an error if a later pass
    differs. It notices a weight that is read without its module only while the weight is not gathered. Small weights
    (below stage3_param_persistence_threshold) are still gathered in the first pass and are missed.
    """
    for module in model.modules():
        if isinstance(module, SelfAttention | OutputHead):
            for parameter in module.read_parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
