"""How the ranks of a run find and reach each other: the network interface, and the rendezvous store.

Left alone, Gloo listens at the address that the host's name resolves to (127.0.1.1 on a Debian), NCCL takes the first
interface that it likes, and torch's store listens on every address of rank 0's machine. Here all three use the address
by which Ray knows the node: the cluster's network, or loopback where Ray runs on one machine alone.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from datetime import timedelta

import ray
from torch import distributed

SIOCGIFADDR, SIOCGIFNETMASK = 0x8915, 0x891B  # netdevice(7)
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"

_store: distributed.TCPStore | None = None  # Rank 0's, open as long as its process.


def interfaces() -> dict[str, ipaddress.IPv4Interface]:
    """This machine's network interfaces that have an IPv4 address, each with it."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                parts = [fcntl.ioctl(query, code, request)[20:24] for code in (SIOCGIFADDR, SIOCGIFNETMASK)]
            except OSError:
                continue  # It has no IPv4 address, so none of ours.
            found[name] = ipaddress.IPv4Interface("/".join(map(socket.inet_ntoa, parts)))
    return found


def interface_of(address: str, found: dict[str, ipaddress.IPv4Interface]) -> str:
    """The interface that carries an address of this machine.

    Args:
        address: an IPv4 address; 127.0.0.2 is lo's, though lo shows 127.0.0.1 only.
        found: the machine's interfaces.

    Raises:
        ValueError: if none does.
    """
    wanted = ipaddress.ip_address(address)
    exact = [name for name, one in found.items() if one.ip == wanted]
    within = [name for name, one in found.items() if one.ip.is_loopback and wanted in one.network]
    if not exact + within:
        shown = ", ".join(f"{name} {one.ip}" for name, one in found.items())
        raise ValueError(
            f"no network interface has the node's address {address} (there are {shown}): name the one that the nodes "
            f"share in {GLOO} and {NCCL} before `ray start`"
        )
    return (exact + within)[0]


def use_node_interface() -> None:
    """Has Gloo and NCCL, in this process, use the node's own interface, unless the environment names one."""
    unnamed = [variable for variable in (GLOO, NCCL) if not os.environ.get(variable)]
    if unnamed:
        name = interface_of(ray.util.get_node_ip_address(), interfaces())
        # Without the sign, NCCL takes it for the beginning of a name.
        os.environ.update({variable: f"={name}" if variable == NCCL else name for variable in unnamed})


def process_name() -> str:
    """This process, for people."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def open_store() -> tuple[str, int]:
    """Opens the rendezvous store in rank 0's process, at the node's address only.

    Returns:
        Its address and port.
    """
    global _store
    host = ray.util.get_node_ip_address()
    listener = socket.create_server((host, 0), backlog=4096)
    port = listener.getsockname()[1]
    # Nothing but a socket that is bound already keeps the store from listening on all addresses; it closes it, too.
    _store = distributed.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return host, port


def join(address: tuple[str, int], rank: int, world: int, backend: str, timeout: timedelta) -> None:
    """Makes this process a rank of torch's process group.

    Args:
        address: what `open_store` returned in rank 0's process.
        rank: this process's.
        world: how many there are.
        backend: gloo, nccl, or one for each device as cpu:gloo,cuda:nccl.
        timeout: of this and of every collective operation.
    """
    use_node_interface()
    store = _store if rank == 0 else distributed.TCPStore(*address, is_master=False, timeout=timeout)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
