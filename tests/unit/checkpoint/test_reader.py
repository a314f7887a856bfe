"""Reading: any layout from any other, only what is asked for, and nothing that is damaged."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlra_scale.checkpoint import CheckpointError, Store, load_checkpoint
from mlra_scale.checkpoint.files import FileEntry
from mlra_scale.checkpoint.fragments import FRAGMENTS, PARTS
from mlra_scale.checkpoint.manifest import MANIFEST, StoredParameter, read_manifest
from mlra_scale.config import ModelConfig
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.parallel.fragments import Fragment
from tests.unit.checkpoint import builders
from tests.unit.checkpoint.builders import (
    MODEL,
    FakeEngine,
    Globals,
    Layout,
    all_parts,
    config_of,
    flip_a_byte,
    global_values,
    sign,
    write_checkpoint,
    write_manifest,
    write_tokenizer,
)

layouts = st.builds(
    Layout,
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2]),
    data=st.sampled_from([1, 2, 3]),
    is_replicated=st.booleans(),
    seed=st.integers(0, 1000),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wrote=layouts, reads=layouts, multiple=st.sampled_from([4, 8, 16, 64]))
def test_any_layout_from_any_other(
    tmp_path_factory: pytest.TempPathFactory, wrote: Layout, reads: Layout, multiple: int
) -> None:
    """Bitwise, with another vocabulary padding: what is stored comes back, rows that are not stored are zero."""
    values = all_parts()
    store = Store.open(write_checkpoint(tmp_path_factory.mktemp("run"), 3, wrote, values))
    assert store.manifest.has_moments and store.verify() == []
    model = MODEL.model_copy(update={"vocab_padding_multiple": multiple})
    expected = all_parts(model)
    for part, tensors in expected.items():
        for name, tensor in tensors.items():
            tensor.zero_()[: len(values[part][name])] = values[part][name][: len(tensor)]
    for rank in range(reads.world_size):
        wanted = FakeEngine(reads.topology(rank), reads, expected, model)
        engine = FakeEngine(reads.topology(rank), reads, all_parts(model), model)
        for fragment, full in zip(engine.fragments, wanted.fragments, strict=True):
            for part in ("values", "exp_avg", "exp_avg_sq"):
                getattr(fragment, part).fill_(float("nan"))
            store.fill(fragment, reads.tensor, rank % reads.tensor, engine.table[fragment.name])
            for part in ("values", "exp_avg", "exp_avg_sq"):
                assert torch.equal(getattr(fragment, part), getattr(full, part)), (fragment.name, part)


def test_whole_tensors_and_rows(tmp_path: Path) -> None:
    values = all_parts()
    tokenizer, buffers = write_tokenizer(tmp_path / "tokenizer"), {"v": torch.arange(3.0), "n": torch.tensor(7)}
    folder = write_checkpoint(
        tmp_path / "run", 12, Layout(2, 2, 2), values, state={"progress": {"step": 12}}, buffers=buffers,
        tokenizer=tokenizer,
    )  # fmt: skip
    store = Store.open(folder)
    assert (store.kind, store.step, store.config, store.model) == ("training", 12, config_of(), MODEL)
    assert store.state == {"engine": {"optimizer_step": 12}, "progress": {"step": 12}}
    assert store.tokenizer_folder == folder / "tokenizer"
    assert store.manifest.layout["world_size"] == 8 and store.manifest.tensor == 2
    for part in PARTS:
        for name, tensor in values[part].items():
            assert torch.equal(store.tensor(name, part), tensor)
            if tensor.ndim == 2:
                assert torch.equal(store.rows(name, 1, 4, part), tensor[1:4])
    assert torch.equal(store.rows("embedding.weight", 4, 4), torch.zeros(0, 8))
    restored = store.buffers()
    assert restored.keys() == buffers.keys() and all(torch.equal(restored[name], buffers[name]) for name in buffers)
    with pytest.raises(ValueError, match="has rows 0 to 23"):
        store.rows("embedding.weight", 20, 25)
    assert Store.open(write_checkpoint(tmp_path / "bare", 1)).buffers() == {}


def test_a_tensor_in_one_piece_is_mapped_and_not_copied(tmp_path: Path) -> None:
    store = Store.open(write_checkpoint(tmp_path, 1))
    whole, rows = store.tensor("embedding.weight"), store.rows("embedding.weight", 2, 4)
    assert rows.data_ptr() == whole.data_ptr() + 2 * 8 * 4
    mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    spans = [[int(end, 16) for end in mapping[0].split("-")] for mapping in mappings]
    assert any(low <= whole.data_ptr() < high for low, high in spans)


def test_only_the_bytes_that_are_asked_for_are_read(tmp_path: Path) -> None:
    """A checkpoint with a 12 GB embedding, which takes no room on disk because nothing was ever written into it."""
    rows, columns = 1_500_000, 2048
    model = MODEL.model_copy(update={"vocab_size": rows, "hidden_size": columns})
    folder = tmp_path / "step-00000001"
    store = Store.open(write_checkpoint(tmp_path, 1, values={"weight": global_values()}))
    manifest = store.manifest
    shape, file = (model.padded_vocab_size, columns), "rank-00000.safetensors"
    numel = shape[0] * shape[1]
    key = "weight/embedding.weight/0"
    header = json.dumps(
        {
            "__metadata__": {"save_id": manifest.save_id},
            key: {"dtype": "F32", "shape": [numel], "data_offsets": [0, 4 * numel]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with (folder / file).open("wb") as output:
        output.write(struct.pack("<Q", len(header)) + header)
        output.truncate(8 + len(header) + 4 * numel)
    store.manifest.parameters["embedding.weight"] = replace(  # type: ignore[index]
        manifest.parameters["embedding.weight"], shape=shape
    )
    store._fragments["embedding.weight"] = [store._fragments["embedding.weight"][0]._replace(numel=numel)]
    before = file_pages()
    middle = store.rows("embedding.weight", rows // 2, rows // 2 + 16)
    fragment = Fragment("embedding.weight", numel // 4 - 5000, torch.ones(10_000))
    store.fill(fragment, 2, 1)
    assert not middle.any() and not fragment.values.any()
    assert file_pages() - before < 8 * 2**20


def file_pages() -> int:
    """Bytes of mapped files that are in this process's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssFile")


