"""Gradient statistics of one process against numpy, however the tensors are cut; the noise scale; the update."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.config import Config
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.update_rules import UpdateRule
from mlra_scale.parallel.fragments import Fragment
from mlra_scale.stability import gradients as module
from mlra_scale.stability.gradients import AdamWUpdate, GradientStatistics, Groups, kind_of, noise_scale
from mlra_scale.stability.watcher import Step

KINDS = ["all", "embedding", "positions", "norm", "attention", "mlp"]
BLOCK_NAMES = ("gradient_norm", "gradient_mean", "gradient_variance", "weight_norm", "update_ratio")
LEARNING_RATE, DECAY = 1e-3, 0.1


def config(**gradients: int) -> Config:
    """2 layers of width 8; 11 tokens in 16 rows."""
    model = {"vocab_size": 11, "vocab_padding_multiple": 16, "max_positions": 6}
    model |= {"num_layers": 2, "hidden_size": 8, "num_heads": 2}
    train = {"steps": 25, "global_batch_size": 12, "micro_batch_size": 2, "sequence_length": 6, "device": "cpu"}
    optim = {"lr": LEARNING_RATE, "weight_decay": DECAY}
    return Config.from_dict({"model": model, "train": train, "optim": optim, "gradients": gradients})


CONFIG = config(every=10)
TABLE = ParameterTable(CONFIG.model)


def rule_of(name: str, optimizer: Any = "adamw", lr_factor: float = 1.0, eps: float = CONFIG.optim.eps) -> UpdateRule:
    return UpdateRule(optimizer, lr_factor, 0.0 if TABLE[name].kind in ("bias", "norm") else DECAY, eps)


class FakeEngine:
    """One rank that owns everything, in pieces that are cut anywhere; remembers what it was asked."""

    def __init__(self, seed: int = 0, num_cuts: int = 0, mean: float = 0.0) -> None:
        generator = np.random.default_rng(seed)
        self.table, self.num_updates = TABLE, 3
        self.topology = SimpleNamespace(tensor=1, tensor_rank=0, data=2, device=torch.device("cpu"))
        shapes = {name: info.shape for name, info in TABLE.items()}
        self.tensors = {
            part: {
                name: torch.from_numpy((generator.standard_normal(shape) * scale + shift).astype(np.float32))
                for name, shape in shapes.items()
            }
            for part, scale, shift in (("values", 0.1, 0.0), ("exp_avg", 0.01, 0.0), ("gradient", 0.01, mean))
        }
        self.tensors["exp_avg_sq"] = {name: tensor.square() for name, tensor in self.tensors["exp_avg"].items()}
        for part in self.tensors.values():
            part["embedding.weight"][TABLE.vocab_size :] = 1e9  # nobody may look at padded rows
        self.cuts = {
            name: sorted({0, info.numel(), *generator.integers(0, info.numel(), num_cuts).tolist()})
            for name, info in TABLE.items()
        }
        self.rules = {name: rule_of(name) for name in TABLE}
        self.adam_begun_at: dict[str, int] = {}
        self.extra_passes: list[Any] = []
        self.small_norm = 2.0

    def fragments(self, *parts: str) -> list[Any]:
        found = []
        for name, cuts in self.cuts.items():
            for start, stop in itertools.pairwise(cuts):
                pieces = (self.tensors[part][name].reshape(-1)[start:stop] for part in parts)
                found.append(Fragment(name, start, *pieces))
        return found

    def owned_gradients(self) -> list[Any]:
        return self.fragments("gradient")

    def owned_fragments(self, with_moments: bool = False) -> list[Any]:
        return self.fragments("values", "exp_avg", "exp_avg_sq") if with_moments else self.fragments("values")

    def training_state(self) -> dict[str, Any]:
        return {"optimizer_step": self.num_updates, "adam_begun_at": self.adam_begun_at}

    def gradient_norm(self, batches: list[Any], between: Any = None) -> float:
        self.extra_passes.append(batches)
        return self.small_norm

    def real(self, part: str, names: list[str]) -> np.ndarray:
        """All real elements of some parameters in float64."""
        tensors = self.tensors[part]
        rows = {name: TABLE.vocab_size if name == "embedding.weight" else None for name in names}
        return np.concatenate([tensors[name][: rows[name]].double().numpy().reshape(-1) for name in names])


def members(kind: str) -> list[str]:
    return [name for name, info in TABLE.items() if kind == "all" or kind_of(info) == kind]


def of_block(block: int) -> list[str]:
    return [name for name in TABLE if name.startswith(f"blocks.{block}.")]


def proposal(loss: float = 1.0, norm: float = 1.0) -> Any:
    return SimpleNamespace(is_finite=math.isfinite(loss) and math.isfinite(norm))


def result(norm: float = 1.0, applied: bool = True) -> Any:
    return SimpleNamespace(gradient_norm=norm, applied=applied)


def step_of(number: int, batches: Any = ()) -> Step:
    return Step(number, True, 0, batches, LEARNING_RATE)


def measure(engine: Any, configuration: Config = CONFIG, step: int = 10, **options: Any) -> dict[str, Any]:
    statistics = GradientStatistics(engine, configuration)
    now = step_of(step, ["first", "second", "third"])
    statistics.before_step(now)
    assert statistics.before_update(proposal())
    return dict(statistics.after_step(now, result(**options)))


def check(found: dict[str, Any], names: list[str], engine: FakeEngine) -> None:
    gradient, weight = engine.real("gradient", names), engine.real("values", names)
    mean, square = (engine.real(part, names) for part in ("exp_avg", "exp_avg_sq"))
    each = {name: len(engine.real("values", [name])) for name in names}
    rates, decay, eps = (
        np.concatenate([np.full(size, value(engine.rules[name])) for name, size in each.items()])
        for value in (lambda of: LEARNING_RATE * of.lr_factor, lambda of: of.weight_decay, lambda of: of.eps)
    )
    beta1, beta2 = CONFIG.optim.betas
    count = np.concatenate([np.full(size, 3 - engine.adam_begun_at.get(name, 0)) for name, size in each.items()])
    step = mean / (1 - beta1**count) / (np.sqrt(square / (1 - beta2**count)) + eps)
    before = (weight + rates * step) / (1 - rates * decay)
    expected = {
        "gradient_norm": np.linalg.norm(gradient),
        "gradient_variance": gradient.var(),
        "weight_norm": np.linalg.norm(weight),
        "update_ratio": np.linalg.norm(weight - before) / np.linalg.norm(weight),
    }
    # numpy itself takes the difference of two weights: 1e-16 of them is 1e-13 of an update.
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-11, err_msg=name)
    np.testing.assert_allclose(found["gradient_mean"], gradient.mean(), atol=1e-13 * np.abs(gradient).max(), rtol=0)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    num_cuts=st.integers(0, 5),
    mean=st.sampled_from([0.0, 1.0]),
    chunk=st.sampled_from([5, 7, 4096]),
)
def test_statistics_equal_numpys_however_tensors_are_cut(seed: int, num_cuts: int, mean: float, chunk: int) -> None:
    engine = FakeEngine(seed, num_cuts, mean)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_CHUNK", chunk)
        report = measure(engine)["gradients"]
    assert list(report["kinds"]) == KINDS
    for kind, found in report["kinds"].items():
        assert found["count"] == len(engine.real("values", members(kind)))
        check(found, members(kind), engine)
    assert set(report["layers"]) == set(BLOCK_NAMES)
    for block in range(2):
        check({name: report["layers"][name][block] for name in BLOCK_NAMES}, of_block(block), engine)


def test_updates_follow_the_rule_of_each_parameter() -> None:
    engine = FakeEngine(num_cuts=2)
    for name, info in TABLE.items():
        engine.rules[name] = rule_of(
            name, lr_factor=3.0 if info.kind == "factor" else 1.0, eps=1e-3 if name.startswith("blocks.1.") else 1e-8
        )
        if info.kind == "matrix":
            engine.adam_begun_at[name] = 2
    report = measure(engine)["gradients"]
    check(report["kinds"]["all"], members("all"), engine)
    for block in range(2):
        check({name: report["layers"][name][block] for name in BLOCK_NAMES}, of_block(block), engine)


@pytest.mark.parametrize("applied", [True, False])
def test_orthogonalised_updates_are_differences_of_the_weights(applied: bool) -> None:
    """There is no second moment, and the first does not tell an element's update."""
    engine = FakeEngine(num_cuts=3)
    theirs = [name for name, info in TABLE.items() if info.kind in ("factor", "matrix")]
    engine.rules |= {name: rule_of(name, "muon") for name in theirs}
    both = engine.fragments

    def without_second(*parts: str) -> list[Any]:
        return [replace(f, exp_avg_sq=None) if f.name in theirs else f for f in both(*parts)]

    engine.fragments = without_second  # type: ignore[method-assign]
    before = {name: tensor.double() for name, tensor in engine.tensors["values"].items()}
    statistics, now = GradientStatistics(engine, CONFIG), step_of(10)  # type: ignore[arg-type]
    statistics.before_step(now)
    statistics.before_update(proposal())
    generator = torch.Generator().manual_seed(3)
    for name in theirs:
        engine.tensors["values"][name] += 0.01 * torch.randn(TABLE[name].shape, generator=generator)
    found = dict(statistics.after_step(now, result(applied=applied)))["gradients"]["kinds"]
    matrices = [name for name in members("mlp") if name in theirs]
    square = sum(float((engine.tensors["values"][n].double() - before[n]).square().sum()) for n in matrices)
    biases = [name for name in members("mlp") if name not in theirs]
    old = np.concatenate([before[name].numpy().reshape(-1) for name in members("mlp")])
    beta1, beta2 = CONFIG.optim.betas
    mean, second = (engine.real(part, biases) for part in ("exp_avg", "exp_avg_sq"))
    steps = mean / (1 - beta1**3) / (np.sqrt(second / (1 - beta2**3)) + CONFIG.optim.eps)
    expected = math.sqrt(square + np.square(LEARNING_RATE * steps).sum()) / np.linalg.norm(old)
    np.testing.assert_allclose(found["mlp"]["update_ratio"], expected if applied else 0.0, rtol=1e-6)


