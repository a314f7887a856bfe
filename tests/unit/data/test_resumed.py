"""An interrupted preparation: the same command continues it, and the bytes are those of an uninterrupted one."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.data import DataError, build, encode, readers
from mlra_scale.data.mixture import Component
from mlra_scale.data.options import PrepareOptions
from mlra_scale.data.prepare import prepare
from mlra_scale.data.sources import SourceName
from tests.unit.data.builders import WORDS, write_jsonl

Encode = Callable[..., Iterator[encode.EncodedChunk]]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many portions and chunks, each committed."""
    monkeypatch.setattr(readers, "_PORTION_BYTES", 1000)
    monkeypatch.setattr(encode, "_CHUNK_BYTES", 1500)
    monkeypatch.setattr(build, "SECONDS_BETWEEN_COMMITS", 0.0)
    monkeypatch.setattr(logging.getLogger("mlra_scale"), "propagate", True)  # another test may have set it


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [" ".join(WORDS[(i * k) % 16] for k in range(i % 40)) for i in range(300)]
    write_jsonl(folder / "a.jsonl", texts[:100])
    write_jsonl(folder / "b.jsonl.gz", texts[100:200])
    write_jsonl(folder / "c.jsonl", [])
    write_jsonl(folder / "d.jsonl", texts[200:])
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", texts[:40])
    write_jsonl(tmp_path / "hub" / "test.jsonl", texts[:1])
    return folder


