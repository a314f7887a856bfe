"""Where faults are tried: prepared data, undisturbed runs to compare with, and a folder for each fault."""

import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.faults.launching import Armed, Forked
from tests.faults.training import Training, assert_as_undisturbed, assert_visible_is_whole, assert_way_back
from tests.faults.triggers import Trigger
from tests.slurm.cluster import SlurmCluster
from tests.support.processes import TIMEOUT, TRAIN, torchrun
from tests.support.training_runs import make_data

ALONE_SECONDS = 1.5
DISK = "disk"
"""Name of the folder at which a disk of its own is mounted."""
STEPS, EVERY = 8, 2
FLAT = ("optim.schedule=constant", "optim.warmup_steps=0")
"""A learning rate that does not depend on the number of steps: a run may be stopped anywhere, and be made longer."""
MEASURED = (
    "evaluation.every=2",
    "evaluation.batches=2",
    "tev.every=1",
    "activations.every=2",
    "gradients.every=2",
    "gradients.noise_every=2",
    "gradients.spectral_iterations=2",
)
"""Everything that a run can measure."""
GUARDED = (
    "guard.enabled=true",
    "guard.window=8",
    "guard.min_window=4",
    "guard.sigmas=2.0",
    "optim.lr=0.1",
    "guard.calm_steps=2",
    "guard.max_skips=0",
    "guard.max_lowerings=0",
    "guard.skip_before=1",
    "guard.max_rollbacks=30",
    "optim.schedule=constant",
)
"""A guard so strict that a usual run goes back."""


@dataclass
class Bench:
    """A folder with what all faults share; several threads may use it.

    Attributes:
        folder: For everything.
        lock: Held while something that all share is made.
    """

    folder: Path
    lock: threading.RLock = field(default_factory=threading.RLock)
    _references: dict[Training, Path] = field(default_factory=dict)
    _cluster: SlurmCluster | None = None
    _locks: dict[Training, threading.Lock] = field(default_factory=dict)

    @cached_property
    def data(self) -> Path:
        """Prepared data that nobody changes."""
        with self.lock:
            path = self.folder / "data"
            return path if path.exists() else make_data(path)

    def cluster(self) -> SlurmCluster:
        """A Slurm cluster of three nodes; it ends with `close`."""
        with self.lock:
            if self._cluster is None:
                # Slurm's sockets want short paths.
                folder = Path(tempfile.mkdtemp(prefix="slurm-"))
                self._cluster = SlurmCluster(folder, nodes=3).__enter__()
            return self._cluster

    def close(self) -> None:
        """Ends the cluster."""
        if self._cluster is not None:
            self._cluster.stop()
            shutil.rmtree(self._cluster.directory, ignore_errors=True)

    def place(self, name: str) -> Path:
        """A new folder for one fault."""
        path = self.folder / name.replace(" ", "-").replace("/", "-")
        path.mkdir(parents=True)
        return path

    def training(self, layout: str = "single", *more: str, **fields: Any) -> Training:
        """A short training."""
        values: dict[str, Any] = {"steps": STEPS, "every": EVERY, "keep_last": 2} | fields
        return Training(self.data, layout, more=more, **values)

    def reference(self, training: Training) -> Path:
        """The run directory of the training that nobody disturbs; trained once."""
        with self.lock:
            lock = self._locks.setdefault(training, threading.Lock())
            number = list(self._locks).index(training)
        with lock:
            if training not in self._references:
                run = self.folder / f"undisturbed-{number}-{training.layout}"
                start(training, run)
                self._references[training] = run
        return self._references[training]

    def finish(self, training: Training, run: Path) -> None:
        """Continues a run to its end, which must be that of the undisturbed one."""
        assert_way_back(run)
        start(training, run, resume=True)
        assert_as_undisturbed(run, self.reference(training), training.steps)


def log_of(run: Path) -> Path:
    """Where the output of a run goes: beside its directory, and not on a disk that is a disturbance's own."""
    folder = run.parent.parent if run.parent.name == DISK else run.parent
    return folder / f"{run.name}.log"


def start(
    training: Training,
    run: Path,
    *more: str,
    resume: bool = False,
    code: int = 0,
    triggers: Sequence[Trigger] = (),
    **extra: str,
) -> str:
    """Trains in forked ranks, which must end with this code (minus the signal for a killed one); returns the output."""
    launch = Forked([*training.arguments(run, resume), *more], training.num_ranks, log_of(run), triggers, **extra)
    if code < 0:
        deadline = time.monotonic() + TIMEOUT
        while not launch.has_ended() and time.monotonic() < deadline:
            time.sleep(0.05)
        # The other ranks live on for a trigger, and then go as with a machine: they would wait for the dead one.
        time.sleep(ALONE_SECONDS)
        launch.end()
    launch.wait()
    codes, output = launch.codes, launch.output()
    assert code in codes if code < 0 else set(codes) == {code}, f"{codes}\n{output[-1000:]}"
    return output


def program(
    training: Training, run: Path, *more: str, resume: bool = False, shell: Sequence[str] = (), **options: Any
) -> Armed:
    """Trains by the real command line: python alone for one rank, torchrun for several; see Armed for the options.

    Args:
        training: What is trained.
        run: The run directory.
        more: Overrides.
        resume: Whether the run is continued.
        shell: What starts the command, which is added.
        options: Of Armed.
    """
    begin = TRAIN if training.num_ranks == 1 else torchrun(training.num_ranks)
    return Armed([*shell, *begin, *training.arguments(run, resume), *more], log_of(run), **options)


def assert_sound(run: Path) -> int:
    """Fails unless nothing that was reported is lost and nothing half-written is visible; returns the newest step."""
    if not run.exists():
        return 0
    step = assert_way_back(run)
    assert_visible_is_whole(run)
    return step
