"""What one rank does for a save: a snapshot, its file in the background, and on rank 0 the completion.

Nothing here communicates with other ranks; saver.py does, from the main thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mlra_scale.checkpoint import failpoints, retention
from mlra_scale.checkpoint.copies import Digests, collect, digests_on_device
from mlra_scale.checkpoint.files import SHARED_DISK, CheckpointError, FileEntry, size_fault, system_errors, write_file
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
from mlra_scale.checkpoint.manifest import MANIFEST, Manifest, library_versions, stored_parameters
from mlra_scale.checkpoint.safetensors_file import NamedTensors, spec_of, write_safetensors
from mlra_scale.checkpoint.state_contents import write_small_files
from mlra_scale.config import Config, engine_kind, zero_stage
from mlra_scale.files import sync
from mlra_scale.model.bit_checksum import position_weights

if TYPE_CHECKING:
    from mlra_scale.model.parameters import ParameterTable
    from mlra_scale.parallel import Engine
    from mlra_scale.parallel.topology import Topology

CANCELLED = "the save was cancelled"


class Cancelled(Exception):
    """The save was cancelled while it was being written."""


class BackgroundTask:
    """A function that runs in a thread of its own from now on.

    Attributes:
        result: What it returned; None where it has not ended, or failed.
        error: Why it failed, as text; None where it did not.
        seconds: How long it took.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: str | None = None
        self.seconds = 0.0
        self._function = function
        # A daemon: a process that fails for another reason ends without waiting for it.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Waits for its end, at most this long."""
        self._thread.join(seconds)

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self.result = self._function()
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
    """Host memory that is allocated at the first snapshot and reused by every later one."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0)

    def parts_for(self, tensors: NamedTensors) -> NamedTensors:
        """Returns memory for copies of fp32 tensors, flattened, under their names.

        Raises:
            CheckpointError: There is not enough memory.
        """
        numel = sum(tensor.numel() for _, tensor in tensors)
        if self.buffer.numel() < numel:
            self.buffer = torch.empty(0)  # frees the old one first
            is_pinned = any(tensor.is_cuda for _, tensor in tensors)
            try:
                self.buffer = torch.empty(numel, dtype=torch.float32, pin_memory=is_pinned)
            except RuntimeError as error:
                raise CheckpointError(
                    f"{4e-9 * numel:.3g} GB of host memory for a copy of weights and moments are not available "
                    f"({str(error).splitlines()[0]}); set checkpoint.asynchronous=false, which needs no copy"
                ) from error
        parts = self.buffer[:numel].split([tensor.numel() for _, tensor in tensors])
        return [(name, part) for part, (name, _) in zip(parts, tensors, strict=True)]


@dataclass
class Snapshot:
    """What a rank contributes to a save.

    Attributes:
        tensors: The tensors of its file, valid only after `read` has returned.
        runs: The fragments that these are.
        has_moments: Whether moments are among them; None where the rank owns nothing.
        momentum_only: Parameters of which the first moment is among them, and no second one.
        read: Reads what training changes; for the writer's thread. Returns the checksums of parameters that others hold
            too.
        before_change: To be called before weights or moments change: waits until they have been read.
    """

    tensors: NamedTensors
    runs: list[ElementRun]
    has_moments: bool | None
    momentum_only: frozenset[str]
    read: Callable[[], Digests]
    before_change: Callable[[], object]


def take_snapshot(engine: Engine, copied: frozenset[str], memory: HostMemory | None) -> Snapshot:
    """Starts a snapshot of the weights and moments of an engine that a rank owns.

    Checksums are computed of `copied` (from `copies.copied_parameters`). The tensors are copied into `memory` while
    training continues, and its next update waits until they are. Copies from a GPU run on a separate stream, copies
    from host memory in the writer's thread. Without `memory` no copy is made.
    """
    failpoints.reached("snapshot")
    owned = [fragment for fragment in engine.owned_fragments(with_moments=True) if fragment.values.numel() > 0]
    held, device = engine.held_fragments(with_moments=True), engine.topology.device
    found = [(part, fragment, tensor.detach()) for fragment in owned for part, tensor in parts_of(fragment)]
    found.sort(key=lambda item: PARTS.index(item[0]))  # all weights, then all first moments, then all second ones
    sources = [(tensor_key(part, fragment.name, fragment.start), tensor) for part, fragment, tensor in found]
    targets = sources if memory is None else memory.parts_for(sources)

    def start_reading() -> Callable[[], Digests]:
        """Starts copies and checksums on the current stream; the function that it returns is for after their end."""
        failpoints.reached("copy")
        for (_, target), (_, source) in zip(targets, sources, strict=True):
            if target is not source:
                target.copy_(source, non_blocking=True)
        keys, values = digests_on_device(held, copied)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        host.copy_(values, non_blocking=True)
        return lambda: collect(keys, host.tolist())

    read, before_change = _reading(start_reading, device, all(tensor.is_cuda for _, tensor in sources))
    runs = [(fragment.name, fragment.start, fragment.values.numel()) for fragment in owned]
    has_moments = owned[0].exp_avg is not None if owned else None
    momentum_only = frozenset(fragment.name for fragment in owned if has_moments and fragment.exp_avg_sq is None)
    return Snapshot(targets, runs, has_moments, momentum_only, read, before_change)


def _reading(
    start: Callable[[], Callable[[], Digests]], device: torch.device, is_on_device: bool
) -> tuple[Callable[[], Digests], Callable[[], object]]:
    """Returns `read` and `before_change` of a snapshot, see there, of which `start` starts the work on a stream."""
    if device.type == "cuda" and is_on_device:
        training, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        position_weights(device)  # kept for both streams, so made on the one that the other waits for
        stream.wait_stream(training)
        with torch.cuda.stream(stream):
            digests = start()
            event = torch.cuda.Event()
            event.record(stream)

        def read_from_device() -> Digests:
            event.synchronize()
            return digests()

        return read_from_device, lambda: torch.cuda.current_stream(device).wait_event(event)

    is_read = threading.Event()

    def read() -> Digests:
        try:
            if device.type != "cuda":
                return start()()
            with torch.cuda.device(device):  # a new thread's current device is device 0
                digests = start()
                torch.cuda.synchronize(device)
                return digests()
        finally:
            is_read.set()

    return read, is_read.wait


@dataclass
class RankReport:
    """What rank 0 learns of the file that a rank has written.

    Attributes:
        rank: Global rank; `tensor_rank` and `pipeline_rank` are its coordinates.
        has_moments: See Snapshot; `momentum_only` too.
        digests: Checksums of parameters that other ranks hold too.
        entry: The file, and `line` its line of fragments.json.
        stall_seconds: How long training waited.
        write_seconds: How long writing took.
    """

    rank: int
    tensor_rank: int
    pipeline_rank: int
    has_moments: bool | None = None
    momentum_only: frozenset[str] = frozenset()
    digests: Digests = field(default_factory=dict)
    entry: FileEntry | None = None
    line: bytes = b""
    stall_seconds: float = 0.0
    write_seconds: float = 0.0

    @property
    def file(self) -> str:
        return f"rank-{self.rank:05d}.safetensors"


class MainFiles(NamedTuple):
    """What rank 0 adds to a save: the content of state.json and config.yaml, tensors, a tokenizer's folder to copy."""

    state: bytes
    buffers: NamedTensors
    config_text: str
    tokenizer: Path | None


