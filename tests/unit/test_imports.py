"""The import directions between the rooms, and what no source file may contain.

The tables below are the design: a new room, or a new direction, is a line here and a reason in its commit.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mlra_scale"
SCRIPT_FOLDERS = ("tools", "benchmarks")

# Rooms of one file that every room may import; they import none of ours.
LEAVES = {"bundled", "console", "files", "process_tree"}
# room -> further rooms of ours that it may import. A room that is not there yet has its line already.
ROOMS: dict[str, set[str]] = {
    "bundled": set(),
    "config": set(),
    "console": set(),
    "files": set(),
    "megatron": set(),
    "process_tree": set(),
    # Travels with exports.
    "shipped": set(),
    "model": {"config", "megatron", "shipped"},
    "parallel": {"config", "model", "megatron"},
    "data": {"config", "megatron"},
    "stability": {"config", "model", "parallel"},
    "checkpoint": {"config", "model", "parallel", "shipped"},
    # The public face; the package's own __init__ offers its names.
    "api": {"shipped", "stability"},
    "__init__": {"api", "shipped", "stability"},
    "planning": {"config", "model"},
    "evaluation": {"config", "model", "parallel", "data", "checkpoint", "shipped"},
    "publishing": {"config", "data", "checkpoint", "evaluation"},
    "training": {
        *("config", "model", "parallel", "data", "stability", "checkpoint", "planning", "evaluation", "publishing"),
    },
    "study": {"config", "model", "training"},
    "train": {"config", "model", "data", "evaluation", "training"},
    "cluster": {"config", "model", "training", "train"},
    "cli": {
        "config",
        "data",
        "stability",
        "checkpoint",
        "planning",
        "evaluation",
        "publishing",
        "training",
        "study",
        "cluster",
        "train",
    },
}
# Rooms that see only a part of another one: its parameter table, its interface, what its probe path shows.
PARTS: dict[tuple[str, str], set[str]] = {
    ("stability", "model"): {"parameters", "probe"},
    # Both do with torch and numpy alone.
    ("api", "stability"): {"embedding_names", "tev", "watcher"},
    ("stability", "parallel"): {"", "fragments", "topology"},
    ("checkpoint", "parallel"): {"", "fragments", "topology"},
    ("planning", "model"): {
        *("head_chunks", "low_rank_plan", "matrix_rounds", "parameters", "update_rules", "validation"),
    },
    ("study", "model"): {"optim_text", "validation"},
    ("train", "model"): {"validation"},
    ("cluster", "model"): {"validation"},
    ("training", "parallel"): {"", "fragments", "topology"},
    # What runs leave behind; none of these loads torch.
    ("study", "training"): {"exit_codes", "interruption", "record", "resume", "run_directory", "run_reader"},
}
# Libraries that only these rooms may import.
LIBRARIES: dict[str, set[str]] = {
    "torch": set(ROOMS) - {"bundled", "config", "console", "files", "planning", "study"},
    "rich": {"console"},
    "deepspeed": {"api", "parallel", "training"},
    "lightning": {"api"},
    "megatron": {"megatron"},
    "datasets": {"data"},
    "lm_eval": {"evaluation"},
    "matplotlib": {"study"},
    "PIL": {"study"},
    "pandas": {"study"},
    "scipy": {"study"},
    "jinja2": {"study"},
    "wandb": {"training"},
}
CONFIG_LIBRARIES = {"pydantic", "pydantic_core", "ruamel", PACKAGE}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".json", ".yaml", ".yml", ".sbatch", ".sh", ".cfg", ""}


def package_files() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def python_files() -> list[Path]:
    folders = (PACKAGE, *SCRIPT_FOLDERS, "docs", "tests")
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def project_files() -> Iterator[Path]:
    """Every text file of the project, without caches and what tools write."""
    folders = (PACKAGE, "tools", "benchmarks", "tests", "docs", "ds_configs", "slurm", ".ci")
    files = [file for file in ROOT.iterdir() if file.is_file()]
    files += [file for folder in folders for file in sorted((ROOT / folder).rglob("*")) if file.is_file()]
    for file in files:
        if file.suffix in TEXT_SUFFIXES and file.name != ".git" and not file.name.startswith(".coverage"):
            yield file


@cache
def imports_of(file: Path, for_types: bool = True) -> tuple[tuple[int, str], ...]:
    """(line, dotted name) of every import in a file, those inside functions included.

    `from a import b` gives a.b, or a where that is ours and b is a name in it and not a module.

    Args:
        file: A Python file.
        for_types: Whether imports under `if TYPE_CHECKING` count, which never run.
    """
    found: list[tuple[int, str]] = []
    for node in nodes_of(ast.parse(file.read_text(encoding="utf-8"), str(file)), for_types):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = file.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join([*package, *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            found += [(node.lineno, base if is_ours(base) and not is_module(name) else name) for name in names]
    return tuple(found)


def nodes_of(tree: ast.AST, for_types: bool) -> Iterator[ast.AST]:
    """Every node below `tree`, without or with the blocks under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if for_types or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes_of(node, for_types)


