"""One log per rank, named by its global rank, and all of them merged on the console."""

from __future__ import annotations

import os
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest


class RankLogs(DefaultLogsSpecs):
    """torchrun's logs under names that do not collide between nodes, such as rank-00007.log.

    A rank sends its standard error to the same file (rank/__main__.py), so that its log has everything in order.
    `first_rank` is the lowest one on this node; the folder is shared by all nodes.
    """

    def __init__(self, folder: Path, first_rank: int) -> None:
        super().__init__(os.devnull)  # torchrun's own tree of folders is not needed
        self._folder, self._first_rank = folder, first_rank

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Returns where the output of each local rank goes, and where it leaves the traceback of its end."""
        files = super().reify(envs)
        for local_rank, environment in envs.items():
            name = f"{self._folder}/rank-{self._first_rank + local_rank:05d}"
            files.stdouts[local_rank] = files.tee_stdouts[local_rank] = f"{name}.log"
            files.tee_stderrs.pop(local_rank, None)
            files.error_files[local_rank] = environment["TORCHELASTIC_ERROR_FILE"] = f"{name}.error.json"
        return files
