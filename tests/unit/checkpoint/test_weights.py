"""Streaming safetensors, and checkpoints of weights alone."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mlra_scale.checkpoint import CheckpointError, Store, weights, write_safetensors, write_weights
from mlra_scale.checkpoint.safetensors_file import CHUNK_BYTES
from tests.unit.checkpoint.builders import MODEL, global_values, write_tokenizer


def test_the_safetensors_library_reads_it_back(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(7, dtype=torch.float32),
        "b": torch.randn(3, 5).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "c": torch.randn(4, 6).t(),  # not contiguous
        "scalar": torch.tensor(7, dtype=torch.int64),
        "d": torch.randn(CHUNK_BYTES // 4 + 3),  # more than one chunk
        "e": torch.tensor([True, False]),
        "f": torch.randn(3).half(),
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    entry = write_safetensors(path, specs, iter(tensors.items()), {"save_id": "7"})
    assert (entry.bytes, entry.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"save_id": "7"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor) and file.get_tensor(name).dtype == tensor.dtype


@pytest.mark.parametrize("came", [[], [("b", torch.zeros(2))], [("a", torch.zeros(3))], [("a", torch.zeros(2))] * 2])
def test_other_tensors_than_announced_are_refused(tmp_path: Path, came: list[Any]) -> None:
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(tmp_path / "x", {"a": (torch.float32, (2,))}, came, {})


def test_weights_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FILE_BYTES", 1500)
    values, tokenizer = global_values(), write_tokenizer(tmp_path / "tokenizer")
    folder = write_weights(tmp_path / "imported", MODEL.model_dump(mode="json"), values.items(), tokenizer, {"a": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "imported"}
    assert len(list(folder.glob("weights-*.safetensors"))) > 1
    store = Store.open(folder)
    assert store.verify() == []
    assert (store.kind, store.step, store.config, store.model) == ("weights", 0, None, MODEL)
    assert store.state == {"origin": {"a": 1}}
    assert store.tokenizer_folder is not None
    assert {path.name for path in store.tokenizer_folder.iterdir()} == {path.name for path in tokenizer.iterdir()}
    for name, tensor in values.items():
        assert torch.equal(store.tensor(name), tensor)
    assert torch.equal(store.rows("embedding.weight", 3, 9), values["embedding.weight"][3:9])
    with pytest.raises(CheckpointError, match="has no optimizer moments"):
        store.tensor("final_norm.bias", "exp_avg")
    with pytest.raises(CheckpointError, match="exists; name a folder that does not"):
        write_weights(folder, MODEL.model_dump(mode="json"), values.items(), None, {})


def test_weights_of_another_model_leave_nothing(tmp_path: Path) -> None:
    model = MODEL.model_dump(mode="json")
    faults = {"the weights end before final_norm.bias": dict(list(global_values().items())[:-1])}
    faults["continue with more"] = global_values() | {"more": torch.zeros(1)}
    faults[r"asks for positions\.weight \(6, 8\), given is positions\.weight \(2, 8\)"] = global_values() | {
        "positions.weight": torch.zeros(2, 8)
    }
    for message, values in faults.items():
        with pytest.raises(CheckpointError, match=message):
            write_weights(tmp_path / "x", model, values.items(), None, {})
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="model section that is not sound"):
        write_weights(tmp_path / "x", {"num_layers": 0}, [], None, {})
