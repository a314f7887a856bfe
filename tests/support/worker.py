"""What a rank of a test pool does: run functions one after another, each in a fresh process group and clean globals.

Nothing here imports torch at module level: the environment of the process has to be set first.
"""

import gc
import os
import pickle
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import _lru_cache_wrapper
from typing import Any

from benchmarks.ranks import Failed


@dataclass
class Frozen:
    """What the collector no longer walks through."""

    num_modules: int = 0  # modules that were loaded at the last freeze
    # DeepSpeed's methods with a cache among it: they keep engines, and a search for them would miss them.
    caches: list[Any] = field(default_factory=list)


_FROZEN = Frozen()


@dataclass(frozen=True)
class Call:
    """One function to call on every rank; ``payload`` is the pickled function and tuple of its arguments."""

    number: int
    payload: bytes
    search_path: tuple[str, ...]


def serve_calls(calls: Iterator[Call], group_timeout: float) -> Iterator[Any]:
    """Answers when it is ready, then twice for each call: its pickled result, and when all that it left is gone."""
    import torch.distributed as dist

    timeout = timedelta(seconds=group_timeout)
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    environment, directory = dict(os.environ), os.getcwd()
    yield "ready"
    for call in calls:
        yield _run(call, dist.PrefixStore(f"call{call.number}", store), timeout)
        _tear_down()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        yield "clean"


def _run(call: Call, store: Any, timeout: timedelta) -> Any:
    import torch
    import torch.distributed as dist

    print(f"--- call {call.number}", flush=True)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        sys.path[:] = call.search_path
        function, arguments = pickle.loads(call.payload)
        _freeze_libraries()
        torch.manual_seed(0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        # A rank that closes its sockets while another one still connects makes that one fail.
        dist.barrier()
        # Pickled here: an engine that the result refers to would outlive _tear_down.
        return pickle.dumps(function(rank, world_size, *arguments))
    except Exception as error:
        text = traceback.format_exc()
        traceback.clear_frames(error.__traceback__)
        return Failed(text)


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
