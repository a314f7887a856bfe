"""The devices of a start and the launcher's environment. torch is imported where a device is looked at, not before.

What CUDA's libraries read from the environment must be set before the first call that creates a CUDA context, such as
torch.cuda.set_device: a node's agent sets it for its ranks, and mlra_scale.train before it looks at the device.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from mlra_scale.config import Config, ConfigError, Problem, offload_optimizer
from mlra_scale.planning.cluster import cluster_of_device

_LONGEST_BUILD_SECONDS = 1800.0


@dataclass(frozen=True)
class Launcher:
    """The position of this process among those of its launcher, and among those on this node (None: not set)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launcher:
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

        Raises:
            ConfigError: One of them is no whole number, or out of range.
        """
        problems: list[Problem] = []

        def read(name: str, low: int, stop: int | None = None) -> int:
            text = environment.get(name, str(low))
            if text.isdecimal() and int(text) >= low and (stop is None or int(text) < stop):
                return int(text)
            allowed = f"at least {low}" if stop is None else f"from {low} to {stop - 1}"
            remedy = f"must be a whole number, {allowed}; start the processes by torchrun, which sets it, or unset it"
            problems.append(Problem(name, text, remedy))
            return low

        world_size = read("WORLD_SIZE", 1)
        local_world_size = read("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in environment else None
        rank, local_rank = read("RANK", 0, world_size), read("LOCAL_RANK", 0, local_world_size)
        if problems:
            raise ConfigError(problems)
        return cls(rank, world_size, local_rank, local_world_size)


def check_launcher(environment: Mapping[str, str]) -> list[Problem]:
    """Finds a process that srun or mpirun, which do not set torch's variables, started beside others.

    An srun that starts one torchrun per node is right: torchrun sets RANK.
    """
    if "RANK" in environment:
        return []
    for name, launcher in (("SLURM_NTASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")):
        value = environment.get(name, "1")
        if value.isdecimal() and int(value) > 1:
            remedy = (
                f"{launcher} starts {value} processes, each of which would train by itself, for RANK is not set; start "
                "the processes by torchrun (under srun: one torchrun per node, with --ntasks-per-node=1), and a "
                "single process inside such an allocation by torchrun --nproc_per_node 1"
            )
            return [Problem(name, value, remedy)]
    return []


@dataclass(frozen=True)
class Devices:
    """The devices of a start, one per rank.

    Attributes:
        number: Of all of them.
        per_node: Of a node; None: as many as the planner's cluster has, if they divide the ranks.
        kind: `cuda` or `cpu`.
        name: What the driver calls them; None: unknown here.
        memory: Bytes of one; None: unknown here.
    """

    number: int
    per_node: int | None
    kind: str
    name: str | None = None
    memory: float | None = None

    def is_known(self) -> bool:
        """Returns whether the planner has constants for them."""
        return self.name is not None and cluster_of_device(self.name) is not None


def devices_elsewhere(config: Config, world_size: int, per_node: int | None = None) -> Devices:
    """Returns the devices of a start that is planned on another machine: GPUs unless a field says cpu."""
    is_cpu = config.train.device == "cpu" or (config.train.device == "auto" and config.cluster.device == "cpu")
    return Devices(world_size, per_node, "cpu" if is_cpu else "cuda")


def devices_here(number: int, kind: str, per_node: int | None = None) -> Devices:
    """Returns the devices of a start of which one is on this machine; `per_node` None: as the launcher says."""
    launcher = Launcher.of(os.environ)
    per_node = per_node or launcher.local_world_size
    if kind == "cpu":
        return Devices(number, per_node, kind, memory=memory_of_node() / (per_node or number))
    import torch

    if launcher.local_rank >= torch.cuda.device_count():
        return Devices(number, per_node, kind)  # reported by check_device
    properties = torch.cuda.get_device_properties(launcher.local_rank)
    return Devices(number, per_node, kind, properties.name, float(properties.total_memory))


def resolve_device(config: Config) -> str:
    """Returns `cpu` or `cuda`: `train.device`, or what this machine has."""
    if config.train.device != "auto":
        return config.train.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(config: Config) -> list[Problem]:
    """Finds out whether this process has the device that it needs, and whether DeepSpeed can load its operators."""
    device = resolve_device(config)
    if locked := _locked_operator(config, device):
        return [locked]
    if device == "cpu":
        return []
    import torch

    num_devices, local_rank = torch.cuda.device_count(), Launcher.of(os.environ).local_rank
    if num_devices == 0:
        return [Problem("train.device", config.train.device, "torch sees no GPU here; use train.device=cpu or auto")]
    if local_rank >= num_devices:
        remedy = f"torch sees {num_devices} GPU(s) here and this is local rank {local_rank}; start fewer ranks per node"
        return [Problem("train.device", config.train.device, remedy)]
    # With emulation, the default, torch answers yes for every GPU, and DeepSpeed's kernels then fail or are very slow.
    if config.train.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        return [Problem("train.precision", "bf16", f"{name} has no bf16; use train.precision=fp16 or fp32")]
    return []


def _locked_operator(config: Config, device: str) -> Problem | None:
    """Finds an operator that DeepSpeed builds at its first use, and would wait for: a killed build leaves its lock."""
    operators = ["cpu_adam"] * offload_optimizer(config) + ["deepspeed_shm_comm"] * (device == "cpu")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    for lock in (found for name in operators for found in (*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock"))):
        with contextlib.suppress(OSError):  # it has just been removed
            if time.time() - lock.stat().st_mtime > _LONGEST_BUILD_SECONDS:
                remedy = "is left from a build of a DeepSpeed operator that was killed, and is waited for without end; "
                return Problem("TORCH_EXTENSIONS_DIR", str(lock), remedy + "remove it, unless something compiles there")
    return None


def set_device_environment(
    config: Config, environment: MutableMapping[str, str], is_layout_open: bool = False
) -> set[str]:
    """Sets the variables of CUDA's libraries that are not set already, in a process that has not touched its device.

    With `is_layout_open` the planner, which looks at the device, may still choose tensor parallelism.

    Returns:
        The names of the variables that this has set.
    """
    variables = {}
    if config.parallel.tensor > 1 or is_layout_open:
        # One hardware queue starts kernels in the order of their launch: a sum that is launched before a matrix
        # product then overlaps with it (model/tensor_parallel.py).
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if config.train.deterministic:
        # cuBLAS otherwise chooses among several workspaces, and its sums depend on the choice.
        variables["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    missing = variables.keys() - environment.keys()
    environment.update({name: variables[name] for name in missing})
    return missing


def memory_of_node() -> float:
    """Returns the bytes of memory that this process may use: what a container or a job leaves of the machine's."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits(Path("/"))]
    in_mib = os.environ.get("SLURM_MEM_PER_NODE", "")
    if in_mib.isdecimal() and int(in_mib) > 0:
        limits.append(int(in_mib) * 2**20)
    return float(min(limits))


def _cgroup_limits(root: Path) -> list[int]:
    """Returns the memory limits in bytes of this process's control group (version 2) and of its parents."""
    limits = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
        mounted = root / "sys/fs/cgroup"
        for folder in (mounted / own, *(mounted / own).parents):
            with contextlib.suppress(OSError, ValueError):  # the root has no limit, and `max` is none
                limits.append(int((folder / "memory.max").read_text()))
            if folder == mounted:
                break
    return limits
