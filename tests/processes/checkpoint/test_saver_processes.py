"""The saver in processes that fail or are killed, and the memory that writing takes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mlra_scale.checkpoint import Store, complete_checkpoints, latest, write_safetensors
from tests.unit.checkpoint.builders import all_parts
from tests.unit.checkpoint.test_saver import engine_of, hidden, save, saver_of, visible

ROOT = Path(__file__).resolve().parents[3]

FAILING_PROCESS = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from mlra_scale.checkpoint import failpoints
from tests.unit.checkpoint.test_saver import engine_of, save, saver_of

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
failpoints.reached = lambda point: time.sleep(600) if point == "mid-file" else None
save(saver_of(Path(sys.argv[1]), dist.group.WORLD), engine_of(dist.group.WORLD), 1)
raise RuntimeError("training failed")
"""


def test_a_failed_process_ends_although_a_save_is_in_flight(tmp_path: Path) -> None:
    result = run_python(FAILING_PROCESS, str(tmp_path), timeout=60)
    # Seldom the process aborts on its way out, where the end of Python finds the writing thread in native code.
    assert result.returncode in (1, -signal.SIGABRT) and "training failed" in result.stderr
    assert visible(tmp_path) == []


KILLED_PROCESSES = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
from mlra_scale.checkpoint import failpoints
from tests.unit.checkpoint.test_saver import engine_of, save, saver_of

def train(folder, where, step):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    saver = saver_of(folder, dist.group.WORLD, keep_last=2)
    for earlier in (1, 2):
        save(saver, engine_of(dist.group.WORLD, float(earlier)), earlier)
    saver.finish()
    failpoints.reached = lambda point: os._exit(9) if point == where else None
    save(saver, engine_of(dist.group.WORLD, 100.0 + step), step)
    saver.finish()

codes = {}
for point in failpoints.FAILPOINTS:
    for step in (2, 3):
        child = os.fork()
        if child == 0:
            try:
                train(Path(sys.argv[1], f"{point}-{step}"), point, step)
            finally:
                os._exit(0)
        codes[f"{point}-{step}"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


def test_killed_at_every_point(tmp_path: Path, one_process: Any) -> None:
    """Whenever it dies, saving a new step or an earlier one anew: there is a complete checkpoint, and a next save."""
    result = run_python(KILLED_PROCESSES, str(tmp_path), timeout=120)
    codes = json.loads(result.stdout)
    # Replacing step 2 removes nothing by retention: two checkpoints stay.
    assert [name for name, code in codes.items() if code != 9] == ["retention-2"]
    for name in codes:
        point, step = name.rsplit("-", 1)
        folder = tmp_path / name
        complete = complete_checkpoints(folder)
        assert len(complete) >= 2, name
        assert all(Store.open(path).verify() == [] for path in complete)
        is_new = point in ("before-latest", "retention")
        assert complete[-1].name == f"step-0000000{step if is_new else 2}", name
        newest = float(
            Store.open(complete[-1]).tensor("final_norm.bias")[0] - all_parts()["weight"]["final_norm.bias"][0]
        )
        assert newest == pytest.approx(100.0 + int(step) if is_new else 2.0, abs=1e-4)
        assert latest(folder) in complete
        saver = saver_of(folder, one_process, keep_last=1)
        save(saver, engine_of(one_process), 4)
        saver.finish()
        assert visible(folder) == ["latest", "step-00000004"] and hidden(folder) == []


def run_python(code: str, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


@contextmanager
def growth_below(limit: int) -> Iterator[None]:
    """Fails if the process's memory was at some time this much above what it is now."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = memory("VmRSS:")
    yield
    assert memory("VmHWM:") - before < limit


def test_a_file_is_written_with_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """400 MB from tensors that are made when they are asked for, and from one that lives."""
    numel = 10**7
    names = [f"t{number}" for number in range(10)]
    with growth_below(56 * 2**20):
        made = ((name, torch.zeros(numel)) for name in names)
        entry = write_safetensors(tmp_path / "a", dict.fromkeys(names, (torch.float32, (numel,))), made, {})
    assert entry.bytes > 40 * numel
    whole = torch.ones(10 * numel)
    with growth_below(16 * 2**20):
        write_safetensors(tmp_path / "b", {"t": (torch.float32, (10 * numel,))}, [("t", whole)], {})
