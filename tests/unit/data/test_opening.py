"""From the configuration to streams: what is refused, and that the order depends on nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlra_scale.config import ConfigError
from mlra_scale.data import OpenData, check_data, identify_data, open_datasets
from mlra_scale.data.data_sets import find_data
from tests.unit.data.builders import config_for, edit, prepare_words, random_documents, write_documents


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_words(tmp_path_factory.mktemp("prepared"), 60, 60)


@pytest.fixture
def data(original: Path, tmp_path: Path) -> Path:
    """A prepared folder that the test may damage."""
    return Path(shutil.copytree(original, tmp_path / "data"))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "bare", random_documents(200, 30))


def problems(path: Path | None, *overrides: str, **fields: Any) -> str:
    """The problems of data; opening them must find the same ones, the tokenizer's apart."""
    config = config_for(path, *overrides, **fields)
    found = check_data(config)
    if others := [problem for problem in found if problem.field != "data.tokenizer"]:
        with pytest.raises(ConfigError) as caught:
            open_datasets(config)
        assert caught.value.problems == others
    return "\n".join(map(str, found))


def tokens(datasets: OpenData, first: int = 0, count: int = 64) -> torch.Tensor:
    return datasets.train.batch(first, count).tokens_BS


def test_data_sets_that_were_found_for_other_data_are_not_used(data: Path, bare: Path) -> None:
    found, other = find_data(config_for(data)), config_for(bare)
    assert identify_data(other, found) == identify_data(other) == open_datasets(other, (), found).identity
    assert identify_data(config_for(data, "train.seed=7"), found) == identify_data(config_for(data))
    refused, missing = config_for(data.parent / "missing"), check_data(config_for(data.parent / "missing"))
    twice = find_data(refused)
    assert [check_data(refused, found=twice) for _ in range(2)] == [missing, missing] and len(missing) == 1


def test_a_prepared_folder_opens(data: Path) -> None:
    config = config_for(data)
    assert check_data(config) == []
    opened = open_datasets(config)
    (manifest,) = opened.manifests
    assert opened.num_train_tokens == manifest.splits["train"].tokens
    batch = opened.train.batch(0, opened.train.samples_per_epoch)
    assert int(batch.documents_BS.max()) > 0 and int(batch.tokens_BS.max()) < manifest.tokenizer.vocabulary_size
    assert opened.validation.samples_per_epoch >= 1
    assert not (data / "cache").exists()  # small data leave no trace


def test_a_bare_prefix_opens_and_its_last_documents_validate(bare: Path) -> None:
    config = config_for(bare, validation_fraction=0.1, end_of_document_token=0)
    before = {path.name: path.read_bytes() for path in bare.parent.iterdir()}
    assert check_data(config) == []
    opened = open_datasets(config)
    assert opened.manifests == ()
    lengths = [len(document) for document in random_documents(200, 30)]
    assert opened.num_train_tokens == sum(lengths[:180])
    assert opened.validation.samples_per_epoch == (sum(lengths[180:]) - 1) // 16
    assert {path.name: path.read_bytes() for path in bare.parent.iterdir()} == before  # and no cache beside them


def test_sequences_of_one_document_stay_on_one_side(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "set.bin"), dtype=np.uint16)
    for _ in range(10):
        builder.add_document(np.arange(60), [10, 20, 30])
    builder.finalize(str(tmp_path / "set.idx"))
    opened = open_datasets(config_for(tmp_path / "set", validation_fraction=0.2))
    assert opened.num_train_tokens == 8 * 60


def test_separate_validation_data(data: Path, bare: Path) -> None:
    opened = open_datasets(config_for(bare, validation_path=data))
    assert opened.num_train_tokens == sum(len(document) for document in random_documents(200, 30))
    own = open_datasets(config_for(data)).validation
    assert torch.equal(opened.validation.batch(0, 3).tokens_BS, own.batch(0, 3).tokens_BS)
    # A bare prefix as validation data is used whole.
    whole = open_datasets(config_for(data, validation_path=bare)).validation
    assert whole.samples_per_epoch == (sum(len(document) for document in random_documents(200, 30)) - 1) // 16


@pytest.mark.parametrize("kind", ["single", "blend"])
def test_more_steps_do_not_change_the_order(data: Path, bare: Path, kind: str) -> None:
    # must-show 6b: stopped and continued with a larger train.steps = uninterrupted longer run, sample for sample
    blend = () if kind == "single" else (f"data.blend={{{data}: 0.7, {bare}: 0.3}}", "data.path=null")
    short, long = (config_for(data, f"train.steps={steps}", *blend) for steps in (20, 5000))
    size = short.train.global_batch_size
    stopped, continued, uninterrupted = (open_datasets(config) for config in (short, long, long))
    for step in range(60):
        source = stopped if step < 20 else continued
        wanted = uninterrupted.train.batch(step * size, size)
        read = source.train.batch(step * size, size)
        assert torch.equal(read.tokens_BS, wanted.tokens_BS) and torch.equal(read.sample_ids_B, wanted.sample_ids_B)


