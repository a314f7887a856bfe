"""Evaluation: perplexity, generation, and the texts for them."""
