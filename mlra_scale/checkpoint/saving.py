"""What one rank does for a save: a snapshot, its file in the background, and on rank 0 the completion.

Nothing here communicates with other ranks; saver.py does, from the main thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mlra_scale.checkpoint import failpoints, retention
from mlra_scale.checkpoint.copies import Digests, collect, digests_on_device
from mlra_scale.checkpoint.files import CheckpointError, FileEntry, size_fault, system_errors, write_file
from mlra_scale.checkpoint.fragments import (
    FRAGMENTS,
    PARTS,
    ElementRun,
    join_lines,
    line_of,
    parse_fragments,
    parts_of,
    tensor_key,
)
from mlra_scale.checkpoint.manifest import MANIFEST, Manifest, StoredParameter, library_versions
from mlra_scale.checkpoint.safetensors_file import spec_of, write_safetensors
from mlra_scale.checkpoint.state_contents import BUFFERS, write_small_files
from mlra_scale.config import Config, engine_kind, zero_stage
from mlra_scale.files import sync

if TYPE_CHECKING:
    from mlra_scale.model.parameters import ParameterTable
    from mlra_scale.parallel import Engine
    from mlra_scale.parallel.topology import Topology

CANCELLED = "the save was cancelled"
Named = list[tuple[str, torch.Tensor]]


class Cancelled(Exception):
    """The save was cancelled while it was being written."""


class BackgroundTask:
    """A function in a thread of its own; never ends by an exception.

    Attributes:
        error: What went wrong, as text for people; None where nothing did.
        seconds: How long it took.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        """Starts the function."""
        self.error: str | None = None
        self.seconds = 0.0
        self._function = function
        # A daemon: a process that fails for another reason ends without waiting for it.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, with or without an error."""
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Waits for its end, at most this long."""
        self._thread.join(seconds)

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._function()
        except Cancelled:
            self.error = CANCELLED
        except Exception as error:
            # Of any kind: all ranks must learn of it, since they wait for this one.
            self.error = error_text(error)
        self.seconds = time.perf_counter() - started


def error_text(error: Exception) -> str:
    """Returns an error as a line of text."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


