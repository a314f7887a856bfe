"""The analysis of the study as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

OPTIMIZER_ARMS = ("mlra", "mlra-muon", "mlra-spectron")
OPTIMIZERS_FIGURE = "optimizers-over-rates.png"
"""Arms of H7 and H8, which compare sensitivities between optimizers, and the picture of their losses."""


def as_markdown(result: Mapping[str, Any]) -> str:
    """Returns the analysis as Markdown.

    Args:
        result: From `analysis.analyse`.
    """
    lines = ["# Which techniques combine with low-rank attention?", ""]
    lines += [f"- {name}: {_about(study)}" for name, study in result["studies"].items()]
    lines += ["", f"Seeds {', '.join(map(str, result['seeds']))}; of the screening 1.", "", "## Hypotheses", ""]
    header = ["", "first - second", "expected", "difference", "95 % interval", "n", "Holm's p", "verdict"]
    lines += table(header, [_hypothesis(item) for item in result["hypotheses"]])
    lines += ["", "Best losses at the rate that is best by the mean of the other seeds, as first planned:", ""]
    rows = [[name, number(item["value"], "+.4f"), _ends(item)] for name, item in result["left_out"].items()]
    lines += table(["", "difference", "95 % interval"], rows)
    figure = f"![{_FIGURE_TEXT}]({OPTIMIZERS_FIGURE})"
    lines += ["", "## Loss over rate of the arms of H7 and H8", "", _CAUTION, "", figure, ""]
    lines += _by_rate({arm: result["arms"][arm] for arm in OPTIMIZER_ARMS}, with_best=False)
    lines += ["", "## All rates, validation loss", "", *_by_rate(result["arms"], with_best=False)]
    lines += ["", "## Values, mean over seeds and 95 % interval", "", *_values(result["arms"])]
    lines += ["", "## Screening, validation loss of one seed", "", *_by_rate(result["screening"], with_best=True)]
    return "\n".join([*lines, ""])


_FIGURE_TEXT = "Validation loss over the learning rate, a line for each arm of H7 and H8"
_CAUTION = """A learning rate does not mean the same for different optimizers, so that a difference of sensitivities
may be one of where the best rate lies between the ends of the sweep. H7 and H8 alone support no claim about
stability."""


def _about(study: Mapping[str, Any]) -> str:
    known = [f"{name} {study[name]}" for name in ("commit", "started", "ended") if study.get(name)]
    return ", ".join([*known, " ".join(study.get("command") or [])]) if known else "not recorded"


def _hypothesis(item: Mapping[str, Any]) -> list[str]:
    what = item["quantity"] + (f" {item['depth']}" if item["quantity"] == "loss at depth" else "")
    return [
        item["name"],
        f"{what}: {item['first']} - {item['second']}",
        item["sign"],
        number(item["value"], "+.4f"),
        _ends(item),
        str(item["n"]),
        number(item["adjusted_p"], ".2g"),
        item["verdict"],
    ]


def _ends(item: Mapping[str, Any]) -> str:
    return "-" if item["low"] is None else f"{item['low']:+.4f} to {item['high']:+.4f}"


def _by_rate(arms: Mapping[str, Any], with_best: bool) -> list[str]:
    rates = sorted({rate for arm in arms.values() for rate in arm["losses"]}, key=float)
    rows = [[name, *(number(arm["losses"].get(rate), ".3f") for rate in rates)] for name, arm in arms.items()]
    if with_best:
        rows = [[*row, number(arm["best_rate"], "g")] for row, arm in zip(rows, arms.values(), strict=True)]
        return table(["", *rates, "best rate"], rows)
    others = [[str(arm["diverged"]), str(arm["missing"])] for arm in arms.values()]
    rows = [[*row, *more] for row, more in zip(rows, others, strict=True)]
    return table(["", *rates, "diverged", "missing"], rows)


def _values(arms: Mapping[str, Any]) -> list[str]:
    names = list(dict.fromkeys(name for arm in arms.values() for name in arm["values"]))
    rows = [[arm, *(_mean(found["values"].get(name)) for name in names)] for arm, found in arms.items()]
    return table(["", *names], rows)


def _mean(value: Mapping[str, Any] | None) -> str:
    if value is None or value["value"] is None:
        return "-"
    return f"{value['value']:.3f}" + ("" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]")


def number(value: float | None, form: str) -> str:
    """Returns a number in a format; "-" for None."""
    return "-" if value is None else f"{value:{form}}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table."""
    return ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]]
