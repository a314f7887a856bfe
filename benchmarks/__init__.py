"""Ratios measured in one run, each printing what it compared and on what: `python -m benchmarks.step_time`."""

import os
import warnings

import torch

# Before DeepSpeed and Megatron are imported: the one would look for an accelerator and say that there is none, the
# other tells which optional kernels are not installed.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
warnings.filterwarnings("ignore", module=r"(deepspeed|megatron|torch)\b")