def write_share(
    folder: Path, save_id: str, topology: Topology, snapshot: Snapshot, cancel: threading.Event
) -> RankReport:
    """Writes a rank's file into the unfinished checkpoint.

    Raises:
        Cancelled: `cancel` was set meanwhile.
        CheckpointError: The system refuses something.
    """

    def check() -> None:
        if cancel.is_set():
            raise Cancelled

    report = RankReport(topology.rank, topology.tensor_rank, topology.pipeline_rank, snapshot.has_moments)
    report.momentum_only = snapshot.momentum_only
    report.digests = snapshot.read()
    report.line = line_of(report.file, report.tensor_rank, snapshot.runs)
    specs = {name: spec_of(tensor) for name, tensor in snapshot.tensors}
    with system_errors("written", folder):
        report.entry = write_safetensors(folder / report.file, specs, snapshot.tensors, {"save_id": save_id}, check)
        failpoints.reached("file-complete")
    return report


def build_manifest(
    unfinished: Path,
    save_id: str,
    step: int,
    reports: Sequence[RankReport],
    main: MainFiles,
    table: ParameterTable,
    topology: Topology,
) -> Manifest:
    """Writes what rank 0 adds to the files of all ranks, checks that these add up, and returns the manifest; rank 0.

    Raises:
        CheckpointError: The ranks' fragments do not add up to the model, or the system refuses something.
    """
    has_moments = {report.has_moments for report in reports} - {None}
    if len(has_moments) > 1:
        raise CheckpointError("some ranks have moments of the optimizer and others have none; nothing was saved")
    momentum_only = frozenset[str]().union(*(report.momentum_only for report in reports))
    content = join_lines(report.line for report in reports)
    files = {report.file: report.entry for report in reports if report.entry is not None}
    with system_errors("written", unfinished):
        files[FRAGMENTS] = write_file(unfinished / FRAGMENTS, content)
        files |= write_small_files(unfinished, save_id, *main)
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
        files=files,
        parameters=stored_parameters(table),
        momentum_only=tuple(name for name in table if name in momentum_only),
    )
    by_file = {report.file: report.momentum_only for report in reports}
    for fragment in parse_fragments(content, manifest, unfinished / FRAGMENTS):
        if fragment.name in momentum_only and fragment.name not in by_file[fragment.file]:
            raise CheckpointError(
                f"some ranks have a second moment of {fragment.name} and others have none; nothing was saved"
            )
    return manifest


def commit(unfinished: Path, manifest: Manifest, keep_last: int, keep_every: int, pinned: int | None) -> str | None:
    """Completes a checkpoint: manifest, name, `latest`, then `retention.prune`; rank 0.

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
                raise CheckpointError(f"{fault}, as rank 0 sees it; {SHARED_DISK}")
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
