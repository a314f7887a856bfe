"""The loop: schedule, batches for a step, metrics, checkpoints, and `fit`, which reads as prose."""
