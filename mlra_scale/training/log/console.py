"""What a run prints: lines of its progress and its summary, and no messages of libraries that nobody can act on."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CURVES = ("loss", "validation_loss", "tev_mean", "tev_std")
"""Curves of the record whose first and last value the summary shows."""


def train_line(record: Mapping[str, Any], total_steps: int, elapsed: float, remaining: float | None) -> str:
    """Returns the console line of a logged step: the mean loss of the steps since the last line, and their end.

    Args:
        record: The record of the step.
        total_steps: Of the run.
        elapsed: Seconds since this process started.
        remaining: Seconds to the last step; None: unknown.
    """
    parts = [
        _step(record["step"], total_steps),
        f"loss {record.get('loss_mean', record['loss']):.4f}",
        f"grad {record['gradient_norm']:.3g}",
        f"lr {record['learning_rate']:.2e}",
        f"{record['tokens_per_second']:,.0f} tok/s",
    ]
    if "mfu" in record:
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    parts.append(f"{record['memory_gib']:.2f} GiB")
    if record.get("loss_scale") is not None:
        parts.append(f"scale {record['loss_scale']:g}")
    if "tev_mean" in record:
        parts.append(_tev(record))
    if record.get("overflow"):
        parts.append("overflow, update skipped")
    parts.append(duration(elapsed) + ("" if remaining is None else f", {duration(remaining)} left"))
    return " | ".join(parts)


def tev_line(record: Mapping[str, Any], total_steps: int) -> str:
    """Returns the console line of the TEV measurement before the first step."""
    return f"{_step(record['step'], total_steps)} | {_tev(record)}"


def validation_line(record: Mapping[str, Any], total_steps: int) -> str:
    """Returns the console line of one evaluation."""
    loss, perplexity = record["validation_loss"], record["validation_perplexity"]
    return f"{_step(record['step'], total_steps)} | validation loss {loss:.4f} | perplexity {_perplexity(perplexity)}"


def _perplexity(value: float) -> str:
    return f"{value:,.1f}" if value < 1e6 else f"{value:.3g}"


def task_lines(record: Mapping[str, Any], total_steps: int) -> list[str]:
    """Returns a console line for each text, and each task of the harness, of one evaluation."""
    lines = [
        f"perplexity of {name} {_perplexity(figures['token_perplexity'])} per token, "
        f"{_perplexity(figures['word_perplexity'])} per word"
        for name, figures in record.get("tasks", {}).items()
    ]
    for name, figures in record.get("harness", {}).items():
        lines.append(f"{name} " + ", ".join(f"{metric} {value:.4g}" for metric, value in figures.items()))
    return [f"{_step(record['step'], total_steps)} | {line}" for line in lines]


def duration(seconds: float) -> str:
    """Returns a time as 0:07, 12:30 or 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _step(step: int, total_steps: int) -> str:
    return f"step {step:>{len(str(total_steps))}}/{total_steps}"


def _tev(record: Mapping[str, Any]) -> str:
    step = record.get("tev_step", record["step"])
    earlier = "" if step == record["step"] else f" (of step {step})"
    return f"TEV {record['tev_mean']:.5f} +- {record['tev_std']:.5f}{earlier}"


def summary_of(
    records: Sequence[Mapping[str, Any]], steps: int, seconds: float, tokens_per_second: float, peak_memory_gib: float
) -> dict[str, Any]:
    """Returns the summary of a run that reached its last step, for the event log and wandb.

    The curves are those of the whole run, seconds and tokens per second those of this process, and the memory is the
    largest of any rank.
    """
    curves = {name: [record[name] for record in records if record.get(name) is not None] for name in CURVES}
    return {
        "steps": steps,
        "wall_seconds": round(seconds, 1),
        "tokens_per_second": round(tokens_per_second, 1),
        "peak_memory_gib": round(peak_memory_gib, 3),
        **{f"{name}_first": values[0] if values else None for name, values in curves.items()},
        **{f"{name}_last": values[-1] if values else None for name, values in curves.items()},
    }


def summary_lines(summary: Mapping[str, Any], total_steps: int) -> list[str]:
    """Returns the console lines of a summary."""

    def curve(name: str, digits: int) -> str:
        first, last = summary[f"{name}_first"], summary[f"{name}_last"]
        return "not measured" if last is None else f"{first:.{digits}f} -> {last:.{digits}f}"

    def perplexity(name: str) -> str:
        last = summary[f"{name}_last"]
        return "" if last is None or last > 100 else f" (perplexity {math.exp(last):,.1f})"

    return [
        "",
        f"done: step {summary['steps']}/{total_steps} in {summary['wall_seconds']:.1f} s, "
        f"{summary['tokens_per_second']:,.0f} tokens/s on average, "
        f"peak memory {summary['peak_memory_gib']:.2f} GiB per rank",
        f"  train loss       {curve('loss', 4)}{perplexity('loss')}",
        f"  validation loss  {curve('validation_loss', 4)}{perplexity('validation_loss')}",
        f"  TEV mean         {curve('tev_mean', 5)}",
        f"  TEV std          {curve('tev_std', 5)}",
    ]


_EXPECTED_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # DeepSpeed calls collectives by their names of before torch 2.13.
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
    # DeepSpeed broadcasts parameters, which need a gradient, when it starts an engine; nothing is differentiated there.
    (r"c10d::broadcast_: an autograd kernel was not registered", UserWarning),
)
"""Warnings of every run. Any other warning is shown: it may be the first sign of a fault."""


def silence_libraries(device: str) -> None:
    """Silences loggers and warnings; to be called before DeepSpeed is imported, whose accelerator is then `device`."""
    os.environ["DS_ACCELERATOR"] = device
    for message, category in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    import deepspeed  # noqa: F401  (creates the logger that is silenced here)

    for name in ("DeepSpeed", "megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def suppressed_output() -> Iterator[None]:
    """Suppresses what the block prints, such as DeepSpeed's memory reports; an error in the block prints it."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stdout(captured):
            yield
    except BaseException:
        print(captured.getvalue(), file=sys.stderr, end="", flush=True)
        raise
