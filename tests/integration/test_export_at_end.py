"""export.format: a run ends with a verified export of its last checkpoint, in any layout and at whatever start."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import GPT2LMHeadModel

from mlra_scale.checkpoint.huggingface.verification import VerificationError
from mlra_scale.checkpoint.retention import checkpoint_at
from mlra_scale.cluster.channel import free_port
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.export_at_end import _Signs
from tests.support.hub_server import TOKEN, hub_server, use_in_library
from tests.support.pool import WorkerPool
from tests.support.training_runs import Finished, Start, base_command, environment, events, main_on_rank

SHORT = ["train.steps=2", "tev.every=0", "checkpoint.every=1", "export.format=gpt2"]


def last_event(run: Path) -> dict[str, Any]:
    return events(run)[-1]


@pytest.mark.parametrize(
    ("number", "overrides"),
    [(1, []), pytest.param(2, ["deepspeed.zero_optimization.stage=3"], marks=pytest.mark.slow)],
    ids=["one", "zero-3"],
)
def test_a_run_ends_with_an_export(tmp_path: Path, start: Start, number: int, overrides: list[str]) -> None:
    run = tmp_path / "run"
    finished = start("run", *SHORT, "export.license=apache-2.0", *overrides, num_processes=number)
    assert "export: verified on the run's validation data" in finished.stdout
    assert last_event(run)["event"] == "exported" and last_event(run)["path"] == str(run / "exported")
    card = (run / "exported" / "README.md").read_text()
    assert "optimizer steps | 2 of 2" in card and ModelCard(card).data.to_dict()["license"] == "apache-2.0"
    GPT2LMHeadModel.from_pretrained(run / "exported")
    # All steps are done: a start makes what is missing, and nothing else.
    before = checkpoint_at(run).stat().st_mtime_ns
    again = start("run", *SHORT, *overrides, "--resume", "auto", num_processes=number)
    assert "nothing to do" in again.stdout and "export:" not in again.stdout
    shutil.rmtree(run / "exported")
    start("run", *SHORT, *overrides, "--resume", "auto", num_processes=number)
    assert (run / "exported" / "model.safetensors").is_file() and checkpoint_at(run).stat().st_mtime_ns == before
    # A run that continues replaces its export.
    start("run", *SHORT, *overrides, "train.steps=3", "--resume", "auto", num_processes=number)
    assert "optimizer steps | 3 of 3" in (run / "exported" / "README.md").read_text()
    # Nor is an export of another form taken for the one that is wanted.
    start("run", "export.dtype=bfloat16", "--resume", "auto", num_processes=number)
    assert json.loads((run / "exported" / "config.json").read_text())["dtype"] == "bfloat16"


def main_whose_export_differs(
    rank: int, world_size: int, arguments: tuple[str, ...], kind: type[Exception] = VerificationError
) -> Finished:
    """Runs the command line on a rank where no export passes its verification."""
    from mlra_scale.publishing import exporting

    def fail(*_: Any) -> None:
        raise kind("its logits are not the trained model's")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "export_checkpoint", fail)
        return main_on_rank(rank, world_size, arguments)


@pytest.mark.parametrize("kind", [VerificationError, pytest.param(RuntimeError, marks=pytest.mark.slow)])
def test_an_export_that_fails_leaves_a_complete_run(
    tmp_path: Path, training_data: Path, worker_pool: Callable[[int], WorkerPool], kind: type[Exception]
) -> None:
    run = tmp_path / "run"
    command = tuple(base_command(run, training_data, *SHORT, "parallel.timeout_minutes=1"))
    ranks = worker_pool(2).run(main_whose_export_differs, command, kind)
    assert [finished.code for finished in ranks] == [ExitCode.EXPORT_FAILED] * 2, "on all ranks alike"
    assert "export failed: its logits are not the trained model's\n  the run is complete" in ranks[0].stdout
    assert [event["event"] for event in events(run)][-2:] == ["finished", "export_failed"]
    assert checkpoint_at(run).name == "step-00000002" and not (run / "exported").exists()
    assert ("Traceback" in ranks[0].stderr) == (kind is RuntimeError), "of what nobody expected"


@pytest.mark.slow
def test_an_older_export_is_not_taken_for_that_of_the_last_checkpoint(
    tmp_path: Path, training_data: Path, start: Start, worker_pool: Callable[[int], WorkerPool]
) -> None:
    start("run", *SHORT)
    card = tmp_path / "run" / "exported" / "README.md"
    command = tuple(base_command(tmp_path / "run", training_data, *SHORT, "train.steps=3", "--resume", "auto"))
    (failed,) = worker_pool(1).run(main_whose_export_differs, command)
    assert failed.code == ExitCode.EXPORT_FAILED and "optimizer steps | 2 of 2" in card.read_text()
    start("run", *SHORT, "train.steps=3", "--resume", "auto")
    assert "optimizer steps | 3 of 3" in card.read_text()


def main_that_sees_another_directory(rank: int, world_size: int, arguments: tuple[str, ...]) -> Finished:
    """Runs the command line on ranks of which all but the first take the export for made."""
    from mlra_scale.training.start import request

    with pytest.MonkeyPatch.context() as patch:
        if rank > 0:
            patch.setattr(request, "_is_export_due", lambda *_: False)
        return main_on_rank(rank, world_size, arguments)


@pytest.mark.slow
def test_rank_0_decides_whether_an_export_is_due(
    tmp_path: Path, training_data: Path, start: Start, worker_pool: Callable[[int], WorkerPool]
) -> None:
    start("run", *SHORT, num_processes=2)
    shutil.rmtree(tmp_path / "run" / "exported")
    more = ("--resume", "auto", "parallel.timeout_minutes=1")
    command = tuple(base_command(tmp_path / "run", training_data, *SHORT, *more))
    ranks = worker_pool(2).run(main_that_sees_another_directory, command)
    assert [finished.code for finished in ranks] == [0, 0] and (tmp_path / "run" / "exported" / "README.md").is_file()


def test_signs_end_where_a_push_hangs() -> None:
    given, given_up = list[float](), list[bool]()
    with _Signs(lambda: given.append(time.monotonic()), 0.01, lambda: given_up.append(True)) as signs:
        while len(given) < 3:
            time.sleep(0.01)
        signs.limit(0.0)
        signs._thread.join(timeout=10)
        assert not signs._thread.is_alive() and given_up == [True]


HANGING = """
import sys, time
from mlra_scale import train
from mlra_scale.publishing import hub
from mlra_scale.training import export_at_end
from mlra_scale.training.start import request

