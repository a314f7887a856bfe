"""Pre-training of very deep GPT-2 models with multi-head low-rank attention factors (MLRA).

The names below are for training loops other than this package's own (docs/library.md). Each is loaded at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlra_scale.api.auto_classes import MlraConfig, MlraForCausalLM, MlraModel
    from mlra_scale.api.deepspeed_engine import attach_tev
    from mlra_scale.api.lightning_callback import LightningTevCallback
    from mlra_scale.api.replacement import merge_attention_projections, replace_attention_projections
    from mlra_scale.api.tev import tev
    from mlra_scale.api.transformers_callback import TevCallback
    from mlra_scale.shipped.low_rank_linear import LowRankLinear
    from mlra_scale.stability.tev import TevStatistics

__version__ = "0.1.0"

_MODULES = {
    "LightningTevCallback": "api.lightning_callback",
    "LowRankLinear": "shipped.low_rank_linear",
    "MlraConfig": "api.auto_classes",
    "MlraForCausalLM": "api.auto_classes",
    "MlraModel": "api.auto_classes",
    "TevCallback": "api.transformers_callback",
    "TevStatistics": "stability.tev",
    "attach_tev": "api.deepspeed_engine",
    "merge_attention_projections": "api.replacement",
    "replace_attention_projections": "api.replacement",
    "tev": "api.tev",
}

__all__ = [
    "LightningTevCallback",
    "LowRankLinear",
    "MlraConfig",
    "MlraForCausalLM",
    "MlraModel",
    "TevCallback",
    "TevStatistics",
    "attach_tev",
    "merge_attention_projections",
    "replace_attention_projections",
    "tev",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        library = _missing_library(error)
        if library in ("", __name__):
            raise
        raise ImportError(f"{__name__}.{name} needs {library}: pip install {library}", name=library) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _missing_library(error: BaseException | None) -> str:
    """Returns the library that is missing: transformers wraps the error that names it in others that name nothing."""
    while isinstance(error, ModuleNotFoundError):
        if error.name:
            return error.name.partition(".")[0]
        error = error.__cause__
    return ""
