"""Runs made of noise, with events and warnings where a test wants them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from docs.studies.predict.events import Protocol, first_event
from docs.studies.predict.runs import SweptRuns
from docs.studies.predict.windows import SERIES, Run

STEPS = 150
Numbers = NDArray[np.float64]
Shape = Callable[[Numbers, int | None], Numbers]
"""What is added to the logarithm of TEV: of the steps and of the event's step."""

# The fixed numbers, with fewer resamples: of 400, a 95 % limit scatters by a tenth of the interval's width.
QUICK = Protocol(resamples=400)


def nothing(steps: Numbers, event: int | None) -> Numbers:
    return 0.0 * steps


def make_losses(generator: np.random.Generator, event: int | None = None, steps: int = STEPS) -> Numbers:
    """A falling, noisy loss that is 3 nats higher from the event on."""
    times = np.arange(1, steps + 1)
    losses = 5.0 + 1.5 * np.exp(-times / 60.0) + 0.1 * generator.standard_normal(steps)
    return losses + (3.0 * (times >= event) if event is not None else 0.0)


def make_run(
    generator: np.random.Generator,
    event: int | None = None,
    rate: float = 1e-3,
    variant: str = "plain",
    seed: int = 0,
    shape: Shape = nothing,
    steps: int = STEPS,
) -> Run:
    """A run whose series are noise around a level of its own, with the shape added to both of TEV."""
    times = np.arange(1.0, steps + 1)
    series = {
        name: np.exp(0.02 * generator.standard_normal(steps) + 0.02 * generator.standard_normal()) for name in SERIES
    }
    for name in ("tev_mean", "tev_std"):
        series[name] = series[name] * np.exp(shape(times, event))
    series["loss"] = make_losses(generator, event, steps)
    found = first_event(series["loss"], False, QUICK)
    assert (found is None) == (event is None) and (found is None or found.step == event)
    return Run(
        cell=f"{variant}-lr{rate:g}-seed{seed}",
        variant=variant,
        seed=seed,
        shape="shape",
        twin=f"{variant} {rate}",
        rates=np.full(steps, rate),
        series=series,
        event=found,
    )


def make_sweep(seed: int, shape: Shape = nothing, num_events: int = 12, num_stable: int = 12) -> SweptRuns:
    """Runs at two rates and of two variants, with events at random steps."""
    generator = np.random.default_rng(seed)
    runs = []
    for index in range(num_events + num_stable):
        event = int(generator.integers(45, STEPS - 30)) if index < num_events else None
        rate = (1e-3, 3e-3)[index % 2]
        variant = ("plain", "unclipped")[index // 2 % 2]
        runs.append(make_run(generator, event, rate, variant, index, shape))
    return SweptRuns(tuple(runs), (), {}, ())


def write_run(folder: Path, run: Run, losses: Numbers | None = None, stopped: bool = False) -> None:
    """Leaves a run in a sweep's folder as the trainer and the sweep leave it."""
    directory = folder / "cells" / run.cell
    directory.mkdir(parents=True)
    losses = run.series["loss"] if losses is None else losses
    lines: list[dict[str, object]] = [{"step": 0, "tev_mean": 1.0}]
    for index, loss in enumerate(losses):
        line: dict[str, object] = {"step": index + 1, "loss": loss, "learning_rate": run.rates[index]}
        line |= {name: run.series[name][index] for name in ("tev_mean", "tev_std", "gradient_norm")}
        if index % 2 == 0:
            variance = run.series["shallow_gradient_variance"][index]
            # The mean is geometric: of v/8, v/1 and v*8 it is v. The third block is not shallow.
            line["gradients"] = {
                "kinds": {"embedding": {"gradient_variance": variance / 8}},
                "layers": {"gradient_variance": [variance, variance * 8, 1e9]},
            }
            line["activations"] = {"max_logit": run.series["largest_logit"][index]}
        lines.append(line)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    end = {"event": "stopped", "exit_code": 3, "step": len(losses) + 1} if stopped else {"event": "finished"}
    (directory / "events.jsonl").write_text(json.dumps({"event": "start"}) + "\n" + json.dumps(end) + "\n")
    config = f"model: {{num_layers: 24}}\ntrain: {{seed: {run.seed}, name: {run.variant}}}\n"
    (directory / "config.yaml").write_text(config)
    result = {"cell": run.cell, "variant": run.variant, "axes": {}, "seed": run.seed, "run": f"cells/{run.cell}"}
    result["state"] = "diverged" if stopped else "done"
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
