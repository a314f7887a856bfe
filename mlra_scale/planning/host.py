"""What slow paths of the optimizer add to a step: operations that the host starts, and waits. Imports no torch.

DeepSpeed's optimizers over flat buffers (ZeRO 1 and 2, fp32 without ZeRO) work on few large tensors; what they cost is
in the overhead of a step (cluster.py). Beside that, per tensor that a rank holds and step, as tracing the engines
counts (tests/device):

    path                                                 operations    waits for the device
    half precision without ZeRO: optimizer unfused       16            1
    ZeRO 3: the gradient's share, tensor by tensor       none          1

A device that computes the update hides what the host starts meanwhile; a wait is never hidden.
"""

from __future__ import annotations

from mlra_scale.config import BatchPlan, Config, zero_stage
from mlra_scale.planning.cluster import Cluster
from mlra_scale.planning.layout import num_tensors_of_stage

UNFUSED_LAUNCHES = 16


def is_unfused(config: Config) -> bool:
    """Whether the optimizer works tensor by tensor: in bf16 and fp16 without ZeRO."""
    return zero_stage(config) == 0 and config.train.precision != "fp32"


def slow_path_seconds(config: Config, plan: BatchPlan, cluster: Cluster, stage: int, update: float) -> float:
    """Seconds that the optimizer's path adds to a step.

    Args:
        config: A validated configuration.
        plan: Its batch plan.
        cluster: What it would run on.
        stage: The pipeline stage.
        update: Seconds that the device computes the update.
    """
    num_tensors = num_tensors_of_stage(config.model, plan, stage)
    launches = num_tensors * UNFUSED_LAUNCHES * is_unfused(config)
    waits = num_tensors * (is_unfused(config) or zero_stage(config) == 3)
    return max(0.0, launches * cluster.launch - update) + waits * cluster.wait