def test_the_share_of_every_rank_is_verified_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, Layout(2, 1, 2), tokenizer=write_tokenizer(tmp_path / "tokenizer"))
    store = Store.open(folder)
    for name in store.manifest.files:
        flip_a_byte(folder / name)
    for of in (1, 3, 20):
        faults = [fault for part in range(of) for fault in store.verify(part, of)]
        assert sorted(faults) == sorted(
            f"{folder / name} is damaged or of another save: its sha256 is not the manifest's"
            for name in store.manifest.files
        )


def test_what_is_incomplete_cannot_be_opened(tmp_path: Path) -> None:
    shard, state = "rank-00001.safetensors", "state.json"
    damages: dict[str, tuple[Callable[[Path], Any], str]] = {
        "shard gone": (lambda folder: (folder / shard).unlink(), r"rank-00001\.safetensors is missing"),
        "shard cut": (lambda folder: os.truncate(folder / shard, 99), r"has 99 bytes and not \d+"),
        "shard grown": (lambda folder: (folder / shard).open("ab").write(b"x"), r"has \d+ bytes and not \d+"),
        "state damaged": (lambda folder: flip_a_byte(folder / state), r"state\.json is damaged"),
        "configuration damaged": (lambda folder: flip_a_byte(folder / "config.yaml"), r"config\.yaml is damaged"),
        "manifest gone": (lambda folder: (folder / MANIFEST).unlink(), r"is no complete checkpoint: it has no"),
        "manifest cut": (lambda folder: os.truncate(folder / MANIFEST, 500), r"manifest\.json is damaged"),
        "manifest empty": (lambda folder: os.truncate(folder / MANIFEST, 0), r"manifest\.json is damaged"),
        "manifest damaged": (
            lambda folder: edit_manifest(folder, '"step": 1', '"step": 2'),
            "checksum is another",
        ),
        "another format": (
            lambda folder: edit_manifest(folder, "mlra-scale-checkpoint", "x"),
            "not this project's",
        ),
        "no folder": (lambda folder: folder.rename(folder.with_name("away")), "there is no such folder"),
    }
    for number, (name, (damage, message)) in enumerate(damages.items()):
        folder = write_checkpoint(tmp_path / str(number), 1, Layout(2))
        damage(folder)
        with pytest.raises(CheckpointError, match=message) as caught:
            Store.open(folder)
        assert "another" in str(caught.value) or name == "another format"  # the remedy


def edit_manifest(folder: Path, old: str, new: str) -> None:
    text = (folder / MANIFEST).read_text()
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, new, 1))


