"""What a rank does for a save in the background: writing its file, and on rank 0 completing the checkpoint.

Nothing here talks to other ranks; saver.py does, from the main thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlra_scale.checkpoint import points, retention
from mlra_scale.checkpoint.contents import BUFFERS, library_versions, write_small_files
from mlra_scale.checkpoint.copies import Digests, RankCopies
from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.files import FileEntry, faults_told, size_fault, write_file
from mlra_scale.checkpoint.fragments import FRAGMENTS, Run, joined, line_of, parse
from mlra_scale.checkpoint.manifest import MANIFEST, Manifest, StoredParameter
from mlra_scale.checkpoint.retention import next_created
from mlra_scale.checkpoint.snapshot import Named
from mlra_scale.checkpoint.writer import write_safetensors
from mlra_scale.config import Config, engine_kind, zero_stage
from mlra_scale.files import sync

if TYPE_CHECKING:
    from mlra_scale.model.parameters import ParameterTable
    from mlra_scale.parallel.topology import Topology


GIVEN_UP = "was given up"


class Cancelled(Exception):
    """The save was given up while it was being written."""


class Work:
    """A piece of work in a thread of its own; never ends by an exception.

    Attributes:
        error: What went wrong, as text for people; None where nothing did.
        seconds: How long it took.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        """Starts the work."""
        self.error: str | None = None
        self.seconds = 0.0
        self._function = function
        # A daemon: a process that fails for another reason ends without waiting for it.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Waits for its end, but no longer than this."""
        self._thread.join(seconds)

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._function()
        except Cancelled:
            self.error = GIVEN_UP
        except Exception as error:
            # Whatever it is, all ranks must hear of it: the others wait for this one.
            self.error = told(error)
        self.seconds = time.perf_counter() - started


def told(error: Exception) -> str:
    """Returns an error as a line of text."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


@dataclass
class RankShare:
    """What one rank contributes to a save.

    Attributes:
        file: Name of its file.
        tensors: What goes into it.
        tensor_rank: This rank's.
        runs: The fragments that these are.
        has_moments: Whether moments are among them; None where there is nothing at all.
        digests: Of the copies that it holds.
        entry: The file, once it is written.
        line: What fragments.json says of it, once it is written.
    """

    file: str
    tensor_rank: int
    tensors: Named = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    has_moments: bool | None = None
    digests: Digests = field(default_factory=dict)
    entry: FileEntry | None = None
    line: bytes = b""


@dataclass(frozen=True)
class RankReport:
    """What rank 0 learns of a rank's share when it is written: see RankShare."""

    file: str
    entry: FileEntry
    line: bytes
    has_moments: bool | None
    copies: RankCopies
    stall_seconds: float
    write_seconds: float


@dataclass
class MainShare:
    """What rank 0 adds to a save.

    Attributes:
        state: Content of state.json.
        buffers: Named tensors in host memory.
        config_text: The configuration's YAML document.
        tokenizer: A folder to copy, or None.
        files: The files, once they are written.
    """

    state: bytes
    buffers: Named
    config_text: str
    tokenizer: Path | None
    files: dict[str, FileEntry] = field(default_factory=dict)


def write_share(folder: Path, save_id: str, share: RankShare, main: MainShare | None, cancel: threading.Event) -> None:
    """Writes a rank's file, and on rank 0 everything but the manifest.

    Args:
        folder: The unfinished checkpoint.
        save_id: Of this save.
        share: This rank's part; gets its entry.
        main: On rank 0; gets its files.
        cancel: Set when the save is given up.

    Raises:
        Cancelled: It was given up.
        CheckpointError: The system refuses something.
    """

    def check() -> None:
        if cancel.is_set():
            raise Cancelled

    with faults_told("written", folder):
        share.entry = _write_tensors(folder / share.file, share.tensors, save_id, check)
        share.line = line_of(share.file, share.tensor_rank, share.runs)
        points.reached("between-files")
        if main is None:
            return
        if main.buffers:
            main.files[BUFFERS] = _write_tensors(folder / BUFFERS, main.buffers, save_id, check)
        check()
        main.files |= write_small_files(folder, main.state, main.config_text, main.tokenizer)


def _write_tensors(path: Path, tensors: Named, save_id: str, check: Callable[[], None]) -> FileEntry:
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}
    return write_safetensors(path, specs, tensors, {"save_id": save_id}, check)


def describe(
    unfinished: Path,
    save_id: str,
    step: int,
    reports: Sequence[RankReport],
    main: MainShare,
    table: ParameterTable,
    topology: Topology,
) -> Manifest:
    """Checks what the ranks report, writes fragments.json and puts the manifest together; rank 0.

    Raises:
        CheckpointError: The ranks' fragments do not add up to the model, or the system refuses.
    """
    has_moments = {report.has_moments for report in reports} - {None}
    if len(has_moments) > 1:
        raise CheckpointError("some ranks have Adam's moments and others have none; nothing was saved")
    content = joined(report.line for report in reports)
    with faults_told("written", unfinished):
        entry = write_file(unfinished / FRAGMENTS, content)
    config = Config.from_yaml(main.config_text)
    layout: dict[str, Any] = {
        "world_size": topology.world_size,
        "tensor": topology.tensor,
        "pipeline": topology.pipeline,
        "data": topology.data,
        "engine": engine_kind(config),
        "zero_stage": zero_stage(config),
        "precision": config.train.precision,
    }
    manifest = Manifest(
        save_id=save_id,
        kind="training",
        step=step,
        created=next_created(unfinished.parent),
        layout=layout,
        has_moments=has_moments == {True},
        versions=library_versions(),
        files={report.file: report.entry for report in reports} | {FRAGMENTS: entry} | main.files,
        parameters={name: StoredParameter(info.shape, info.shard_dim) for name, info in table.items()},
    )
    parse(content, manifest, unfinished / FRAGMENTS)
    return manifest


def commit(
    unfinished: Path,
    manifest: Manifest,
    keep_last: int,
    keep_every: int,
    pinned: int | None = None,
    tell: Callable[[str], None] = lambda fault: None,
) -> Path:
    """Completes a checkpoint: manifest, name, `latest`, and the removal of those that are no longer kept; rank 0.

    Args:
        unfinished: The folder, with every file but the manifest.
        manifest: What it consists of.
        keep_last: See retention.prune.
        keep_every: See retention.prune.
        pinned: See retention.prune.
        tell: Called if earlier checkpoints cannot be removed, which does not make this one worse.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: The system refuses something, or a file is not there. The checkpoint is complete or invisible
            all the same.
    """
    folder = unfinished.parent
    final = folder / retention.checkpoint_name(manifest.step)
    with faults_told("written", unfinished):
        points.reached("before-manifest")
        for name, entry in manifest.files.items():
            # Other ranks' files are not here where every machine has a disk of its own.
            if fault := size_fault(unfinished / name, entry):
                raise CheckpointError(
                    f"{fault}, as rank 0 sees it; checkpoints must lie on a disk that all ranks share"
                )
        write_file(unfinished / MANIFEST, manifest.to_json())
        sync(unfinished)
        points.reached("before-rename")
        retention.put_in_place(unfinished, final)
        points.reached("before-latest")
        retention.set_latest(folder, final)
    try:
        retention.prune(folder, keep_last, keep_every, pinned)
    except (CheckpointError, OSError) as fault:
        tell(str(fault))
    return final


def host_copies(tensors: dict[str, torch.Tensor]) -> Named:
    """Returns copies in host memory of a few small tensors."""
    return [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in tensors.items()]
