"""The pipeline engine: TP x PP x DP with ZeRO stages 0 and 1, one pipeline stage per rank."""

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.schedule import BackwardPass, ReduceTiedGrads
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from mlra_scale.config import BatchPlan, Config
from mlra_scale.model.context import ModelContext
from mlra_scale.model.layers import Layer, TokenEmbedding, model_layers
from mlra_scale.parallel.engine import EngineBase
from mlra_scale.parallel.interface import Between, MicroBatch
from mlra_scale.parallel.optimizer import build_optimizer, parameter_groups
from mlra_scale.parallel.topology import Topology


class _BuildLayer(LayerSpec):
    """DeepSpeed's layer description of one of our layers."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.module_class)
        self.layer = layer

    def build(self, log: bool = False) -> nn.Module:
        return self.layer.build()


def _what_the_loss_needs(embedding: TokenEmbedding, hidden_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden state and the weight, from which the loss is made with the head in one.

    The weight goes this way because DeepSpeed clears bf16 gradients when the backward pass reaches the module's
    outputs: that of a weight which the loss had read by itself would be gone.
    """
    return hidden_BSD, embedding.weight.view_as(embedding.weight)


class _BuildTiedLayer(TiedLayerSpec):
    """The token embedding, at both ends of the pipeline; the last stage uses its copy as the head."""

    def __init__(self, layer: Layer, is_head: bool) -> None:
        super().__init__(
            "embedding",
            layer.module_class,
            forward_fn=_what_the_loss_needs if is_head else None,
            tied_weight_attr="weight",
        )
        self.layer = layer

    def build(self, log: bool = False) -> nn.Module:
        return self.layer.build()


