"""A mixture in one YAML file: several data sets, one tokenizer, and the configuration that trains on them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlra_scale.cli.prepare import COMMAND
from mlra_scale.config import load_config
from mlra_scale.data import DataError, check_data, identify_data
from mlra_scale.data.manifest import read_manifest
from mlra_scale.data.mixture import Component, read_mixture
from mlra_scale.data.sources import SourceName
from tests.unit.data.builders import flip, write_jsonl

TEXT = """
web:
  weight: 7
  sources:
    - source: a.jsonl
      field: body
    - b.jsonl
hub:
  weight: 0.5
  sources: [{source: "hf:some/name", split: test, config_name: en}]
"""


def test_what_a_file_says(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(TEXT)
    assert read_mixture(tmp_path / "m.yaml") == [
        Component("web", [SourceName("a.jsonl", "body"), SourceName("b.jsonl")], 7.0),
        Component("hub", [SourceName("hf:some/name", "text", "test", "en")], 0.5),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("web: [", "line 1, column"),
        ("", "the file = None: input should be a valid dictionary"),
        ("{}", "the file = {}: dictionary should have at least 1 item"),
        ("web: {sources: [a]}", "web.weight: field required"),
        ("web: {weight: 0, sources: [a]}", "web.weight = 0: input should be greater than 0"),
        ("web: {weight: .inf, sources: [a]}", "web.weight = inf: input should be a finite number"),
        ("web: {weight: '1', sources: [a]}", "web.weight = '1': input should be a valid number"),
        ("web: {weight: 1, sources: []}", "web.sources = []: list should have at least 1 item"),
        ("web: {weight: 1, sources: a}", "web.sources = 'a': input should be a valid list"),
        ("web: {weight: 1, sources: [a], field: b}", "web.field = 'b': extra inputs are not permitted"),
        ("web: {weight: 1, sources: [{source: a, fields: b}]}", "web.sources.0.fields = 'b': extra inputs"),
        ("web: {weight: 1, sources: [{field: b}]}", "web.sources.0.source: field required (docs"),
        (
            "web: {weight: 0, sources: []}",
            "web.weight = 0: input should be greater than 0; web.sources = []: list should",
        ),
        ("../web: {weight: 1, sources: [a]}", "'../web' names a folder"),
        (".web: {weight: 1, sources: [a]}", "'.web' names a folder"),
    ],
)
def test_what_is_no_mixture_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_mixture(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_mixture_is_prepared_and_trains_as_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"web text number {i} of the mixture" for i in range(200)], "body")
    write_jsonl(tmp_path / "b.jsonl", [f"def code_{i}(x): return x" for i in range(100)])
    (tmp_path / "m.yaml").write_text(
        f"web: {{weight: 3, sources: [{{source: {tmp_path}/a.jsonl, field: body}}]}}\n"
        f"code: {{weight: 1, sources: [{tmp_path}/b.jsonl]}}\n"
    )
    out = tmp_path / "mix"
    command = ["--output", str(out), "--mixture", str(tmp_path / "m.yaml"), "--train-bpe", "300", "--quiet"]
    assert COMMAND.main([*command, "--validation-fraction", "0.1", "--workers", "1"]) == 0
    assert f"--config {out / 'mixture.yaml'}" in capsys.readouterr().out
    web, code = (read_manifest(out / name) for name in ("web", "code"))
    assert (web.documents, code.documents) == (200, 100) and web.tokenizer.sha256 == code.tokenizer.sha256
    vocabulary = web.tokenizer.vocabulary_size
    config = load_config("debug", str(out / "mixture.yaml"), None, ["train.sequence_length=16"])
    assert config.data.blend == {str(out / "web"): 3.0, str(out / "code"): 1.0}
    assert config.model.vocab_size == vocabulary and check_data(config) == []
    assert identify_data(config).mix.fingerprints == (web.fingerprint, code.fingerprint)
    # The whole of it is verified, and not replaced unless asked.
    assert COMMAND.main(command) == 2
    assert "holds a finished data set" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        COMMAND.main(["--verify", str(out)])
    assert ended.value.code == 0
    flip(out / "code" / "train.bin", 10, 1)
    assert COMMAND.main(["--verify", str(out)]) == 2
    assert f"{out / 'code' / 'train.bin'} is damaged" in capsys.readouterr().err
    shutil.rmtree(out / "code")
    assert COMMAND.main(["--verify", str(out)]) == 2
    assert str(out / "code") in capsys.readouterr().err
    (out / "mixture.yaml").write_text("data: {}")
    assert COMMAND.main(["--verify", str(out)]) == 2
    assert f"{out / 'mixture.yaml'} is damaged" in capsys.readouterr().err


def test_options_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--output", str(tmp_path / "set"), "--train-bpe", "300"]
    for options, message in (
        (["--mixture", "m.yaml", "--field", "body"], "leave out the options"),
        (["--mixture", str(tmp_path / "none.yaml")], "none.yaml cannot be read: No such file"),
        (["--source", "a", "--source", "b", "--source", "c", "--field", "x", "--field", "y"], "2 times for 3 sources"),
    ):
        assert COMMAND.main([*command, *options]) == 2
        assert message in capsys.readouterr().err
