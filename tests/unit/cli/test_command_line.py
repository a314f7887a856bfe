"""Every command has its help and its file in tools/, and a wrong command line is refused."""

import ast
from pathlib import Path
from typing import NoReturn

import pytest

from mlra_scale import __version__
from mlra_scale.cli.main import COMMANDS, main, parser

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def test_help_lists_every_command() -> None:
    shown = parser().format_help()
    assert all(f"  {name} " in shown and command.summary in shown for name, command in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code: object = None
    try:
        code = COMMANDS[name].main(["--help"])
    except SystemExit as left:
        code = left.code
    shown = capsys.readouterr().out
    assert code == 0 and f"usage: mlra-scale {name} " in shown and f"\n  mlra-scale {name}" in shown
    assert "PROG" not in shown and "--help" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [([], 2, "COMMAND"), (["plna"], 2, "invalid choice: 'plna'"), (["--version"], 0, f"mlra-scale {__version__}")],
)
def test_without_a_command(arguments: list[str], code: int, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == code and part in "".join(capsys.readouterr())


def test_nproc_is_taken_out_and_all_else_is_left_to_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def execute(program: str, command: list[str]) -> NoReturn:
        called.append(command)
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execute)
    arguments = ["--preset", "debug", "a.b=3", "--resume", "auto", "--", "c.d=4"]
    with pytest.raises(SystemExit):
        COMMANDS["train"].main(["--nproc", "1", *arguments])
    assert called[0][1:] == ["-m", "mlra_scale.train", *arguments]


def test_tools_run_the_same_commands() -> None:
    files = {file.stem for file in TOOLS.glob("*.py")} - {"install", "lock"}
    renamed = {"prepare": "prepare_data", "export": "export_hf", "import": "import_hf"}
    assert files == {renamed.get(name, name) for name in COMMANDS if name not in ("train", "slurm-files")}
    for file in files:
        source = (TOOLS / f"{file}.py").read_text()
        assert len(source.splitlines()) <= 11 and f'COMMAND.start(prog="{file}.py")' in source
        assert ast.get_docstring(ast.parse(source))
