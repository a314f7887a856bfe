"""Calls a function of a module of this folder in a process of its own, with a time-out.

Each contender of benchmarks/gpu.py has the device's memory for itself, and one that does not fit ends alone.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.contenders import Shape, one_process_mesh
from benchmarks.processes import CommandFailed, run_command

MOST_CPU_THREADS = 8


def run_child(
    device: str, function: str, shape: Shape, arguments: Mapping[str, Any], file: Path, timeout_s: float
) -> None:
    """Calls function(shape, topology, **arguments) in a process of its own.

    Args:
        device: "cpu" or "cuda".
        function: As "module.name", of this folder. It returns tensors by name, or JSON values.
        shape: A model.
        arguments: JSON values.
        file: Where the result goes: safetensors or JSON.
        timeout_s: Seconds that it may take.

    Raises:
        CommandFailed: It failed, took too long, or did not write its file.
    """
    text = json.dumps([asdict(shape), dict(arguments)])
    command = [sys.executable, "-m", "benchmarks.child", device, function, text, str(file)]
    environment = {**os.environ, "DS_ACCELERATOR": device}  # instead of what the caller, on a GPU, chose for itself
    name = f"{function.partition('.')[2]} of {arguments.get('name', shape.name)}"
    run_command(name, command, environment, timeout_s)
    if not file.exists():
        raise CommandFailed(f"{name}: it wrote no result")


def main(device: str, function: str, text: str, file: str) -> int:
    """Does what `run_child` asks for."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(min(MOST_CPU_THREADS, len(os.sched_getaffinity(0))))
    shape, arguments = json.loads(text)
    module, name = function.split(".")
    with one_process_mesh(device) as topology:
        found = getattr(import_module(f"benchmarks.{module}"), name)(Shape(**shape), topology, **arguments)
    if all(isinstance(value, torch.Tensor) for value in found.values()):
        save_file(found, file)
    else:
        Path(file).write_text(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
