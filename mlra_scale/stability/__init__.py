"""Signals of training stability."""
