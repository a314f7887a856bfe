"""The public face for other training loops: TEV of a model, the low-rank map, replaced projections, names."""
