"""Checkpoints: saving, reading, retention, and exchange with Hugging Face."""
