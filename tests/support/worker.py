"""What one process of a test pool does: run cases one after another, each in a fresh process group and clean globals.

Nothing here imports torch at module level: the environment of the process has to be set first.
"""

import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from functools import _lru_cache_wrapper
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass
class Frozen:
    """What the collector no longer walks through.

    Attributes:
        num_modules: Modules that were loaded at the last freeze.
        caches: DeepSpeed's methods with a cache among it: they keep engines, and a search for them would miss them.
    """

    num_modules: int = 0
    caches: list[Any] = field(default_factory=list)


_FROZEN = Frozen()


@dataclass(frozen=True)
class WorkerPlan:
    """Everything a worker has to know at its start."""

    rank: int
    world_size: int
    store_port: int
    group_timeout: float
    log_path: Path
    parent_pid: int


@dataclass(frozen=True)
class Case:
    """One function to call on every rank; ``payload`` is the pickled tuple of its arguments."""

    number: int
    module: str
    function: str
    payload: bytes
    search_path: tuple[str, ...]


def run_worker(plan: WorkerPlan, connection: Connection) -> None:
    """Serves cases until the connection closes.

    It sends ("ready", None) once, then for each case ("result", bytes) or ("error", text), followed by ("idle", None)
    when everything the case left behind is gone, or ("unclean", text) when that failed.
    """
    _leave_with_parent(plan.parent_pid)
    _redirect_output(plan.log_path)
    os.environ.update(
        RANK=str(plan.rank),
        LOCAL_RANK=str(plan.rank),
        WORLD_SIZE=str(plan.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(plan.store_port),
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=plan.group_timeout)
    store = dist.TCPStore("127.0.0.1", plan.store_port, is_master=False, timeout=timeout)
    environment, directory = dict(os.environ), os.getcwd()
    connection.send(("ready", None))
    while True:
        try:
            case: Case = connection.recv()
        except EOFError:
            # Interpreter shutdown may wait for threads of a library; nothing is left to save.
            os._exit(0)
        connection.send(_run_case(case, plan, store, timeout))
        try:
            _tear_down()
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(directory)
        except Exception:
            connection.send(("unclean", traceback.format_exc()))
        else:
            connection.send(("idle", None))


def _run_case(case: Case, plan: WorkerPlan, store: Any, timeout: timedelta) -> tuple[str, Any]:
    import torch
    import torch.distributed as dist

    print(f"--- case {case.number}: {case.module}.{case.function}", flush=True)
    try:
        sys.path[:] = case.search_path
        function: Any = importlib.import_module(case.module)
        for part in case.function.split("."):
            function = getattr(function, part)
        arguments = pickle.loads(case.payload)
        _freeze_libraries()
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"case{case.number}", store),
            rank=plan.rank,
            world_size=plan.world_size,
            timeout=timeout,
        )
        # A rank that closes its sockets while another one still connects makes that one fail.
        dist.barrier()
        # Tensors travel by value: multiprocessing's own pickler would hand out file descriptors of this process.
        return "result", pickle.dumps(function(plan.rank, plan.world_size, *arguments))
    except BaseException as error:
        text = traceback.format_exc()
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            raise
        return "error", text


def _freeze_libraries() -> None:
    """Takes the libraries out of what a collection walks through: they stay, and are most of it.

    Only where there are new ones, and after a collection: what is frozen is never collected, nor found by _tear_down.
    """
    if len(sys.modules) == _FROZEN.num_modules:
        return
    gc.unfreeze()
    gc.collect()
    _FROZEN.caches = [thing for thing in gc.get_objects() if _is_cache_of_deepspeed(thing)]
    _FROZEN.num_modules = len(sys.modules)
    gc.freeze()


def _is_cache_of_deepspeed(thing: Any) -> bool:
    return type(thing) is _lru_cache_wrapper and str(thing.__module__).startswith("deepspeed.")


