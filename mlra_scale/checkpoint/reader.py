"""Reading a checkpoint, whatever the layout that wrote it and the layout that asks.

Opening reads the manifest and the small files. Weights are mapped into memory, and only what is asked for is read.
Nothing here needs a process group.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from mlra_scale.checkpoint import fragments
from mlra_scale.checkpoint.contents import (
    BUFFERS,
    CONFIG,
    PARTS,
    STATE,
    TOKENIZER,
    Part,
    model_of,
    state_of,
    tensor_key,
)
from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.files import checksum_fault, faults_told
from mlra_scale.checkpoint.fragments import FRAGMENTS, StoredFragment
from mlra_scale.checkpoint.manifest import Manifest, read_complete_manifest
from mlra_scale.checkpoint.placement import Box, boxes_of, copy_common, have_common_rows, matrix_shape, shard_of
from mlra_scale.config import Config, ConfigError, ModelConfig, stored_yaml
from mlra_scale.model.parameters import ParameterInfo, ParameterTable, linear_maps, vector_name

if TYPE_CHECKING:
    from mlra_scale.parallel.fragments import Fragment


class Store:
    """One checkpoint, open for reading.

    Attributes:
        folder: Where it lies.
        manifest: What it consists of.
        config: The configuration of the run, or None for kind "weights".
        model: The model section of the configuration.
        table: The parameter table of the model.
        state: What is in state.json.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Reads the small files; see `open`."""
        self.folder = folder
        self.manifest = manifest
        self.config: Config | None
        self.config, self.model = self._read_config()
        self.table = ParameterTable(self.model)
        self.state: dict[str, Any] = state_of(self._small_file(STATE), folder / STATE)
        self._pieces: dict[str, list[tuple[StoredFragment, list[Box]]]] = {}
        self._by_name: dict[str, list[StoredFragment]] = defaultdict(list)
        self._maps: dict[str, Any] = {}
        self._check_parameters()
        for piece in fragments.parse(self._small_file(FRAGMENTS), manifest, folder / FRAGMENTS):
            self._by_name[piece.name].append(piece)

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Opens a checkpoint after checking that every file is there and as large as it should be.

        The weights are not read: `verify` compares their checksums.

        Args:
            folder: The folder of a checkpoint.

        Raises:
            CheckpointError: It is incomplete, damaged or of another format.
        """
        return cls(folder, read_complete_manifest(folder))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def kind(self) -> str:
        """Either "training" or "weights"."""
        return self.manifest.kind

    @property
    def tokenizer_folder(self) -> Path | None:
        """The copy of the data's tokenizer, if there is one."""
        has_one = any(name.startswith(f"{TOKENIZER}/") for name in self.manifest.files)
        return self.folder / TOKENIZER if has_one else None

    def verify(self, part: int = 0, of: int = 1) -> list[str]:
        """Compares files with their checksums; reads them whole.

        Args:
            part: Which share of the files.
            of: Into how many shares of about the same size the files are divided.

        Returns:
            What is wrong, file by file; nothing where all is well.
        """
        loads = [0] * of
        share = []
        for name, entry in sorted(self.manifest.files.items(), key=lambda item: (-item[1].bytes, item[0])):
            lightest = loads.index(min(loads))
            loads[lightest] += entry.bytes
            if lightest == part:
                share.append((name, entry))
        return [fault for name, entry in share if (fault := checksum_fault(self.folder / name, entry))]

    def tensor(self, name: str, moment: Part = "weight") -> torch.Tensor:
        """Returns a whole global tensor in fp32, padded vocabulary rows included.

        Args:
            name: Canonical parameter name.
            moment: The weight itself or one of Adam's moments.

        Returns:
            A view of the mapped file where the tensor lies in one piece, else a new tensor.
        """
        shape = self._parameter_shape(name)
        rows, columns = matrix_shape(shape)
        return self._assembled(name, moment, Box(0, 0, rows, columns, 0)).view(shape)

    def rows(self, name: str, first: int, stop: int, moment: Part = "weight") -> torch.Tensor:
        """Returns some rows of a matrix in fp32; only their bytes are read.

        Args:
            name: Canonical parameter name.
            first: First row.
            stop: The row after the last.
            moment: The weight itself or one of Adam's moments.
        """
        rows, columns = matrix_shape(self._parameter_shape(name))
        if not 0 <= first <= stop <= rows:
            raise ValueError(f"{name} has rows 0 to {rows - 1}; asked for {first} to {stop - 1}")
        return self._assembled(name, moment, Box(first, 0, stop - first, columns, 0)).view(stop - first, columns)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Returns what was stored beside parameters and moments, by name."""
        if BUFFERS not in self.manifest.files:
            return {}
        mapped = self._map(BUFFERS)
        try:
            return {name: mapped.get_tensor(name).clone() for name in mapped.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / BUFFERS} is damaged: {error}; use another checkpoint") from None

    def power_vectors(self) -> dict[str, torch.Tensor]:
        """Returns the vectors of sigmaReparam's power iterations by their names; none where the model has no such maps.

        Raises:
            CheckpointError: Some are missing.
        """
        stored = self.buffers() if self.model.sigma_reparam else {}
        for linear_map in linear_maps(self.model).values():
            vector = stored.get(vector_name(linear_map.name))
            if vector is None or tuple(vector.shape) != (linear_map.size,):
                raise CheckpointError(
                    f"{self.folder} lacks the power-iteration vector of {linear_map.name}; use another checkpoint"
                )
        return stored

    def fill(
        self, fragment: Fragment, tensor_parallel: int, tensor_rank: int, info: ParameterInfo | None = None
    ) -> None:
        """Writes stored values into a fragment of any layout, and stored moments where the fragment has moments.

        Args:
            fragment: What to fill, on any device.
            tensor_parallel: Tensor-parallel degree of the layout it belongs to.
            tensor_rank: The tensor-parallel rank that holds it.
            info: Global shape and sharding of the parameter in that layout; by default as they are stored. The
                embedding may have more or fewer padded rows than were stored: what is more becomes zero.

        Raises:
            CheckpointError: The parameter is not stored, or is of another shape, or has no moments.
        """
        stored = self._parameter_shape(fragment.name)
        info = replace(self.table[fragment.name], shape=stored) if info is None else info
        shape = info.shape
        may_differ = info.kind == "embedding" and shape[0] >= self.model.vocab_size
        if shape[1:] != stored[1:] or (shape[0] != stored[0] and not may_differ):
            raise CheckpointError(f"{self.folder} has {fragment.name} of shape {stored}, asked for is {shape}")
        shard = shard_of(shape, info.shard_dim, tensor_parallel, tensor_rank)
        boxes = boxes_of(shard, fragment.start, fragment.values.numel())
        for part, target in zip(PARTS, (fragment.values, fragment.exp_avg, fragment.exp_avg_sq), strict=True):
            if target is not None:
                self._copy(fragment.name, part, target, boxes)

    def _assembled(self, name: str, part: Part, box: Box) -> torch.Tensor:
        """The elements of a box as one flat tensor: a view where a single stored fragment has them in a row."""
        for piece, boxes in self._stored(name):
            for of in boxes:
                is_within = of.row <= box.row and box.row + box.rows <= of.row + of.rows
                if is_within and (of.column, of.columns) == (box.column, box.columns):
                    start = of.offset + (box.row - of.row) * of.columns
                    return self._values(piece, part)[start : start + box.numel()]
        target = torch.empty(box.numel(), dtype=torch.float32)
        self._copy(name, part, target, [box])
        return target

    def _copy(self, name: str, part: Part, target: torch.Tensor, boxes: list[Box]) -> None:
        """Fills the boxes of a fragment from whatever stored fragments have elements of them."""
        num_rows, _ = matrix_shape(self._parameter_shape(name))
        stored = sum(max(0, min(box.row + box.rows, num_rows) - box.row) * box.columns for box in boxes)
        if stored < target.numel():
            target.zero_()
        copied = 0
        for piece, of in self._stored(name):
            if boxes and have_common_rows(boxes, of):
                copied += copy_common(target, boxes, self._values(piece, part), of)
        # The manifest is known to cover every parameter once.
        assert copied == stored, (name, copied, stored)

    def _stored(self, name: str) -> list[tuple[StoredFragment, list[Box]]]:
        """The stored fragments of a parameter, with the rectangles that they are."""
        if name not in self._pieces:
            parameter, pieces = self.manifest.parameters[name], self._by_name[name]
            tensor = self.manifest.tensor
            shards = [shard_of(parameter.shape, parameter.shard_dim, tensor, piece.tensor_rank) for piece in pieces]
            self._pieces[name] = [
                (piece, boxes_of(shard, piece.start, piece.numel)) for piece, shard in zip(pieces, shards, strict=True)
            ]
        return self._pieces[name]

    def _values(self, piece: StoredFragment, part: Part) -> torch.Tensor:
        """A stored fragment as a view of its mapped file."""
        if part != "weight" and not self.manifest.has_moments:
            raise CheckpointError(f"{self.folder} has no optimizer moments; it is the start of a run, not its middle")
        try:
            values: torch.Tensor = self._map(piece.file).get_tensor(tensor_key(part, piece.name, piece.start))
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / piece.file} lacks a part of {piece.name}: {error}") from None
        if values.dtype != torch.float32 or values.numel() != piece.numel:
            raise CheckpointError(f"{self.folder / piece.file} has {piece.name} in another size or type than it should")
        return values

    def _map(self, file: str) -> Any:
        """A safetensors file of this save, mapped."""
        if file not in self._maps:
            path = self.folder / file
            try:
                with faults_told("read", path):
                    mapped = safe_open(path, framework="pt")
                    save_id = (mapped.metadata() or {}).get("save_id")
            except SafetensorError as error:
                raise CheckpointError(f"{path} is damaged: {error}; use another checkpoint") from None
            if save_id != self.manifest.save_id:
                raise CheckpointError(f"{path} belongs to another save than the manifest; use another checkpoint")
            self._maps[file] = mapped
        return self._maps[file]

    def _parameter_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.manifest.parameters:
            raise CheckpointError(f"{self.folder} has no parameter {name}: its model is another one")
        return self.manifest.parameters[name].shape

    def _read_config(self) -> tuple[Config | None, ModelConfig]:
        path = self.folder / CONFIG
        raw = self._small_file(CONFIG)
        try:
            if len(raw) > stored_yaml.MAX_BYTES:
                raise ValueError(f"it is larger than {stored_yaml.MAX_BYTES} bytes")
            values = stored_yaml.parse(raw.decode())
            if self.kind == "weights":
                if not isinstance(values, dict) or "model" not in values:
                    raise ValueError("it has no section `model`")
                return None, model_of(values["model"], path)
            config = Config.from_dict(values)
        except ConfigError as error:
            reason = error.in_one_line
        except ValueError as error:
            reason = str(error)
        else:
            return config, config.model
        raise CheckpointError(f"{path} cannot be understood: {reason}; use another checkpoint")

    def _small_file(self, name: str) -> bytes:
        """A file that is read anyway, checked at once."""
        path = self.folder / name
        if name not in self.manifest.files:
            raise CheckpointError(f"{self.folder} has no {name}; use another checkpoint")
        if fault := checksum_fault(path, self.manifest.files[name]):
            raise CheckpointError(f"{fault}; use another checkpoint")
        with faults_told("read", path):
            return path.read_bytes()

    def _check_parameters(self) -> None:
        """The stored parameters must be those of the stored configuration."""
        stored = {name: (entry.shape, entry.shard_dim) for name, entry in self.manifest.parameters.items()}
        for name in self.table.keys() | stored.keys():
            info = self.table.get(name)
            made = None if info is None else (info.shape, info.shard_dim)
            # A program before version 3 of the configuration may have split the down factors of q, k, v by rows.
            may_be_split = name.endswith(("q.down.weight", "k.down.weight", "v.down.weight"))
            if info is None or stored.get(name) not in (made, (info.shape, 0) if may_be_split else made):
                raise CheckpointError(
                    f"{self.folder / CONFIG} makes {name} {made}, stored is {stored.get(name)}; "
                    "use the program that wrote the checkpoint"
                )
