"""Processes of torchrun write to the files that logs.py names."""

import json
import os
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import start_processes

from mlra_scale.cluster.node.logs import RankLogs

RANK = """
import os, sys
os.dup2(1, 2)
print("out", os.environ["LOCAL_RANK"], flush=True)
print("error", os.environ["LOCAL_RANK"], file=sys.stderr, flush=True)
open(os.environ["TORCHELASTIC_ERROR_FILE"], "w").write(sys.argv[1])
sys.exit(int(os.environ["LOCAL_RANK"]))
"""


@pytest.mark.usefixtures("own_handlers")
def test_processes_of_torchrun_write_there(tmp_path: Path) -> None:
    """In order, and merged on the console with the rank in front."""
    left = {"message": {"message": "broken", "extraInfo": {"timestamp": 5}}}
    context = start_processes(
        name="rank",
        entrypoint=sys.executable,
        args={number: ("-c", RANK, json.dumps(left)) for number in range(2)},
        envs={number: {"LOCAL_RANK": str(number), "PATH": os.environ["PATH"]} for number in range(2)},
        logs_specs=RankLogs(tmp_path, 4),
        log_line_prefixes={0: "[4] ", 1: "[5] "},
        start_method="spawn",
    )
    try:
        result = context.wait(timeout=30)
        while result is None:
            result = context.wait(timeout=30)
    finally:
        context.close()
    names = {f"rank-0000{rank}.{kind}" for rank in (4, 5) for kind in ("log", "error.json")}
    assert {path.name for path in tmp_path.iterdir()} == names, "by global rank, and no folders of torchrun's own"
    for number in range(2):
        text = (tmp_path / f"rank-{4 + number:05d}.log").read_text()
        assert text == f"out {number}\nerror {number}\n"
    assert [*result.failures] == [1] and result.failures[1].exitcode == 1
    assert result.failures[1].message == left["message"] and result.failures[1].timestamp == 5
