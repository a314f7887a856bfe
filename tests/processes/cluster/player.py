"""A stand-in for srun, which starts one process per node that plays the node's agent.

A play is a few lines of Python that call the functions below.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mlra_scale.cluster.channel import TOKEN_VARIABLE, Heard, Hub, Link, host_and_port

PLAYS_VARIABLE = "TEST_PLAYS"
RECORD_VARIABLE = "TEST_RECORD"
CHECK_VARIABLE = "TEST_CHECK"
SRUN = f"#!{sys.executable} -S\nimport sys\nfrom tests.processes.cluster.player import main\nsys.exit(main())\n"
"""The program srun."""
_LONGEST = 40


def rank(number: int, step: int = 3, phase: str = "training", seconds: float = 0.0) -> dict[str, Any]:
    """A rank as an agent reports it."""
    heartbeat = {"rank": number, "local_rank": 0, "pid": 1000 + number, "phase": phase, "step": step}
    heartbeat |= {"seconds": seconds, "location": "all_reduce (x.py:1)"}
    return {"heartbeat": heartbeat, "silence": 0.0, "state": "sleeping"}


def failure(number: int | None, code: int, at: float = 0.0, message: str = "") -> dict[str, Any]:
    """How a rank ended."""
    return {"rank": number, "code": code, "time": at, "message": message}


class QuickHub(Hub):
    """Waits for news, and for more of them after the end, for a fifth of the time."""

    def poll(self, seconds: float) -> list[Heard]:
        """See Hub."""
        return super().poll(seconds / 5)


class Player:
    """The agent of one node.

    Args:
        command: That srun was asked to run.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.name = os.environ["SLURMD_NODENAME"]
        # Not parsed by the agent's own parser: importing less makes the tests faster.
        options = dict(
            argument[2:].split("=", 1) for argument in command if argument.startswith("--") and "=" in argument
        )
        self.job, self.run_id, self.logs = options["job"], options["run-id"], Path(options["logs"])
        self.num_nodes, self.is_spare = int(options["nodes"]), "--spare" in command
        self._orders: list[str] = []
        self.link: Link

    def connect(self, name: str | None = None, **versions: str) -> Link:
        """Greets the job."""
        host, port = host_and_port(self.job)
        greeting = {"node": name or self.name, "token": os.environ[TOKEN_VARIABLE], "versions": versions}
        link = Link(host, port, greeting)
        if name is None:
            self.link = link
        return link

    def meet(self, where: str) -> None:
        """Waits until all nodes are there."""
        folder = os.environ[RECORD_VARIABLE]
        with open(f"{folder}/{self.name}.{where}", "w", encoding="ascii"):
            pass
        while sum(name.endswith(f".{where}") for name in os.listdir(folder)) < self.num_nodes:
            time.sleep(0.01)

    def join(self, **versions: str) -> None:
        """Greets the job, and waits until all nodes have."""
        self.connect(**versions)
        self.meet("here")

    def report(self, *ranks: dict[str, Any]) -> None:
        """Tells what the ranks do."""
        self.link.send({"ranks": ranks})

    def end(self, *failures: dict[str, Any]) -> None:
        """Tells how the ranks ended, and ends."""
        self.link.send({"failures": failures})
        self.link.close()
        sys.exit(1 if failures else 0)

    def wait_for(self, order: str) -> None:
        """Waits for an order, and notes it with its time."""
        while order not in self._orders:
            self._orders += [message["order"] for message in self.link.receive()]
            assert self.link.is_open or order in self._orders, "the job is gone"
            time.sleep(0.01)
        path = f"{os.environ[RECORD_VARIABLE]}/{self.name}.orders"
        with open(path, "a", encoding="ascii") as file:
            file.write(f"{order} {time.monotonic()}\n")

    def wait_to_begin(self) -> None:
        """Waits as a spare's agent does, and ends where the job says so."""
        while "begin" not in self._orders:
            if "kill" in self._orders:
                self.end()
            self._orders += [message["order"] for message in self.link.receive()]
            assert self.link.is_open, "the job is gone"
            time.sleep(0.01)

    def obey_kill(self, *ranks: int) -> None:
        """Does what an agent does when the job says so, and ends."""
        self.wait_for("kill")
        self.end(*[failure(number, -signal.SIGKILL, time.time()) for number in ranks])


def play(node: str, number: int, command: Sequence[str]) -> None:
    """Plays the agent of one node."""
    signal.alarm(_LONGEST)
    os.environ |= {"SLURMD_NODENAME": node, "SLURM_PROCID": str(number)}
    names: dict[str, Any] = {"me": Player(command), "rank": rank, "failure": failure}
    exec(json.loads(os.environ[PLAYS_VARIABLE])[node], {**names, "os": os, "sys": sys, "time": time, "signal": signal})


def main() -> int:
    """Does what srun does; returns the highest exit code."""
    first = next(index for index, argument in enumerate(sys.argv) if index > 0 and not argument.startswith("-"))
    options, command = sys.argv[1:first], sys.argv[first:]
    record = {"options": options, "command": command, "environment": dict(os.environ)}
    with open(f"{os.environ[RECORD_VARIABLE]}/srun.json", "w", encoding="ascii") as file:
        json.dump(record, file)
    if "mlra_scale.cluster.check" in command:
        if os.environ.get(CHECK_VARIABLE) == "slow":
            os.kill(int(os.environ["TEST_JOB"]), signal.SIGTERM)
            time.sleep(_LONGEST)
        asked = int(next(word for word in command if word.startswith("--nodes=")).partition("=")[2])
        said = os.environ.get(CHECK_VARIABLE, "0")
        if said == "silent":
            return 1
        if said == "2" or (said == "too few" and asked < 2):
            result: dict[str, Any] = {"kind": "bad_input", "message": "data.path = None: is required"}
        else:
            is_auto = "parallel.layout=auto" in command
            result = {"plan": "the plan", "overrides": [f"train.micro_batch_size={asked}"] if is_auto else []}
        print(f"what a container says\nresult of the check: {json.dumps(result)}\nwhat it says at its end")
        return 0
    nodes = next(option for option in options if option.startswith("--nodelist=")).split("=", 1)[1].split(",")
    players = []
    for number, node in enumerate(nodes):
        if node in json.loads(os.environ[PLAYS_VARIABLE]):
            if (player := os.fork()) == 0:
                play(node, number, command)
                return 0
            players.append(player)

    def end(number: int, frame: FrameType | None) -> None:
        for player in players:
            with contextlib.suppress(ProcessLookupError):
                os.kill(player, signal.SIGKILL)
        os._exit(143)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if "--test-stubborn" in options else end)
    return max([abs(os.waitstatus_to_exitcode(os.waitpid(player, 0)[1])) for player in players], default=1)


if __name__ == "__main__":
    sys.exit(main())
