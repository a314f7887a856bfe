"""The model-parallel-unit object through which DeepSpeed's ZeRO engine learns of tensor parallelism."""

import torch.distributed as dist

from mlra_scale.parallel.topology import Topology


class ModelParallelUnit:
    """Maps DeepSpeed's model-parallel questions to the tensor group, without globals.

    It must not offer `initialize_sequence_parallel`: ZeRO-3 would then drop the model-parallel group.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_model_parallel_rank(self) -> int:
        """Coordinate on the tensor axis."""
        return self._topology.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Tensor-parallel degree."""
        return self._topology.tensor

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The tensor-parallel group."""
        return self._topology.tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Coordinate on the data axis."""
        return self._topology.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Data-parallel degree."""
        return self._topology.data

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The data-parallel group."""
        return self._topology.data_group
