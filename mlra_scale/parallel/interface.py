"""Names of the engine for other rooms; goes when they import them from mlra_scale.parallel."""

from mlra_scale.parallel.engine import Engine
from mlra_scale.parallel.step import MicroBatch, StepResult, UpdateProposal

__all__ = ["Engine", "MicroBatch", "StepResult", "UpdateProposal"]
