"""Ratios measured in one run, each printing what it compared and on what: `python -m benchmarks.step_time`."""

import os
import sys
import warnings

# Before DeepSpeed and Megatron are imported: the one would look for an accelerator and say that there is none, the
# other tells which optional kernels are not installed.
wants_cpu = "--device=cpu" in sys.argv or ("--device", "cpu") in zip(sys.argv, sys.argv[1:], strict=False)
if "DS_ACCELERATOR" not in os.environ:
    # Not at the top: where the choice is made already, benchmarks.check does without torch, as slurm/check.sh must.
    import torch

    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() and not wants_cpu else "cpu"
warnings.filterwarnings("ignore", module=r"(deepspeed|megatron|torch)\b")
