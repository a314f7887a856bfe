"""Studies: grids, statistics, predictions, figures and what a report reads."""
