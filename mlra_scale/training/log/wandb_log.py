"""Weights & Biases, set so that it neither asks questions nor waits for an absent network, and never ends a run."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlra_scale.config import Config
from mlra_scale.files import write_atomically
from mlra_scale.training.record import finite_or_none
from mlra_scale.training.run_directory import RunDirectory

_TIMEOUTS = {"init_timeout": 15.0, "login_timeout": 15.0, "finish_timeout": 120.0}
"""Seconds, where wandb's own variables (WANDB_INIT_TIMEOUT and the like) do not say otherwise."""
_UNWRITTEN_SECONDS = 60.0
_logger = logging.getLogger(__name__)


class WandbLog:
    """One wandb run on rank 0; elsewhere, and where wandb is disabled, values are dropped.

    Args:
        run: wandb's run object; None: values are dropped.
        reopen: Makes another run object of the same id. Used once, when wandb's service process has ended: a cluster
            that asks a job to stop sends SIGTERM to that process too, which then drops what it has not yet written.
            The last minute is therefore logged again; a step that is logged twice has the same values.
    """

    def __init__(self, run: Any = None, reopen: Callable[[], Any] | None = None) -> None:
        self._run, self._reopen = run, reopen
        self._recent: deque[tuple[float, int, Mapping[str, Any]]] = deque()

    @property
    def mode(self) -> str:
        """`online`, `offline` or `disabled`."""
        if self._run is None:
            return "disabled"
        return "offline" if self._run.offline else "online"

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends the values of one step."""
        if self._run is None:
            return
        numbers = finite_or_none({key: value for key, value in values.items() if value is not None and key != "step"})
        if self._reopen is not None:
            now = time.monotonic()
            self._recent.append((now, step, numbers))
            while now - self._recent[0][0] > _UNWRITTEN_SECONDS:
                self._recent.popleft()
        try:
            self._run.log(numbers, step=step)
        except Exception as error:  # whatever happens to wandb must not end a training run
            _logger.warning("wandb: stopped logging (%s)", _in_short(error))
            self._run = None
            self._log_again()

    def _log_again(self) -> None:
        reopen, self._reopen = self._reopen, None
        if reopen is None:
            return
        try:
            _end_service()
            run = reopen()
            for _, step, numbers in self._recent:
                run.log(numbers, step=step)
        except Exception as error:  # as above
            _logger.warning("wandb: cannot be started again (%s)", _in_short(error))
            return
        finally:
            self._recent.clear()
        _logger.info("wandb: started again")
        self._run = run

    def finish(self, exit_code: int, summary: Mapping[str, Any] | None = None) -> None:
        """Closes the run with final values; wandb shows a run with another exit code than 0 as failed."""
        while self._run is not None:
            run, self._run = self._run, None
            try:
                for key, value in (summary or {}).items():
                    run.summary[f"final/{key}"] = value
                run.finish(exit_code=exit_code)
            except Exception as error:  # its service may have ended
                _logger.warning("wandb: could not finish (%s)", _in_short(error))
                _end_service()
                self._log_again()


def open_wandb(config: Config, run_directory: RunDirectory, num_rollbacks: int = 0) -> WandbLog:
    """Starts, or continues, the wandb run of a run directory, under the id in its file wandb/run_id.

    Mode `auto` is online if wandb finds a key and WANDB_MODE does not ask for less, else offline. A server that does
    not answer within 15 s (WANDB_INIT_TIMEOUT) turns the run into an offline one, which `wandb sync` can send later.
    Where not even that starts, the run continues without wandb. wandb's steps only increase, so the run has a new id
    after each rollback.
    """
    try:
        mode = wandb_mode(config)
        if mode == "disabled":
            return WandbLog()
        import wandb

        run_id = _stable_run_id(run_directory) + (f"-{num_rollbacks}" if num_rollbacks else "")

        def started(mode: str) -> WandbLog:
            start = partial(_start, wandb, config, run_directory, run_id, mode)
            return WandbLog(start(), start)

        if mode == "online":
            try:
                return started("online")
            except Exception as error:
                _logger.warning("wandb: cannot start online (%s)", _in_short(error))
                _end_service()  # it would keep the id of the run that failed to start
        return started("offline")
    except Exception as error:
        # Every error, here and above: wandb reads an environment, files and a network that are unknown here, and raises
        # errors of several libraries.
        _logger.warning("wandb: not used in this run (%s)", _in_short(error))
        return WandbLog()


def _end_service() -> None:
    """Ends wandb's service now; at the end of the process, wandb would print a traceback where it has died."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _in_short(error: Exception) -> str:
    """Returns an error's text on one line; validation errors give the reason only on their third line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _start(wandb: Any, config: Config, run_directory: RunDirectory, run_id: str, mode: str) -> Any:
    # Without the last two, wandb wraps our standard output and prints its own banner and summary into it.
    wanted = {**_TIMEOUTS, "console": "off", "silent": True}
    known = wandb.Settings.model_fields  # not every release that we accept has every timeout
    settings = wandb.Settings(
        **{name: value for name, value in wanted.items() if name in known and f"WANDB_{name.upper()}" not in os.environ}
    )
    return wandb.init(
        project=config.wandb.project,
        name=config.wandb.name or run_directory.path.resolve().name,
        tags=list(config.wandb.tags),
        id=run_id,
        resume="allow",
        dir=str(run_directory.path.resolve()),
        config=config.to_dict(),
        mode=mode,
        settings=settings,
    )


def wandb_mode(config: Config) -> str:
    """Returns the mode to start in, with `auto` resolved."""
    if config.wandb.mode != "auto":
        return config.wandb.mode
    wanted = os.environ.get("WANDB_MODE", "").lower()
    if wanted == "disabled":
        return wanted
    # "dryrun" is wandb's old word for offline.
    return "offline" if wanted in ("offline", "dryrun") or not _has_key() else "online"


def _has_key() -> bool:
    """Returns whether wandb finds credentials by itself; wandb.login() may prompt, and so cannot be asked."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    settings = wandb.setup().settings
    if settings.api_key:
        return True
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for candidate in (Path(name).expanduser() for name in candidates if name):
        if candidate.is_file():
            try:
                return netrc.netrc(candidate).authenticators(urlsplit(settings.base_url).netloc) is not None
            except (netrc.NetrcParseError, OSError):
                return False
    return False


def _stable_run_id(run_directory: RunDirectory) -> str:
    path = run_directory.wandb / "run_id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()
