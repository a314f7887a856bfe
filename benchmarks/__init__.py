"""Ratios measured in one run, each printing what it compared and on what: `python -m benchmarks.step_time`."""

import os
import sys
import warnings

import torch

# Before DeepSpeed and Megatron are imported: the one would look for an accelerator and say that there is none, the
# other tells which optional kernels are not installed.
wants_cpu = "--device=cpu" in sys.argv or ("--device", "cpu") in zip(sys.argv, sys.argv[1:], strict=False)
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() and not wants_cpu else "cpu")
warnings.filterwarnings("ignore", module=r"(deepspeed|megatron|torch)\b")
