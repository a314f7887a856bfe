"""Process groups and the two DeepSpeed engines behind one class."""

from mlra_scale.parallel.build import build_engine
from mlra_scale.parallel.engine import Engine
from mlra_scale.parallel.fragments import Fragment
from mlra_scale.parallel.step import BeforeUpdate, MicroBatch, StepResult, UpdateProposal
from mlra_scale.parallel.topology import Topology, build_topology, destroy_topology, initialize_distributed

__all__ = [
    "BeforeUpdate",
    "Engine",
    "Fragment",
    "MicroBatch",
    "StepResult",
    "Topology",
    "UpdateProposal",
    "build_engine",
    "build_topology",
    "destroy_topology",
    "initialize_distributed",
]
