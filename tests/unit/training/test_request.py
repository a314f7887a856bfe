"""What a start resolves to before a process group exists; the indexes of the data are read once for all of it."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.checkpoint import Store
from mlra_scale.config import Config, ConfigError, Named, load_named_config
from mlra_scale.data import folder, identify_data, open_datasets
from mlra_scale.data.indexed import IndexedFiles
from mlra_scale.planning.choice import FIELDS
from mlra_scale.publishing.hub import HubError
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.start.agreement import _with_present_layout
from mlra_scale.training.start.request import LaunchRequest, ResolvedRun, _is_good_step_lost, resolve_run
from tests.unit.checkpoint.builders import flip_a_byte, write_checkpoint

WRITTEN = Path(__file__).resolve().parents[2] / "fixtures" / "written_by_3a017c2"


def resolved(place: Path, resume: str) -> ResolvedRun:
    """The start of two ranks on the data and, to resume, in the run directory of the fixture."""
    run = RunDirectory(place / "zero3" if resume == "auto" else place / "new")
    values = Config.from_yaml((WRITTEN / "zero3" / "config.yaml").read_text()).to_dict()
    config = Config.model_validate(values | {"data": {"path": str(place / "data")}})
    return resolve_run(LaunchRequest(config, Named(frozenset({"data.path"})), run, resume, 2), is_here=False)


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_every_index_is_read_once_from_the_check_to_the_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    place, read, open_indexed = Path(shutil.copytree(WRITTEN, tmp_path / "written")), list[str](), folder.open_indexed

    def counted(prefix: str, table: Path | None = None) -> IndexedFiles:
        read.append(prefix)
        return open_indexed(prefix, table)

    monkeypatch.setattr(folder, "open_indexed", counted)
    run = resolved(place, resume)
    opened = open_datasets(run.config, run.resume.mixes, run.found_data)
    assert run.resume.progress.step == (3 if resume == "auto" else 0) and len(opened.notices) == 1
    assert sorted(read) == [str(place / "data" / split) for split in ("train", "validation")]
    assert opened.identity == identify_data(run.config)


def test_a_rule_that_matches_nothing_ends_a_start_with_all_else_that_is_wrong(tmp_path: Path) -> None:
    overrides = ["optim.rules=[{names: blocks.9.*, lr_factor: 2}]", "optim.warmup_steps=21", "data.path=/nowhere"]
    config, named = load_named_config("debug", overrides=overrides)
    with pytest.raises(ConfigError) as caught:
        resolve_run(LaunchRequest(config, named, RunDirectory(tmp_path / "new"), "none", 1), is_here=False)
    assert [each.field for each in caught.value.problems] == ["optim.warmup_steps", "optim.rules.0", "data.path"]
    assert "blocks.9.*" in str(caught.value.problems[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_finds_what_is_missing_on_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Ranks that were started by hand would else wait for rank 0 until the process group's time is over."""
    asked = list[str]()
    monkeypatch.setattr("mlra_scale.training.start.request.check_access", lambda name, is_private: asked.append(name))
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    (tmp_path / "run" / "exported" / "mine").mkdir(parents=True)
    exported = ["export.format=gpt2", "export.repository=me/model"]
    overrides = [f"evaluation.tasks=[{tmp_path}/none.txt]", *exported, "data.path=/nowhere"]
    config, named = load_named_config("debug", overrides=overrides)
    with pytest.raises(ConfigError) as caught:
        resolve_run(LaunchRequest(config, named, RunDirectory(tmp_path / "run"), "none", 2))
    found = {each.field for each in caught.value.problems}
    assert {"evaluation.tasks", "export.format"} <= found
    assert asked == (["me/model"] if rank == 0 else [])