def _tear_down() -> None:
    """Removes process groups and the libraries' process-wide state, so that any other layout can follow.

    Only libraries that the case has imported are touched, so that light cases stay light.
    """
    import torch
    import torch.distributed as dist

    # Engines sit in reference cycles and may have switched the collector off.
    gc.enable()
    gc.collect()
    _destroy_engines()
    _reset_deepspeed()
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.set_num_threads(1)
    gc.collect()


def _destroy_engines() -> None:
    """Destroys the engines that a case has left behind.

    Their hooks hang on autograd nodes, where the collector does not see the cycles that they close, and methods with
    a cache keep their objects: without this, engines, parameters and process groups live as long as the process.
    """
    engine_module = sys.modules.get("deepspeed.runtime.engine")
    if engine_module is None:
        return
    from deepspeed.runtime.utils import OutputBackwardHookManager

    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, engine_module.DeepSpeedEngine):
            # One that outlives its own case (somebody still holds it) must not be destroyed twice.
            if not vars(thing).get("_destroyed_by_pool"):
                vars(thing)["_destroyed_by_pool"] = True
                thing.destroy()
        elif kind is OutputBackwardHookManager:
            thing.remove_hooks()
        elif _is_cache_of_deepspeed(thing):
            thing.cache_clear()
    for cache in _FROZEN.caches:
        cache.cache_clear()


def _reset_deepspeed() -> None:
    """Puts DeepSpeed's module-level variables, and what it has replaced in torch, back to what they are at its import.

    zero.Init replaces torch's linear map by one whose backward pass rounds otherwise, for the rest of the process.
    """
    partitioning = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if partitioning is not None:
        import torch

        replaced = partitioning.InsertPostInitMethodToModuleSubClasses
        torch.nn.functional.linear = getattr(replaced, "linear_bk", torch.nn.functional.linear)
    pristine: dict[str, dict[str, Any]] = {
        "deepspeed.comm.comm": {"cdb": None},
        "deepspeed.runtime.pipe.p2p": {"_groups": None, "_grid": None, "_async": []},
        "deepspeed.runtime.activation_checkpointing.checkpointing": {
            "mpu": None,
            "mp_rank": 0,
            "mp_size": 1,
            "mp_group": None,
            "num_layers": None,
            "deepspeed_checkpointing_enabled": False,
            "PARTITION_ACTIVATIONS": False,
            "CPU_CHECKPOINT": False,
            "CONTIGUOUS_CHECKPOINTING": False,
            "contiguous_data_buffers": [],
            "data_offsets": [],
            "contiguous_size_buffers": [],
            "size_offsets": [],
            "_cpu_offload_engine": None,
        },
        "deepspeed.runtime.zero.partition_parameters": {
            "zero_init_context": 0,
            "top_level_context": None,
            "temp_contiguous_tensor": None,
            "empty_buffers": {},
        },
        "deepspeed.runtime.torch_autocast": {"TORCH_AUTOCAST_INITIALIZED": False, "TORCH_AUTOCAST_DTYPE": None},
    }
    partitioning = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if partitioning is not None and partitioning.zero_init_context:
        # A case that failed inside zero.Init leaves torch.nn.Module patched.
        partitioning.shutdown_init_context()
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if offload is not None:
        offload.FWD_MODULE_STACK.clear()
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        groups._release_process_group_references()
    for module_name, values in pristine.items():
        module = sys.modules.get(module_name)
        for name, value in values.items() if module is not None else ():
            if not hasattr(module, name):
                raise RuntimeError(f"{module_name}.{name} is gone: revise tests/support/worker.py for this DeepSpeed")
            setattr(module, name, value)


def _leave_with_parent(parent_pid: int) -> None:
    """Makes this process a group of its own (so that its children can be killed with it) that dies with its parent."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def _redirect_output(path: Path) -> None:
    """Sends everything printed, also by native code, to a file, and makes SIGUSR1 write the stacks of all threads."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
