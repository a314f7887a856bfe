"""The debug preset's losses to the last digit: a change that should not change the computation must not change one.

Arithmetic order depends on the processor's vector width and on torch, so the file has an entry for each pair that was
run; on any other the losses must agree to rounding. After a change that is meant to change the computation:

    python -m tests.distributed.test_golden
"""

import json
import re
from pathlib import Path

import numpy as np
import torch

from mlra_scale.config import Config, load_config
from tests.distributed.steps import train
from tests.support.layouts import Layout
from tests.support.pool import Pools, WorkerPool

FILE = Path(__file__).with_name("golden_debug.json")
STEPS = 10


def machine() -> str:
    """What the digits depend on besides the code; the vendor is not named where it is Intel.

    Matrix products take other paths on other vendors' processors with the same instructions.
    """
    found = re.search(r"vendor_id\s*: (\S+)", Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"))
    vendor = "" if found is None or found[1] == "GenuineIntel" else f" {found[1]}"
    return f"{torch.backends.cpu.get_cpu_capability()} torch {torch.__version__.split('+')[0]}{vendor}"


def debug_config() -> Config:
    return load_config("debug", overrides=["train.device=cpu", f"train.steps={STEPS}"])


def losses_of(pool: WorkerPool) -> list[float]:
    (record,) = pool.run(train, debug_config(), STEPS)
    return record.losses


def test_the_debug_presets_losses(worker_pool: Pools) -> None:
    golden = json.loads(FILE.read_text())
    losses = losses_of(worker_pool(Layout().world_size))
    if machine() in golden:
        assert losses == golden[machine()]
    # Adam turns rounding noise of the key bias into steps, so that it grows a little over the run.
    np.testing.assert_allclose(losses, next(iter(golden.values())), rtol=1e-5)


if __name__ == "__main__":
    pool = WorkerPool(1)
    FILE.write_text(json.dumps({machine(): losses_of(pool)}, indent=2) + "\n")
    pool.close()
