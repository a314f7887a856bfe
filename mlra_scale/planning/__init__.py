"""Arithmetic about a run before it starts: who holds what, parameters, operations and memory per rank."""
