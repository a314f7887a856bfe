"""The README's commands run as they stand, at a tiny size, one after another as a reader would."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.support.hub_server import TOKEN, hub_server
from tests.support.training_runs import environment

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = ["model.num_layers=2", "model.hidden_size=32", "train.sequence_length=32", "evaluation.batches=1"]
TINY_BATCH = ["train.global_batch_size=4", "train.micro_batch_size=1", "checkpoint.every=1"]


def readme_commands() -> list[str]:
    """The lines of all bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def tiny(command: str, steps: int) -> list[str]:
    """The command's arguments, with more of them that only make it smaller."""
    words = shlex.split(command)
    if words[0] == "sbatch":
        # tests/slurm submits the files; here their arguments are read, and the plan of that job is made.
        script = next(index for index, word in enumerate(words) if word.startswith("slurm/"))
        words = ["bash", words[script], "--dry-run", *words[script + 1 :]]
    if words[0] == "bash":
        return [word for word in words if not word.startswith("data.path=")]
    assert words[0] == "mlra-scale", f"a command that this test cannot run: {command}"
    words[:1] = [sys.executable, "-m", "mlra_scale.cli.main"]
    if "prepare" in words:
        return [*words, "--max-bytes", "300e3", "--workers", "1", "--quiet"]
    if "--dry-run" in words or "train" not in words:
        return words
    return [*words, *TINY_MODEL, *TINY_BATCH, f"train.steps={steps}"]


def test_the_readme_commands_run(tmp_path: Path) -> None:
    for folder in ("ds_configs", "slurm"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    commands = [command.replace("OWNER/NAME", "me/small") for command in readme_commands()]
    assert len(commands) >= 12
    steps = 2
    with hub_server() as hub:
        own = environment(PATH=path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
        for command in commands:
            steps += 2 if "--resume" in command else 0
            result = subprocess.run(
                tiny(command, steps), cwd=tmp_path, env=own, capture_output=True, text=True, timeout=200
            )
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
            if "--dry-run" in command or "sbatch" in command:
                assert "Memory per rank" in result.stdout
            elif "--resume" in command:
                assert f"step {steps - 2}" in result.stdout and f"step {steps}/{steps}" in result.stdout, result.stdout
                assert f"step 1/{steps}" not in result.stdout, result.stdout
        assert "model.safetensors" in hub.repositories["me/small"].files
    page = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert "<h1>Runs first, two</h1>" in page and "Prompt: Return a list of" in page and "no sample" not in page
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.isascii()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"make ([a-z-]+)", text):
        assert target in targets, target
