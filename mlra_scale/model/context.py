"""What every layer needs to know besides its inputs, handed down explicitly instead of through globals."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig

from mlra_scale.config import ModelConfig
from mlra_scale.model.initialization import Initializer


@dataclass(frozen=True)
class ModelContext:
    """Configuration and process group shared by the layers of one model.

    Attributes:
        model: Shapes and options.
        seed: The run's seed: keys initial weights and dropout masks.
        tensor_group: The tensor-parallel group (its size is the TP degree).
        has_document_mask: Whether attention stops at document boundaries.
        has_activation_checkpointing: Whether blocks recompute their activations in the backward pass.
    """

    model: ModelConfig
    seed: int
    tensor_group: dist.ProcessGroup
    has_document_mask: bool = False
    has_activation_checkpointing: bool = False
    initialize: Initializer = field(init=False)
    megatron: ModelParallelConfig = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "initialize", Initializer(self.model, self.seed))
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

    def context_of(self, documents_BS: torch.Tensor, sample_ids_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors that travel beside the hidden state from block to block: only those that are used."""
        documents = (documents_BS,) if self.has_document_mask else ()
        samples = (sample_ids_B,) if self.has_dropout else ()
        return documents + samples

    def split_context(self, context: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Inverse of `context_of`: (documents_BS or None, sample_ids_B or None)."""
        documents_BS = context[0] if self.has_document_mask else None
        sample_ids_B = context[-1] if self.has_dropout else None
        return documents_BS, sample_ids_B
