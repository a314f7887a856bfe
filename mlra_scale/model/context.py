"""What every layer needs to know besides its inputs, passed explicitly instead of through globals."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from mlra_scale.config import ModelConfig
from mlra_scale.megatron import ModelParallelConfig
from mlra_scale.model.document_mask import DocumentMasks
from mlra_scale.model.initialization import fill_initial_values
from mlra_scale.model.low_rank_plan import LowRankPlan
from mlra_scale.model.parameters import ParameterTable

ActivationCheckpointing = Literal["none", "selective", "block"]
Stream = torch.Tensor | tuple[torch.Tensor, ...]
"""What travels from block to block: see ModelContext.pack."""


@dataclass(frozen=True)
class ModelContext:
    """Configuration and process group shared by the layers of one model."""

    model: ModelConfig  # shapes and options
    seed: int  # the run's seed: keys initial weights and dropout masks
    tensor_group: dist.ProcessGroup  # the tensor-parallel group (its size is the TP degree)
    has_document_mask: bool = False  # whether attention stops at document boundaries
    # What blocks compute again in the backward pass: "none", "selective" (what is cheap, see recomputation.py) or
    # "block" (all).
    activation_checkpointing: ActivationCheckpointing = "none"
    has_compiled_blocks: bool = False  # whether blocks run through torch.compile
    # How tensor-parallel ranks share factorised q, k, v (see low_rank_plan.py).
    low_rank_plan: LowRankPlan = "replicated"
    # Whether tensor-parallel ranks split the stream along the sequence (tensor_parallel.py).
    has_sequence_parallel: bool = False
    # Whether attention within documents runs through flex_attention (document_mask.py).
    has_flex_attention: bool = False
    # Applies a torch.autograd.Function that communicates, never within a compiled graph.
    apply: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        assert self.tensor_parallel > 1 or not self.has_sequence_parallel
        # Compiled blocks are compiled between their collectives: inside a graph the compiler would order them.
        apply = torch.compiler.disable(_apply) if self.has_compiled_blocks else _apply
        object.__setattr__(self, "apply", apply)

    @cached_property
    def table(self) -> ParameterTable:
        return ParameterTable(self.model)

    @cached_property
    def document_masks(self) -> DocumentMasks:
        return DocumentMasks(self.has_flex_attention)

    @cached_property
    def megatron(self) -> ModelParallelConfig:
        """Megatron's configuration of the layers.

        Weights are always created in fp32 on the CPU, from full keyed draws that Megatron slices; DeepSpeed moves them
        to the device and to the training precision.
        """
        return ModelParallelConfig(
            tensor_model_parallel_size=self.tensor_parallel,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            params_dtype=torch.float32,
        )

    def initialize(self, name: str) -> Callable[[torch.Tensor], None]:
        """Returns the function that fills a parameter's global tensor in place (Megatron's `init_method`)."""
        return partial(fill_initial_values, model=self.model, info=self.table[name], seed=self.seed)

    @property
    def tensor_parallel(self) -> int:
        return self.tensor_group.size()

    @property
    def tensor_rank(self) -> int:
        return self.tensor_group.rank()

    @property
    def has_dropout(self) -> bool:
        model = self.model
        return max(model.embedding_dropout, model.attention_dropout, model.residual_dropout) > 0.0

    def first_position(self, hidden_BSD: torch.Tensor) -> int:
        """Where in the sequence a hidden state of this rank begins."""
        return self.tensor_rank * hidden_BSD.size(1) if self.has_sequence_parallel else 0

    def pack(
        self, hidden_BSD: torch.Tensor, documents_BS: torch.Tensor | None, sample_ids_B: torch.Tensor | None
    ) -> Stream:
        """Packs what travels from block to block: the hidden state, and beside it only the ids that are used.

        With sequence parallelism the hidden state is that of this rank's positions, [B, S / TP, D]; ids are whole.
        """
        ids: list[torch.Tensor] = []
        if self.has_document_mask:
            assert documents_BS is not None
            ids.append(documents_BS)
        if self.has_dropout:
            assert sample_ids_B is not None
            ids.append(sample_ids_B)
        # A bare tensor, not a tuple of one: DeepSpeed's pipeline unwraps the latter on its way.
        return (hidden_BSD, *ids) if ids else hidden_BSD

    def unpack(self, stream: Stream) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Inverse of `pack`: (hidden_BSD, documents_BS or None, sample_ids_B or None)."""
        if isinstance(stream, torch.Tensor):
            return stream, None, None
        documents_BS = stream[1] if self.has_document_mask else None
        sample_ids_B = stream[-1] if self.has_dropout else None
        return stream[0], documents_BS, sample_ids_B


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)
