"""The pipeline engine: TP x PP x DP with ZeRO stages 0 and 1, one pipeline stage per rank."""

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.schedule import BackwardPass, ReduceTiedGrads
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from mlra_scale.config import BatchPlan, Config
from mlra_scale.model.context import ModelContext
from mlra_scale.model.embedding import TokenEmbedding
from mlra_scale.model.gpt import model_layers
from mlra_scale.parallel.engine import Engine
from mlra_scale.parallel.optimizer import build_optimizer, parameter_groups
from mlra_scale.parallel.step import Between, MicroBatch
from mlra_scale.parallel.topology import Topology


def _hidden_and_weight(embedding: TokenEmbedding, hidden_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last stage hands to the loss function: the hidden state and the weight of the head.

    DeepSpeed clears bf16 gradients when the backward pass reaches the module's outputs: the gradient of a weight that
    the loss function read by itself would be lost.
    """
    return hidden_BSD, embedding.weight.view_as(embedding.weight)


class PipelineEngine(Engine):
    """DeepSpeed's pipeline engine around the layer list."""

    def __init__(
        self,
        config: Config,
        plan: BatchPlan,
        topology: Topology,
        context: ModelContext,
        adam_begun_at: Mapping[str, int],
    ) -> None:
        super().__init__(config, plan, topology, adam_begun_at)
        layers = model_layers(context)
        embedding, *rest = layers
        # The token embedding is at both ends of the pipeline; the last stage uses its copy as the head.
        tied = partial(TiedLayerSpec, "embedding", embedding.module_class, *embedding.arguments)
        specs = [
            tied(tied_weight_attr="weight"),
            *(LayerSpec(layer.module_class, *layer.arguments) for layer in rest),
            tied(forward_fn=_hidden_and_weight, tied_weight_attr="weight"),
        ]
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
        # With several stages the tied embedding has a parameter group of its own, so that ZeRO cuts both copies into
        # the same pieces. In one group with other weights the pieces of the two stages would differ. Fused Adam on CPUs
        # rounds the last few elements of a piece, which fill no vector register, differently from the others: the two
        # copies would drift apart.
        alone = {"embedding.weight"} if topology.pipeline > 1 else set()
        optimizer = build_optimizer(config, parameter_groups(named, self.rules, self.adam_begun_at, alone))
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self._settings, dist_init_required=False
        )
        # The loss is summed in Engine._propose; DeepSpeed would sum and send it once more, with a copy that waits.
        engine._aggregate_total_loss = lambda: None
        engine._bcast_pipe_scalar = partial(self._broadcast_scalar, engine)
        if not engine.is_pipe_partitioned:  # with it, which a --ds-config file may set, stages send other shapes
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
        """DeepSpeed's own; then the last stage drops the micro-batch's outputs, as the others do."""
        engine._exec_backward_pass(buffer_id)
        engine.pipe_buffers["outputs"][buffer_id] = None

    @staticmethod
    def _reduce_tied_gradients(engine: Any) -> None:
        """Stands in for DeepSpeed's ReduceTiedGrads, so that both copies of the tied embedding stay equal bit by bit.

        DeepSpeed adds the two stages' gradients, and then each stage those of its data ranks, within one buffer with
        the rest of the stage. How a sum of three or more numbers is rounded depends on their order, and that on the
        offset in the buffer, which differs between the stages: the copies would drift apart. Here the data ranks are
        summed first and the two stages last: a sum of two numbers has no order. Only data rank 0 then contributes the
        sum to DeepSpeed's reduction over data ranks: zeros change nothing in any order.
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

    def _run(self, batches: Sequence[MicroBatch], between: Between | None) -> None:
        with self._called_between_steps(between):
            self.deepspeed_engine.train_batch(data_iter=self._feed(batches))

    @contextlib.contextmanager
    def _called_between_steps(self, between: Between | None) -> Iterator[None]:
        """Has DeepSpeed call `between` before each step of its schedule.

        A step is atomic: all stages have equally many, and a message is sent and received within the same step, so that
        a collective, or an exception, between two steps leaves no rank waiting (PipeSchedule's own documentation).
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

        with mock.patch.object(engine, "_exec_schedule", execute_stepwise):
            yield

    def _local_loss(self) -> torch.Tensor:
        engine = self.deepspeed_engine
        if self.topology.is_last_stage and self.topology.tensor_rank == 0:
            return engine.total_loss
        return torch.zeros((), device=self.topology.device)

    def eval_batch(self, batches: Sequence[MicroBatch], between: Between | None = None) -> float:
        """See Engine."""
        with self._called_between_steps(between):
            loss = self.deepspeed_engine.eval_batch(self._feed(batches), num_micro_batches=len(batches))
        outputs = self.deepspeed_engine.pipe_buffers["outputs"]
        outputs[:] = [None] * len(outputs)
        return float(loss)

    def _feed(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]:
        """Yields what DeepSpeed's pipeline reads per micro-batch: inputs of the first stage, labels of the last.

        They are on the device: DeepSpeed's own copy would be from unpinned memory, and wait.
        """
        for batch in batches:
            inputs: tuple[torch.Tensor, ...] = ()
            targets_BS = None
            if self.topology.is_first_stage:
                inputs = self._on_device(batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.sample_ids_B)
            if self.topology.is_last_stage:
                (targets_BS,) = self._on_device(batch.targets_BS)
            yield inputs, targets_BS