def test_fragments_that_do_not_cover_the_model_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, Layout(2))
    whole = json.loads((folder / FRAGMENTS).read_bytes())
    shard = "rank-00000.safetensors"
    (name, start, numel), *others = whole[shard]["runs"]
    assert (name, start, numel) == ("embedding.weight", 0, 96)

    def sign_fragments(content: Any) -> None:
        sign(folder, FRAGMENTS, json.dumps(content).encode())

    faults: dict[str, Any] = {
        r"embedding\.weight, tensor rank 0: 93 elements are stored, the shard has 96": [(name, 0, 93), *others],
        r"embedding\.weight, tensor rank 0: elements 0 to 95 are stored twice": [*whole[shard]["runs"], (name, 0, 96)],
        r"tensor rank 0: elements 0 to 2 are missing": [(name, 3, 93), *others],
        r"tensor rank 0: 0 elements are stored": others,
        r"KeyError: 'head'": [("head", 0, 96), *others],
        r"ValueError": [(name, 0), *others],
    }
    for message, runs in faults.items():
        sign_fragments(whole | {shard: {"tensor_rank": 0, "runs": runs}})
        with pytest.raises(CheckpointError, match=message):
            Store.open(folder)
    sign_fragments(whole | {"rank-00001.safetensors": whole["rank-00001.safetensors"] | {"tensor_rank": 2}})
    with pytest.raises(CheckpointError, match="tensor rank 1: 0 elements are stored"):
        Store.open(folder)
    sign_fragments(whole | {"other": {"tensor_rank": 0, "runs": []}})
    with pytest.raises(CheckpointError, match="the manifest does not list other"):
        Store.open(folder)


def test_a_manifest_that_is_not_sound_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    manifest = read_manifest(folder)
    faults: dict[str, dict[str, Any]] = {
        "leads out of the folder": {"files": {**manifest.files, "../x": FileEntry(1, "")}},
        "File name too long": {"files": {**manifest.files, 300 * "x": FileEntry(1, "")}},
        "layout: tensor is 'two'": {"layout": {**manifest.layout, "tensor": "two"}},
        "layout: tensor is 0": {"layout": {**manifest.layout, "tensor": 0}},
        "5000000 tensor-parallel ranks have": {"layout": {**manifest.layout, "tensor": 5_000_000}},
        r"blocks\.0\.attention\.q\.up\.weight of shape \(8, 4\) is split over 3": {
            "layout": {**manifest.layout, "tensor": 3}
        },
        "kind: Input should be 'training' or 'weights'": {"kind": "other"},
        "step: Input should be a valid integer": {"step": "1"},
        "created: Invalid isoformat string: 'yesterday'": {"created": "yesterday"},
        r"parameters\.final_norm\.bias\.shape: Tuple should have at most 2 items": {
            "parameters": {**manifest.parameters, "final_norm.bias": StoredParameter((2, 2, 2), None)}
        },
        r"final_norm\.bias of shape \(8,\) is split .* along 1": {
            "parameters": {**manifest.parameters, "final_norm.bias": StoredParameter((8,), 1)}
        },
        "layout: world_size is None": {"layout": {}},
        "momentum_only has head, which is no parameter": {"momentum_only": ("head",)},
        r"config\.yaml makes \S+ \(\(.*stored is None": {"parameters": {}},
        r"config\.yaml makes embedding\.weight \(\(24, 8\), 0\), stored is \(\(24, 8\), 1\)": {
            "parameters": {**manifest.parameters, "embedding.weight": StoredParameter((24, 8), 1)}
        },
    }
    for message, changes in faults.items():
        (folder / MANIFEST).write_bytes(replace(manifest, **changes).to_json())
        with pytest.raises(CheckpointError, match=message):
            Store.open(folder)


def test_files_of_other_saves_are_told_apart(tmp_path: Path) -> None:
    """Two saves of the same run and layout: same names, same sizes."""
    one, two = (write_checkpoint(tmp_path, step, Layout(2)) for step in (1, 2))
    shard = "rank-00001.safetensors"
    (one / shard).write_bytes((two / shard).read_bytes())
    store = Store.open(one)
    assert [fault.split(" is ")[0] for fault in store.verify()] == [str(one / shard)]
    with pytest.raises(CheckpointError, match="belongs to another save than the manifest"):
        store.tensor("embedding.weight")
    (two / MANIFEST).write_bytes((one / MANIFEST).read_bytes())
    with pytest.raises(CheckpointError, match=r"state\.json (has|is damaged)"):
        Store.open(two)


@pytest.mark.parametrize("version", [4, 0, "2", None, True])
def test_another_version_says_so(tmp_path: Path, version: Any) -> None:
    folder = write_checkpoint(tmp_path, 1)
    write_manifest(folder, json.loads((folder / MANIFEST).read_text()) | {"version": version})
    with pytest.raises(CheckpointError, match=f"has version {version!r} of the format, this program reads 1 to 3"):
        Store.open(folder)


