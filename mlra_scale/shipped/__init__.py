"""The model's code that exports carry: torch and transformers, and nothing of this package from elsewhere."""
