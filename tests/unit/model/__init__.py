"""The model: its layers against the oracle, initialization, randomness, parameters and cost model."""
