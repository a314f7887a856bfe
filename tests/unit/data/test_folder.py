"""Nothing in a prepared folder changes unseen: bit flips, swaps and edits anywhere, in both versions of folders."""

from __future__ import annotations

import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.data import DataError, check_data, identify_data, indexed, open_datasets
from mlra_scale.data.blocks import BLOCK_BYTES
from mlra_scale.data.folder import verify_folder
from mlra_scale.data.indexed import sha256_of_file
from mlra_scale.data.manifest import content_fingerprint, manifest_text, read_manifest
from tests.support.foreign_tokenizers import begins_with_bos, save
from tests.unit.data.builders import config_for, edit, flip, prepare_texts, prepare_words

VERSION_1 = Path(__file__).resolve().parents[2] / "fixtures" / "written_by_3a017c2" / "data"
FLIPS_PER_FILE = 24


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder whose train.bin has four blocks."""
    folder = prepare_words(tmp_path_factory.mktemp("x"), 400, 800)
    assert 3 * BLOCK_BYTES < (folder / "train.bin").stat().st_size < 5 * BLOCK_BYTES
    return folder


@pytest.fixture
def data(original: Path, tmp_path: Path) -> Path:
    """A prepared folder that the test may damage."""
    return Path(shutil.copytree(original, tmp_path / "data"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder of version 1, as commit 3a017c2 made it, that the test may damage."""
    return Path(shutil.copytree(VERSION_1, tmp_path / "old"))


def problems(folder: Path) -> str:
    return "\n".join(map(str, check_data(config_for(folder))))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_flipped_bit_anywhere_is_refused_by_name(data: Path) -> None:
    draw, names = random.Random(13), set()
    for path in files_of(data):
        size = path.stat().st_size
        places = {(draw.randrange(size), draw.randrange(8)) for _ in range(FLIPS_PER_FILE)} | {(0, 0), (size - 1, 7)}
        for byte, bit in sorted(places):
            flip(path, byte, bit)
            found = problems(data)
            assert str(path) in found, f"bit {bit} of byte {byte} of {path.name} was not seen: {found!r}"
            assert "\n" not in found
            flip(path, byte, bit)
        names.add(path.name)
    assert {"train.bin", "train.idx", "train.blocks", "validation.bin", "manifest.json", "tokenizer.json"} <= names
    assert problems(data) == ""


def test_a_flipped_bit_in_a_folder_of_version_1(old: Path) -> None:
    # Version 1 has no sums of the tokenizer's files, nor of the manifest. What decides tokens and order is compared all
    # the same; what is not refused is the same training: texts about origin, and copies for other programs.
    assert problems(old) == ""
    before, draw, accepted = identify_data(config_for(old)), random.Random(5), set()
    for path in files_of(old):
        for _ in range(40):
            byte, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
            flip(path, byte, bit)
            if not (found := problems(old)):
                accepted.add(path.name)
                assert identify_data(config_for(old)) == before
                manifest = read_manifest(old)
                assert (manifest.tokenizer.vocabulary_size, manifest.tokenizer.end_of_document_token) == (512, 0)
            else:
                assert str(path) in found
            flip(path, byte, bit)
    assert accepted <= {"manifest.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"}


def swap_two_ids(content: Any) -> None:
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def test_two_swapped_ids_of_a_tokenizer_are_refused(data: Path, old: Path) -> None:
    for folder in (data, old):
        path = folder / "tokenizer" / "tokenizer.json"
        edit(path, swap_two_ids)
        assert str(path) in problems(folder)


@pytest.mark.parametrize("token", [1, 289, 511, 512, 2**31, 2**63, 10**30, -1, True, "0", 0.5, None])
def test_another_end_of_document_token_is_refused(data: Path, old: Path, token: object) -> None:
    for folder in (data, old):
        path = folder / "manifest.json"
        edit(path, lambda content: content["tokenizer"].update(end_of_document_token=token))
        assert str(path) in problems(folder)


