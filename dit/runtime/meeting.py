"""Do all ranks come, and reach each other? Asked before a process group is made, which would wait long and name nobody."""

import fcntl
import json
import os
import platform
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

CONNECT_SECONDS = 5.0
_places: list[Any] = []
"""Kept, so that the group is made at the same server."""


def meet(patience: float) -> tuple[str, str | None]:
    """Every rank comes to the meeting place within `patience` seconds, and takes a connection from every other.

    Returns what was found, and the fix if it is bad. Where they meet is where the group will be made, which does not name the absent.
    """
    from torch.distributed import TCPStore

    from dit.runtime import distributed

    distributed.describe_processes()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks == 1:
        return "of one; to check what is between several, run this under torchrun or srun", None
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    end = time.monotonic() + patience
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        address, port = place.rsplit(":", 1)
        limit = timedelta(seconds=patience)
        store = TCPStore(address, int(port), ranks, is_host, timeout=limit, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        fix = f"rank 0 must listen at {place} (MASTER_ADDR, MASTER_PORT), and this host reach it"
        return f"no answer from {place} within {patience:g} s: {str(error).splitlines()[0]}", fix
    _places.append(store)
    try:
        own = _own_address()
    except OSError as error:
        return f"GLOO_SOCKET_IFNAME={os.environ['GLOO_SOCKET_IFNAME']}: {error.strerror}", "name an interface of `ip address`"
    with socket.create_server(("", 0), backlog=ranks) as server:
        store.set(f"doctor/{rank}", json.dumps([platform.node(), own, server.getsockname()[1]]))
        there = {other: found for other in range(ranks) if (found := _waited(store, f"doctor/{other}", end))}
        if missing := [other for other in range(ranks) if other not in there]:
            who = ", ".join(f"rank {other}" for other in missing)
            fix = f"start it, and see that its host reaches {place}; --patience if it is only late"
            return f"{who} did not come within {patience:g} s; here: {', '.join(map(str, there))} of {ranks}", fix
        with ThreadPoolExecutor(32) as callers:
            refusals = dict(zip(there, callers.map(lambda found: _refusal(found[1], found[2]), there.values()), strict=True))
        store.set(f"doctor/called/{rank}", "")
        end = time.monotonic() + 2 * CONNECT_SECONDS
        for other in there:  # before this one hangs up
            _waited(store, f"doctor/called/{other}", end)
    if far := [f"rank {other} on {there[other][0]} ({there[other][1]}): {why}" for other, why in refusals.items() if why]:
        fix = "open all ports between the hosts; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network interface"
        return f"rank {rank} on {platform.node()} cannot reach {'; '.join(far)}", fix
    return f"{ranks} ranks, each reaches the others", None


def _waited(store: Any, key: str, end: float) -> Any:
    """The JSON under `key`, as soon as it is there; None if it is not by `end`."""
    try:
        store.wait([key], timedelta(seconds=max(0.1, end - time.monotonic())))
        return json.loads(store.get(key) or b"true")
    except RuntimeError:  # of torch, when the time is over
        return None


def _own_address() -> str:
    """The address of this host that gloo will give to the others."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not name:
        with suppress(OSError):
            return socket.gethostbyname(platform.node())
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
    return socket.inet_ntoa(answer[20:24])


def _refusal(address: str, port: int) -> str | None:
    """Why no connection to it can be made, or None."""
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return None