request.check_access = lambda *_: None
export_at_end._SECONDS_OF_A_PUSH, export_at_end.seconds_between_signs = 0.0, lambda _: 0.1
hub.push = lambda *_: time.sleep(600)
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_push_that_hangs_ends_all_ranks_alike(tmp_path: Path, training_data: Path) -> None:
    run, port = tmp_path / "run", str(free_port())
    arguments = base_command(run, training_data, *SHORT, "export.repository=me/trained")
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", HANGING, *arguments],
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [ExitCode.EXPORT_FAILED] * 2
    assert (
        "the push hangs\n  the run is complete" in printed[0] and f"hf upload me/trained {run}/exported" in printed[0]
    )
    assert last_event(run)["event"] == "export_failed" and (run / "exported" / "model.safetensors").is_file()


def test_what_is_no_export_is_not_replaced_and_found_before_the_first_step(tmp_path: Path, start: Start) -> None:
    (tmp_path / "run" / "exported").mkdir(parents=True)
    (tmp_path / "run" / "exported" / "mine.txt").write_text("not an export")
    finished = start("run", *SHORT, code=ExitCode.BAD_INPUT)
    assert "export.format" in finished.stderr and "holds something that is not an export" in finished.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def main_with_hub(rank: int, world_size: int, arguments: tuple[str, ...], url: str, token: str) -> Finished:
    """Runs the command line on a rank whose library takes the stand-in for the hub."""
    with pytest.MonkeyPatch.context() as patch:
        use_in_library(patch, url, token)
        return main_on_rank(rank, world_size, arguments)


@pytest.mark.slow
def test_it_is_pushed_where_a_repository_is_named(
    tmp_path: Path, training_data: Path, worker_pool: Callable[[int], WorkerPool]
) -> None:
    run = tmp_path / "run"
    command = tuple(base_command(run, training_data, *SHORT, "export.repository=me/trained"))
    with hub_server() as server:
        (refused,) = worker_pool(1).run(main_with_hub, command, server.url, "hf_wrong")
        assert refused.code == ExitCode.BAD_INPUT and "export.repository" in refused.stderr, "before the first step"
        assert not (run / "metrics.jsonl").exists() and not server.repositories
        server.refused["/commit/"] = (403, "the quota is used up")
        (failed,) = worker_pool(1).run(main_with_hub, command, server.url, TOKEN)
        assert failed.code == ExitCode.EXPORT_FAILED and f"hf upload me/trained {run}/exported" in failed.stdout
        assert last_event(run)["event"] == "export_failed" and (run / "exported" / "model.safetensors").is_file()
        assert "mlra-scale export" not in failed.stdout, "the folder is there"
        server.refused.clear()
        (done,) = worker_pool(1).run(main_with_hub, (*command, "--resume", "auto"), server.url, TOKEN)
        assert done.code == ExitCode.DONE, done.stderr
        assert last_event(run)["repository"] == f"{server.url}/me/trained"
        files = server.repositories["me/trained"].files
        assert files["model.safetensors"] == (run / "exported" / "model.safetensors").read_bytes()
        assert 'name = "me/trained"' in files["README.md"].decode()
        resumed = (*command, "--resume", "auto")
        # What is done needs no hub; what is wanted otherwise does.
        (again,) = worker_pool(1).run(main_with_hub, resumed, "http://127.0.0.1:9", TOKEN)
        assert again.code == ExitCode.DONE and "nothing to do" in again.stdout
        other = (*resumed, "export.private=true", "export.format=mlra")
        (refused,) = worker_pool(1).run(main_with_hub, other, server.url, TOKEN)
        assert refused.code == ExitCode.BAD_INPUT and "me/trained is public" in refused.stderr
