"""Reading a checkpoint into any layout, without a process group.

Opening reads the manifest and the small files. Weights are mapped into memory, and only the requested parts are read.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from mlra_scale.checkpoint.files import CheckpointError, checksum_fault, system_errors
from mlra_scale.checkpoint.fragments import (
    FRAGMENTS,
    PARTS,
    Box,
    Part,
    StoredFragment,
    boxes_of,
    copy_overlaps,
    matrix_shape,
    overlaps,
    parse_fragments,
    parts_of,
    shard_of,
    tensor_key,
)
from mlra_scale.checkpoint.manifest import Manifest, read_complete_manifest
from mlra_scale.checkpoint.state_contents import BUFFERS, CONFIG, STATE, TOKENIZER, parse_model, parse_state
from mlra_scale.config import Config, ConfigError, ModelConfig, stored_yaml
from mlra_scale.model.parameters import ParameterInfo, ParameterTable
from mlra_scale.model.update_rules import update_rules, vector_lengths

if TYPE_CHECKING:
    from mlra_scale.parallel.fragments import Fragment


class Store:
    """One checkpoint, open for reading.

    Attributes:
        config: The configuration of the run, or None for kind "weights", which has only its section `model`.
        table: The parameter table of the model.
        state: The content of state.json.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Reads the small files; see `open`."""
        self.folder = folder
        self.manifest = manifest
        self.config: Config | None
        self.config, self.model = self._read_config()
        self.table = ParameterTable(self.model)
        self.state: dict[str, Any] = parse_state(self._read_small_file(STATE), folder / STATE)
        self._boxes: dict[str, list[tuple[StoredFragment, list[Box]]]] = {}
        self._fragments: dict[str, list[StoredFragment]] = defaultdict(list)
        self._mapped_files: dict[str, Any] = {}
        self._momentum_only = frozenset(manifest.momentum_only)
        self._check_parameters()
        self._check_buffers()
        for fragment in parse_fragments(self._read_small_file(FRAGMENTS), manifest, folder / FRAGMENTS):
            self._fragments[fragment.name].append(fragment)

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Opens a checkpoint after checking that every file exists and has its size; `verify` compares checksums.

        Raises:
            CheckpointError: It is incomplete, damaged or of another format.
        """
        return cls(folder, read_complete_manifest(folder))

    @property
    def step(self) -> int:
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

    def parts(self, name: str) -> tuple[Part, ...]:
        """Returns what is stored of a parameter: the weight, and the moments that its optimizer keeps."""
        if not self.manifest.has_moments:
            return PARTS[:1]
        return PARTS[:2] if name in self._momentum_only else PARTS

    def verify(self, part: int = 0, of: int = 1) -> list[str]:
        """Compares files with their checksums, which reads them whole; returns a fault for each damaged one.

        Only share number `part` is read of `of` shares of about the same size.
        """
        loads = [0] * of
        faults = []
        for name, entry in sorted(self.manifest.files.items(), key=lambda item: (-item[1].bytes, item[0])):
            lightest = loads.index(min(loads))
            loads[lightest] += entry.bytes
            if lightest == part and (fault := checksum_fault(self.folder / name, entry)):
                faults.append(fault)
        return faults

    def tensor(self, name: str, part: Part = "weight") -> torch.Tensor:
        """Returns a global tensor in fp32 with its padded vocabulary rows; a view of the file if it is in one piece."""
        shape = self._stored_shape(name)
        return self._assemble(name, part, Box(0, 0, *matrix_shape(shape))).view(shape)

    def rows(self, name: str, first: int, stop: int, part: Part = "weight") -> torch.Tensor:
        """Returns the rows `first` to `stop - 1` of a matrix in fp32; only their bytes are read."""
        rows, columns = matrix_shape(self._stored_shape(name))
        if not 0 <= first <= stop <= rows:
            raise ValueError(f"{name} has rows 0 to {rows - 1}; asked for {first} to {stop - 1}")
        return self._assemble(name, part, Box(first, 0, stop - first, columns)).view(stop - first, columns)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Returns the tensors stored beside parameters and moments, by name."""
        return {name: self._tensor(BUFFERS, name).clone() for name in sorted(self.buffer_names)}

    @property
    def buffer_names(self) -> frozenset[str]:
        """The names of the tensors beside parameters and moments."""
        return frozenset(self._map(BUFFERS).keys()) if BUFFERS in self.manifest.files else frozenset()

    def fill(
        self, fragment: Fragment, tensor_parallel: int, tensor_rank: int, info: ParameterInfo | None = None
    ) -> None:
        """Writes stored values into a fragment of any layout, and stored moments where the fragment has moments.

        Args:
            fragment: What to fill, on any device.
            tensor_parallel: Tensor-parallel degree of the fragment's layout.
            tensor_rank: The tensor-parallel rank that holds it.
            info: Global shape and sharding of the parameter in that layout; None: as stored. The embedding may have
                other padded rows than were stored: additional ones become zero.

        Raises:
            CheckpointError: The parameter is not stored, has another shape, or not these moments.
        """
        stored = self._stored_shape(fragment.name)
        info = replace(self.table[fragment.name], shape=stored) if info is None else info
        shape = info.shape
        may_differ = info.kind == "embedding" and shape[0] >= self.model.vocab_size
        if shape[1:] != stored[1:] or (shape[0] != stored[0] and not may_differ):
            raise CheckpointError(
                f"{self.folder} has {fragment.name} of shape {stored}, asked for is {shape}: take the shape from"
                " `Store.table`"
            )
        shard = shard_of(shape, info.shard_dim, tensor_parallel, tensor_rank)
        boxes = boxes_of(shard, fragment.start, fragment.values.numel())
        for part, target in parts_of(fragment):
            self._copy(fragment.name, part, target, boxes)

    def _assemble(self, name: str, part: Part, box: Box) -> torch.Tensor:
        """The elements of a box as one flat tensor: a view where a single stored fragment has them in a row."""
        for fragment, boxes in self._stored_boxes(name):
            for of in boxes:
                is_within = of.row <= box.row and box.end_row <= of.end_row
                if is_within and (of.column, of.columns) == (box.column, box.columns):
                    start = of.offset + (box.row - of.row) * of.columns
                    return self._read_values(fragment, part)[start : start + box.numel]
        target = torch.empty(box.numel, dtype=torch.float32)
        self._copy(name, part, target, [box])
        return target

    def _copy(self, name: str, part: Part, target: torch.Tensor, boxes: list[Box]) -> None:
        """Fills the boxes of a tensor from all stored fragments that overlap them."""
        num_rows, _ = matrix_shape(self._stored_shape(name))
        num_stored = sum(max(0, min(box.end_row, num_rows) - box.row) * box.columns for box in boxes)
        if num_stored < target.numel():
            target.zero_()
        num_copied = 0
        for fragment, of in self._stored_boxes(name):
            if common := overlaps(boxes, of):
                num_copied += copy_overlaps(target, self._read_values(fragment, part), common)
        # The manifest is known to cover every parameter once.
        assert num_copied == num_stored, (name, num_copied, num_stored)

    def _stored_boxes(self, name: str) -> list[tuple[StoredFragment, list[Box]]]:
        if name not in self._boxes:
            parameter, degree = self.manifest.parameters[name], self.manifest.tensor
            self._boxes[name] = []
            for of in self._fragments[name]:
                shard = shard_of(parameter.shape, parameter.shard_dim, degree, of.tensor_rank)
                self._boxes[name].append((of, boxes_of(shard, of.start, of.numel)))
        return self._boxes[name]

    def _read_values(self, fragment: StoredFragment, part: Part) -> torch.Tensor:
        """A stored fragment as a view of its mapped file."""
        if part != "weight" and not self.manifest.has_moments:
            raise CheckpointError(f"{self.folder} has no optimizer moments; it is the start of a run, not its middle")
        if part not in self.parts(fragment.name):
            raise CheckpointError(f"{self.folder} has the momentum of {fragment.name} alone, and no {part}")
        values = self._tensor(fragment.file, tensor_key(part, fragment.name, fragment.start))
        if values.dtype != torch.float32 or values.numel() != fragment.numel:
            path = self.folder / fragment.file
            raise CheckpointError(f"{path} has {fragment.name} in another size or type; use another checkpoint")
        return values

    def _tensor(self, file: str, key: str) -> torch.Tensor:
        """A tensor of a file, as a view of the mapped file."""
        try:
            values: torch.Tensor = self._map(file).get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / file} is damaged: {error}; use another checkpoint") from None
        return values

    def _map(self, file: str) -> Any:
        """A safetensors file of this save, mapped."""
        if file not in self._mapped_files:
            path = self.folder / file
            try:
                with system_errors("read", path):
                    mapped = safe_open(path, framework="pt")
                    save_id = (mapped.metadata() or {}).get("save_id")
            except SafetensorError as error:
                raise CheckpointError(f"{path} is damaged: {error}; use another checkpoint") from None
            if save_id != self.manifest.save_id:
                raise CheckpointError(f"{path} belongs to another save than the manifest; use another checkpoint")
            self._mapped_files[file] = mapped
        return self._mapped_files[file]

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.manifest.parameters:
            raise CheckpointError(f"{self.folder} has no parameter {name}; `Store.table` lists those it has")
        return self.manifest.parameters[name].shape

    def _read_config(self) -> tuple[Config | None, ModelConfig]:
        path = self.folder / CONFIG
        raw = self._read_small_file(CONFIG)
        try:
            if len(raw) > stored_yaml.MAX_BYTES:
                raise ValueError(f"it is larger than {stored_yaml.MAX_BYTES} bytes")
            values = stored_yaml.parse(raw.decode())
            if self.kind == "training":
                config = Config.from_dict(values)
                return config, config.model
            if not isinstance(values, dict) or "model" not in values:
                raise ValueError("it has no section `model`")
            return None, parse_model(values["model"], path)
        except ValueError as error:
            reason = error.in_one_line if isinstance(error, ConfigError) else str(error)
            raise CheckpointError(f"{path} cannot be understood: {reason}; use another checkpoint") from None

    def _read_small_file(self, name: str) -> bytes:
        """Reads a file after comparing it with its checksum."""
        path = self.folder / name
        if name not in self.manifest.files:
            raise CheckpointError(f"{self.folder} has no {name}; use another checkpoint")
        if fault := checksum_fault(path, self.manifest.files[name]):
            raise CheckpointError(f"{fault}; use another checkpoint")
        with system_errors("read", path):
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

    def _check_buffers(self) -> None:
        """The vectors of power iterations: sigmaReparam's must be stored, those of spectron all or none.

        A run that has made no update with spectron yet has none, and may have moments of another optimizer.
        """
        needed = {each.vector: each.vector_size for each in self.table.normalised.values()}
        of_spectron: dict[str, int] = {}
        if self.config is not None and self.manifest.has_moments:
            try:
                of_spectron = vector_lengths(update_rules(self.model, self.config.optim), self.table)
            except ConfigError as error:
                raise CheckpointError(
                    f"{self.folder / CONFIG} is not sound ({error.in_one_line}); use another checkpoint"
                ) from None
        stored = self.buffer_names if needed or of_spectron else frozenset()
        if stored & of_spectron.keys():
            needed |= of_spectron
        for name, length in needed.items():
            if name in stored:
                piece = self._map(BUFFERS).get_slice(name)
                if (piece.get_shape(), piece.get_dtype()) == ([length], "F32"):
                    continue
            raise CheckpointError(
                f"{self.folder} lacks {name}, a vector of {length} numbers of a power iteration; use another checkpoint"
            )