def test_no_digits_are_lost_to_a_large_mean() -> None:
    engine = FakeEngine(num_cuts=3)
    for name, tensor in engine.tensors["gradient"].items():
        tensor.fill_(1e6)
        if name == "positions.weight":
            tensor[0, 0] += 1.0
    kinds = measure(engine)["gradients"]["kinds"]
    assert kinds["mlp"]["gradient_variance"] == kinds["norm"]["gradient_variance"] == 0.0
    count = kinds["positions"]["count"]
    np.testing.assert_allclose(kinds["positions"]["gradient_variance"], (count - 1) / count**2, rtol=1e-9)


@pytest.mark.parametrize("num_layers", [4, 32])
def test_what_is_kept_of_groups_grows_with_the_runs_and_not_with_runs_times_blocks(num_layers: int) -> None:
    table = ParameterTable(CONFIG.model.model_copy(update={"num_layers": num_layers}))
    members = Groups(table).members([*table, *table], torch.device("cpu"))
    assert members.run_P.numel() == members.group_P.numel() <= 3 * 2 * len(table)
    assert Groups(table).members([], torch.device("cpu")).sum_of_runs(torch.zeros(0, 2)).count_nonzero() == 0


def test_every_parameter_is_of_one_kind_and_counts_in_its_block() -> None:
    groups = Groups(TABLE)
    names = list(TABLE)
    membership = groups.members(names, torch.device("cpu")).sum_of_runs(torch.eye(len(names)))
    assert groups.kinds == KINDS and membership.shape == (len(KINDS) + 2, len(names))
    assert (membership[0] == 1).all() and (membership[1:6].sum(dim=0) == 1).all()
    in_blocks = torch.tensor([float(name.startswith("blocks.")) for name in names])
    assert torch.equal(membership[6:].sum(dim=0), in_blocks)
    assert kind_of(TABLE["blocks.0.attention_norm.weight"]) == kind_of(TABLE["final_norm.bias"]) == "norm"
    assert (
        kind_of(TABLE["blocks.1.attention.q.up.bias"]) == kind_of(TABLE["blocks.0.attention.o.weight"]) == "attention"
    )
    counts = Config.from_dict(CONFIG.model_dump()).model.parameter_counts()
    kinds = measure(FakeEngine())["gradients"]["kinds"]
    assert kinds["all"]["count"] == sum(counts.values()) and kinds["embedding"]["count"] == counts["embedding"]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_update_is_what_an_explicit_copy_says(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(0.1 * torch.randn(5000, generator=generator))
    optimizer = torch.optim.AdamW([weight], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, fused=True)
    for step in range(1, 4):
        before = weight.detach().double()
        weight.grad = 1e-3 * torch.randn(5000, generator=generator)
        optimizer.step()
        state = optimizer.state[weight]
        update = AdamWUpdate(3e-3, (0.9, 0.95), 1e-8, step)
        found = update.of(weight.detach(), state["exp_avg"], state["exp_avg_sq"], weight_decay)
        copied = weight.detach().double() - before
        # A weight is rounded when it is decayed and when it is moved, the step itself a few times: 2**-24 each.
        allowed = 2**-24 * (2 * before.abs() + 8 * copied.abs())
        assert ((found - copied).abs() <= allowed).all()
        torch.testing.assert_close(found.norm(), copied.norm(), rtol=1e-6, atol=0.0)


def test_a_refused_update_has_ratio_zero_and_empty_weights_none() -> None:
    engine = FakeEngine()
    for name in members("norm"):
        engine.tensors["values"][name].zero_()
    kinds = measure(engine, applied=False)["gradients"]["kinds"]
    assert kinds["all"]["update_ratio"] == kinds["embedding"]["update_ratio"] == 0.0
    assert kinds["norm"]["update_ratio"] is None and kinds["all"]["gradient_norm"] > 0.0


def test_the_noise_scale_solves_for_signal_and_trace() -> None:
    signal, trace = 0.7, 40.0
    found = noise_scale(4, 64, signal + trace / 4, signal + trace / 64)
    assert found["signal"] == pytest.approx(signal, rel=1e-12) and found["trace"] == pytest.approx(trace, rel=1e-12)
    assert found["scale"] == pytest.approx(trace / signal, rel=1e-12)
    drowned = noise_scale(4, 64, 16.0, 0.9)  # sixteen times the batch: with any signal, less than that of the norm
    assert drowned["signal"] < 0.0 and drowned["scale"] is None


def test_the_noise_scale_is_unbiased() -> None:
    """Gradients of samples are G + noise; the small batch is a part of the large one, as in training."""
    generator = np.random.default_rng(0)
    true = generator.standard_normal(50)
    spread = generator.uniform(0.5, 3.0, 50)
    signals, traces = [], []
    for _ in range(4000):
        samples = true + spread * generator.standard_normal((16, 50))
        small, large = (float(np.square(samples[:size].mean(axis=0)).sum()) for size in (2, 16))
        found = noise_scale(2, 16, small, large)
        signals.append(found["signal"])
        traces.append(found["trace"])
    for values, expected in ((signals, np.square(true).sum()), (traces, np.square(spread).sum())):
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - expected) < 4 * error and error < 0.02 * expected