@pytest.fixture(autouse=True)
def _messages_reach_caplog(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A test before these may have called `set_up_logging`, for a rank that prints warnings only."""
    monkeypatch.setattr(logging.getLogger("mlra_scale"), "propagate", True)
    caplog.set_level(logging.INFO, "mlra_scale")


def options_of(source: Path, output: Path, **changes: Any) -> PrepareOptions:
    values: dict[str, Any] = {"train_bpe": 280, "train_bpe_bytes": 3000, "validation_fraction": 0.2}
    names = (f"hf:{source.parent / 'hub'}", str(source))
    values |= {"components": [Component("", list(map(SourceName, names)))], "max_bytes": 18_000}
    return PrepareOptions(output, progress=False, **(values | changes))


def mixture_of(source: Path, output: Path) -> PrepareOptions:
    named = [SourceName(str(source / name)) for name in ("a.jsonl", "b.jsonl.gz", "d.jsonl")]
    components = [Component("one", named[:2], 3.0), Component("two", named[2:])]
    return options_of(source, output, components=components, max_bytes=None)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets preparations fail when they have this many chunks."""
    whole = build.encode_in_order

    def stop_at(count: int, error: BaseException | None = None) -> None:
        left = count

        def stopping(*arguments: Any) -> Iterator[encode.EncodedChunk]:
            nonlocal left
            for chunk in whole(*arguments):
                if left == 0:
                    raise error or KeyboardInterrupt
                left -= 1
                yield chunk

        monkeypatch.setattr(build, "encode_in_order", stopping)

    return stop_at


@pytest.mark.parametrize("make", [options_of, mixture_of], ids=["one", "mixture"])
def test_an_interrupted_preparation_continues(
    tmp_path: Path, source: Path, stop: Any, caplog: pytest.LogCaptureFixture, make: Any
) -> None:
    (whole, *_) = prepare(make(source, tmp_path / "whole"))
    out, interruptions = tmp_path / "set", 0
    stop(2)
    while not out.exists():
        try:
            prepare(make(source, out))
        except KeyboardInterrupt:
            interruptions += 1
            assert interruptions < 20 and (tmp_path / ".set.partial").is_dir()
            stop(2)
    assert interruptions >= 3 and "continuing after" in caplog.text
    assert [source["documents"] > 20 for source in whole.content["sources"]] == [True, True]
    found, wanted = digests(out), digests(tmp_path / "whole")
    for files in (found, wanted):  # it names the folder
        assert (files.pop("mixture.yaml", None) is None) == (make is options_of)
    assert found == wanted and not list(out.rglob("progress.json"))
    assert sorted(os.listdir(tmp_path)) == ["hub", "in", "set", "whole"]


def test_without_a_commit_nothing_is_left(
    tmp_path: Path, source: Path, stop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SECONDS_BETWEEN_COMMITS", 1e9)
    stop(3)
    with pytest.raises(KeyboardInterrupt):
        prepare(options_of(source, tmp_path / "set"))
    assert sorted(os.listdir(tmp_path)) == ["hub", "in"]


def test_an_error_says_what_is_kept(tmp_path: Path, source: Path, stop: Any) -> None:
    out = tmp_path / "set"
    for error, text in (
        (DataError("no text"), "no text"),
        (OSError(28, "No space left on device"), f"{out} cannot be written: No space left on device"),
    ):
        stop(2, error)
        with pytest.raises(DataError) as caught:
            prepare(options_of(source, out))
        kept = f"what is done so far is kept in {tmp_path / '.set.partial'}: the same command continues there"
        assert str(caught.value) == f"{text}; {kept} if the sources are as they were"


def test_a_part_that_is_made_again_has_no_manifest_of_before(tmp_path: Path, source: Path, stop: Any) -> None:
    """A kill between the ends of two parts, and another one in the preparation that follows."""
    out, kept = tmp_path / "set", tmp_path / ".set.partial"
    while not (len(list(kept.glob("*/progress.json"))) == 2 and list(kept.glob("*/manifest.json"))):
        stop(2)
        with pytest.raises(KeyboardInterrupt):
            prepare(mixture_of(source, out))
    (manifest,) = kept.glob("*/manifest.json")
    (manifest.parent / "progress.json").unlink()
    stop(1)
    with pytest.raises(KeyboardInterrupt):
        prepare(mixture_of(source, out))
    assert kept.is_dir() and not manifest.exists()


def touch(source: Path) -> None:
    os.utime(source / "d.jsonl", ns=(0, 0))


def truncate(source: Path) -> None:
    os.truncate(source.parent / ".set.partial" / "train.bin", 100)


@pytest.mark.parametrize(
    ("change", "changes", "message"),
    [
        (touch, {}, "was begun with other options, inputs or versions of libraries; starting over"),
        (None, {"seed": 1}, "was begun with other options"),
        (None, {"train_bpe": 281}, "was begun with other options"),
        (truncate, {}, "starting over"),
    ],
)
def test_what_does_not_fit_is_begun_again(
    tmp_path: Path,
    source: Path,
    stop: Any,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None] | None,
    changes: dict[str, Any],
    message: str,
) -> None:
    stop(3)
    with pytest.raises(KeyboardInterrupt):
        prepare(options_of(source, tmp_path / "set"))
    if change is not None:
        change(source)
    stop(10**9)
    prepare(options_of(source, tmp_path / "set", **changes))
    assert message in caplog.text and "continuing" not in caplog.text
    prepare(options_of(source, tmp_path / "whole", **changes))
    assert digests(tmp_path / "set") == digests(tmp_path / "whole")


def test_another_tokenizer_of_the_same_name_is_begun_again(
    tmp_path: Path, source: Path, stop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(options_of(source, tmp_path / "first"))
    prepare(options_of(source, tmp_path / "second", train_bpe=290))
    path = tmp_path / "tokenizer.json"
    path.write_bytes((tmp_path / "first" / "tokenizer" / "tokenizer.json").read_bytes())
    named: dict[str, Any] = {"train_bpe": None, "tokenizer": [str(path)]}
    stop(3)
    with pytest.raises(KeyboardInterrupt):
        prepare(options_of(source, tmp_path / "set", **named))
    path.write_bytes((tmp_path / "second" / "tokenizer" / "tokenizer.json").read_bytes())
    stop(10**9)
    (manifest,) = prepare(options_of(source, tmp_path / "set", **named))
    assert "the tokenizer is another one" in caplog.text and manifest.tokenizer.vocabulary_size == 290


def test_another_end_of_document_is_begun_again(
    tmp_path: Path, source: Path, stop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokens are the same, and so is the tokenizer's checksum."""
    prepare(options_of(source, tmp_path / "first"))
    folder = tmp_path / "first" / "tokenizer"
    named: dict[str, Any] = {"train_bpe": None, "tokenizer": [str(folder)]}
    stop(3)
    with pytest.raises(KeyboardInterrupt):
        prepare(options_of(source, tmp_path / "set", **named))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "a"}))
    stop(10**9)
    prepare(options_of(source, tmp_path / "set", **named))
    assert "the tokenizer is another one" in caplog.text
    prepare(options_of(source, tmp_path / "whole", **named))
    assert digests(tmp_path / "set") == digests(tmp_path / "whole")