def test_an_index_is_hashed_once_at_a_start_of_a_rank(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have gigabytes."""
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of_file(path)

    monkeypatch.setattr(indexed, "sha256_of_file", counting)
    open_datasets(config_for(data))
    assert sorted(hashed) == ["train.idx", "validation.idx"]


def test_a_file_beside_the_tokenizer_is_refused(data: Path) -> None:
    (data / "tokenizer" / ".nfs0001").write_text("of the file system")
    assert problems(data) == ""
    (data / "tokenizer" / "added_tokens.json").write_text("{}")
    assert "added_tokens.json was not there when the data were prepared; remove it" in problems(data)


def test_files_in_folders_beside_the_tokenizer_are_recorded(tmp_path: Path) -> None:
    """transformers keeps further chat templates in a folder of their own."""
    templates = [{"name": name, "template": name} for name in ("default", "rag")]
    save(begins_with_bos(), tmp_path / "tokenizer", tokenizer_class="PreTrainedTokenizerFast", chat_template=templates)
    texts, tokenizer = [f"layer {i}" for i in range(100)], [str(tmp_path / "tokenizer")]
    output = prepare_texts(tmp_path / "data", texts, tokenizer=tokenizer, validation_fraction=0.2)
    (inner,) = (name for name in read_manifest(output).files if name.count("/") == 2)
    assert problems(output) == "" and verify_folder(output) == []
    flip(output / inner, 1, 0)
    assert f"{output / inner} is damaged" in problems(output)


FOREIGN_MANIFESTS = {
    "list": "[1, 2]",
    "text": '"mlra-scale-data"',
    "version 1 of nothing": '{"format": "mlra-scale-data", "version": 1}',
    "control characters": '{"format": "mlra-scale-data", "version": "\\u001b[2J\\u0007"}',
    "true": '{"format": "mlra-scale-data", "version": true}',
}


@pytest.mark.parametrize("name", FOREIGN_MANIFESTS)
def test_a_foreign_manifest_is_one_clean_sentence(data: Path, name: str) -> None:
    (data / "manifest.json").write_text(FOREIGN_MANIFESTS[name])
    found = problems(data)
    assert str(data / "manifest.json") in found and found.isprintable() and len(found) < 600


@pytest.mark.parametrize("change", [{"documents": 1}, {"tokens": 1}, {"dtype": "int32"}])
def test_entries_that_do_not_fit_the_indices_are_refused(data: Path, change: dict[str, object]) -> None:
    # A manifest with a right checksum of its own, as a program with a fault would write it.
    content = read_manifest(data).content
    (content if "dtype" in change else content["splits"]["train"]).update(change)
    (data / "manifest.json").write_text(manifest_text(content))
    assert f"{data / 'manifest.json'} was changed by hand" in problems(data)


def test_the_fingerprint_covers_the_end_of_documents(data: Path) -> None:
    manifest = read_manifest(data)
    others = [content_fingerprint(manifest.files, manifest.tokenizer.sha256, end) for end in (1, 2)]
    assert len({manifest.fingerprint, *others}) == 3


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlra_scale.data.indexed.WHOLE_BYTES", 0)


@pytest.mark.usefixtures("nothing_is_small")
def test_every_block_of_a_large_file_is_checked_when_it_is_read(data: Path) -> None:
    whole = open_datasets(config_for(data)).train
    some = range(0, whole.samples_per_epoch, 40)
    expected = {first: whole.batch(first, 1).tokens_BS for first in some}
    flip(data / "train.bin", 2 * BLOCK_BYTES + 77, 3)
    config = config_for(data)
    assert check_data(config) == []
    read = open_datasets(config).train
    messages, num_read = set(), 0
    for first, tokens in expected.items():
        try:
            batch = read.batch(first, 1).tokens_BS
        except DataError as error:
            messages.add(str(error))
        else:
            num_read += 1
            assert (batch == tokens).all()
    (message,) = messages
    assert f"{data / 'train.bin'} is damaged: its blocks of 65536 bytes at offset 131072 differ" in message
    # Of four blocks one is damaged; a sample that ends in it is refused as well.
    assert 0.6 < num_read / len(expected) < 0.8


@pytest.mark.usefixtures("nothing_is_small")
def test_threads_that_read_together_are_all_refused(data: Path) -> None:
    for block in range(4):
        flip(data / "train.bin", block * BLOCK_BYTES + 5, 0)
    stream, refused = open_datasets(config_for(data)).train, []

    def reader(first: int) -> None:
        for sample in range(first, first + 50):
            with pytest.raises(DataError, match=r"train\.bin is damaged"):
                stream.batch(sample, 3)
        refused.append(first)

    threads = [threading.Thread(target=reader, args=(first,)) for first in range(0, 200, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(refused) == [0, 50, 100, 150]


def test_verify_names_everything_that_is_damaged(data: Path) -> None:
    said: list[str] = []
    assert verify_folder(data, said.append) == []
    assert any(str(data / "train.bin") in line for line in said)
    flip(data / "train.bin", BLOCK_BYTES, 0)
    flip(data / "train.bin", 3 * BLOCK_BYTES + 9, 7)
    flip(data / "train.idx", 200, 1)
    (data / "validation.blocks").unlink()
    flip(data / "tokenizer" / "tokenizer.json", 500, 2)
    found = verify_folder(data)
    assert len(found) == 4
    assert f"{data / 'train.bin'} is damaged" in found[0] and "at offset 65536, 196608 differ" in found[0]
    for name, problem in zip(("train.idx", "validation.blocks", "tokenizer.json"), found[1:], strict=True):
        assert name in problem


def test_verify_names_a_damaged_file_whose_table_is_damaged_too(data: Path) -> None:
    flip(data / "train.bin", BLOCK_BYTES, 0)
    with open(data / "train.blocks", "r+b") as table:
        table.truncate(table.seek(0, 2) - 1)
    found = verify_folder(data)
    assert any(line.startswith(f"{data / 'train.bin'} is damaged") for line in found)
    assert any(line.startswith(f"{data / 'train.blocks'} has ") for line in found)


def test_verify_checks_tokens_and_ends(data: Path) -> None:
    manifest = read_manifest(data)
    for entry, value, message in (
        ("end_of_document_token", 5, "not every document ends with the token 5|another|has 290 tokens, and 0 ends"),
        ("vocabulary_size", 200, "has 290 tokens, and 0 ends documents"),
    ):
        content = json.loads(json.dumps(manifest.content))
        content["tokenizer"][entry] = value
        content["fingerprint"] = content_fingerprint(
            manifest.files, manifest.tokenizer.sha256, content["tokenizer"]["end_of_document_token"]
        )
        (data / "manifest.json").write_text(manifest_text(content))
        with pytest.raises(DataError, match=message):
            verify_folder(data)


def test_verify_makes_a_folder_of_version_1_one_of_today(old: Path) -> None:
    before, config = identify_data(config_for(old)), config_for(old)
    (notice,) = open_datasets(config).notices
    assert f"{old} was prepared by an earlier version" in notice and f"--verify {old}" in notice
    said: list[str] = []
    assert verify_folder(old, said.append) == []
    assert f"{old}: added the hashes of its blocks" in said[-1]
    assert read_manifest(old).version == 2 and problems(old) == "" and open_datasets(config).notices == ()
    assert identify_data(config) == before
    flip(old / "tokenizer" / "merges.txt", 40, 1)
    assert "merges.txt is damaged" in problems(old)


def test_a_damaged_folder_of_version_1_gets_no_hashes(old: Path) -> None:
    flip(old / "train.bin", 100_000, 4)
    (found,) = verify_folder(old)
    assert f"{old / 'train.bin'} is damaged" in found
    assert read_manifest(old).version == 1 and not (old / "train.blocks").exists()
