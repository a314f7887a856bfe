"""The network interface over which gloo connects ranks, on hosts that have several.

By default gloo uses the interface of the host's name, which on many clusters is a management network, and on Debian
127.0.1.1. All ranks connect to MASTER_ADDR: the interface from which this host reaches it is one over which the hosts
reach each other.
"""

from __future__ import annotations

import socket
from collections.abc import MutableMapping

import psutil


def set_gloo_interface(environment: MutableMapping[str, str]) -> None:
    """Names the interface for gloo, unless the environment names it or has no MASTER_ADDR.

    With several hosts it is never the loopback interface, to which the first host's own name may resolve.
    """
    if "GLOO_SOCKET_IFNAME" in environment or environment.get("WORLD_SIZE", "1") == "1":
        return
    name = interface_towards(environment.get("MASTER_ADDR", ""))
    spans_hosts = environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"]) != environment["WORLD_SIZE"]
    if name is not None and not (spans_hosts and is_loopback(name)):
        environment["GLOO_SOCKET_IFNAME"] = name


def is_loopback(name: str) -> bool:
    """Returns whether an interface reaches this host only."""
    stats = psutil.net_if_stats().get(name)
    return stats is not None and "loopback" in stats.flags.split(",")


def interface_towards(host: str) -> str | None:
    """Returns the interface from which this machine reaches a host; None if it is not known. Nothing is sent."""
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
