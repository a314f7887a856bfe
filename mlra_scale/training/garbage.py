"""Python's garbage collector, at the same steps on all ranks.

Left alone it runs on each rank when that has made so many objects: with thousands of ranks some rank collects in every
step, and all others wait for it in the next collective. torchtitan, OLMo-core and lingua do the same.
"""

from __future__ import annotations

import gc
from types import TracebackType


class GarbageCollection:
    """Switches automatic collection off while it is entered, and collects every so many steps.

    Args:
        every: Steps between collections; 0: Python decides, as it does by itself.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def __enter__(self) -> GarbageCollection:
        if self._every > 0:
            gc.disable()
            gc.collect()
            gc.freeze()  # what is there now stays: later collections need not look at it
        return self

    def after(self, step: int) -> None:
        """Collects if it is time.

        Args:
            step: The step that is done.
        """
        if self._every > 0 and step % self._every == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._every > 0:
            gc.unfreeze()
            gc.enable()
