"""tools/export_hf.py --push-to-hub against a stand-in of the hub: what arrives there, and what others load from it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from mlra_scale.publishing.hub import HubError, check_access, push
from tests.support.hub_server import TOKEN, Hub, Repository, hub_server, use_in_library
from tests.support.tools import Ran, run_tool
from tests.support.training_runs import environment
from tests.unit.checkpoint.huggingface.builders import checkpoint

LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch

there, here = sys.argv[1:]
pair = [AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).state_dict() for name in (there, here)]
assert pair[0].keys() == pair[1].keys() and all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])
pair = [AutoTokenizer.from_pretrained(name, trust_remote_code=False)("A window slides").input_ids for name in (there, here)]
assert pair[0] == pair[1], pair
print("same")
"""  # noqa: E501


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, which the library in this process takes for the hub."""
    with hub_server() as server:
        use_in_library(monkeypatch, server.url)
        yield server


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, and a text to verify on."""
    place = tmp_path_factory.mktemp("stored")
    checkpoint(place / "step-00000001")
    (place / "text.txt").write_text("A window slides over the text, and every token in it is seen once as new. " * 8)
    return place / "step-00000001"


def pushed(stored: Path, output: Path, *arguments: str, code: int = 0) -> Ran:
    text = stored.parent / "text.txt"
    result = run_tool("export_hf", stored, output, "--text", text, "--push-to-hub", "me/small", *arguments)
    assert result.code == code, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    return result


@pytest.mark.parametrize("export_format", [pytest.param("gpt2", marks=pytest.mark.slow), "mlra"])
def test_what_is_pushed_is_loaded_by_its_name(stored: Path, tmp_path: Path, server: Hub, export_format: str) -> None:
    output = tmp_path / "out"
    more = ["--license", "apache-2.0", "--language", "en", "de", "--dataset", "me/corpus"]
    result = pushed(stored, output, "--format", export_format, "--private", *more)
    assert f"pushed {len(list(output.iterdir()))} files to {server.url}/me/small" in result.stdout
    repository = server.repositories["me/small"]
    assert repository.is_private and len(repository.commits) == 2, "one commit: nothing half-pushed is ever visible"
    sent = {file.name: file.read_bytes() for file in output.iterdir()}
    assert {name: content for name, content in repository.files.items() if name != ".gitattributes"} == sent
    card = ModelCard(repository.files["README.md"].decode())
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["datasets"]) == ("apache-2.0", ["en", "de"], ["me/corpus"])
    assert 'name = "me/small"' in card.text
    own = environment(HF_ENDPOINT=server.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1")
    command = [sys.executable, "-c", LOAD, "me/small", str(output)]
    loaded = subprocess.run(command, env=own, capture_output=True, text=True, timeout=300, check=False)
    assert loaded.returncode == 0 and loaded.stdout.strip() == "same", loaded.stderr


def test_a_second_push_removes_files_of_the_first_and_no_others(stored: Path, tmp_path: Path, server: Hub) -> None:
    pushed(stored, tmp_path / "first", "--format", "mlra", "--max-shard-size", "50KB")
    repository = server.repositories["me/small"]
    shards = {name for name in repository.files if name.startswith("model-")}
    assert len(shards) > 1
    others = dict.fromkeys(
        ("samples.txt", "inference.py", "scripts/eval.py", "lora/adapter_model.safetensors", "lora/tokenizer.json",
         "adapter_model.safetensors", "tokenizer_of_mine.json"),
        b"of the owner",
    )  # fmt: skip
    repository.files.update(others)
    result = pushed(stored, tmp_path / "second")
    gone = {*shards, "model.safetensors.index.json", "modeling_mlra.py"}
    assert not gone & repository.files.keys()
    assert {name: repository.files.get(name) for name in others} == others
    assert all(name in result.stdout for name in gone)
    assert "model.safetensors" in repository.files


FOREIGN = [
    {"README.md": b"# My model\n"},
    {"README.md": b"# My model\n", "model-00001-of-00002.safetensors": b"mine"},
    {"model.safetensors": b"mine"},
]


@pytest.mark.parametrize("files", FOREIGN)
def test_what_is_no_export_is_not_overwritten(
    stored: Path, tmp_path: Path, server: Hub, files: dict[str, bytes]
) -> None:
    server.repositories["me/small"] = Repository(is_private=False)
    server.repositories["me/small"].files.update(files)
    result = pushed(stored, tmp_path / "out", code=2)
    assert f"me/small holds {', '.join(files)}, which are no export of this tool" in result.stderr
    assert not (tmp_path / "out").exists(), "found before anything is exported"
    # Whoever comes in between is not overwritten either.
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("exported with mlra-scale")
    with pytest.raises(HubError, match="no export of this tool"):
        push(tmp_path / "folder", "me/small", False, print)
    assert len(server.repositories["me/small"].commits) == 1


def test_a_repository_of_other_files_is_pushed_to(tmp_path: Path, server: Hub) -> None:
    server.repositories["me/small"] = Repository(is_private=True)
    server.repositories["me/small"].files["run.py"] = b"mine"
    check_access("me/small", is_private=True)
    (tmp_path / "README.md").write_text("exported with mlra-scale")
    push(tmp_path, "me/small", True, print)
    assert server.repositories["me/small"].files.keys() == {".gitattributes", "run.py", "README.md"}


def test_what_is_to_be_private_is_not_pushed_to_a_public_repository(stored: Path, tmp_path: Path, server: Hub) -> None:
    server.repositories["me/small"] = Repository(is_private=False)
    result = pushed(stored, tmp_path / "out", "--private", code=2)
    assert "me/small is public, and was to be private" in result.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "README.md").write_text("exported with mlra-scale")
    with pytest.raises(HubError, match="is public"):
        push(tmp_path, "me/small", True, print)
    assert len(server.repositories["me/small"].commits) == 1


def test_a_token_or_a_role_that_may_not_write_is_found_first(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.organizations = {"lab": "write", "readers": "read"}
    for repository in ("me/small", "Me/small", "lab/small"):
        check_access(repository)
    with pytest.raises(HubError, match="me may only read in readers"):
        check_access("readers/small")
    with pytest.raises(HubError, match="me is no member of others"):
        check_access("others/small")
    server.role = "fineGrained"
    check_access("others/small")
    server.role = "read"
    with pytest.raises(HubError, match="the token may only read; log in"):
        check_access("me/small")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE .* is set.*set HF_HUB_OFFLINE=0"):
        check_access("me/small")
    assert not server.repositories


def test_without_access_nothing_is_exported(
    stored: Path, tmp_path: Path, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    result = pushed(stored, tmp_path / "out", code=2)
    assert "me/small cannot be pushed to" in result.stderr and "hf auth login" in result.stderr
    assert not (tmp_path / "out").exists() and not server.repositories


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--push-to-hub small", "repository = 'small': string should match pattern"),
        ("--license MIT!", "license = 'MIT!': string should match pattern"),
        ("--language en e", "languages.1 = 'e': string should match pattern"),
        ("--dataset me/a/b", "datasets.0 = 'me/a/b': string should match pattern"),
        ("--private", "name it with --push-to-hub"),
        ("--push-to-hub me/small --no-verify", "only a verified export is pushed"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_first(
    stored: Path, tmp_path: Path, server: Hub, arguments: str, message: str
) -> None:
    result = run_tool("export_hf", stored, tmp_path / "out", *arguments.split())
    assert result.code == 2 and message in result.stderr, result.stderr
    assert not (tmp_path / "out").exists() and not server.repositories


@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/upload/", "/commit/"])
def test_a_push_that_fails_leaves_the_export_and_the_repository_as_they_were(
    stored: Path, tmp_path: Path, server: Hub, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.refused[path] = (403, "the quota is used up")
    result = pushed(stored, tmp_path / "out", code=3)
    assert f"was not pushed to me/small ({server.url})" in result.stderr
    assert f"hf upload me/small {tmp_path / 'out'}" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert all(len(repository.commits) == 1 for repository in server.repositories.values())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_the_hub_holds_is_compared_with_what_was_sent(
    stored: Path, tmp_path: Path, server: Hub, name: str
) -> None:
    server.damages = {name}
    result = pushed(stored, tmp_path / "out", code=3)
    assert f"holds other content than {tmp_path / 'out'}: {name}; push again" in result.stderr


def test_a_card_names_a_repository_without_a_push(stored: Path, tmp_path: Path) -> None:
    text = stored.parent / "text.txt"
    result = run_tool("export_hf", stored, tmp_path / "out", "--text", text, "--repo-name", "you/other")
    assert result.code == 0, result.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from_pretrained(name)" in card and 'name = "you/other"\n' in card
    data = ModelCard(card).data.to_dict()
    assert "license" not in data and "model-index" not in data, "what nobody said is not claimed"
