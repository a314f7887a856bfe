"""The report of one run."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from mlra_scale.config import yaml_text
from mlra_scale.study.correlation import pearson, ranks, spearman_of_changes
from mlra_scale.study.report import page, run_figures
from mlra_scale.study.report.costs import costs_of, costs_section
from mlra_scale.study.report.run_record import (
    Record,
    RunRecord,
    at,
    is_number,
    moment,
    named,
    number_or_nan,
    open_run,
    read_mapping,
)
from mlra_scale.study.report.sweep_results import STUDY
from mlra_scale.study.report.written import Written, write_report
from mlra_scale.study.verdicts import number

_MAX_EVENTS = 200
_FIGURES = {
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


def report_run(path: Path, output: Path) -> Written:
    """Writes the report of a run directory.

    Args:
        path: The run directory, of a run that has ended or is at work.
        output: The folder to write to; made if need be.

    Returns:
        What was written.
    """
    run = open_run(path)
    over_time, missing = run_figures.time_figure(run)
    profiles = run_figures.profile_figure(run)
    images = {"run.png": over_time, "blocks.png": profiles}
    title = f"Run {path.resolve().name}"
    steps = f"{run.last_step} of {run.setting('train.steps', '?')} steps recorded"
    content = page.page(
        title,
        page.paragraph(f"{run.state}; {steps}.", "lead"),
        page.section("What ran", page.facts(_what_ran(run))),
        page.section("Figures of the run", _figures_table(run), *_remarks(run)),
        page.section("Over time", *_over_time(run, over_time, missing)),
        page.section("Over the blocks", *_over_blocks(profiles)),
        page.section("What measuring costs", *costs_section([found] if (found := costs_of(run.metrics)) else [])),
        page.section("Events", *_events(run)),
        page.section("What could not be read", page.items(run.notes)) if run.notes else "",
        page.folded("The resolved configuration", page.preformatted(yaml_text.dump(run.config))) if run.config else "",
    )
    return write_report(output, content, images)


def _what_ran(run: RunRecord) -> list[tuple[str, Any]]:
    get = run.setting
    starts = run.events_named("start")
    world = starts[-1].get("world_size") if starts else get("parallel.world_size")
    tokens = _product(get("train.global_batch_size"), get("train.sequence_length"))
    return [
        ("run directory", run.path.resolve().name),
        ("preset", get("preset")),
        ("model", _model(run)),
        ("seed", get("train.seed")),
        ("data", get("data.path") or get("data.blend")),
        (
            "batch",
            None
            if tokens is None
            else f"{get('train.global_batch_size')} sequences of "
            f"{get('train.sequence_length')} tokens, {tokens:,} tokens per step",
        ),
        ("learning rate", _learning_rate(run)),
        ("layout", _layout(run, world)),
        ("precision", get("train.precision")),
        ("guard", None if get("guard") is None else "on" if get("guard.enabled") is True else "off"),
        ("checkpoints", _checkpoints(run)),
        ("starts", f"{len(starts)}, the first {moment(starts[0].get('time'))} (UTC)" if starts else None),
        ("commit", _commit(run) or "not recorded"),
    ]


def _checkpoints(run: RunRecord) -> str | None:
    """What the checkpoints cost: how many, how large, how long training waited and how long the writing took."""
    saves = run.events_named("checkpoint")
    if not saves:
        return None
    size, waited, written = (
        [number_or_nan(event.get(name)) for event in saves] for name in ("bytes", "stall_seconds", "write_seconds")
    )
    cost = (
        f"training waited {number(sum(waited), 3)} s for them, and the last was written in {number(written[-1], 3)} s"
    )
    return f"{len(saves)}, the last of {number(size[-1] / 1e6, 3)} MB; {cost}"


def _model(run: RunRecord) -> str | None:
    model = run.setting("model")
    if not isinstance(model, dict):
        return None
    shape = f"{model.get('num_layers')} blocks, width {model.get('hidden_size')}, {model.get('num_heads')} heads"
    if model.get("attention") != "mlra":
        return f"{shape}, {model.get('attention')} attention, initialized {model.get('attention_init')}"
    rank = model.get("attention_rank") or f"{model.get('attention_rank_ratio')} of the width"
    return f"{shape}, mlra attention of rank {rank}, initialized {model.get('attention_init')}"


def _learning_rate(run: RunRecord) -> str | None:
    optim = run.setting("optim")
    if not isinstance(optim, dict):
        return None
    return f"{optim.get('lr')}, {optim.get('schedule')}, {optim.get('warmup_steps')} steps of warm-up"


def _layout(run: RunRecord, world: Any) -> str:
    tensor, pipeline = run.setting("parallel.tensor", 1), run.setting("parallel.pipeline", 1)
    stage = run.setting("deepspeed.zero_optimization.stage", 0)
    degrees = f"tensor {tensor}, pipeline {pipeline}, ZeRO stage {stage}"
    if not (is_number(world) and is_number(tensor) and is_number(pipeline) and tensor * pipeline > 0):
        return f"{degrees}; number of processes not recorded"
    return f"{world} process{'es' * (world != 1)}: data {int(world // (tensor * pipeline))}, {degrees}"


def _commit(run: RunRecord) -> str | None:
    """The commit, where an event or the sweep that the run is a cell of names it."""
    commits = [event["commit"] for event in run.events if event.get("commit")]
    if commits:
        return str(commits[-1])
    study = run.path.resolve().parent.parent / STUDY
    commit = read_mapping(study, []).get("commit") if study.is_file() else None
    return None if commit is None else f"{commit} (of the sweep)"


def _product(*values: Any) -> int | None:
    return int(math.prod(values)) if all(is_number(value) for value in values) else None


def _figures_table(run: RunRecord) -> str:
    rows, missing = [], []
    for name, (key, unit) in _FIGURES.items():
        series = run.series(named(key)).finite
        if not series:
            missing.append(name)
            continue
        low, high = series.values.min(), series.values.max()
        shown = (number(float(value), 4) for value in (series.values[0], series.values[-1], low, high))
        rows.append((name, *shown, unit, series.steps.size))
    head = ("measure", "first", "last", "lowest", "highest", "unit", "measured")
    told = page.table(head, rows, numbers=(1, 2, 3, 4, 6)) if rows else page.paragraph("Nothing was recorded yet.")
    return told + (page.paragraph(f"Not measured: {', '.join(missing)}.", "small") if missing else "")


def _remarks(run: RunRecord) -> list[str]:
    remarks = [_tev_and_gradients(run)]
    for name, (key, _) in _FIGURES.items():
        series = run.series(named(key))
        num_bad = series.values.size - series.finite.values.size
        if num_bad:
            remarks.append(f"{name}: {num_bad} of {series.values.size} recorded values are no finite numbers (gaps).")
    if run.rolled_back:
        numbers = {record.get("rollback") for record in run.rolled_back}
        remarks.append(
            f"{len(run.rolled_back)} recorded step(s) were undone in {len(numbers)} rollback(s); they are no part of "
            "these figures, and are drawn apart below."
        )
    return [page.paragraph(remark, "small") for remark in remarks]


def _tev_and_gradients(run: RunRecord) -> str:
    steps, tev, variance = run_figures.gradient_and_tev(run)
    if steps.size < 4:
        return "TEV and gradient variance of the embedding were measured together at fewer than 4 steps."
    plain, changes = pearson(ranks(tev), ranks(variance)), spearman_of_changes(tev, variance)
    told = f"{changes:.2f} of" if math.isfinite(changes) else "undefined for"
    return (
        f"TEV against gradient variance of the embedding within this run: Spearman {plain:.2f}, {told} their changes "
        f"from one measurement to the next, over {steps.size} steps. Steps of one run are no independent observations: "
        "no interval, and no claim."
    )


def _over_time(run: RunRecord, image: bytes | None, missing: list[str]) -> list[str]:
    if image is None:
        return [page.paragraph("There is nothing to draw yet."), page.items(missing)]
    caption = (
        "All measures on one axis of optimizer steps. Grey dotted curves with hollow markers are steps that a rollback "
        "undid. Vertical lines: dotted, an update was skipped; dash-dotted, the rate fell; solid, the run went back. "
        "In the events' panel a bar leads from a rollback to the step it went back to, and from a lowered rate to "
        "where the schedule is reached again. Shallow blocks are the first quarter of the blocks."
    )
    alternative = (
        f"Curves of {len(run.metrics)} records over {run.last_step} steps; their figures are in the table above."
    )
    shown = [page.image(image, alternative, caption)]
    return [*shown, page.paragraph("Not drawn:", "small"), page.items(missing)] if missing else shown


def _over_blocks(image: bytes | None) -> list[str]:
    if image is None:
        return [page.paragraph("Nothing was measured per block (needs gradients.every or activations.every).")]
    caption = "Values per block at the first, the middle and the last measurement."
    return [page.image(image, "Measures over the depth of the model at three steps.", caption)]


def _events(run: RunRecord) -> list[str]:
    counts = Counter(str(event.get("event")) for event in run.events)
    if not counts:
        return [page.paragraph("No event was recorded.")]
    told = page.paragraph(", ".join(f"{name}: {count}" for name, count in counts.items()) + ".")
    telling = [event for event in run.events if event.get("event") not in ("start", "checkpoint")]
    if not telling:
        return [told]
    rows = [(moment(e.get("time")), e.get("event"), e.get("step", ""), _details(e)) for e in telling[-_MAX_EVENTS:]]
    cut = f"The last {_MAX_EVENTS} of {len(telling)}, " if len(telling) > _MAX_EVENTS else ""
    note = page.paragraph(f"{cut}starts and checkpoints left out:", "small")
    return [told, note, page.table(("time (UTC)", "event", "step", "what"), rows, numbers=(2,), whole=(0, 1))]


def _details(event: Record) -> str:
    hidden = {"time", "event", "step"}
    return ", ".join(
        f"{key} {value}" for key, value in event.items() if key not in hidden and at(event, key) is not None
    )
