"""The mathematics: MLRA and dense GPT-2, their parameters, initialization and randomness, and the oracle."""
