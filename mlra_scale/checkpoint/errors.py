"""What goes wrong with checkpoints."""

from __future__ import annotations

from mlra_scale.config.json_text import printable


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the text names the file, the fault and the remedy.

    What files hold is part of the text: control characters in it are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
