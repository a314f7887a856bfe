"""How a rank ended, in words."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from mlra_scale.training.exit_codes import ExitCode


@dataclass
class Failure:
    """How a rank ended, other than well."""

    node: str
    rank: int | None
    code: int
    time: float
    message: str
    is_ours: bool = False
    """Killed on our order, after the cause."""

    def __str__(self) -> str:
        if self.rank is None:
            return f"{self.node}: {self.message}"
        if self.code < 0:
            names = {number.value: number.name for number in signal.Signals}
            return f"rank {self.rank} on {self.node} was killed by {names.get(-self.code, f'signal {-self.code}')}"
        name = ExitCode(self.code).name if self.code in tuple(ExitCode) else "unknown"
        detail = f": {self.message}" if self.message and self.code == ExitCode.FAILED else ""
        return f"rank {self.rank} on {self.node} ended with exit code {self.code} ({name}){detail}"
