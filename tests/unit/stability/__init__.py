"""Signals of stability: TEV, gradient statistics, activations, spikes, the guard."""
