"""Parameters with a momentum alone, vectors of power iterations, and starts with another optimizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlra_scale.checkpoint import CheckpointError, Store, load_checkpoint
from mlra_scale.checkpoint.other_optimizer import adam_begun_at, notice_of_change
from mlra_scale.checkpoint.saving import take_snapshot
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.parallel.fragments import Fragment
from tests.unit.checkpoint.builders import (
    MODEL,
    FakeEngine,
    Globals,
    Layout,
    all_parts,
    parts_with,
    rules_of,
    vectors_with,
    write_checkpoint,
)

MUON: dict[str, Any] = {"name": "muon"}
SPECTRON: dict[str, Any] = {"name": "spectron"}
MATRICES = [name for name, rule in rules_of(**MUON).items() if rule.optimizer == "muon"]
FACTORS = [name for name, rule in rules_of(**SPECTRON).items() if rule.optimizer == "spectron"]
MATRIX, FACTOR, NORM = "blocks.1.mlp.fc_in.weight", "blocks.0.attention.q.down.weight", "final_norm.bias"


def checkpoint(folder: Path, step: int = 100, layout: Layout | None = None, **optim: Any) -> Store:
    """A checkpoint of a run with these fields of `optim`."""
    values, buffers = parts_with(**optim), vectors_with(**optim)
    return Store.open(write_checkpoint(folder, step, layout, values, optim=optim, buffers=buffers))


def zeros(values: Globals) -> Globals:
    return {part: {name: torch.zeros_like(tensor) for name, tensor in of.items()} for part, of in values.items()}


layouts = st.builds(
    Layout,
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2]),
    data=st.sampled_from([1, 2, 3]),
    is_replicated=st.booleans(),
    seed=st.integers(0, 1000),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wrote=layouts, reads=layouts)
def test_momentum_alone_goes_from_any_layout_to_any_other(
    tmp_path_factory: pytest.TempPathFactory, wrote: Layout, reads: Layout
) -> None:
    values = parts_with(**MUON)
    store = checkpoint(tmp_path_factory.mktemp("run"), 3, wrote, **MUON)
    assert set(store.manifest.momentum_only) == set(MATRICES) and len(MATRICES) == 18
    assert store.parts(MATRIX) == ("weight", "exp_avg") and len(store.parts(NORM)) == 3
    for rank in range(reads.world_size):
        wanted = FakeEngine(reads.topology(rank), reads, values)
        engine = FakeEngine(reads.topology(rank), reads, zeros(values))
        for fragment, full in zip(engine.fragments, wanted.fragments, strict=True):
            store.fill(fragment, reads.tensor, rank % reads.tensor)
            assert torch.equal(fragment.values, full.values)
            assert fragment.exp_avg is not None and full.exp_avg is not None
            assert torch.equal(fragment.exp_avg, full.exp_avg)
            if fragment.exp_avg_sq is not None and full.exp_avg_sq is not None:
                assert torch.equal(fragment.exp_avg_sq, full.exp_avg_sq)


def test_a_second_moment_that_is_not_stored_is_not_read(tmp_path: Path) -> None:
    store = checkpoint(tmp_path, **MUON)
    both = Fragment(MATRIX, 0, torch.zeros(4), torch.zeros(4), torch.zeros(4))
    with pytest.raises(CheckpointError, match=rf"has the momentum of {MATRIX} alone, and no exp_avg_sq"):
        store.fill(both, 1, 0)
    with pytest.raises(CheckpointError, match="the momentum of"):
        store.tensor(MATRIX, "exp_avg_sq")


def test_before_the_first_update_no_parameter_has_a_momentum(tmp_path: Path) -> None:
    """And no vectors are needed: they begin with the first update."""
    weights: Globals = {"weight": all_parts()["weight"]}
    store = Store.open(write_checkpoint(tmp_path, 0, values=weights, optim=SPECTRON))
    assert store.manifest.momentum_only == () and store.parts(MATRIX) == ("weight",)
    assert adam_begun_at(store, rules_of()) == {} and notice_of_change(store, rules_of()) is None


def test_ranks_that_do_not_agree_on_moments_save_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tensor=2)

    def spoiled(engine: Any, *arguments: Any) -> Any:
        if engine.topology.rank == 1:
            engine.fragments = [
                replace(each, exp_avg_sq=None) if each.name == MATRIX else each for each in engine.fragments
            ]
        return take_snapshot(engine, *arguments)

    monkeypatch.setattr("tests.unit.checkpoint.builders.take_snapshot", spoiled)
    with pytest.raises(CheckpointError, match=rf"some ranks have a second moment of {MATRIX} and others have none"):
        write_checkpoint(tmp_path, 1, layout)


@pytest.mark.parametrize("fault", ["missing", "too short"])
def test_a_checkpoint_with_some_of_the_vectors_is_not_opened(tmp_path: Path, fault: str) -> None:
    """So that --resume auto passes it over."""
    vectors = vectors_with(**SPECTRON)
    assert [name.partition("/")[2] for name in vectors] == FACTORS
    last = f"optimizer_vector/{FACTORS[-1]}"
    if fault == "missing":
        del vectors[last]
    else:
        vectors[last] = vectors[last][:-1]
    values = parts_with(**SPECTRON)
    folder = write_checkpoint(tmp_path, 1, values=values, optim=SPECTRON, buffers=vectors)
    length = ParameterTable(MODEL)[FACTORS[-1]].shape[1]
    with pytest.raises(CheckpointError, match=f"lacks {last}, a vector of {length} numbers of a power iteration"):
        Store.open(folder)


def test_moments_without_vectors_are_those_of_a_run_that_has_just_changed_to_spectron(
    tmp_path: Path, one_process: Any
) -> None:
    """Its first update was left out; nothing begins anew that had begun."""
    store = Store.open(write_checkpoint(tmp_path, 1, values=parts_with(**SPECTRON), optim=SPECTRON))
    engine = loaded(store, one_process, **SPECTRON)
    assert engine.restored["with_moments"] and engine.loaded_buffers == {}
    assert notice_of_change(store, engine.rules) is None
    assert "AdamW begins anew" in (notice_of_change(store, rules_of()) or "")


def test_vectors_of_the_model_and_of_the_optimizer_are_stored_side_by_side(tmp_path: Path, one_process: Any) -> None:
    model = MODEL.model_copy(update={"sigma_reparam": True})
    of_model = {
        f"power_iteration/blocks.{block}.{part}": torch.ones(MODEL.rank if part[-1] in "qkv" else MODEL.hidden_size)
        for block in range(2)
        for part in ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.fc_in", "mlp.fc_out")
    }
    buffers = of_model | vectors_with(model, **SPECTRON)
    values, layout = parts_with(model, **SPECTRON), Layout()
    options: dict[str, Any] = {"model": model, "optim": SPECTRON}
    store = Store.open(write_checkpoint(tmp_path / "whole", 1, layout, values, buffers=buffers, **options))
    engine: Any = FakeEngine(layout.topology(0, one_process), layout, zeros(values), model, SPECTRON)
    load_checkpoint(engine, store)
    assert engine.loaded_buffers.keys() == buffers.keys()
    assert all(torch.equal(engine.loaded_buffers[name], vector) for name, vector in buffers.items())
    first = next(iter(of_model))
    del buffers[first]
    folder = write_checkpoint(tmp_path / "lacking", 1, layout, values, buffers=buffers, **options)
    with pytest.raises(CheckpointError, match=f"lacks {first}, a vector of 4 numbers"):
        Store.open(folder)


def loaded(store: Store, group: Any, **optim: Any) -> Any:
    """An engine that has trained, after it has loaded the checkpoint."""
    layout, values = Layout(), parts_with(**optim)
    trained: Globals = {part: {name: tensor + 1 for name, tensor in of.items()} for part, of in values.items()}
    engine: Any = FakeEngine(layout.topology(0, group), layout, trained, MODEL, optim)
    load_checkpoint(engine, store)
    return engine


def test_from_adamw_to_muon_the_first_moment_becomes_the_momentum(tmp_path: Path, one_process: Any) -> None:
    store, values = checkpoint(tmp_path), all_parts()
    engine = loaded(store, one_process, **MUON)
    assert engine.restored["state"] == {"optimizer_step": 100, "adam_begun_at": {}}
    for fragment in engine.fragments:
        shape = values["exp_avg"][fragment.name].shape
        assert torch.equal(fragment.exp_avg.view(shape), values["exp_avg"][fragment.name])
        assert (fragment.exp_avg_sq is None) == (fragment.name in MATRICES)
    assert notice_of_change(store, engine.rules) == (
        "another optimizer than in the checkpoint: AdamW's first moment becomes the momentum, and its second one is "
        f"dropped, of 18 parameters ({MATRICES[0]} to {MATRICES[-1]})"
    )


@pytest.mark.parametrize("was", ["muon", "spectron"])
def test_to_adamw_both_moments_and_the_count_begin_anew_and_all_else_is_carried(
    tmp_path: Path, one_process: Any, was: str
) -> None:
    store, values = checkpoint(tmp_path, name=was), all_parts()
    engine = loaded(store, one_process)
    begun = dict.fromkeys(MATRICES, 100)
    assert engine.restored["state"] == {"optimizer_step": 100, "adam_begun_at": begun}
    for fragment in engine.fragments:
        of = {"weight": fragment.values, "exp_avg": fragment.exp_avg, "exp_avg_sq": fragment.exp_avg_sq}
        for part, found in of.items():
            expected = values[part][fragment.name].view(-1)
            if part != "weight" and fragment.name in MATRICES:
                expected = torch.zeros_like(expected)
            assert torch.equal(found, expected), (fragment.name, part)
    assert notice_of_change(store, engine.rules) == (
        "another optimizer than in the checkpoint: AdamW begins anew, with moments of zero, for 18 parameters "
        f"({MATRICES[0]} to {MATRICES[-1]})"
    )


def test_rules_move_single_parameters(tmp_path: Path) -> None:
    store = checkpoint(tmp_path, **MUON)
    now = rules_of(name="muon", rules=[{"names": MATRIX, "optimizer": "adamw"}])
    assert adam_begun_at(store, now) == {MATRIX: 100}
    assert (notice_of_change(store, now) or "").endswith(f"AdamW begins anew, with moments of zero, for {MATRIX}")
    assert notice_of_change(store, rules_of(name="muon", rules=[{"kind": "factor", "lr_factor": 2}])) is None


def test_between_muon_and_spectron_only_power_iterations_begin(tmp_path: Path, one_process: Any) -> None:
    store = checkpoint(tmp_path / "muon", **MUON)
    assert notice_of_change(store, rules_of(**SPECTRON)) == (
        "another optimizer than in the checkpoint: power iterations begin anew for 12 parameters "
        f"({FACTORS[0]} to {FACTORS[-1]})"
    )
    assert loaded(store, one_process, **SPECTRON).loaded_buffers == {}
    store = checkpoint(tmp_path / "spectron", **SPECTRON)
    assert notice_of_change(store, rules_of(**MUON)) is None
    assert notice_of_change(store, rules_of(**SPECTRON)) is None


def test_a_vector_that_is_missing_lets_all_begin_anew(tmp_path: Path, one_process: Any) -> None:
    """In every layout alike: a rank knows the vectors of its own stage only."""
    pair = [{"names": "blocks.0.attention.q.*.weight", "optimizer": "muon"}]
    store = checkpoint(tmp_path, name="spectron", rules=pair)
    assert len(store.buffer_names) == 10
    engine = loaded(store, one_process, **SPECTRON)
    assert engine.loaded_buffers == {}
    assert "power iterations begin anew for 12 parameters" in (notice_of_change(store, engine.rules) or "")
    assert len(loaded(store, one_process, name="spectron", rules=pair).loaded_buffers) == 10


def test_counts_of_updates_are_kept_until_another_change(tmp_path: Path, one_process: Any) -> None:
    """Of a run that was begun by muon and continued by AdamW after step 100."""
    begun = dict.fromkeys(MATRICES, 100)
    state = {"engine": {"optimizer_step": 150, "adam_begun_at": begun}}
    store = Store.open(write_checkpoint(tmp_path, 150, values=all_parts(), state=state))
    assert adam_begun_at(store, rules_of()) == begun and notice_of_change(store, rules_of()) is None
    assert loaded(store, one_process).restored["state"]["adam_begun_at"] == begun
    mixed = rules_of(name="muon", rules=[{"names": MATRIX, "optimizer": "adamw"}])
    assert adam_begun_at(store, mixed) == {MATRIX: 100}, "muon counts no updates"


def test_an_engine_that_counts_otherwise_refuses_before_it_is_changed(tmp_path: Path, one_process: Any) -> None:
    store, layout = checkpoint(tmp_path, **MUON), Layout()
    engine: Any = FakeEngine(layout.topology(0, one_process), layout, all_parts(), can_count=False)
    with pytest.raises(
        CheckpointError, match="older than two changes of the optimizer; continue from it with --resume"
    ):
        load_checkpoint(engine, store)
    assert engine.restored is None
