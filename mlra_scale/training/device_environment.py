"""What CUDA's libraries read from the environment when they begin, from the configuration. Imports no torch.

It must be there before the first call that creates a CUDA context, such as torch.cuda.set_device or a product: the
agent of a node sets it for its ranks, and mlra_scale.train before it looks at the device.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from mlra_scale.config import Config


def set_device_environment(config: Config, environment: MutableMapping[str, str], is_layout_open: bool = False) -> None:
    """Sets what is not set already.

    Args:
        config: Of the run.
        environment: Of a process that has not touched its device.
        is_layout_open: Whether the planner has yet to choose the layout, for which it looks at the device: it may
            choose tensor parallelism.
    """
    if config.parallel.tensor > 1 or is_layout_open:
        # One queue to the device: it then starts things in the order in which they are given, so that a sum which is
        # started beside a matrix product does run beside it (model/tensor_parallel.py).
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if config.train.deterministic:
        # cuBLAS otherwise chooses among several workspaces, and its sums depend on which is free.
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
