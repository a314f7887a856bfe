"""Configuration: schema, presets, loading, validation and the DeepSpeed merge."""
