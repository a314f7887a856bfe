"""What start-up, TEV and a save cost the hosts of a thousand ranks, without the ranks: the real code, fed for all.

Every rank's part is made from the layout by arithmetic: which elements it owns (equal pieces of a stage's flat weights
over data ranks, or of every weight with ZeRO 3; but for DeepSpeed's padding) and the checksums of its copies. What one
process then does with the parts of all ranks is the project's own code, timed in seconds of CPU. There is no network.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlra_scale.checkpoint.copies import Digest, differing_copies
from mlra_scale.checkpoint.files import FileEntry
from mlra_scale.checkpoint.fragments import ElementRun, line_of
from mlra_scale.checkpoint.saving import MainFiles, RankReport, build_manifest
from mlra_scale.config import BatchPlan, Config, batch_plan, zero_stage
from mlra_scale.config.loading import load_named_config
from mlra_scale.model.parameters import ParameterInfo, ParameterTable
from mlra_scale.model.validation import validate
from mlra_scale.planning.layout import rank_of, weights_of_stage
from mlra_scale.planning.memory import rank_memory
from mlra_scale.stability.tev import HEADER, PIECE, TevRequest, combine

PARTS = ("weight", "exp_avg", "exp_avg_sq")
MIB = 1 << 20


@dataclass(frozen=True)
class Mesh:
    """A job that is simulated."""

    name: str
    world_size: int
    overrides: tuple[str, ...]
    ds_config: str
    preset: str = "gpt2-mlra-72l"
    save_seconds: float = 5.0  # CPU time that a save may take rank 0
    fragments_bytes: int = 2 * MIB  # size that fragments.json may have
    is_large: bool = False  # whether it takes a minute to simulate


PIPELINE, ZERO_3 = "ds_configs/zero1_pipeline.json", "ds_configs/zero3.json"
DEEP, DEEPER = "gpt2-mlra-72l", "gpt2-mlra-192l"
MESHES = (
    Mesh("72 layers, 2 x 4 x 128", 1024, ("parallel.tensor=2", "parallel.pipeline=4"), PIPELINE),
    Mesh("72 layers, 2 x 4 x 512", 4096, ("parallel.tensor=2", "parallel.pipeline=4"), PIPELINE),
    Mesh("192 layers, 4 x 8 x 32", 1024, ("parallel.tensor=4", "parallel.pipeline=8"), PIPELINE, DEEPER),
    Mesh("192 layers, 4 x 8 x 128", 4096, ("parallel.tensor=4", "parallel.pipeline=8"), PIPELINE, DEEPER),
    # Every weight is cut into a piece for every data rank.
    Mesh("72 layers, ZeRO 3 x 1024", 1024, (), ZERO_3, DEEP, 60.0, 80 * MIB, True),
)


@dataclass(frozen=True)
class Cost:
    """What a save or a measurement costs."""

    cpu_seconds: float  # of the rank that does most (rank 0), in our own code
    sent: int  # bytes that an ordinary rank sends
    received: int  # bytes that arrive at the rank that gets most


def configured(mesh: Mesh) -> tuple[Config, BatchPlan, float]:
    """The configuration, its plan, and the seconds that this and the memory of every stage take."""
    began = time.process_time()
    base = ["train.device=cuda", "data.path=x", *mesh.overrides]
    config, _ = load_named_config(mesh.preset, None, mesh.ds_config, base)
    ranks = config.parallel.tensor * config.parallel.pipeline
    batch = 2 * config.parallel.pipeline * config.train.micro_batch_size * mesh.world_size // ranks
    config, _ = load_named_config(mesh.preset, None, mesh.ds_config, [*base, f"train.global_batch_size={batch}"])
    validate(config, mesh.world_size, device="cuda")
    plan = batch_plan(config, mesh.world_size)
    for stage in range(plan.pipeline):
        rank_memory(config, plan, stage)
    return config, plan, time.process_time() - began


def _local_numel(info: ParameterInfo, tensor: int) -> int:
    return info.numel() // (1 if info.shard_dim is None else tensor)


def owned_runs(config: Config, plan: BatchPlan, stage: int) -> Iterator[tuple[int, list[ElementRun]]]:
    """Yields the runs of every data rank of a stage, of one tensor-parallel shard."""
    infos = weights_of_stage(config.model, plan.pipeline, stage)
    pieces: list[list[ElementRun]] = [[] for _ in range(plan.data)]
    if zero_stage(config) == 3:
        for info in infos:
            numel = _local_numel(info, plan.tensor)
            size = -(-numel // plan.data)
            for rank, start in enumerate(range(0, numel, size)):
                pieces[rank].append((info.name, start, min(size, numel - start)))
    else:
        total = sum(_local_numel(info, plan.tensor) for info in infos)
        share, position = -(-total // plan.data), 0
        for info in infos:
            numel, start = _local_numel(info, plan.tensor), 0
            while start < numel:
                rank = position // share
                length = min(numel - start, (rank + 1) * share - position)
                pieces[rank].append((info.name, start, length))
                start, position = start + length, position + length
    yield from enumerate(pieces)


def rank_reports(config: Config, plan: BatchPlan) -> list[RankReport]:
    """What every rank reports of its share of a save (checkpoint.saver), in the order of the ranks."""
    table = ParameterTable(config.model)
    reports: list[Any] = [None] * plan.world_size
    entry = FileEntry(1 << 20, "0" * 64)
    for stage in range(plan.pipeline):
        is_copy = 0 < stage == plan.pipeline - 1
        for data_rank, runs in owned_runs(config, plan, stage):
            for tensor_rank in range(plan.tensor):
                rank = rank_of(plan, stage, data_rank, tensor_rank)
                # A checksum of ones: copies agree, however they are cut.
                digests = {
                    (name, part): Digest(numel, numel)
                    for name, start, numel in runs
                    if (table[name].shard_dim is None and plan.tensor > 1)
                    or (name == "embedding.weight" and plan.pipeline > 1)
                    for part in PARTS
                }
                mine = [
                    run
                    for run in runs
                    if (tensor_rank == 0 or table[run[0]].shard_dim is not None)
                    and not (is_copy and run[0] == "embedding.weight")
                ]
                file = f"rank-{rank:05d}.safetensors"
                line = line_of(file, tensor_rank, mine)
                report = RankReport(rank, tensor_rank, stage, has_moments=True, entry=entry, line=line)
                report.digests = digests  # type: ignore[assignment]
                reports[rank] = report
    return reports


def save_costs(config: Config, plan: BatchPlan, folder: Path) -> tuple[Cost, int, int]:
    """What a save costs rank 0 when every rank has written its file.

    Returns:
        The cost, and the bytes of fragments.json and of the manifest.
    """
    reports = rank_reports(config, plan)
    sizes = [len(pickle.dumps(report)) for report in reports]
    table = ParameterTable(config.model)
    topology: Any = SimpleNamespace(
        world_size=plan.world_size, tensor=plan.tensor, pipeline=plan.pipeline, data=plan.data
    )
    main = MainFiles(b"{}", [], config.to_yaml(), None)
    began = time.process_time()
    assert differing_copies(reports, table, plan.tensor) is None
    manifest = build_manifest(folder, "0" * 32, 1, reports, main, table, topology)
    content = manifest.to_json()
    seconds = time.process_time() - began
    # gather_object sends as many bytes for every rank as the longest report has; before it, and after, a few numbers.
    cost = Cost(seconds, max(sizes), max(sizes) * plan.world_size)
    return cost, (folder / "fragments.json").stat().st_size, len(content)


def tev_costs(config: Config, plan: BatchPlan) -> Cost:
    """What a measurement of TEV costs a rank: the last part, for which every rank has everybody's numbers."""
    request = TevRequest(config.model.vocab_size, config.model.hidden_size)
    width, rows = request.hidden_size, config.model.padded_vocab_size // plan.tensor
    gathered = [np.zeros(HEADER + 2 * PIECE) for _ in range(plan.world_size)]
    for tensor_rank in range(plan.tensor):
        first, end = tensor_rank * rows, min((tensor_rank + 1) * rows, request.num_tokens)
        for data_rank, runs in owned_runs(config, plan, 0):
            for name, start, numel in runs:
                if name == "embedding.weight":
                    vector = gathered[rank_of(plan, 0, data_rank, tensor_rank)]
                    _count_rows(vector, first * width + start, min(first * width + start + numel, end * width), width)
    summed = np.ones(request.hidden_size + request.num_tokens)
    began = time.process_time()
    combine(request, gathered, summed)
    seconds = time.process_time() - began
    sent = 8 + gathered[0].nbytes + summed.nbytes
    return Cost(seconds, sent, gathered[0].nbytes * plan.world_size + summed.nbytes)


def _count_rows(vector: np.ndarray, start: int, stop: int, width: int) -> None:
    """Fills what a rank sends of elements start..stop of the embedding: its whole rows, and pieces of rows."""
    if stop <= start:
        return
    first, last = -(-start // width), stop // width
    places = [(start // width, min(first * width, stop) - start), (last, stop - last * width)]
    if last < first:  # within one row
        places = [(start // width, stop - start), (0, 0)]
    else:
        vector[:HEADER] = (last - first, 1.0, 0.0, 1.0)
    for number, (row, count) in enumerate(places):
        if count > 0:
            vector[HEADER + number * PIECE : HEADER + (number + 1) * PIECE] = (row, count, 1.0, 1.0)
