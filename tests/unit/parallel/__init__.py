"""Optimizers: the iterations of Newton-Schulz."""
