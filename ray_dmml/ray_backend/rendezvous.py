"""How the peer actors of a generation find each other, and which way their embeddings take."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from datetime import timedelta
from typing import Any

import ray
import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from ray_dmml.cohort.teachers import Teachers
from ray_dmml.ray_backend.coordinator import Group, Offer
from ray_dmml.ray_backend.exchange import (
    DIST_ERRORS,
    CoordinatorExchange,
    DirectExchange,
    Exchange,
    Members,
    NoExchange,
    first_line,
    leave_group,
)

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""


def connect(
    transport: str,
    coordinator: Any,
    rank: int,
    members: Members,
    teachers: Teachers,
    device: torch.device,
    start_timeout_s: float,
) -> tuple[Exchange, str]:
    """Connects a peer to the others of its generation.

    If no group can be formed, ``direct`` falls back to the coordinator for all peers alike.

    Args:
        transport: ``direct`` or ``coordinator``.
        coordinator: the actor of this generation.
        rank: rank of this peer.
        members: the peers of the generation.
        teachers: who learns from whom.
        device: device of this peer.
        start_timeout_s: the driver's patience; a third of it is left to form the group.

    Returns:
        The peer's end of the exchange, and a description of the way it takes: ``none``, ``direct``, or
        ``coordinator``, with the reason if ``direct`` was asked for.
    """
    leave_group()
    if len(members.names) == 1:
        return NoExchange(), "none"
    if transport == "coordinator":
        return CoordinatorExchange(coordinator, rank, members, teachers), "coordinator"
    direct: DirectExchange | None = None
    reason = "another peer could not join"
    try:
        direct = _join_group(coordinator, rank, members, teachers, device, start_timeout_s)
    except DIST_ERRORS as error:
        reason = first_line(error)
    try:
        all_joined = ray.get(coordinator.all_agree.remote(rank, direct is not None))
    except BaseException:
        leave_group()
        raise
    if all_joined:
        assert direct is not None
        return direct, "direct"
    leave_group()
    description = f"coordinator, because no direct group could be formed ({reason})"
    return CoordinatorExchange(coordinator, rank, members, teachers), description


def store_at(host: str, timeout: timedelta) -> TCPStore:
    """A store that listens at this address only, because it does not ask who connects. TCPStore alone
    listens at all addresses."""
    # With port 0 the system picks a free one, and no other process can take it in between.
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listener.detach(),
    )


def _join_group(
    coordinator: Any,
    rank: int,
    members: Members,
    teachers: Teachers,
    device: torch.device,
    start_timeout_s: float,
) -> DirectExchange:
    # The driver waits for start_timeout_s, and some of it must be left to fall back.
    timeout = timedelta(seconds=start_timeout_s / 3)
    _use_interface_of(ray.util.get_node_ip_address())
    name = "cpu"
    if device.type == "cuda":
        name = str(torch.cuda.get_device_properties(device).uuid)
    own_store: Store | None = None
    address: tuple[str, int] | None = None
    reason = "the first peer could open no store"
    if rank == 0:
        host = ray.util.get_node_ip_address()
        try:
            own_store = store_at(host, timeout)
            address = (host, own_store.port)
        except DIST_ERRORS as error:
            reason = f"no store on {host}: {error}"  # raised below: the other peers wait for this offer
    group: Group | None = ray.get(coordinator.form_group.remote(rank, Offer(name, address)))
    if group is None:
        raise RuntimeError(reason)
    store = own_store or TCPStore(*group.store, is_master=False, timeout=timeout)
    return DirectExchange(group, store, rank, members, teachers, device, timeout)


def _use_interface_of(address: str) -> None:
    """Makes gloo and NCCL listen where Ray does, unless the environment names an interface.

    gloo's default is the address that the host's name stands for. On many machines that is 127.0.1.1,
    which no other machine can reach.
    """
    for _, interface in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, suppress(OSError):
            request = struct.pack("256s", interface[:15].encode())
            answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
            if socket.inet_ntoa(answer[20:24]) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
                return