class HostMemory:
    """Host memory that is taken at the first snapshot and used again for every later one."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0)

    def copy(self, tensors: Named) -> Named:
        """Starts copying fp32 tensors; copies from a GPU are complete only when its stream has passed this point.

        Raises:
            CheckpointError: There is not enough memory.
        """
        numel = sum(tensor.numel() for _, tensor in tensors)
        if self.buffer.numel() < numel:
            self.buffer = torch.empty(0)  # the old one is freed before the new one is taken
            is_pinned = any(tensor.is_cuda for _, tensor in tensors)
            try:
                self.buffer = torch.empty(numel, dtype=torch.float32, pin_memory=is_pinned)
            except RuntimeError as error:
                raise CheckpointError(
                    f"{4e-9 * numel:.3g} GB of host memory for a copy of weights and moments are not available "
                    f"({str(error).splitlines()[0]}); set checkpoint.asynchronous=false, which needs no copy"
                ) from error
        parts = self.buffer[:numel].split([tensor.numel() for _, tensor in tensors])
        for part, (_, tensor) in zip(parts, tensors, strict=True):
            part.copy_(tensor, non_blocking=True)
        return [(name, part) for part, (name, _) in zip(parts, tensors, strict=True)]


@dataclass
class Snapshot:
    """What a rank contributes to a save.

    Attributes:
        tensors: The tensors of its file.
        runs: The fragments that these are.
        has_moments: Whether moments are among them; None where there is nothing at all.
        wait: Waits until copies from a GPU are complete, and returns the checksums of all that the rank holds.
    """

    tensors: Named
    runs: list[ElementRun]
    has_moments: bool | None
    wait: Callable[[], Digests]


def take_snapshot(engine: Engine, copied: frozenset[str], memory: HostMemory | None) -> Snapshot:
    """Starts a snapshot of what a rank holds.

    Args:
        engine: Its weights and moments.
        copied: The parameters to compute checksums of, from `copies.copied_parameters`.
        memory: Where to copy the tensors, so that training continues while they are written; None: no copy is made.
    """
    failpoints.reached("snapshot")
    owned = [fragment for fragment in engine.owned_fragments(with_moments=True) if fragment.values.numel() > 0]
    keys, values = digests_on_device(engine.held_fragments(with_moments=True), copied)
    found = {
        (part, fragment.name, fragment.start): tensor.detach()
        for fragment in owned
        for part, tensor in parts_of(fragment)
    }
    # All weights come first, then all first moments, and so on.
    tensors = [(tensor_key(*key), found[key]) for part in PARTS for key in found if key[0] == part]
    if memory is not None:
        tensors = memory.copy(tensors)
    host, event = None, None
    if values is not None:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        host.copy_(values, non_blocking=True)
    if engine.topology.device.type == "cuda":
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(engine.topology.device))

    def wait() -> Digests:
        if event is not None:
            event.synchronize()
        return {} if host is None else collect(keys, host.tolist())

    runs = [(fragment.name, fragment.start, fragment.values.numel()) for fragment in owned]
    return Snapshot(tensors, runs, owned[0].exp_avg is not None if owned else None, wait)


@dataclass
class RankReport:
    """What rank 0 learns of a rank's file when it is written.

    Attributes:
        rank: Global rank.
        tensor_rank: Coordinate on the tensor axis.
        pipeline_rank: Coordinate on the pipeline axis.
        has_moments: See Snapshot.
        digests: Checksums of the copies that it holds.
        entry: The file.
        line: The file's line of fragments.json.
        stall_seconds: How long training waited.
        write_seconds: How long writing took.
    """

    rank: int
    tensor_rank: int
    pipeline_rank: int
    has_moments: bool | None = None
    digests: Digests = field(default_factory=dict)
    entry: FileEntry | None = None
    line: bytes = b""
    stall_seconds: float = 0.0
    write_seconds: float = 0.0

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"rank-{self.rank:05d}.safetensors"


@dataclass
class MainFiles:
    """What rank 0 adds to a save.

    Attributes:
        state: Content of state.json.
        buffers: Named tensors in host memory.
        config_text: The configuration's YAML document.
        tokenizer: A folder to copy, or None.
        entries: The files, once they are written.
    """

    state: bytes
    buffers: Named
    config_text: str
    tokenizer: Path | None
    entries: dict[str, FileEntry] = field(default_factory=dict)


def write_share(
    folder: Path,
    save_id: str,
    snapshot: Snapshot,
    report: RankReport,
    main: MainFiles | None,
    cancel: threading.Event,
) -> None:
    """Writes a rank's file, and on rank 0 everything but manifest and fragments.json.

    Args:
        folder: The unfinished checkpoint.
        save_id: Of this save.
        snapshot: What the rank contributes.
        report: Is filled in.
        main: On rank 0; its entries are filled in.
        cancel: Set when the save is cancelled.

    Raises:
        Cancelled: It was cancelled.
        CheckpointError: The system refuses something.
    """

    def check() -> None:
        if cancel.is_set():
            raise Cancelled

    report.digests, report.has_moments = snapshot.wait(), snapshot.has_moments
    with system_errors("written", folder):
        report.entry = _write_tensors(folder / report.file, snapshot.tensors, save_id, check)
        report.line = line_of(report.file, report.tensor_rank, snapshot.runs)
        failpoints.reached("between-files")
        if main is None:
            return
        if main.buffers:
            main.entries[BUFFERS] = _write_tensors(folder / BUFFERS, main.buffers, save_id, check)
        check()
        main.entries |= write_small_files(folder, main.state, main.config_text, main.tokenizer)


def _write_tensors(path: Path, tensors: Named, save_id: str, check: Callable[[], None]) -> FileEntry:
    specs = {name: spec_of(tensor) for name, tensor in tensors}
    return write_safetensors(path, specs, tensors, {"save_id": save_id}, check)


def build_manifest(
    unfinished: Path,
    save_id: str,
    step: int,
    reports: Sequence[RankReport],
    main: MainFiles,
    table: ParameterTable,
    topology: Topology,
) -> Manifest:
    """Checks the reports of all ranks, writes fragments.json and returns the manifest; rank 0.

    Raises:
        CheckpointError: The ranks' fragments do not add up to the model, or the system refuses.
    """
    has_moments = {report.has_moments for report in reports} - {None}
    if len(has_moments) > 1:
        raise CheckpointError("some ranks have moments of the optimizer and others have none; nothing was saved")
    content = join_lines(report.line for report in reports)
    with system_errors("written", unfinished):
        entries = {FRAGMENTS: write_file(unfinished / FRAGMENTS, content)}
    config = Config.from_yaml(main.config_text)
    manifest = Manifest(
        save_id=save_id,
        kind="training",
        step=step,
        created=retention.next_created(unfinished.parent),
        layout={
            "world_size": topology.world_size,
            "tensor": topology.tensor,
            "pipeline": topology.pipeline,
            "data": topology.data,
            "engine": engine_kind(config),
            "zero_stage": zero_stage(config),
            "precision": config.train.precision,
        },
        has_moments=has_moments == {True},
        versions=library_versions(),
        files={report.file: report.entry for report in reports if report.entry} | entries | main.entries,
        parameters={name: StoredParameter(info.shape, info.shard_dim) for name, info in table.items()},
    )
    parse_fragments(content, manifest, unfinished / FRAGMENTS)
    return manifest


def commit(unfinished: Path, manifest: Manifest, keep_last: int, keep_every: int, pinned: int | None) -> str | None:
    """Completes a checkpoint: manifest, name, `latest`, and the removal of those that are no longer kept; rank 0.

    Args:
        unfinished: The folder, with every file but the manifest.
        manifest: What it consists of.
        keep_last: See retention.prune.
        keep_every: See retention.prune.
        pinned: See retention.prune.

    Returns:
        Why earlier checkpoints could not be removed, which does not make this one worse; None: they were.

    Raises:
        CheckpointError: The system refuses something, or a file is missing. The checkpoint is then complete or
            invisible.
    """
    folder = unfinished.parent
    final = folder / retention.checkpoint_name(manifest.step)
    with system_errors("written", unfinished):
        failpoints.reached("before-manifest")
        for name, entry in manifest.files.items():
            # Other ranks' files are missing where every machine has a disk of its own.
            if fault := size_fault(unfinished / name, entry):
                raise CheckpointError(
                    f"{fault}, as rank 0 sees it; checkpoints must lie on a disk that all ranks share"
                )
        write_file(unfinished / MANIFEST, manifest.to_json())
        sync(unfinished)
        failpoints.reached("before-rename")
        retention.put_in_place(unfinished, final)
        failpoints.reached("before-latest")
        retention.set_latest(folder, final)
    try:
        retention.prune(folder, keep_last, keep_every, pinned)
    except (CheckpointError, OSError) as fault:
        return str(fault)
    return None
