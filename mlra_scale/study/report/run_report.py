"""The report of a run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from mlra_scale.config import Config, ConfigError, yaml_text
from mlra_scale.console import curve
from mlra_scale.model.optim_text import optimizer_text, rule_text
from mlra_scale.study.report import run_figures
from mlra_scale.study.report.costs import costs_of, costs_table
from mlra_scale.study.report.page import Samples, write_report
from mlra_scale.study.report.records import Keys, RunRecord, number_or_nan, open_run, task_figures, time_text
from mlra_scale.study.report.sweep_record import STUDY
from mlra_scale.study.report.wording import number
from mlra_scale.training.run_reader import is_number, parse_any_json, read_mapping

_MAX_EVENTS = 200
_PERPLEXITIES = {"token_perplexity": "token", "word_perplexity": "word"}
_MEASURES: dict[str, tuple[Keys, str]] = {
    "training loss": ("loss", "nats per token"),
    "validation loss": ("validation_loss", "nats per token"),
    "TEV mean": ("tev_mean", "unit of the weights"),
    "TEV spread (standard deviation over tokens)": ("tev_std", "unit of the weights"),
    "norm of the mean embedding": ("mean_embedding_norm", "unit of the weights"),
    "root mean square of embedding rows, mean": ("mean_row_rms", "unit of the weights"),
    "peak memory of a device": ("memory_gib", "GiB"),
    "gradient norm, before clipping": ("gradient_norm", ""),
    "gradient variance, all parameters": ("gradients.kinds.all.gradient_variance", ""),
    "gradient variance, embedding": ("gradients.kinds.embedding.gradient_variance", ""),
    "gradient noise scale": ("noise.scale", "samples"),
    "largest variance of the residual stream": ("activations.max_residual_variance", ""),
    "largest attention logit": ("activations.max_logit", ""),
    "lowest attention entropy of a block": ("activations.min_attention_entropy", "nats"),
    "tokens per second": ("tokens_per_second", ""),
}


def report_run(path: Path, output: Path, samples: Samples | None = None) -> list[Path]:
    """Writes the report of a run, which may be in progress, to a folder; returns the paths of page and images."""
    run = open_run(path)
    overview = run_figures.overview_figure(run)
    over_time, not_drawn = run_figures.time_figure(run)
    over_blocks = run_figures.profile_figure(run)
    rows, not_measured, remarks = _measures(run)
    found = costs_of(run.metrics)
    return write_report(
        output,
        "run.html",
        {"overview.png": overview, "run.png": over_time, "blocks.png": over_blocks},
        title=f"Run {path.resolve().name}",
        lead=f"{run.state}; {run.last_step} of {run.setting('train.steps', '?')} steps recorded.",
        overview=overview,
        overview_text=_overview_text(run),
        facts=_facts(run),
        rows=rows,
        not_measured=not_measured,
        remarks=remarks,
        over_time=over_time,
        alternative=f"Curves of {len(run.metrics)} records over {run.last_step} steps; see the table above.",
        not_drawn=not_drawn,
        over_blocks=over_blocks,
        samples=samples or {},
        costs=costs_table([found] if found else []),
        event_counts=Counter(str(event.get("event")) for event in run.events),
        events=[event for event in run.events if event.get("event") not in ("start", "checkpoint")],
        max_events=_MAX_EVENTS,
        notes=run.notes,
        config=yaml_text.dump(run.config) if run.config else "",
    )


def curves_text(path: Path) -> str:
    """Returns loss and TEV of a run as curves of plain text; "" where nothing was recorded."""
    run = open_run(path)
    found = ((title, run.series(key).dropna()) for title, key in (("training loss", "loss"), ("TEV mean", "tev_mean")))
    return "\n\n".join(curve(title, [*values.index], [*values]) for title, values in found if values.size)


def _overview_text(run: RunRecord) -> str:
    """The alternative text of the first figure: its numbers."""
    parts = []
    for name, key in (("training loss", "loss"), ("validation loss", "validation_loss"), ("mean TEV", "tev_mean")):
        if (values := run.series(key).dropna()).size:
            parts.append(f"{name} from {number(values.iloc[0], 4)} to {number(values.iloc[-1], 4)}")
    return f"Loss and TEV over {run.last_step} steps: {', '.join(parts)}."


def _facts(run: RunRecord) -> list[tuple[str, Any]]:
    get, starts = run.setting, run.events_named("start")
    samples, length, optim = get("train.global_batch_size"), get("train.sequence_length"), get("optim")
    batch = rate = None
    if is_number(samples) and is_number(length):
        batch = f"{samples} sequences of {length} tokens, {int(samples * length):,} tokens per step"
    if isinstance(optim, dict):
        rate = f"{optim.get('lr')}, {optim.get('schedule')}, {optim.get('warmup_steps')} steps of warm-up"
    return [
        ("run directory", run.path.resolve().name),
        ("preset", get("preset")),
        ("model", _model(get("model"))),
        ("seed", get("train.seed")),
        ("data", get("data.path") or get("data.blend")),
        ("batch", batch),
        ("learning rate", rate),
        ("optimizer", _optimizer(run)),
        ("layout", _layout(run, starts[-1].get("world_size") if starts else get("parallel.world_size"))),
        ("precision", get("train.precision")),
        ("guard", None if get("guard") is None else "on" if get("guard.enabled") is True else "off"),
        ("checkpoints", checkpoints_text(run)),
        ("starts", f"{len(starts)}, the first {time_text(starts[0].get('time'))} (UTC)" if starts else None),
        ("commit", _commit(run) or "not recorded"),
    ]


def checkpoints_text(run: RunRecord) -> str | None:
    """Returns number, size, stall and write time of the checkpoints; None without any."""
    saves = run.events_named("checkpoint")
    if not saves:
        return None
    size, stall = number_or_nan(saves[-1].get("bytes")), sum(number_or_nan(e.get("stall_seconds")) for e in saves)
    write = number_or_nan(saves[-1].get("write_seconds"))
    return (
        f"{len(saves)}, the last of {number(size / 1e6, 3)} MB; training waited {number(stall, 3)} s for them, and the "
        f"last was written in {number(write, 3)} s"
    )


def _model(model: Any) -> str | None:
    if not isinstance(model, dict):
        return None
    shape = f"{model.get('num_layers')} blocks, width {model.get('hidden_size')}, {model.get('num_heads')} heads"
    kind = f"{model.get('attention')} attention"
    if model.get("attention") == "mlra":
        kind += f" of rank {model.get('attention_rank') or '{} of the width'.format(model.get('attention_rank_ratio'))}"
    return f"{shape}, {kind}, initialized {model.get('attention_init')}"


def _optimizer(run: RunRecord) -> str | None:
    """The optimizer with its rules; None where the configuration cannot be read."""
    try:
        config = Config.from_dict(run.config)
        text = optimizer_text(config.model, config.optim)
    except ConfigError:
        return None
    rules = [rule_text(rule) for rule in config.optim.rules]
    return "; ".join([text, *(rules and ["rules: " + "; ".join(rules)])])


def _layout(run: RunRecord, world: Any) -> str:
    tensor, pipeline = run.setting("parallel.tensor", 1), run.setting("parallel.pipeline", 1)
    stage = run.setting("deepspeed.zero_optimization.stage", 0)
    degrees = f"tensor {tensor}, pipeline {pipeline}, ZeRO stage {stage}"
    if not (is_number(world) and is_number(tensor) and is_number(pipeline) and tensor * pipeline > 0):
        return f"{degrees}; number of processes not recorded"
    return f"{world} process{'es' * (world != 1)}: data {int(world // (tensor * pipeline))}, {degrees}"


def _commit(run: RunRecord) -> str | None:
    """Returns the commit from the last event that has one, else from the sweep that the run is a cell of."""
    commits = [event["commit"] for event in run.events if event.get("commit")]
    if commits:
        return str(commits[-1])
    commit = read_mapping(run.path.resolve().parent.parent / STUDY, [], parse_any_json).get("commit")
    return None if commit is None else f"{commit} (of the sweep)"


def _measures(run: RunRecord) -> tuple[list[tuple[str, pd.Series, str]], list[str], list[str]]:
    """Returns the rows of the table, what was not measured, and remarks."""
    tasks: dict[str, tuple[Keys, str]] = {
        f"perplexity of {name}, per {_PERPLEXITIES[figure]}": (("tasks", name, figure), "")
        for name, figure in task_figures(run, "tasks")
        if figure in _PERPLEXITIES
    }
    tasks |= {f"{name}: {figure}": (("harness", name, figure), "") for name, figure in task_figures(run, "harness")}
    found = {name: (run.series(key), unit) for name, (key, unit) in (_MEASURES | tasks).items()}
    rows = [(name, values.dropna(), unit) for name, (values, unit) in found.items() if values.notna().any()]
    missing = [name for name, (values, _) in found.items() if not values.notna().any()]
    remarks = [
        f"{name}: {values.isna().sum()} of {values.size} recorded values are not finite numbers (gaps)."
        for name, (values, _) in found.items()
        if values.isna().any()
    ]
    if run.rolled_back:
        numbers = {record.get("rollback") for record in run.rolled_back}
        remarks.append(
            f"{len(run.rolled_back)} recorded step(s) were undone in {len(numbers)} rollback(s); they are not in these "
            "figures, and are drawn apart below."
        )
    return rows, missing, remarks
