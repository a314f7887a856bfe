"""Pre-training of very deep GPT-2 models with multi-head low-rank attention factors (MLRA)."""

__version__ = "0.1.0"
