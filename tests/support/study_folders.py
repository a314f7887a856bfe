"""Run directories and sweep folders as training and sweeps leave them, with effects that are known."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlra_scale.config import load_config

BLOCKS = 12
TIME = "2025-01-01T00:00:00.000+00:00"
Record = dict[str, Any]


def write_lines(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in objects), encoding="ascii")


def step_record(step: int, draw: np.random.Generator, bump: float = 0.0, tev: float = 0.0, size: float = 1.0) -> Record:
    """One line of metrics.jsonl with everything that can be measured; `bump` is an instability of that height."""
    fall, noise = math.exp(-step / 80), float(draw.normal())
    variance = size * 1e-9 * (1 + 20 * fall) * math.exp(0.3 * noise) * (1 + 60 * bump)
    mean = 0.02 * (1 + step / 500) + tev
    blocks = np.linspace(3.0, 1.0, BLOCKS)
    return {
        "step": step,
        "consumed_samples": 8 * step,
        "consumed_tokens": 1024 * step,
        "seconds": 0.25 * step,
        "loss": 5.5 + 5.3 * fall + 0.02 * noise + bump,
        "gradient_norm": (0.4 + 2.0 * fall) * math.exp(0.2 * noise) * (1 + 4 * bump),
        "learning_rate": 1e-3 * min(1.0, step / 30),
        "tokens_per_second": 4096.0,
        "memory_gib": 0.5,
        "tev_mean": mean,
        "tev_std": 0.1 * mean,
        "tev_quantiles": {str(q): mean * (0.9 + 0.2 * q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
        "mean_embedding_norm": 0.1,
        "mean_row_rms": mean,
        "spike_scores": {
            "loss_olmo2": min(1.0, bump) / max(1, step),
            "gradient_olmo2": min(1.0, bump) / max(1, step),
            "loss_olmo_core": 2 * min(1.0, bump) / max(1, step),
            "gradient_olmo_core": 3 * min(1.0, bump) / max(1, step),
        },
        "gradients": {
            "kinds": {
                "all": {"count": 10**6, "gradient_norm": 1.0, "gradient_variance": variance / 5},
                "embedding": {"count": 10**5, "gradient_norm": 0.3, "gradient_variance": variance},
            },
            "layers": {
                "gradient_norm": [float(value) for value in 0.1 * blocks],
                "gradient_variance": [float(value) for value in variance * blocks],
                "update_ratio": [1e-3] * BLOCKS,
            },
        },
        "noise": {"scale": 200.0 + step} if step % 50 == 0 else {"scale": None},
        "activations": {
            "residual_variance": [float(value) for value in np.linspace(0.01, 1 + step / 100, BLOCKS + 1)],
            "attention_entropy": [float(value) for value in np.linspace(4.0, 2.0, BLOCKS)],
            "largest_logit": [float(value) for value in np.linspace(1.0, 8.0 + 30 * bump, BLOCKS)],
            "saturated_share": [0.01 * bump] * BLOCKS,
            "max_residual_variance": 1 + step / 100,
            "min_attention_entropy": 2.0 - 0.5 * bump,
            "max_logit": 8.0 + step / 20 + 30 * bump,
            "max_saturated_share": 0.01 * bump,
        },
    }


def write_run(folder: Path, steps: int = 300, every: int = 2) -> Path:
    """A run that spiked, skipped updates, lowered its rate, went back from step 2/3 to 1/2 and then ended well."""
    folder.mkdir(parents=True)
    overrides = [f"train.steps={steps}", "data.path=data/python-docs", f"model.num_layers={BLOCKS}"]
    (folder / "config.yaml").write_text(load_config("debug", overrides=overrides).to_yaml())
    draw = np.random.default_rng(0)
    back, undone = steps // 2, 2 * steps // 3
    spikes = {undone // 2: 1.5, undone // 2 + every: 0.7}
    kept = [step_record(step, draw, spikes.get(step, 0.0)) for step in range(0, steps + 1, every)]
    for record in kept:
        if record["step"] % 50 == 0:
            record["validation_loss"] = record["loss"] + 0.1
            record["harness"] = {"choose": {"acc": 0.25 + record["step"] / 1000, "acc_norm": 0.3}}
            record["tasks"] = {"held-out": {"token_perplexity": 200.0 - record["step"] / 4, "word_perplexity": 900.0}}
    write_lines(folder / "metrics.jsonl", kept)
    lost = [step_record(step, draw, 0.04 * (step - back)) for step in range(back + every, undone + 1, every)]
    write_lines(folder / "rolled_back.jsonl", [{**record, "rollback": 1} for record in lost])
    events: list[Record] = [
        {"event": "start", "step": 0, "world_size": 4},
        *({"event": "checkpoint", "step": step} for step in range(50, steps + 1, 50)),
        {"event": "guard_skip", "step": undone // 2, "reason": "loss above the limit"},
        {
            "event": "guard_lower_rate",
            "step": undone // 2 + 2,
            "reason": "4 bad updates",
            "factor": 0.5,
            "until": undone // 2 + steps // 8,
        },
        {
            "event": "guard_rollback",
            "step": undone,
            "to_step": back,
            "skipped_from": 8 * back,
            "skipped_to": 8 * undone,
            "factor": 1.0,
            "until": None,
            "reason": "the loss had risen by 1 nat",
        },
        {"event": "finished", "steps": steps},
    ]
    write_lines(folder / "events.jsonl", [{"time": TIME, **event} for event in events])
    return folder


def cell_of(variant: str, axes: Mapping[str, Any], seed: Any, **values: Any) -> Record:
    """One line of results.jsonl."""
    name = "-".join([variant, *(f"{key.rpartition('.')[2]}{value}" for key, value in axes.items()), f"seed{seed}"])
    return {
        "cell": name,
        "variant": variant,
        "axes": dict(axes),
        "seed": seed,
        "run": f"cells/{name}",
        "state": "done",
        "steps": 300,
        "final_loss": 6.0,
        "initial_loss": 10.8,
        "validation_loss": None,
        "tev_mean": None,
        "tev_std": None,
        "diverged_at": None,
        "seconds": 75.0,
        "tokens": 307200,
        "error": None,
        **values,
    }


def write_sweep(
    folder: Path,
    variants: Mapping[str, float],
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2),
    depths: Sequence[int] = (24, 48),
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    diverged: Sequence[tuple[str, float]] = (),
    record_steps: int = 10,
) -> Path:
    """A finished sweep.

    Args:
        folder: Where.
        variants: What each adds to the final loss, exactly on average over seeds.
        rates: Learning rates; the loss is a parabola over their logarithm.
        depths: Numbers of blocks.
        seeds: Each adds something to the loss of all variants.
        diverged: (variant, rate) whose cells diverge for every second seed.
        record_steps: Records in each cell's metrics.jsonl; 0: none.
    """
    folder.mkdir(parents=True)
    draw = np.random.default_rng(7)
    cells = []
    for depth in depths:
        for rate in rates:
            # Pair noise whose mean over seeds is exactly 0, so that the effect is what it is said to be.
            noise = {name: draw.normal(size=len(seeds)) for name in variants}
            noise = {name: 0.01 * (values - values.mean()) for name, values in noise.items()}
            for place, seed in enumerate(seeds):
                for variant, effect in variants.items():
                    axes = {"model.num_layers": depth, "optim.lr": rate}
                    bowl = 0.3 * (math.log10(rate) + 2.8) ** 2
                    loss = 6.0 + bowl - 0.002 * depth + 0.15 * math.sin(seed) + effect + float(noise[variant][place])
                    size = rate * 1e3 * math.exp(0.5 * float(draw.normal()))
                    # TEV follows the gradient variance, and lies higher where the loss is lower.
                    tev = 0.02 + 0.004 * math.log10(size) - 0.004 * effect + 0.0004 * float(draw.normal())
                    values: Record = {"final_loss": loss, "validation_loss": loss + 0.1, "tev_mean": tev}
                    values |= {"tev_std": 0.1 * tev, "gradient_variance_embedding": 1e-9 * size, "spikes": seed % 2}
                    if (variant, rate) in diverged and place % 2 == 0:
                        values = {"state": "diverged", "final_loss": None, "diverged_at": 40, "steps": 40}
                    cell = cell_of(variant, axes, seed, **values)
                    cells.append(cell)
                    if record_steps:
                        run = folder / cell["run"]
                        run.mkdir(parents=True)
                        records = [
                            step_record(step, draw, tev=tev, size=size)
                            for step in range(0, 300, max(1, 300 // record_steps))
                        ]
                        write_lines(run / "metrics.jsonl", records)
    write_lines(folder / "results.jsonl", cells)
    study: Record = {
        "name": "synthetic",
        "commit": "0123abc",
        "command": ["python", "tools/sweep.py"],
        "hardware": "2 CPUs",
    }
    study |= {"versions": {"torch": "2.13.0", "numpy": "2.4.6"}, "started": TIME, "ended": TIME}
    (folder / "study.json").write_text(json.dumps(study))
    plan: Record = {"name": "synthetic", "variants": {name: {} for name in variants}, "seeds": list(seeds)}
    plan |= {"description": "Made up: the effects are known."}
    plan |= {"axes": {"model.num_layers": list(depths), "optim.lr": list(rates)}}
    (folder / "sweep.yaml").write_text(json.dumps(plan))
    return folder
