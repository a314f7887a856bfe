"""What every layer needs to know besides its inputs, handed down explicitly instead of through globals."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist

from mlra_scale.config import ModelConfig
from mlra_scale.megatron import ModelParallelConfig
from mlra_scale.model.document_mask import DocumentMasks
from mlra_scale.model.initialization import Initializer
from mlra_scale.model.parameters import LowRankPlan

ActivationCheckpointing = Literal["none", "selective", "block"]


@dataclass(frozen=True)
class ModelContext:
    """Configuration and process group shared by the layers of one model.

    Attributes:
        model: Shapes and options.
        seed: The run's seed: keys initial weights and dropout masks.
        tensor_group: The tensor-parallel group (its size is the TP degree).
        has_document_mask: Whether attention stops at document boundaries.
        activation_checkpointing: What blocks compute again in the backward pass: "none", "selective" (what is cheap,
            see recomputation.py) or "block" (all).
        has_compiled_blocks: Whether blocks run through torch.compile.
        low_rank_plan: How tensor-parallel ranks share factorised q, k, v (see low_rank_plan.py).
        has_sequence_parallel: Whether tensor-parallel ranks split the stream along the sequence (tensor_parallel.py).
        has_flex_attention: Whether attention within documents runs through flex_attention (document_mask.py).
        initialize: Makes initial weights.
        megatron: Megatron's configuration of the layers.
        document_masks: The masks of documents in use.
        apply: Applies a torch.autograd.Function that communicates, never within a compiled graph.
    """

    model: ModelConfig
    seed: int
    tensor_group: dist.ProcessGroup
    has_document_mask: bool = False
    activation_checkpointing: ActivationCheckpointing = "none"
    has_compiled_blocks: bool = False
    low_rank_plan: LowRankPlan = "replicated"
    has_sequence_parallel: bool = False
    has_flex_attention: bool = False
    initialize: Initializer = field(init=False)
    megatron: ModelParallelConfig = field(init=False)
    document_masks: DocumentMasks = field(init=False)
    apply: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        assert self.tensor_parallel > 1 or not self.has_sequence_parallel
        # Compiled blocks are compiled between their collectives: what a graph has of them is the compiler's to order.
        apply = torch.compiler.disable(_apply) if self.has_compiled_blocks else _apply
        object.__setattr__(self, "apply", apply)
        object.__setattr__(self, "document_masks", DocumentMasks(self.has_flex_attention))
        object.__setattr__(self, "initialize", Initializer(self.model, self.seed, self.low_rank_plan))
        # Weights are always created in fp32 on the CPU, from full keyed draws that Megatron slices; DeepSpeed
        # moves them to the device and to the training precision.
        megatron = ModelParallelConfig(
            tensor_model_parallel_size=self.tensor_parallel,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            params_dtype=torch.float32,
        )
        object.__setattr__(self, "megatron", megatron)

    @property
    def tensor_parallel(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.tensor_group.size()

    @property
    def tensor_rank(self) -> int:
        """This process's rank in the tensor-parallel group."""
        return self.tensor_group.rank()

    @property
    def has_dropout(self) -> bool:
        """Whether any dropout probability is positive."""
        model = self.model
        return max(model.embedding_dropout, model.attention_dropout, model.residual_dropout) > 0.0

    @property
    def has_gathered_linear(self) -> bool:
        """Whether column-parallel maps gather what they take of the stream themselves (tensor_parallel.py)."""
        # With sigmaReparam weights are scaled on the way, by a map of its own.
        return self.has_sequence_parallel and not self.model.sigma_reparam

    def first_position(self, hidden_BSD: torch.Tensor) -> int:
        """Where in the sequence a hidden state of this rank begins."""
        return self.tensor_rank * hidden_BSD.size(1) if self.has_sequence_parallel else 0

    def pack(
        self, hidden_BSD: torch.Tensor, documents_BS: torch.Tensor | None, sample_ids_B: torch.Tensor | None
    ) -> "Stream":
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

    def unpack(self, stream: "Stream") -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Inverse of `pack`: (hidden_BSD, documents_BS or None, sample_ids_B or None)."""
        if isinstance(stream, torch.Tensor):
            return stream, None, None
        documents_BS = stream[1] if self.has_document_mask else None
        sample_ids_B = stream[-1] if self.has_dropout else None
        return stream[0], documents_BS, sample_ids_B


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)


Stream = torch.Tensor | tuple[torch.Tensor, ...]
