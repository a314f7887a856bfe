"""What goes wrong with checkpoints."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the text names the file, the fault and the remedy."""
