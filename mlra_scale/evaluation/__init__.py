"""Evaluation: a trained model's perplexity on text, and text from it.

models.py opens a store checkpoint or a Hugging Face folder, texts.py turns files and prepared data into tokens,
perplexity.py scores them, generation.py writes.
"""

from mlra_scale.console import InputError


class EvaluationError(InputError, ValueError):
    """A model, a text or an option cannot be used; the message names it and the remedy."""
