"""The analysis of predictions as Markdown tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

_NAMES = {
    "tev_mean": "TEV mean",
    "tev_std": "TEV spread",
    "gradient_norm": "gradient norm",
    "shallow_gradient_variance": "gradient variance, shallow layers",
    "largest_logit": "largest attention logit",
    "loss": "loss",
    "step": "step number",
    "learning_rate": "learning rate",
}
ENOUGH_RUNS = 20
"""With fewer runs of either kind the page says so."""
_COMPARISONS = {
    "pooled": "Pooled: all with all, for contrast; what only follows step or learning rate looks like a signal here",
    "matched": "Matched: the same step, learning rates and shape",
    "twins": "Twins: matched, and nothing different but the seed",
}


def as_markdown(result: Mapping[str, Any]) -> str:
    """Returns the analysis as Markdown.

    Args:
        result: From `analysis.analyse`.
    """
    lines = ["# Does TEV warn before a spike or a divergence?", "", *_summary(result), "", *_events(result)]
    for comparison in result["comparisons"]:
        lines += ["", *_comparison(comparison)]
    return "\n".join([*lines, ""])


def _summary(result: Mapping[str, Any]) -> list[str]:
    runs, protocol = result["runs"], result["protocol"]
    main = next(item for item in result["comparisons"] if (item["stretch"], item["comparison"]) == ("near", "matched"))
    lines = [
        f"Verdict, {main['from']} to {main['to']} steps before the event, where matched runs and twins agree: "
        f"the claim that TEV warns is **{result['claim']}** at this scale ("
        + "; ".join(f"{_NAMES[name]}: {text}" for name, text in result["verdicts"].items())
        + ").",
        "",
        f"{runs['analysed']} runs analysed, {runs['with_event']} with an event and {runs['without_event']} without; "
        f"{main['events']} events have a control to compare with (windows of {main['controls']} runs, also of runs "
        f"before their own event); {len(runs['unstable_from_start'])} unstable from the start, "
        f"{len(runs['left_out'])} left out.",
        "",
        *_study(result),
    ]
    if min(runs["with_event"], runs["without_event"]) < ENOUGH_RUNS:
        lines += ["", f"Fewer than {ENOUGH_RUNS} runs with an event or fewer than {ENOUGH_RUNS} without: little data."]
    if main["events"] < protocol["minimum_events"]:
        lines += [
            "",
            f"**Too few events: {main['events']}, and {protocol['minimum_events']} are needed for a verdict.** The "
            "areas below are shown for what they are.",
        ]
    if runs["poisoned"]:
        found = sum(runs["poisoned"].values())
        lines += [
            "",
            f"Poisoned from outside, which cannot be foretold: {len(runs['poisoned'])} runs; in {found} an event was "
            "found.",
        ]
    reasons = Counter(item["reason"] for item in runs["left_out"])
    lines += [f"- left out, {count}: {reason}" for reason, count in sorted(reasons.items())]
    return lines


def _study(result: Mapping[str, Any]) -> list[str]:
    about, seeds = result["study"], result["runs"]["seeds"]
    hardware = about.get("hardware") or {}
    known = {
        "commit": about.get("commit"),
        "command": " ".join(about.get("command") or []),
        "hardware": ", ".join(f"{name} {value}" for name, value in hardware.items() if value),
        "seeds": ", ".join(map(str, seeds)),
    }
    return [f"- {name}: {value or 'not recorded'}" for name, value in known.items()]


def _events(result: Mapping[str, Any]) -> list[str]:
    if not result["events"]:
        return ["No event."]
    rows = [[item["cell"], item["kind"], str(item["step"]), f"{item['rate']:.3g}"] for item in result["events"]]
    return ["## Events", "", *_table(["cell", "kind", "step", "learning rate before it"], rows)]


def _comparison(comparison: Mapping[str, Any]) -> list[str]:
    title = f"## {comparison['from']} to {comparison['to']} steps before. {_COMPARISONS[comparison['comparison']]}"
    if comparison["events"] == 0:
        return [title, "", "Nothing to compare."]
    rows = [[_signal_name(name), *_signal_cells(signal)] for name, signal in comparison["signals"].items()]
    header = ["signal", "ROC area [95 %]", "warned / judged", "median lead", "false alarms", "controls alarmed"]
    counts = (
        f"{comparison['events']} events ({comparison['positive_windows']} windows), {comparison['controls']} control "
        f"runs ({comparison['negative_windows']} windows)."
    )
    lines = [title, "", counts, "", *_table(header, rows)]
    if comparison["stretch"] != "near":
        return lines
    differences = [
        [f"{_NAMES[name]} - {_NAMES[rival]}", _with_interval(item["difference"], item["interval"], "+.3f")]
        for name, signal in comparison["signals"].items()
        for rival, item in signal.get("differences", {}).items()
    ]
    return [*lines, "", *_table(["difference of areas", "[95 %]"], differences)]


def _signal_name(name: str) -> str:
    base = name.removesuffix("_change")
    return _NAMES[base] + (", change" if base != name else "")


def _signal_cells(signal: Mapping[str, Any]) -> list[str]:
    alarms = signal["alarms"]
    return [
        _with_interval(signal["area"], signal["interval"], ".3f"),
        f"{alarms['warned']} / {alarms['judged']}",
        f"{median(alarms['lead_times']):g}" if alarms["lead_times"] else "-",
        _percent(alarms["false_share"]),
        _percent(alarms["chance"]),
    ]


def _with_interval(value: float | None, limits: Sequence[float] | None, form: str) -> str:
    if value is None:
        return "-"
    shown = "no interval" if limits is None else f"{limits[0]:{form}}, {limits[1]:{form}}"
    return f"{value:{form}} [{shown}]"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
