"""The network interface over which gloo connects ranks, on hosts that have several.

By itself gloo takes the interface of the host's name, which on many clusters is a management network, or on Debian
127.0.1.1. The ranks already meet at MASTER_ADDR (under Slurm the address that it has of the first node): the interface
from which this host reaches it is one over which the hosts reach each other.
"""

from __future__ import annotations

import socket
from collections.abc import MutableMapping

import psutil


def set_gloo_interface(environment: MutableMapping[str, str]) -> None:
    """Names the interface for gloo, unless the environment does or the ranks do not say where they meet.

    Args:
        environment: Of a rank, with MASTER_ADDR and WORLD_SIZE as launchers set them.
    """
    if "GLOO_SOCKET_IFNAME" in environment or int(environment.get("WORLD_SIZE", "1")) == 1:
        return
    name = interface_towards(environment.get("MASTER_ADDR", ""))
    if name is not None:
        environment["GLOO_SOCKET_IFNAME"] = name


def interface_towards(host: str) -> str | None:
    """Returns the name of the interface whose address this machine shows to a host; None if that is not known.

    Args:
        host: A name or an address; nothing is sent to it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # which only looks up the route
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return str(name)
    return None
