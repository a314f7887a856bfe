"""What a start does before and while it touches its device, on machines as those with GPUs are."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mlra_scale.config import load_config
from mlra_scale.parallel.network import interface_towards, set_gloo_interface
from mlra_scale.training.start.device import set_device_environment

BEFORE_CUDA = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG")

# Notes what CUDA would read at each question to the device; the questions themselves are answered as ever.
WATCHED_START = """
import json, os, sys, torch
from mlra_scale import train
seen = []

def watch(name):
    ask = getattr(torch.cuda, name)

    def answer(*arguments, **options):
        seen.append([name, *(os.environ.get(variable) for variable in json.loads(sys.argv[1]))])
        return ask(*arguments, **options)

    setattr(torch.cuda, name, answer)

for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_name", "set_device",
             "is_bf16_supported", "_lazy_init"):
    watch(name)
code = train.main(sys.argv[2:])
print(json.dumps([code, seen]))
"""


def python(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in BEFORE_CUDA} | variables
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.tensor=2", "train.deterministic=true"], ["1", ":4096:8"]),
        (["parallel.tensor=1"], [None, None]),
        (["parallel.layout=auto"], ["1", None]),
    ],
    ids=["tensor 2, deterministic", "one process", "a layout that the planner has yet to choose"],
)
def test_what_cuda_reads_is_there_before_the_device_is_looked_at(
    tmp_path: Path, overrides: list[str], expected: list[str | None]
) -> None:
    arguments = ["--preset", "debug", "--run-dir", str(tmp_path / "run"), "train.device=cuda", *overrides]
    result = python(WATCHED_START, json.dumps(BEFORE_CUDA), *arguments)
    code, seen = json.loads(result.stdout.splitlines()[-1])
    assert code == 2, "there is no GPU here"
    assert seen and all(values == expected for _, *values in seen), seen


# Starts until the process groups would be created, and says what CUDA would read from then on.
PREPARED_START = """
import os, sys
from mlra_scale import train
from mlra_scale.training.loop import trainer
trainer.launch = lambda *_: print("variable:", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")) or 0
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("variables", "expected"), [({}, "None"), ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "8")])
def test_a_chosen_layout_without_tensor_parallelism_keeps_all_queues(
    tmp_path: Path, training_data: Path, variables: dict[str, str], expected: str
) -> None:
    fields = ["parallel.layout=auto", "train.device=cpu", f"data.path={training_data}"]
    result = python(PREPARED_START, "--preset", "debug", "--run-dir", str(tmp_path / "run"), *fields, **variables)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"variable: {expected}\n" in result.stdout


def test_what_the_user_has_set_stays() -> None:
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    set_device_environment(load_config("debug", overrides=["parallel.tensor=2"]), environment)
    assert environment == {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}


def test_deepspeed_does_not_warn_of_kernels_that_need_nvcc() -> None:
    """On a machine with a GPU, a torch for it and no CUDA toolkit, as most nodes are: seven lines from each rank."""
    script = """
import torch
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
torch.cuda.get_device_properties = lambda device=None: type("Properties", (), {"major": 9, "minor": 0})
from mlra_scale.parallel import initialize_distributed
initialize_distributed("cpu", 1.0)
print("started")
"""
    result = python(script, DS_ACCELERATOR="cuda", GLOO_SOCKET_IFNAME="lo")
    assert result.returncode == 0, result.stderr
    assert "compatibility check failed" not in result.stdout + result.stderr
    assert result.stdout.splitlines() == ["started"]


def test_gloo_gets_the_interface_over_which_the_ranks_meet() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    set_gloo_interface(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    for given in (
        {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"},
        {"WORLD_SIZE": "2", "MASTER_ADDR": "no.such.host.invalid"},
        {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "ib0"},
        # Two hosts, of which the first knows itself by its loopback address.
        {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.1.1"},
    ):
        environment = dict(given)
        set_gloo_interface(environment)
        assert environment == given


def test_the_interface_is_that_of_the_address_and_not_of_the_hosts_name() -> None:
    """The first node reaches its own address, as Slurm has it, from that address."""
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    own = {name: address for name in names if (address := address_of(name)) is not None}
    if not own:
        pytest.skip("needs a network interface beside the loopback")
    for name, address in own.items():
        assert interface_towards(address) == name


def address_of(interface: str) -> str | None:
    """The IPv4 address of an interface, from the kernel."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()))  # SIOCGIFADDR
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
