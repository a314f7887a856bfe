"""Studies over many runs: grids, their execution, and reports with statistics. Imports neither torch nor the model."""