def test_a_silent_hub_does_not_keep_a_run_from_the_steps_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts are local ones that have gone; a text of the hub is a problem of the same field."""

    def silent(repository: str, is_private: bool) -> None:
        raise HubError(f"{repository} cannot be pushed to: the hub does not answer")

    monkeypatch.setattr("mlra_scale.training.start.request.check_access", silent)
    place = Path(shutil.copytree(WRITTEN, tmp_path / "written"))
    run = RunDirectory(place / "zero3")
    stored = Config.from_yaml(run.config.read_text()).to_dict()
    stored["evaluation"] |= {"tasks": [f"{tmp_path}/gone.txt"]}
    stored["export"] |= {"format": "mlra", "repository": "me/model"}
    values = stored | {"data": {"path": str(place / "data")}}
    wanted = {"evaluation.tasks", "export.repository"}
    longer = values | {"train": values["train"] | {"steps": 5}}
    named = ("train.steps", "evaluation.tasks", "export.format", "export.repository")
    with pytest.raises(ConfigError) as caught:  # the checkpoint is of a run without them
        resolved_with(run, longer, *named)
    assert {each.field for each in caught.value.problems} == wanted

    read, known = Store._read_config, Config.model_validate(stored)
    monkeypatch.setattr(Store, "_read_config", lambda store: (known, read(store)[1]))
    start = resolved_with(run, longer, *named)
    carried = [notice for notice in start.resume.notices if notice.startswith("the run continues without it: ")]
    assert {notice.split()[5] for notice in carried} == wanted
    with pytest.raises(ConfigError, match="the hub does not answer"):  # nothing but the push is left
        resolved_with(run, values)


def test_other_processes_find_the_data_for_themselves(tmp_path: Path) -> None:
    """The index files are mapped into memory: pickled they would be sent as a whole."""
    run = resolved(Path(shutil.copytree(WRITTEN, tmp_path / "written")), "none")
    sent = pickle.dumps(run)
    received = pickle.loads(sent)
    assert run.found_data is not None and received.found_data is None and received == run and len(sent) < 100_000


def test_a_start_with_another_optimizer_says_what_is_carried_over(tmp_path: Path) -> None:
    """From the AdamW of the fixture to muon; what muon leaves to AdamW is in tests/unit/checkpoint."""
    place = Path(shutil.copytree(WRITTEN, tmp_path / "written"))
    run = RunDirectory(place / "zero3")
    values = Config.from_yaml(run.config.read_text()).to_dict()
    data = values | {"data": {"path": str(place / "data")}}
    start = resolved_with(run, data | {"optim": values["optim"] | {"name": "muon"}}, "optim.name")
    format_notice, carried = start.resume.notices
    assert "version 1 of the format" in format_notice
    assert "AdamW's first moment becomes the momentum" in carried and "of 18 parameters (blocks.0." in carried
    assert start.resume.adam_begun_at == {} and start.config.optim.name == "muon"
    assert len(resolved_with(run, data).resume.notices) == 1


def test_who_watches_a_run_is_as_its_newest_start_has_it_and_a_branch_has_its_own(tmp_path: Path) -> None:
    """The checkpoint has wandb disabled; a later start named another mode and died before it saved."""
    place = Path(shutil.copytree(WRITTEN, tmp_path / "written"))
    run, values = (
        RunDirectory(place / "zero3"),
        Config.from_yaml((WRITTEN / "zero3" / "config.yaml").read_text()).to_dict(),
    )
    values |= {"data": {"path": str(place / "data")}}
    newest = values | {"wandb": values["wandb"] | {"mode": "offline", "name": "first"}}
    run.config.write_text(Config.model_validate(newest).to_yaml())
    preset = values | {"wandb": values["wandb"] | {"mode": "auto", "name": None}}
    in_place = resolved_with(run, preset)
    assert (in_place.config.wandb.mode, in_place.config.wandb.name) == ("offline", "first")
    assert {change.field: change.now for change in in_place.resume.changes}["wandb.mode"] == "offline"
    assert resolved_with(run, preset, "wandb.mode").config.wandb.mode == "auto"
    request = LaunchRequest(
        Config.model_validate(preset), Named(frozenset({"data.path"})), RunDirectory(place / "branch"), str(run.path), 2
    )
    branch = resolve_run(request, is_here=False)
    assert (branch.config.wandb.mode, branch.config.wandb.name) == ("auto", None)


def resolved_with(run: RunDirectory, values: dict[str, Any], *named: str) -> ResolvedRun:
    """The continuation of a run with a configuration of which these fields are named."""
    names = Named(frozenset({"data.path", *named}))
    return resolve_run(LaunchRequest(Config.model_validate(values), names, run, "auto", 2), is_here=False)


def test_a_resumed_start_chooses_its_layout_again_and_reports_the_changes(tmp_path: Path) -> None:
    place = Path(shutil.copytree(WRITTEN, tmp_path / "written"))
    run = RunDirectory(place / "zero3")
    stored = Config.from_yaml((WRITTEN / "zero3" / "config.yaml").read_text()).to_dict()
    values = stored | {"data": {"path": str(place / "data")}, "parallel": stored["parallel"] | {"layout": "auto"}}
    config = Config.model_validate(values)
    named = Named(frozenset({"data.path", "parallel.layout", "parallel.activation_checkpointing"}))
    start = resolve_run(LaunchRequest(config, named, run, "auto", 2, ranks_per_node=2), is_here=False)
    assert start.layout is not None and start.layout.kept == ("parallel.activation_checkpointing",)
    assert start.config == start.layout.chosen.config and start.plan.world_size == 2
    now = start.config.to_dict()
    expected = {
        field: (stored[section].get(name) if name else stored[section], now[section][name] if name else now[section])
        for field in FIELDS
        for section, _, name in [field.partition(".")]
    }
    reported = {change.field: (change.was, change.now) for change in start.resume.changes if change.field in FIELDS}
    assert reported == {field: pair for field, pair in expected.items() if pair[0] != pair[1]} and reported
    received = pickle.loads(pickle.dumps(start))
    assert received.layout == start.layout
    # If the checkpoint then turns out to be damaged, the layout stays that of the process groups.
    larger = Config.model_validate(config.to_dict() | {"cluster": {"device_memory_gib": 400.0}})
    request = LaunchRequest(larger, named, run, "auto", 2, ranks_per_node=2)
    again = resolve_run(_with_present_layout(request, start), is_here=False)
    assert again.layout is None and again.plan == start.plan
    assert again.config.parallel == start.config.parallel and again.config.deepspeed == start.config.deepspeed


def test_the_checkpoint_of_the_next_rollback_counts_as_lost_where_it_cannot_be_opened(tmp_path: Path) -> None:
    """Its sizes are right, and a file of it is damaged."""
    run = RunDirectory(tmp_path)
    good = write_checkpoint(run.checkpoints, 10)
    store = Store.open(write_checkpoint(run.checkpoints, 20, state={"windows": {"guard": {"good_step": 10}}}))
    assert not _is_good_step_lost(run, store)
    flip_a_byte(good / "state.json")
    assert _is_good_step_lost(run, store)
