"""README, docs/ and the other documents: links lead somewhere, pictures are described, commands would be accepted."""

import argparse
import contextlib
import io
import os
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from mlra_scale.cli.main import COMMANDS
from mlra_scale.config import ConfigError, load_named_config
from mlra_scale.console import InputError
from mlra_scale.train import build_parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
IDS = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
PROGRAMS = ("python", "python3", "mlra-scale", "torchrun", "sbatch", "bash", "make", "docker", "apptainer")
FOREIGN = {"pip", "venv", "pytest", "torch.distributed.run"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)]*)\)")
FEWEST_LETTERS = 20
"""Of the text that takes the place of a picture; a shorter one names it and does not say what it shows."""


def paragraphs(text: str) -> list[str]:
    """The document in pieces: its fenced blocks, and what is between blank lines elsewhere."""
    blocks = [match[0] for match in FENCE.finditer(text)]
    return [*blocks, *re.split(r"\n\s*\n", FENCE.sub("\n\n", text))]


def commands_of(paragraph: str) -> list[str]:
    """The commands in bash blocks, in indented lines and in inline code, as lines of a shell."""
    joined = re.sub(r"\\\n\s*", "", paragraph)
    if block := FENCE.match(joined):
        lines = block[2].splitlines() if block[1] == "bash" else []
    else:
        # After several spaces stands what the command is for.
        lines = [re.split(r"\s{3,}", line.strip())[0] for line in re.findall(r"^ {4}\S.*$", joined, re.MULTILINE)]
        lines += [code.replace("\n", " ") for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", joined)]
    parts = [part.strip() for line in lines for part in line.split(" && ")]
    without = [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", part) for part in parts]
    return [part for part in without if part.split(" ")[0] in PROGRAMS and " " in part]


def words_of(command: str) -> list[str]:
    """Its words: a placeholder in capitals is a number, which is a path as well; brackets and dots are left out."""
    words = shlex.split(command, comments=True)
    words = [word if "=[" in word else word.strip("[]").split("|")[0] for word in words]
    words = ["7" if re.fullmatch(r"[A-Z][A-Z_+0-9]*", word) else word for word in words]
    return [word for word in words if word not in ("", "...")]


def problem_of(command: str, paragraph: str = "") -> str | None:
    """What is wrong with a command; None where nothing is seen."""
    program, *words = words_of(command)
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            return _problem(program, words, paragraph)
        except ConfigError as error:
            return str(error)
        except SystemExit as left:
            return None if left.code == 0 else told.getvalue().strip().splitlines()[-1]


def _problem(program: str, words: list[str], paragraph: str) -> str | None:
    missing = [word for word in words if re.match(r"(containers|locks|tests)/", word) and not (ROOT / word).exists()]
    if missing:
        return f"there is no {missing[0]}"
    if program == "make":
        targets = [word for word in words if "=" not in word]
        return next((f"make has no target {target}" for target in targets if target not in make_targets()), None)
    if program in ("sbatch", "bash"):
        return _problem_of_script(words)
    if program == "mlra-scale":
        return _parse(words[0], words[1:]) if words[0] not in ("7", "--help", "--version") else None
    if program == "torchrun" or words[:1] == ["-m"]:
        at = words.index("-m") if "-m" in words else None
        return None if at is None else _problem_of_module(words[at + 1], words[at + 2 :], paragraph)
    if words[0].startswith("tools/"):
        return _problem_of_tool(words[0], words[1:])
    return None


def _problem_of_script(words: list[str]) -> str | None:
    at = next((number for number, word in enumerate(words) if word.startswith("slurm/")), None)
    if at is None or words[at] == "slurm/FILE":
        return None
    if not (ROOT / words[at]).is_file():
        return f"there is no {words[at]}"
    rest = [word for word in words[at + 1 :] if word != "--check"]
    if words[at].endswith("sweep.sh"):
        return _parse("sweep", rest)
    return None if words[at].endswith("check.sh") else _parse("train", rest)


def _problem_of_module(name: str, words: list[str], paragraph: str) -> str | None:
    if name == "mlra_scale.train":
        return _parse("train", words)
    path = ROOT.joinpath(*name.split("."))
    is_there = name in FOREIGN or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    # What was removed is named with the commit that has it.
    return None if is_there or re.search(r"commits? [0-9a-f]{7}\b", paragraph) else f"there is no module {name}"


def _problem_of_tool(path: str, words: list[str]) -> str | None:
    renamed = {"prepare_data": "prepare", "export_hf": "export", "import_hf": "import"}
    stem = Path(path).stem
    if stem in ("install", "lock", "NAME"):
        return None
    return _parse(renamed.get(stem, stem), words) if (ROOT / path).is_file() else f"there is no {path}"


def _parse(name: str, words: list[str]) -> str | None:
    """Lets a command's own parser read its words, and for a training the configuration its fields."""
    if name not in COMMANDS:
        return f"mlra-scale has no command {name}"
    if name != "train":
        command = COMMANDS[name]
        parser = command.parser(f"mlra-scale {name}")
        with contextlib.suppress(InputError):  # from an option that does its work at once: it was accepted
            if words:
                (parser.parse_intermixed_args if command.is_intermixed else parser.parse_args)(words)
        return None
    if "--nproc" in words:
        at = words.index("--nproc")
        words = [*words[:at], *words[at + 2 :]]
    options: argparse.Namespace = build_parser().parse_intermixed_args(words)
    overrides = [text for text in options.overrides if not text.endswith("=...")]
    load_named_config(options.preset or "debug", None, options.ds_config, overrides)
    return None


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def anchors_of(document: Path) -> set[str]:
    """The anchors of its headings, as GitHub and the site make them."""
    text = FENCE.sub("", document.read_text())
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", title)).strip().lower().replace(" ", "-") for title in titles
    }


def link_problems(document: Path) -> list[str]:
    """Links and pictures of a document that lead nowhere, and pictures without a description."""
    text = FENCE.sub("", document.read_text())
    problems = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists():
            problems.append(f"{link}: there is no such file")
        elif anchor and anchor not in anchors_of(target):
            problems.append(f"{link}: there is no such heading")
    problems += [
        f"{path}: the picture is not described: {alt!r}"
        for alt, path in IMAGE.findall(text)
        if len(alt) < FEWEST_LETTERS
    ]
    return problems


@pytest.fixture(autouse=True)
def _project_as_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere_and_pictures_are_described(document: Path) -> None:
    assert link_problems(document) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_every_command_would_be_accepted(document: Path) -> None:
    found = [(command, piece) for piece in paragraphs(document.read_text()) for command in commands_of(piece)]
    problems = [f"{command}: {problem}" for command, piece in found if (problem := problem_of(command, piece))]
    assert problems == [], "\n".join(problems)


def test_the_documents_have_commands_of_every_kind() -> None:
    found = [word for path in DOCUMENTS for piece in paragraphs(path.read_text()) for word in commands_of(piece)]
    assert len(found) > 100 and {command.split(" ")[0] for command in found} >= set(PROGRAMS) - {"python3"}


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("mlra-scale plna --preset laptop", "no command plna"),
        ("python tools/plan.py --preset laptop --clutser cpu", "--clutser"),
        ("python tools/plot.py runs/first", "no tools/plot.py"),
        ("python -m mlra_scale.train --preset laptop train.stepz=3", "train.stepz"),
        ("python -m mlra_scale.train --presets laptop", "--presets"),
        ("mlra-scale train --nproc 2 --preset labtop", "labtop"),
        ("torchrun --nproc_per_node 2 -m mlra_scale.trian --preset laptop", "no module mlra_scale.trian"),
        ("sbatch --nodes 2 slurm/train_mlra_72l.sh", "no slurm/train_mlra_72l.sh"),
        ("sbatch slurm/train_mlra_72L.sh data.pth=x", "data.pth"),
        ("make tests", "no target tests"),
        ("python -m benchmarks.no_such_file", "no module benchmarks.no_such_file"),
        ("python -m pytest tests/unit/test_no_such_file.py", "no tests/unit/test_no_such_file.py"),
    ],
)
def test_a_wrong_command_is_seen(command: str, part: str) -> None:
    assert part in (problem_of(command) or "")
    assert commands_of(f"    {command}      what it is for") == commands_of(f"a `{command}` b") == [command]
    assert commands_of(f"```bash\n{command}\n```") == [command] and commands_of(f"```python\n{command}\n```") == []


def test_a_removed_module_is_named_with_its_commit() -> None:
    assert problem_of("python -m benchmarks.no_such_file", "of commit 1314739") is None


def test_a_broken_link_and_a_picture_without_words_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    document = tmp_path / "a.md"
    document.write_text(
        "# One title\n[x](b.md) [y](#one-title) [z](#two) [w](https://a.b/c)\n\n![](a.png) ![short](a.png)\n"
    )
    assert [problem.split(":")[0] for problem in link_problems(document)] == ["b.md", "#two", "a.png", "a.png"]


def test_the_site_has_every_document() -> None:
    """Beside mkdocs' own check, which needs mkdocs."""
    written = set(re.findall(r"- (?:\w+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {os.path.relpath(path, ROOT / "docs") for path in DOCUMENTS if path.is_relative_to(ROOT / "docs")}
    assert written == pages | {"index.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
