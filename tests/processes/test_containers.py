"""The recipes of containers/: their files are there, both make the same image, and their commands are sound shell."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.training_runs import ROOT

DOCKERFILE = ROOT / "containers" / "Dockerfile"
APPTAINER = ROOT / "containers" / "mlra-scale.def"
KEYWORDS = {"FROM", "ARG", "RUN", "COPY", "WORKDIR", "USER", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: keyword and arguments, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(keyword, rest) for keyword, _, rest in (line.partition(" ") for line in lines)]


def sections() -> dict[str, list[str]]:
    """The definition's sections, by name; the header is the section ''."""
    found: dict[str, list[str]] = {"": []}
    for line in APPTAINER.read_text().splitlines():
        if line.startswith("%"):
            found[line[1:]] = []
        elif line.strip() and not line.startswith("#"):
            found[list(found)[-1]].append(line.strip())
    return found


def docker_commands() -> list[str]:
    return [part.strip() for keyword, rest in instructions() if keyword == "RUN" for part in rest.split("&&")]


def lock_of(text: str) -> str:
    return text.replace("${LOCK}", "cuda-py311").replace("{{ LOCK }}", "cuda-py311")


def test_every_instruction_is_one_of_docker() -> None:
    keywords = [keyword for keyword, _ in instructions()]
    assert set(keywords) == KEYWORDS and keywords[0] == "FROM"


def test_what_is_copied_is_there_and_not_ignored() -> None:
    copied = [rest.split()[:-1] for keyword, rest in instructions() if keyword == "COPY" and "--from" not in rest]
    names = {lock_of(name) for group in copied for name in group}
    assert names == {lock_of(line).split()[0] for line in sections()["files"]}
    ignored = (ROOT / "containers" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == {name.split("/")[0] for name in names}
    assert all((ROOT / name).exists() for name in names), names


def test_both_recipes_install_the_same() -> None:
    bases = {rest.split()[0] for keyword, rest in instructions() if keyword == "FROM"}
    assert bases == {line.removeprefix("From: ") for line in sections()[""] if line.startswith("From:")}
    pip = [re.sub(r"\S*(lock\.txt|/?wheels)", r"\1", line) for line in docker_commands() if " pip " in line]
    other = [re.sub(r"\S*(lock\.txt|/?wheels)", r"\1", line) for line in sections()["post"] if " pip " in line]
    assert len(pip) == 3 and sorted(pip) == sorted(other)
    assert ("ARG", "LOCK=cuda-py311") in instructions() and sections()["arguments"] == ["LOCK=cuda-py311"]


def test_the_default_lock_and_the_documented_ones_are_there() -> None:
    texts = [DOCKERFILE.read_text(), APPTAINER.read_text(), (ROOT / "docs" / "installing.md").read_text()]
    names = {name for text in texts for name in re.findall(r"LOCK=(\S+)", text)}
    assert "cpu-py311" in names and all((ROOT / "locks" / f"{name}.txt").is_file() for name in names), names


@pytest.mark.parametrize("recipe", ["Dockerfile", "mlra-scale.def"])
def test_shellcheck_finds_nothing_in_the_commands(recipe: str, tmp_path: Path) -> None:
    lines = docker_commands() if recipe == "Dockerfile" else sections()["post"] + sections()["test"]
    script = tmp_path / "commands.sh"
    script.write_text("#!/bin/sh\nset -e\n" + "\n".join(lines) + "\n")
    assert subprocess.run(["sh", "-n", str(script)], timeout=30, check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck (Debian: shellcheck)")
    result = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout
