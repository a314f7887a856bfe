"""What the fork server imports once for all ranks that are forked from it."""

import importlib
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

from mlra_scale.training.log.console import silence_libraries

# Before the modules below, which import DeepSpeed.
silence_libraries("cpu")
for name in ("start.agreement", "loop.trainer"):
    importlib.import_module(f"mlra_scale.training.{name}")
importlib.import_module("mlra_scale.train")
# The first step of an optimizer loads it.
importlib.import_module("torch._dynamo")
