"""Data: sources, tokenizers, indexed files, blends, and the order of the samples."""