def module_of(file: Path) -> str:
    """The dotted name of a file's module."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(file: Path) -> str:
    return file.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def is_ours(dotted: str) -> bool:
    return dotted.split(".")[0] == PACKAGE


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def describe(file: Path, line: int, text: str) -> str:
    return f"{file.relative_to(ROOT)}:{line}: {text}"


def test_every_room_has_its_line() -> None:
    rooms = {room_of(file) for file in package_files()} - {"__init__"}
    assert rooms <= set(ROOMS), f"not in the table: {rooms - set(ROOMS)}"
    assert {"config", "model", "parallel", "data", "stability", "training", "train"} <= rooms


def test_the_directions_have_no_circle() -> None:
    order: list[str] = []
    while len(order) < len(ROOMS):
        free = [room for room in ROOMS if room not in order and ROOMS[room] <= set(order)]
        assert free, f"a circle among {set(ROOMS) - set(order)}"
        order += free


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions count: they hide a circle and do not remove it."""
    graph = {
        module_of(file): {name for _, name in imports_of(file, for_types=False) if is_ours(name)} - {module_of(file)}
        for file in package_files()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # graphlib names each module before the one that imports it.
        pytest.fail(f"a circle of imports: {' imports '.join(reversed(error.args[1]))}")


def test_rooms_import_only_what_they_may() -> None:
    problems = []
    for file in package_files():
        room = room_of(file)
        for line, name in imports_of(file):
            if not is_ours(name) or name == PACKAGE:
                continue
            target, part = (*name.split(".")[1:3], "")[:2]
            if target != room and target not in ROOMS.get(room, set()) | LEAVES:
                problems.append(describe(file, line, f"{room} imports {name}"))
            elif (room, target) in PARTS and part not in PARTS[room, target]:
                problems.append(describe(file, line, f"{room} imports {name}, and may see {PARTS[room, target]} only"))
    assert not problems, "\n".join(problems)


def test_libraries_stay_in_their_rooms() -> None:
    problems = []
    for file in package_files():
        room = room_of(file)
        for line, name in imports_of(file):
            library = name.split(".")[0]
            if room not in LIBRARIES.get(library, {room}):
                problems.append(describe(file, line, f"{room} imports {name}"))
            if room == "config" and library not in CONFIG_LIBRARIES | set(sys.stdlib_module_names):
                problems.append(describe(file, line, f"{room} imports {name}"))
    assert not problems, "\n".join(problems)


def test_megatron_process_groups_are_touched_in_one_file() -> None:
    places = [file for file in package_files() if any("parallel_state" in name for _, name in imports_of(file))]
    assert set(places) <= {ROOT / PACKAGE / "parallel" / "topology.py", ROOT / PACKAGE / "megatron.py"}


def test_the_reference_model_is_an_oracle_and_nothing_else() -> None:
    reference = ROOT / "tests" / "support" / "reference.py"
    foreign = {name.split(".")[0] for _, name in imports_of(reference)} - {"torch"} - set(sys.stdlib_module_names)
    assert not foreign, f"reference.py imports {foreign}"
    users = [
        describe(file, line, name)
        for file in python_files()
        if "tests" not in file.relative_to(ROOT).parts and file != reference
        for line, name in imports_of(file)
        if name.startswith("tests.support.reference")
    ]
    assert not users, "\n".join(users)


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS)
def test_scripts_do_not_import_scripts_of_other_folders(folder: str) -> None:
    tools = {file.stem for file in (ROOT / "tools").glob("*.py")}
    problems = [
        describe(file, line, name)
        for file in sorted((ROOT / folder).glob("*.py"))
        for line, name in imports_of(file)
        if name.split(".")[0] in tools | {"tools", "tests"}
    ]
    assert not problems, "\n".join(problems)


def test_the_package_imports_no_script_and_no_test() -> None:
    problems = [
        describe(file, line, name)
        for file in package_files()
        for line, name in imports_of(file)
        if name.split(".")[0] in {*SCRIPT_FOLDERS, "docs", "tests"}
    ]
    assert not problems, "\n".join(problems)


def test_python_sources_are_ascii() -> None:
    problems = [
        describe(file, number, ascii(line))
        for file in python_files()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if not line.isascii()
    ]
    assert not problems, "\n".join(problems)


def test_no_file_names_a_path_of_one_machine() -> None:
    # The folder the project lies in, the home folder, and the places where it was written.
    here = [re.escape(f"{folder}/") for folder in (ROOT, Path.home()) if len(folder.parts) > 1]
    pattern = re.compile("|".join([*here, r"(?<![\w.])/(?:work|root|opt/(?:pypi|wheels)|tmp/[a-z])/"]))
    problems = [
        describe(file, number, line.strip())
        for file in project_files()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not problems, "\n".join(problems)


def test_the_checks_see_what_they_look_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above pass on a clean tree; this one shows that they would fail on another."""
    package = tmp_path / PACKAGE
    (package / "config").mkdir(parents=True)
    (package / "model").mkdir()
    (package / "data").mkdir()
    (package / "config" / "late.py").write_text("def f():\n    import torch\n    from mlra_scale.model import gpt\n")
    (package / "model" / "layer.py").write_text("from megatron.core import parallel_state\nfrom .. import data\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"late\.py:3: config imports mlra_scale\.model"):
        test_rooms_import_only_what_they_may()
    with pytest.raises(AssertionError, match=r"layer\.py:2: model imports mlra_scale\.data"):
        test_rooms_import_only_what_they_may()
    with pytest.raises(AssertionError, match=r"late\.py:2: config imports torch"):
        test_libraries_stay_in_their_rooms()
    with pytest.raises(AssertionError, match="layer"):
        test_megatron_process_groups_are_touched_in_one_file()
    (package / "data" / "late.py").write_text("def f():\n    from mlra_scale.data import later\n")
    (package / "data" / "later.py").write_text("from mlra_scale.data.late import f\n")
    with pytest.raises(pytest.fail.Exception, match=r"data\.late\S* imports mlra_scale\.data\.later imports"):
        test_no_module_imports_itself_by_way_of_others()
    (package / "data" / "late.py").write_text("if TYPE_CHECKING:\n    from mlra_scale.data import later\n")
    imports_of.cache_clear()
    test_no_module_imports_itself_by_way_of_others()
