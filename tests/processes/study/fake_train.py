"""Plays `mlra_scale.train` in a sweep: its files and its ends, at once and without a model. The seed says which end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mlra_scale.config import load_config

DONE, DIVERGED, FAILED, ENDLESS, BAD_INPUT, KILLED, GAVE_UP, STOPPED, STUBBORN = range(1, 10)


def main() -> int:
    run, *overrides = sys.argv[1:]
    folder = Path(run)
    config = load_config("debug", overrides=overrides)
    seed = config.train.seed
    if seed == BAD_INPUT:
        print("mlra_scale.train: bad input\n  data.path = 'nowhere': there is no such folder", file=sys.stderr)
        return 2
    (folder / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    with (folder / "events.jsonl").open("a") as events, (folder / "metrics.jsonl").open("a") as metrics:

        def write(file: object, **values: object) -> None:
            print(json.dumps(values), file=file, flush=True)  # type: ignore[call-overload]

        write(events, event="start", step=0)
        for step in range(config.train.steps + 1):
            write(metrics, step=step, seconds=0.5 * step, tev_mean=0.1, **({"loss": 7.0 - 0.1 * step} if step else {}))
        if seed == DONE:
            write(events, event="finished", steps=config.train.steps)
            return 0
        if seed in (DIVERGED, GAVE_UP):
            write(events, event="stopped", exit_code=3 if seed == DIVERGED else 7, step=3, reason="not finite")
            return 3
        if seed == STOPPED:
            write(events, event="stopped", exit_code=4, step=3, reason="the disk is full")
            return 4
        if seed == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == ENDLESS:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(preempted()))

            def preempted() -> int:
                write(events, event="preempted", exit_code=5)
                return 5

            (folder / "waits").touch()
            time.sleep(60)
        if seed == STUBBORN:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            rank = subprocess.Popen(["sleep", "60"], start_new_session=True)
            (folder / "waits").write_text(f"{rank.pid}\n")
            time.sleep(60)
    raise RuntimeError("no such thing")


if __name__ == "__main__":
    sys.exit(main())
