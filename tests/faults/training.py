"""A short training, what must be true of its run directory at any trigger, and what at its end."""

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mlra_scale.checkpoint import Store
from mlra_scale.checkpoint.retention import newest_complete
from tests.support.stored import assert_bitwise_equal, store_of
from tests.support.training_runs import curve, events, metrics

SMALL = ["model.num_layers=2", "model.hidden_size=32", "train.sequence_length=32", "evaluation.every=0", "tev.every=0"]
SMALL += ["train.log_every=1", "parallel.timeout_minutes=1"]
SMALL += [f"model.{site}_dropout=0.1" for site in ("embedding", "attention", "residual")]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single": (1, []),
    "pipeline2": (2, ["parallel.pipeline=2"]),
    "zero1-dp2": (2, ['deepspeed={"zero_optimization": {"stage": 1}}']),
    "zero3-dp2": (2, ['deepspeed={"zero_optimization": {"stage": 3}}']),
    "tp2pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "zero3-tp2dp2": (4, ["parallel.tensor=2", 'deepspeed={"zero_optimization": {"stage": 3}}']),
}
CLOCK = ("seconds", "tokens_per_second", "memory_gib", "mfu", "measuring_seconds", "step_seconds")
"""What the record holds of the clock and the machine."""
CURVES = ("loss", "gradient_norm", "learning_rate", "consumed_samples")


@dataclass(frozen=True)
class Training:
    """One training, to be run in several directories.

    Attributes:
        data: A prepared data set for the debug preset.
        layout: One of LAYOUTS.
        steps: train.steps.
        every: checkpoint.every.
        keep_last: checkpoint.keep_last.
        precision: train.precision.
        more: Further overrides.
    """

    data: Path
    layout: str
    steps: int
    every: int
    keep_last: int = 2
    precision: str = "fp32"
    more: tuple[str, ...] = ()

    @property
    def num_ranks(self) -> int:
        return LAYOUTS[self.layout][0]

    def arguments(self, run: Path, resume: bool = False) -> list[str]:
        """The command line of a start."""
        fixed = ["--preset", "debug", "--run-dir", str(run), f"data.path={self.data}", f"train.steps={self.steps}"]
        fixed += [f"checkpoint.every={self.every}", f"checkpoint.keep_last={self.keep_last}"]
        fixed += [f"train.precision={self.precision}"]
        return [*fixed, *SMALL, *LAYOUTS[self.layout][1], *self.more, *(["--resume", "auto"] if resume else [])]


def reported_checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoints that the run said were complete."""
    if not (run / "events.jsonl").exists():
        return []
    return [event["step"] for event in events(run) if event["event"] == "checkpoint"]


def assert_way_back(run: Path) -> int:
    """Fails unless what was reported as complete is there and sound.

    Returns:
        The step of the newest complete checkpoint; 0 where none was reported and none is there.
    """
    newest = newest_complete(run / "checkpoints")
    reported = reported_checkpoints(run)
    if newest is None:
        assert not reported, f"checkpoints {reported} were reported, and none is complete"
        return 0
    store = Store.open(newest)
    assert store.verify() == []
    assert not reported or store.step >= reported[-1], (
        f"checkpoint {reported[-1]} was reported, the newest is {store.step}"
    )
    return store.step


def assert_visible_is_whole(run: Path) -> None:
    """Fails if a checkpoint under its own name is incomplete, or a line of the record, but for the last, is torn."""
    for folder in sorted((run / "checkpoints").glob("step-*")):
        assert Store.open(folder).verify() == [], folder
    for name in ("metrics.jsonl", "events.jsonl", "rolled_back.jsonl"):
        lines = (run / name).read_bytes().split(b"\n")[:-1] if (run / name).exists() else []
        for line in lines:
            json.loads(line)


def timeless(run: Path) -> list[dict[str, Any]]:
    """The whole record of a run, measurements included, but for what depends on the clock."""
    return [{key: value for key, value in record.items() if key not in CLOCK} for record in metrics(run)]


def assert_as_undisturbed(run: Path, undisturbed: Path, steps: int) -> None:
    """Fails unless record and last checkpoint are those of the undisturbed run, bit by bit, each step once."""
    recorded = [record["step"] for record in metrics(run) if "loss" in record]
    assert recorded == list(range(1, steps + 1)), recorded
    for name in CURVES:
        assert curve(run, name) == curve(undisturbed, name), name
    for mine, theirs in zip_longest(timeless(run), timeless(undisturbed)):
        assert mine == theirs, f"{mine}\nis recorded, and undisturbed\n{theirs}"
    assert_bitwise_equal(store_of(run, steps), store_of(undisturbed, steps))
    hidden = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert hidden == [], f"left over: {hidden}"