def test_the_order_belongs_to_the_seed(data: Path) -> None:
    first = tokens(open_datasets(config_for(data)))
    assert torch.equal(first, tokens(open_datasets(config_for(data))))
    assert not torch.equal(first, tokens(open_datasets(config_for(data, seed=77))))
    assert not torch.equal(first, tokens(open_datasets(config_for(data, "train.seed=77"))))
    by_data_seed = [tokens(open_datasets(config_for(data, f"train.seed={seed}", seed=5))) for seed in (1, 2)]
    assert torch.equal(*by_data_seed)
    validation = [open_datasets(config_for(data, seed=seed)).validation.batch(0, 4).tokens_BS for seed in (1, 2)]
    assert torch.equal(*validation)


def test_a_blend_has_its_weights(data: Path, bare: Path) -> None:
    config = config_for(None, f"data.blend={{{data}: 3, {bare}: 1}}")
    assert check_data(config) == []
    opened = open_datasets(config)
    parts, _ = opened.train.locate(np.arange(4000))
    assert np.bincount(parts).tolist() == [3000, 1000]
    assert len(opened.manifests) == 1
    assert opened.train.samples_per_epoch == sum(
        open_datasets(config_for(path)).train.samples_per_epoch for path in (data, bare)
    )


@pytest.mark.parametrize("second", ["link", "slash", "copy"])
def test_the_same_data_twice_in_a_blend_are_refused(data: Path, bare: Path, tmp_path: Path, second: str) -> None:
    names = {"link": str(tmp_path / "link"), "slash": f"{data}/", "copy": str(tmp_path / "copy")}
    (tmp_path / "link").symlink_to(data)
    shutil.copytree(data, tmp_path / "copy")
    config = config_for(None, f"data.blend={{{data}: 1, {bare}: 1, {names[second]}: 2}}")
    (problem,) = check_data(config)
    assert problem.value == names[second] and f"holds the same data as {data}; name them once" in problem.remedy
    # A run that began with them, when that was not refused, continues.
    assert check_data(config, is_resumed=True) == []


def test_weights_that_cannot_be_met_are_said(data: Path, bare: Path) -> None:
    config = config_for(None, f"data.blend={{{data}: 1, {bare}: 1.0e-9}}")
    (notice,) = open_datasets(config).notices
    assert f"the weight of {bare} asks for 1e-09 of the samples and gets 1.53e-05" in notice
    assert open_datasets(config_for(None, f"data.blend={{{data}: 0.7, {bare}: 0.3}}")).notices == ()


def test_validation_on_the_data_that_are_trained_on_is_said(bare: Path) -> None:
    (notice,) = open_datasets(config_for(bare, validation_path=bare)).notices
    assert f"{bare} holds the data that are trained on" in notice


def test_small_bare_data_are_known_by_all_their_tokens(tmp_path: Path) -> None:
    # 500,000 tokens: a sample of 64 stretches, as for larger data, would not see the change.
    prefix = write_documents(tmp_path / "set", [[1, 2, 3, 4] * 125_000, [5] * 40])
    config = config_for(prefix)
    before = identify_data(config)
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[2 * 6000] ^= 1
    Path(f"{prefix}.bin").write_bytes(content)
    after = identify_data(config)
    assert after.mix.fingerprints != before.mix.fingerprints and list(after.earlier) == list(before.earlier)


def test_a_folder_that_may_not_be_entered_is_refused(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refused)
    (problem,) = check_data(config_for(data))
    assert problem.field == "data.path" and "Permission denied" in problem.remedy


