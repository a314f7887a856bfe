"""Studies over many runs: grids of them, statistics, predictions and reports. Imports neither torch nor the model."""