def test_version_1_is_read(tmp_path: Path) -> None:
    """What commit 3a017c2 wrote: version 1 in the manifest, none in config.yaml."""
    folder = write_checkpoint(tmp_path, 1)
    config = (folder / "config.yaml").read_text()
    assert config.startswith("version: 4\n")
    sign(folder, "config.yaml", config.partition("\n")[2].encode())
    write_manifest(folder, json.loads((folder / MANIFEST).read_text()) | {"version": 1})
    store = Store.open(folder)
    assert (store.manifest.version, store.config) == (1, config_of())
    assert store.manifest.notice == "the checkpoint has version 1 of the format and is read as version 3"


def test_version_2_is_read(tmp_path: Path) -> None:
    """It does not say of which parameters a momentum alone is stored: there were none."""
    folder, values = write_checkpoint(tmp_path, 1), all_parts()
    content = json.loads((folder / MANIFEST).read_text())
    assert content.pop("momentum_only") == []
    write_manifest(folder, content | {"version": 2})
    store = Store.open(folder)
    assert store.manifest.notice == "the checkpoint has version 2 of the format and is read as version 3"
    for part in PARTS:
        assert torch.equal(store.tensor("final_norm.bias", part), values[part]["final_norm.bias"])


class SplitTable(ParameterTable):
    """As it was with the plan `sharded`: down factors of q, k and v split by rows over tensor-parallel ranks."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        for name, info in self.items():
            if name.endswith(("q.down.weight", "k.down.weight", "v.down.weight")):
                self[name] = replace(info, shard_dim=0)


def test_a_checkpoint_of_the_removed_plan_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = all_parts()
    with monkeypatch.context() as before:
        before.setattr(builders, "ParameterTable", SplitTable)
        folder = write_checkpoint(tmp_path, 1, Layout(tensor=2), values)
    stored = read_manifest(folder).parameters
    assert stored["blocks.0.attention.q.down.weight"].shard_dim == 0
    store = Store.open(folder)
    for name, value in values["weight"].items():
        assert torch.equal(store.tensor(name), value), name
    # No other weight may be split otherwise than the table has it.
    other = replace(read_manifest(folder), parameters=dict(stored) | {"final_norm.bias": StoredParameter((8,), 0)})
    (folder / MANIFEST).write_bytes(other.to_json())
    with pytest.raises(CheckpointError, match=r"makes final_norm\.bias \(\(8,\), None\), stored is \(\(8,\), 0\)"):
        Store.open(folder)


def test_loading_into_an_engine(tmp_path: Path, one_process: Any) -> None:
    values, layout = all_parts(), Layout()
    store = Store.open(write_checkpoint(tmp_path, 5, Layout(4, 1, 2), values))
    empty: Globals = {
        part: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()} for part, tensors in values.items()
    }
    engine: Any = FakeEngine(layout.topology(0, one_process), layout, empty)
    assert load_checkpoint(engine, store) == {"engine": {"optimizer_step": 5}}
    assert engine.restored == {"state": {"optimizer_step": 5, "adam_begun_at": {}}, "with_moments": True}
    full = FakeEngine(layout.topology(0), layout, values)
    for mine, stored in zip(engine.fragments, full.fragments, strict=True):
        assert torch.equal(mine.values, stored.values)
        assert mine.exp_avg_sq is not None and stored.exp_avg_sq is not None
        assert torch.equal(mine.exp_avg_sq, stored.exp_avg_sq)

    other = MODEL.model_copy(update={"num_layers": 3})
    engine = FakeEngine(layout.topology(0, one_process), layout, all_parts(other), other)
    with pytest.raises(CheckpointError, match=r"has blocks\.2\.\S+ of shape None, the model of this run \(4, 8\)"):
        load_checkpoint(engine, store)
    smaller = MODEL.model_copy(update={"vocab_size": 20})
    engine = FakeEngine(layout.topology(0, one_process), layout, all_parts(smaller), smaller)
    with pytest.raises(CheckpointError, match="has a vocabulary of 21 tokens, this run 20"):
        load_checkpoint(engine, store)
    assert engine.restored is None

    engine = FakeEngine(layout.topology(0, one_process), layout, empty)
    os.truncate(store.folder / "rank-00003.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"cannot be loaded: rank 0: .*rank-00003\.safetensors is damaged"):
        load_checkpoint(engine, Store(store.folder, store.manifest))
