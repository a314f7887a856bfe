"""Studies: grids of runs, what came out of them, and what is predicted of them. Imports neither torch nor the model."""