def test_the_fingerprint_follows_the_content_and_not_the_place(data: Path, bare: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path, *overrides: str) -> str:
        config = config_for(path, *overrides)
        assert identify_data(config) == open_datasets(config).identity
        return identify_data(config).fingerprints["data.path"]

    first, first_bare = fingerprint(data), fingerprint(bare)
    moved = data.rename(tmp_path / "elsewhere")
    assert fingerprint(moved, "train.seed=9", "train.sequence_length=8") == first
    assert fingerprint(prepare_words(tmp_path, 60, 60, seed=4)) != first
    assert first_bare != first
    content = bytearray(Path(f"{bare}.bin").read_bytes())
    content[100] ^= 1
    Path(f"{bare}.bin").write_bytes(content)
    assert fingerprint(bare) != first_bare
    assert fingerprint(bare, f"data.validation_path={moved}") == fingerprint(bare)
    separate = identify_data(config_for(bare, f"data.validation_path={moved}")).fingerprints
    assert separate["data.validation_path"] == first


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "was not made, or not finished, by"),
    "manifest is no JSON": (lambda d: (d / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
    "foreign manifest": (lambda d: (d / "manifest.json").write_text("{}"), "is not a manifest of mlra-scale prepare"),
    "no train.bin": (lambda d: (d / "train.bin").unlink(), "train.bin does not exist"),
    "no validation.idx": (lambda d: (d / "validation.idx").unlink(), "validation.idx does not exist"),
    "short train.bin": (lambda d: (d / "train.bin").write_bytes(b"12345678"), "train.bin is truncated"),
    "long train.bin": (lambda d: (d / "train.bin").open("ab").write(b"12"), "its manifest says"),
    "foreign idx": (lambda d: (d / "train.idx").write_bytes(b"x" * 100), "is not a Megatron index"),
    "changed idx": (lambda d: (d / "train.idx").open("ab").write(b"12"), "is not the file that its manifest describes"),
    "edited manifest": (
        lambda d: edit(d / "manifest.json", lambda c: c.update(files={})),
        "was changed after it was made",
    ),
    "newer manifest": (lambda d: edit(d / "manifest.json", lambda c: c.update(version=3)), "has version 3"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_refused(data: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(data)
    text = problems(data)
    assert message in text and text.startswith("data.path = ") and "\n" not in text


def test_missing_data_are_refused(tmp_path: Path, bare: Path) -> None:
    for suffix in ("bin", "idx"):
        file = Path(f"{bare}.{suffix}").rename(tmp_path / "aside")
        assert f"bare.{suffix} does not exist" in problems(bare)
        file.rename(f"{bare}.{suffix}")
    assert "neither a folder made by mlra-scale prepare nor" in problems(tmp_path / "none")
    assert "no data: name a folder" in problems(None)
    assert "was not made, or not finished" in problems(tmp_path)


def test_all_problems_are_reported_together(data: Path, tmp_path: Path) -> None:
    (data / "train.bin").unlink()
    blend = f"data.blend={{{data}: 1, {tmp_path / 'none'}: 1}}"
    text = problems(None, blend, validation_path=tmp_path / "neither", tokenizer=tmp_path / "nothing")
    assert len(text.splitlines()) == 4
    for field in (f"data.blend.{data}", f"data.blend.{tmp_path / 'none'}", "data.validation_path", "data.tokenizer"):
        assert f"{field} = " in text


def test_splits_without_a_whole_sample_are_refused(tmp_path: Path, data: Path) -> None:
    # Megatron's GPTDataset would count epochs for ever.
    empty = write_documents(tmp_path / "empty", [])
    assert "its train split has no documents" in problems(empty)
    one = write_documents(tmp_path / "one", random_documents(1, 500))
    assert "its train split has no documents" in problems(one)
    hollow = write_documents(tmp_path / "hollow", [[], [], []])
    assert "its train split has only 0 tokens" in problems(hollow)
    small = write_documents(tmp_path / "small", [[1] * 100, [2] * 16])
    assert "its validation split has only 16 tokens, a sample needs 17" in problems(small)
    assert "its validation split has no documents" in problems(data, validation_path=empty)
    assert "validation split has only" in problems(data, "train.sequence_length=60000", "model.max_positions=60000")


def test_vocabularies_must_fit(data: Path, bare: Path, tmp_path: Path) -> None:
    assert "model.vocab_size = 200: smaller than the 290 tokens of" in problems(data, "model.vocab_size=200")
    assert "which holds the token 499" in problems(bare, "model.vocab_size=499")
    assert problems(bare, "model.vocab_size=500") == ""
    negative = write_documents(tmp_path / "negative", [[1, -5, 3] * 20] * 9, np.int32)
    assert "holds negative tokens" in problems(negative)


def test_tokenizers_must_match(data: Path, bare: Path, tmp_path: Path) -> None:
    assert problems(data, tokenizer=data / "tokenizer") == ""
    assert problems(data, tokenizer=data / "tokenizer" / "tokenizer.json") == ""
    other = prepare_words(tmp_path, 60, 60, seed=8, vocabulary=275)
    assert "was made with another tokenizer" in problems(data, tokenizer=other / "tokenizer")
    assert "holds no tokenizer" in problems(data, tokenizer=tmp_path)
    assert "one model needs one tokenizer" in problems(None, f"data.blend={{{data}: 1, {other}: 1}}")
    # A bare prefix has no manifest: the named tokenizer at least has to fit the model.
    assert problems(bare, "model.vocab_size=500", tokenizer=data / "tokenizer") == ""
    low = write_documents(tmp_path / "low", [[1] * 40] * 9)
    (problem,) = check_data(config_for(low, "model.vocab_size=100", tokenizer=data / "tokenizer"))
    assert str(problem).startswith("model.vocab_size = 100: smaller than the 290 tokens of data.tokenizer")


def test_masked_documents_need_a_known_end(data: Path, bare: Path) -> None:
    masked = {"document_attention": "masked"}
    assert problems(data, **masked) == ""
    assert "has to know which token ends documents" in problems(bare, **masked)
    assert problems(bare, **masked, end_of_document_token=0) == ""
    assert "made without --append-eod" in problems(bare, **masked, end_of_document_token=499)
    assert "leave this null" in problems(data, end_of_document_token=5)
    both = f"data.blend={{{data}: 1, {bare}: 1}}"
    assert problems(None, both, **masked) == ""  # the manifest says it for both