def test_the_small_batch_is_the_first_micro_batch_repeated() -> None:
    engine = FakeEngine()
    found = measure(engine, config(noise_every=5), step=10, norm=1.5)
    assert engine.extra_passes == [["first"] * 3]
    assert found == {"noise": noise_scale(4, 12, 4.0, 1.5**2)}


def test_nothing_is_measured_of_a_gradient_that_is_not_finite() -> None:
    engine = FakeEngine()
    for engine.small_norm, large in ((math.inf, 1.0), (math.nan, 1.0), (1.0, math.inf)):
        assert measure(engine, config(noise_every=5), norm=large) == {}
    statistics = GradientStatistics(FakeEngine(), config(every=1, spectral_iterations=2))  # type: ignore[arg-type]
    statistics.before_step(step_of(1))
    statistics.before_update(proposal(norm=math.nan))
    assert statistics.after_step(step_of(1), result(norm=math.nan, applied=False)) == {}


def test_what_is_on_is_due_at_its_steps_and_the_last_and_otherwise_the_engine_is_asked_for_nothing() -> None:
    engine: Any = SimpleNamespace(table=TABLE)  # anything else is an AttributeError
    for configuration in (config(), config(every=10, noise_every=10, spectral_iterations=2)):
        assert measure(engine, configuration, step=11) == {}
    assert set(measure(FakeEngine(), config(every=10, noise_every=10), step=25)) == {"gradients", "noise"}
    assert measure(FakeEngine(), config(), step=25) == {}


def test_one_step_leaves_nothing_to_the_next() -> None:
    statistics = GradientStatistics(FakeEngine(), config(every=2, noise_every=2))  # type: ignore[arg-type]
    for step, expected in ((2, {"gradients", "noise"}), (3, set()), (4, {"gradients", "noise"})):
        now = step_of(step, ["batch"])
        statistics.before_step(now)
        statistics.before_update(proposal())
        assert set(statistics.after_step(now, result())) == expected


def test_spectral_norms_are_recorded_beside_the_other_values_of_blocks() -> None:
    layers = measure(FakeEngine(), config(every=10, spectral_iterations=3))["gradients"]["layers"]
    assert set(layers) == {*BLOCK_NAMES, "qk_spectral_norm", "ov_spectral_norm"}
    assert all(len(values) == 2 for values in layers.values())
