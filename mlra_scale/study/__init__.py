"""Studies over many runs: sweeps, their statistics, predictions and reports. Nothing here trains."""
