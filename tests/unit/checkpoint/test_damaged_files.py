"""Whatever the files of a checkpoint hold: one error that names a file, or a checkpoint that is read; nothing else."""

import copy
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlra_scale.checkpoint import CheckpointError, Store
from mlra_scale.checkpoint.inspection import describe_checkpoint, list_checkpoints
from mlra_scale.checkpoint.manifest import MANIFEST
from mlra_scale.config import yaml_text
from tests.unit.checkpoint.builders import Layout, sign, write_checkpoint, write_manifest, write_tokenizer

DEEP = "[" * 100_000
BAD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**18, 1.5, float("nan"), float("inf"), "", "x", "\x1b[2J\x07", "\x00", "../..", [], [[]], {},
    {"a": 1},
)  # fmt: skip
FEW_BAD_VALUES: tuple[Any, ...] = (None, 10**18, [[]])
STATE = {
    "progress": {"step": 1, "consumed_samples": 2, "consumed_tokens": 8},
    "learning_rate": 0.1,
    "validation_loss": None,
    "windows": {"guard": {"good_step": 1}},
    "data": {"mixes": [], "validation": None, "tokenizer": None},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("damage")
    tokenizer = write_tokenizer(folder / "tokenizer")
    buffers = {"vector": torch.arange(3.0)}
    return write_checkpoint(folder / "whole", 1, Layout(2), state=STATE, buffers=buffers, tokenizer=tokenizer)


def copied(whole: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(whole, target / "step-00000001"))


def outcome(folder: Path) -> str | None:
    """Does with a checkpoint all that needs no engine; returns the error, or None where it can be read."""
    (line,) = list_checkpoints(folder.parent)
    try:
        store = Store.open(folder)
        describe_checkpoint(store)
        for name in store.table:
            store.tensor(name)
    except CheckpointError as error:
        assert str(folder) in str(error)
        assert str(error).isprintable(), str(error)
        assert len(str(error)) < 2000
        return str(error)
    json.dumps(line)
    return None


def variants(values: Any) -> Iterator[Any]:
    """The value with each of its keys or items left out, or replaced by each bad value, down to three levels."""
    for path in paths(values, 3):
        for bad in BAD_VALUES if len(path) == 1 else FEW_BAD_VALUES:
            yield changed(values, path, bad)
        yield changed(values, path, None, is_left_out=True)
    yield from BAD_VALUES


def paths(values: Any, depth: int) -> Iterator[tuple[Any, ...]]:
    keys: list[Any] = []
    if depth > 0 and isinstance(values, dict):
        # Of files and parameters, a few of each kind.
        keys = [*values][:2] + [*values][2:][-4:] if depth < 3 else [*values]
    elif depth > 0 and isinstance(values, list):
        keys = [*range(min(len(values), 3))]
    for key in keys:
        yield (key,)
        yield from ((key, *rest) for rest in paths(values[key], depth - 1))


def changed(values: Any, path: tuple[Any, ...], bad: Any, is_left_out: bool = False) -> Any:
    result = copy.deepcopy(values)
    target = result
    for key in path[:-1]:
        target = target[key]
    if is_left_out:
        del target[path[-1]]
    else:
        target[path[-1]] = bad
    return result


def test_the_whole_one_is_read(whole: Path) -> None:
    assert outcome(whole) is None


def test_a_manifest_with_any_key_missing_or_wrong(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "c")
    sound = json.loads((folder / MANIFEST).read_text())
    num_read = num_refused = 0
    for content in variants(sound):
        write_manifest(folder, content)
        if outcome(folder) is None:
            num_read += 1
        else:
            num_refused += 1
    assert num_refused > 200 and num_read < num_refused / 5


@pytest.mark.parametrize("name", ["fragments.json", "state.json"])
def test_small_files_with_any_key_missing_or_wrong(whole: Path, tmp_path: Path, name: str) -> None:
    folder = copied(whole, tmp_path / "c")
    for content in variants(json.loads((whole / name).read_text())):
        sign(folder, name, json.dumps(content).encode())
        outcome(folder)


def test_a_configuration_with_any_key_missing_or_wrong(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "c")
    config = yaml_text.load((whole / "config.yaml").read_text())
    few = {"version": config["version"], "model": config["model"], "train": {}, "deepspeed": {"zero_optimization": {}}}
    for content in variants(few):
        values = {**config, **content, "train": config["train"]} if isinstance(content, dict) else content
        sign(folder, "config.yaml", yaml_text.dump(values).encode())
        outcome(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", DEEP, "nested more than"),
        ("state.json", '{"a": 1, "a": 2}', "the key 'a' twice"),
        ("state.json", "[]", "must hold a JSON object"),
        ("state.json", "\udcff", "is not UTF-8 text"),
        ("fragments.json", DEEP, "nested more than"),
        ("fragments.json", "[]", "is not sound"),
        ("config.yaml", DEEP, "nested too deeply"),
        ("config.yaml", "a: &x [1]\nb: *x", "aliases"),
        ("config.yaml", "version: 5\nmodel: {}", "version = 5: the file was written by a newer program"),
        ("config.yaml", '"\\x1b[2J": 1', r"\x1b[2J"),
        ("config.yaml", "x" * 2**21, "is larger than"),
    ],
)
def test_the_error_says_what_is_wrong(whole: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = copied(whole, tmp_path / "c")
    sign(folder, name, content.encode("utf-8", "surrogateescape"))
    error = outcome(folder)
    assert error is not None and message in error and name in error


def test_an_absurd_number_of_layers_is_refused_at_once(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "c")
    text = (whole / "config.yaml").read_text()
    sign(folder, "config.yaml", text.replace("num_layers: 2", "num_layers: 300000000").encode())
    assert "model.num_layers = 300000000: must be <= 10000" in (outcome(folder) or "")


@pytest.mark.parametrize("content", [DEEP, "", "[]", "null", "1", '"' + "x" * 100, '{"a": 1, "a": 2}'])
def test_a_manifest_that_is_no_object(whole: Path, tmp_path: Path, content: str) -> None:
    folder = copied(whole, tmp_path / "c")
    (folder / MANIFEST).write_text(content)
    assert "manifest.json is damaged" in (outcome(folder) or "")


def test_a_manifest_that_is_a_pipe_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "c")
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    assert "is no complete checkpoint" in (outcome(folder) or "")


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 100_000) + DEEP.encode(),
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        b"",
        b'X\x00\x00\x00\x00\x00\x00\x00{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}    ',
    ],
)
@pytest.mark.parametrize("name", ["rank-00001.safetensors", "state.safetensors"])
def test_a_header_of_absurd_size_or_content(whole: Path, tmp_path: Path, name: str, header: bytes) -> None:
    folder = copied(whole, tmp_path / "c")
    sign(folder, name, header)
    assert name in (outcome(folder) or "")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_and_cut_files_are_found(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A bit, or the end, of any file: found when the checkpoint is opened, or by its checksums."""
    folder = copied(whole, tmp_path / "c")
    name = data.draw(st.sampled_from(sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))))
    content = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    (folder / name).write_bytes(content)
    if outcome(folder) is None:
        # Space between the values of the manifest is not part of it.
        assert name == MANIFEST or [fault for fault in Store.open(folder).verify() if name in fault]