def _with_a_group_of_its_own(tied: nn.Parameter | None, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups with the tied embedding, where a stage has it, in one of its own.

    ZeRO then cuts both copies at the same places. Otherwise it cuts the rest of the stage along with them, and Adam
    rounds the last few elements of a piece otherwise than those before (they fill no vector register): the copies would
    drift apart there.
    """
    if tied is None:
        return groups
    found: list[dict[str, Any]] = []
    for group in groups:
        is_tied = [parameter is tied for parameter in group["params"]]
        if any(is_tied):
            found.append({**group, "params": [tied]})
            group = {**group, "params": [other for other in group["params"] if other is not tied]}
        found.append(group)
    return [group for group in found if group["params"]]


class PipelineEngine(EngineBase):
    """DeepSpeed's pipeline engine around the layer list (see parallel.engine.Engine)."""

    def __init__(self, config: Config, plan: BatchPlan, topology: Topology, context: ModelContext) -> None:
        super().__init__(config, plan, topology)
        layers = model_layers(context)
        specs = [_BuildTiedLayer(layers[0], is_head=False), *(_BuildLayer(layer) for layer in layers[1:])]
        specs.append(_BuildTiedLayer(layers[0], is_head=True))
        with contextlib.redirect_stdout(io.StringIO()):  # a listing of every layer
            module: PipelineModule = PipelineModule(
                layers=specs,
                topology=PipeModelDataParallelTopology(topology.pipeline, topology.tensor, topology.data),
                loss_fn=lambda outputs, targets_BS: module.tied_modules["embedding"].loss(
                    *outputs, targets_BS, module.training
                ),
                partition_method="type:^Block$",
            )
        self._assert_same_groups(module)
        named = self._canonical_names(module, [layer.name for layer in layers])
        groups = parameter_groups(named, self.table, config.optim)
        if topology.pipeline > 1:
            groups = _with_a_group_of_its_own(named.get("embedding.weight"), groups)
        optimizer = build_optimizer(config, groups)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.settings, dist_init_required=False
        )
        # The loss is summed in EngineBase._propose; DeepSpeed would sum and send it once more, with a copy that waits.
        engine._aggregate_total_loss = lambda: None
        engine._bcast_pipe_scalar = partial(self._broadcast_scalar, engine)
        if not engine.is_pipe_partitioned:  # or what is sent is another shape, which a user's --ds-config has asked for
            self._agree_on_shapes(engine, context)
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, BackwardPass: self._backward_pass}
        if topology.pipeline > 1 and topology.data > 2:
            engine._INSTRUCTION_MAP[ReduceTiedGrads] = self._reduce_tied_gradients
        is_copy = topology.is_last_stage and not topology.is_first_stage
        self._install(engine, named, tied_copies=frozenset({"embedding.weight"} if is_copy else ()))

    def _assert_same_groups(self, module: PipelineModule) -> None:
        """DeepSpeed's grid and Megatron's groups must be the same mesh, or gradients mix silently."""
        grid = module.mpu()
        topology = self.topology
        assert grid.get_stage_id() == topology.pipeline_rank
        pairs = (
            (grid.get_data_parallel_group(), topology.data_group),
            (grid.get_slice_parallel_group(), topology.tensor_group),
            (grid.get_pipe_parallel_group(), topology.pipeline_group),
        )
        for theirs, ours in pairs:
            assert dist.get_process_group_ranks(theirs) == dist.get_process_group_ranks(ours)

    @staticmethod
    def _canonical_names(module: PipelineModule, layer_names: list[str]) -> dict[str, nn.Parameter]:
        """This stage's parameters by canonical name: DeepSpeed names a layer by its index, a tied one by its key."""
        named = {}
        for name, parameter in module.named_parameters():
            owner, rest = name.split(".", 1)
            if owner == "tied_modules":
                named[rest] = parameter
            else:
                named[f"{layer_names[int(owner)]}.{rest}"] = parameter
        return named

    @staticmethod
    def _backward_pass(engine: Any, buffer_id: int) -> None:
        """DeepSpeed's own, after which the last stage too lets go of the micro-batch's outputs."""
        engine._exec_backward_pass(buffer_id)
        engine.pipe_buffers["outputs"][buffer_id] = None

    @staticmethod
    def _reduce_tied_gradients(engine: Any) -> None:
        """Stands in for DeepSpeed's ReduceTiedGrads, so that both copies of the tied embedding stay equal bit by bit.

        DeepSpeed adds the two stages' gradients, and then each stage those of its data ranks, within one buffer with
        the rest of the stage. How a sum of three or more numbers is rounded depends on their order, and that on the
        place in the buffer, which is not the same on both stages: the copies would drift apart. Here the data ranks
        come first and the two stages last, where there are two numbers, and no order. Only data rank 0 then brings the
        sum into DeepSpeed's reduction over data ranks: zeros change nothing in any order.
        """
        data_group = engine.grid.get_data_parallel_group()
        for weight, group in engine.module.get_tied_weights_and_groups():
            gradient = weight._hp_grad if engine.using_bf16_optimizer else weight.grad
            total = gradient.float()
            dist.all_reduce(total, group=data_group)
            dist.all_reduce(total, group=group)
            gradient.copy_(total if engine.grid.get_data_parallel_rank() == 0 else torch.zeros_like(total))

    def _agree_on_shapes(self, engine: Any, context: ModelContext) -> None:
        """Makes the buffers in which a stage receives; DeepSpeed's stages would send each other the shapes first.

        The receiver would read them with a dozen waits for the device.
        """
        plan = self.plan
        engine.first_output_send = False
        if self.topology.is_first_stage:
            return
        length = plan.sequence_length // (plan.tensor if context.has_sequence_parallel else 1)
        hidden = ([plan.micro_batch_size, length, context.model.hidden_size], next(engine.module.parameters()).dtype)
        documents = ([plan.micro_batch_size, plan.sequence_length], torch.int64)
        sample_ids = ([plan.micro_batch_size], torch.int64)
        sent = [hidden] + [documents] * context.has_document_mask + [sample_ids] * context.has_dropout
        buffers = [engine._allocate_or_extend_buffers(index, *what) for index, what in enumerate(sent)]
        engine.pipe_recv_buf = tuple(buffers) if len(buffers) > 1 else buffers[0]

    @staticmethod
    def _broadcast_scalar(engine: Any, scalar: torch.Tensor | None) -> torch.Tensor:
        """Stands in for DeepSpeed's broadcast of the loss of an evaluation, without a copy that waits."""
        total = torch.zeros((), device=engine.device) if scalar is None else scalar.detach().float().clone()
        dist.broadcast(total, engine._loss_stage_global_rank(), group=engine.mpu.get_pipe_parallel_group())
        return total

    def _run(self, batches: Sequence[MicroBatch], between: Between | None = None) -> None:
        with self._called_between_steps(between):
            self.deepspeed_engine.train_batch(data_iter=self._feed(batches))

    @contextlib.contextmanager
    def _called_between_steps(self, between: Between | None) -> Iterator[None]:
        """Has DeepSpeed call `between` before each step of its schedule.

        A step is atomic there: all stages have as many of them, and what one sends another receives in the same step,
        so that a collective, or an end, between two steps leaves nobody waiting (PipeSchedule's own documentation).
        """
        if between is None:
            yield
            return
        engine = self.deepspeed_engine
        execute = engine._exec_schedule

        def stepwise(steps: Iterable[Any]) -> Iterator[Any]:
            for commands in steps:
                between()
                yield commands

        def execute_stepwise(schedule: Any) -> None:
            steps = schedule.steps
            schedule.steps = lambda: stepwise(steps())
            execute(schedule)

        engine._exec_schedule = execute_stepwise
        try:
            yield
        finally:
            del engine._exec_schedule

    def _local_loss(self) -> torch.Tensor:
        engine = self.deepspeed_engine
        if self.topology.is_last_stage and self.topology.tensor_rank == 0:
            return engine.total_loss
        return torch.zeros((), device=self.topology.device)

    def eval_batch(self, batches: Sequence[MicroBatch], between: Between | None = None) -> float:
        """See Engine."""
        self._forget_spectra()
        with self._called_between_steps(between):
            loss = self.deepspeed_engine.eval_batch(self._feed(batches), num_micro_batches=len(batches))
        outputs = self.deepspeed_engine.pipe_buffers["outputs"]
        outputs[:] = [None] * len(outputs)
        return float(loss)

    def _feed(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]:
        """What DeepSpeed's pipeline draws per micro-batch: inputs of the first stage, labels of the last.

        They are on the device: DeepSpeed's own copy would be of unpinned memory, and wait.
        """
        for batch in batches:
            inputs: tuple[torch.Tensor, ...] = ()
            targets_BS = None
            if self.topology.is_first_stage:
                inputs = self._on_device(batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.sample_ids_B)
            if self.topology.is_last_stage:
                (targets_BS,) = self._on_device(batch.targets_BS)
            yield inputs, targets_BS
