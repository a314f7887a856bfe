"""Ranks wait at the latch until the node's agent opens it, and end with the agent."""

import subprocess
import sys

RANK = """
import sys
from mlra_scale.cluster.rank.latch import take_latch, wait_at_latch
wait_at_latch(take_latch())
print("in:", sys.stdin.read())
"""
AGENT = f"""
import subprocess, sys, time
from mlra_scale.cluster.rank.latch import Latch
latch = Latch(2)
latch.become_standard_input()
ranks = [subprocess.Popen([sys.executable, "-c", {RANK!r}], stdout=subprocess.PIPE, text=True) for _ in range(2)]
if sys.argv[1] == "end":
    sys.exit("ended")
if sys.argv[1] == "late":
    time.sleep(1.5)
    print([rank.poll() for rank in ranks])
for _ in range(2):
    latch.open()
print([rank.communicate()[0] for rank in ranks], [rank.returncode for rank in ranks])
"""


def outcome(when: str) -> tuple[str, str]:
    """What an agent and its ranks print."""
    command = [sys.executable, "-c", AGENT, when]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout, done.stderr


def test_ranks_wait_until_the_latch_opens_and_then_have_no_input() -> None:
    passed = "['in: \\n', 'in: \\n'] [0, 0]\n"
    assert outcome("late")[0] == f"[None, None]\n{passed}"
    assert outcome("early")[0] == passed, "one that opens before they come is open"


def test_ranks_end_with_their_agent() -> None:
    _, errors = outcome("end")
    assert errors.count("the node's agent has ended") == 2 and "Traceback" not in errors
