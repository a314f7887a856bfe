"""Checkpoints for tests: a tiny model, engines without DeepSpeed, and ranks without processes."""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import numpy as np
import torch

from mlra_scale.checkpoint import checkpoint_name
from mlra_scale.checkpoint.files import entry_of
from mlra_scale.checkpoint.fragments import PARTS
from mlra_scale.checkpoint.manifest import MANIFEST, _checksum
from mlra_scale.checkpoint.saving import MainFiles, build_manifest, commit, take_snapshot, write_share
from mlra_scale.checkpoint.state_contents import json_bytes
from mlra_scale.config import Config, ModelConfig
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.update_rules import UpdateRule, update_rules, vector_lengths
from mlra_scale.parallel.fragments import Fragment
from mlra_scale.parallel.topology import Topology

MODEL = ModelConfig(vocab_size=21, vocab_padding_multiple=4, max_positions=6, num_layers=2, hidden_size=8, num_heads=2)
Globals = dict[str, dict[str, torch.Tensor]]
_FIELDS = {"weight": "values", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def config_of(model: ModelConfig = MODEL, **optim: Any) -> Config:
    """A run of the model; `optim`: fields of this section."""
    train = {"steps": 10, "global_batch_size": 2, "micro_batch_size": 1, "sequence_length": 4}
    return Config.from_dict({"model": model.model_dump(mode="json"), "train": train, "optim": {"lr": 0.1, **optim}})


def global_values(model: ModelConfig = MODEL, seed: int = 0) -> dict[str, torch.Tensor]:
    """A value for every element of the model; padded rows of the embedding are zero."""
    generator = np.random.default_rng(seed)
    values = {
        name: torch.from_numpy(generator.standard_normal(info.shape, dtype=np.float32))
        for name, info in ParameterTable(model).items()
    }
    values["embedding.weight"][model.vocab_size :] = 0.0
    return values


def all_parts(model: ModelConfig = MODEL) -> Globals:
    """Weights and moments of the model."""
    return {part: global_values(model, seed) for seed, part in enumerate(PARTS)}


def rules_of(model: ModelConfig = MODEL, **optim: Any) -> dict[str, UpdateRule]:
    """How each parameter of the run is updated."""
    return update_rules(model, config_of(model, **optim).optim)


def parts_with(model: ModelConfig = MODEL, **optim: Any) -> Globals:
    """Weights and moments as the optimizers of the run keep them."""
    values, rules = all_parts(model), rules_of(model, **optim)
    kept = {name: tensor for name, tensor in values["exp_avg_sq"].items() if rules[name].optimizer == "adamw"}
    return values | {"exp_avg_sq": kept}


def vectors_with(model: ModelConfig = MODEL, **optim: Any) -> dict[str, torch.Tensor]:
    """Vectors of the power iterations of the run's optimizers."""
    lengths = vector_lengths(rules_of(model, **optim), ParameterTable(model))
    return {name: torch.full((length,), float(index)) for index, (name, length) in enumerate(lengths.items())}


def write_tokenizer(folder: Path) -> Path:
    """Something that looks like a tokenizer's folder."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text('{"model": {}}\n')
    (folder / "tokenizer_config.json").write_text("{}\n")
    return folder


def flip_a_byte(path: Path) -> None:
    """Damages a file; its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_manifest(folder: Path, content: Any) -> None:
    """Writes a manifest with a checksum that fits it."""
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key != "checksum"}
        content["checksum"] = _checksum(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def sign(folder: Path, name: str, content: bytes) -> None:
    """Writes a file of a checkpoint, and a manifest whose sizes and checksums are right: only the content is bad."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = asdict(entry_of(folder / name))
    write_manifest(folder, manifest)


@dataclass(frozen=True)
class Layout:
    """Degrees; over data ranks everything is cut at random places, or replicated (ZeRO stage 0)."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    is_replicated: bool = False
    seed: int = 0

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def topology(self, rank: int, control_group: Any = None) -> Topology:
        """The place of a rank in the mesh, without process groups."""
        place = SimpleNamespace(
            world_size=self.world_size,
            rank=rank,
            tensor=self.tensor,
            pipeline=self.pipeline,
            data=self.data,
            tensor_rank=rank % self.tensor,
            data_rank=rank // self.tensor % self.data,
            pipeline_rank=rank // (self.tensor * self.data),
            control_group=control_group,
            device=torch.device("cpu"),
        )
        return cast(Topology, place)


@dataclass
class FakeEngine:
    """One rank's fragments of given global values; `optim`: fields of the section of its configuration."""

    topology: Topology
    layout: Layout
    values: Globals
    model: ModelConfig = MODEL
    optim: dict[str, Any] = field(default_factory=dict)
    table: ParameterTable = field(init=False)
    restored: dict[str, Any] | None = None
    loaded_buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    can_count: bool = True
    fragments: list[Fragment] = field(default_factory=list)
    before_change: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.table = ParameterTable(self.model)
        self.rules = rules_of(self.model, **self.optim)
        for name in self.table:
            if self._holds(name):
                local = {part: self._local(part, name) for part in self.values if name in self.values[part]}
                for start, stop in self._cuts(name, local["weight"].numel()):
                    pieces = {_FIELDS[part]: values[start:stop] for part, values in local.items()}
                    self.fragments.append(Fragment(name, start, **pieces))

    def _holds(self, name: str) -> bool:
        """The first stage has the embeddings, the last the tied head and the final norm, blocks are dealt out."""
        last = self.layout.pipeline - 1
        if name == "embedding.weight":
            return self.topology.pipeline_rank in (0, last)
        if name == "positions.weight":
            return self.topology.pipeline_rank == 0
        if name.startswith("final_norm"):
            return self.topology.pipeline_rank == last
        return int(name.split(".")[1]) % self.layout.pipeline == self.topology.pipeline_rank

    def _local(self, part: str, name: str) -> torch.Tensor:
        whole, dim = self.values[part][name], self.table[name].shard_dim
        shard = whole if dim is None else whole.chunk(self.layout.tensor, dim)[self.topology.tensor_rank]
        return shard.reshape(-1).clone()

    def _cuts(self, name: str, size: int) -> list[tuple[int, int]]:
        if self.layout.is_replicated:
            return [(0, size)]
        # Equal on the ranks of a data group, different for every tensor and stage: some data ranks get nothing.
        seed = [self.layout.seed, self.topology.pipeline_rank, len(name), size]
        inner = np.random.default_rng(seed).integers(0, size + 1, self.layout.data - 1)
        edges = [0, *sorted(inner.tolist()), size]
        start, stop = edges[self.topology.data_rank], edges[self.topology.data_rank + 1]
        return [(start, stop)] if stop > start else []

    def load_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        self.loaded_buffers = buffers

    def has_counts_for(self, adam_begun_at: dict[str, int]) -> bool:
        return self.can_count

    def owns(self, name: str) -> bool:
        if name == "embedding.weight" and self.topology.pipeline_rank > 0:
            return False
        if self.table[name].shard_dim is None and self.topology.tensor_rank > 0:
            return False
        return not self.layout.is_replicated or self.topology.data_rank == 0

    def held_fragments(self, with_moments: bool = False) -> list[Fragment]:
        if with_moments:
            return self.fragments
        return [Fragment(fragment.name, fragment.start, fragment.values) for fragment in self.fragments]

    def owned_fragments(self, with_moments: bool = False) -> list[Fragment]:
        return [fragment for fragment in self.held_fragments(with_moments) if self.owns(fragment.name)]

    def restore(self, fill: Callable[[Fragment], None], state: dict[str, Any] | None, with_moments: bool) -> None:
        for fragment in self.held_fragments(with_moments):
            fill(fragment)
        self.restored = {"state": state, "with_moments": with_moments}


def write_checkpoint(
    checkpoints: Path, step: int, layout: Layout | None = None, values: Globals | None = None, **options: Any
) -> Path:
    """Writes a checkpoint of any layout, rank after rank in this process.

    Args:
        checkpoints: The run's checkpoints.
        step: Of the checkpoint.
        layout: Of the ranks.
        values: Weights, and moments if there are any.
        options: model, optim, state, buffers, tokenizer, keep_last, keep_every, faults (a list that commit adds to).
    """
    layout, values = layout or Layout(), all_parts() if values is None else values
    model, save_id = options.get("model", MODEL), uuid4().hex
    unfinished = checkpoints / f".unfinished-{step}"
    unfinished.mkdir(parents=True)
    state = {"engine": {"optimizer_step": step}} | options.get("state", {})
    buffers = list(options.get("buffers", {}).items())
    config = config_of(model, **options.get("optim", {}))
    main = MainFiles(json_bytes(state), buffers, config.to_yaml(), options.get("tokenizer"))
    reports, table = [], ParameterTable(model)
    for rank in range(layout.world_size):
        topology = layout.topology(rank)
        engine: Any = FakeEngine(topology, layout, values, model)
        snapshot = take_snapshot(engine, frozenset(table), None)
        reports.append(write_share(unfinished, save_id, topology, snapshot, threading.Event()))
    manifest = build_manifest(unfinished, save_id, step, reports, main, table, layout.topology(0))
    fault = commit(unfinished, manifest, options.get("keep_last", 100), options.get("keep_every", 0), None)
    options.get("faults", []).append(fault)
    return checkpoints / checkpoint_name(step)
