"""How the peer actors of a generation find each other, and which way their embeddings take."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import ray
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ray_dmml.ray_backend.exchange import (
    DIST_ERRORS,
    CoordinatorExchange,
    DirectExchange,
    Exchange,
    Member,
    leave_group,
)
from ray_dmml.ray_backend.failures import first_line


def connect(member: Member, transport: str, start_timeout_s: float) -> tuple[Exchange, str]:
    """Connects a peer to the others of its generation. If they form no group within a third of the driver's patience,
    ``direct`` falls back to the coordinator for all of them.

    Returns:
        The peer's end of the exchange, and a description of the way it takes: ``none``, ``direct``, or
        ``coordinator``, with the reason if ``direct`` was asked for.
    """
    leave_group()
    if len(member.names) == 1:
        return Exchange(), "none"
    if transport == "coordinator":
        return CoordinatorExchange(member), "coordinator"
    direct: DirectExchange | None = None
    reason = "another peer could not join"
    try:
        direct = _join_group(member, timedelta(seconds=start_timeout_s / 3))
    except DIST_ERRORS as error:
        reason = first_line(error)
    all_joined = False
    try:
        all_joined = all(ray.get(member.coordinator.gather.remote("joined", member.rank, direct is not None)))
    finally:
        if not all_joined:
            leave_group()
    if direct is not None and all_joined:
        return direct, "direct"
    return CoordinatorExchange(member), f"coordinator, because no direct group could be formed ({reason})"


def store_at(host: str, timeout: timedelta) -> TCPStore:
    """A store that listens at this address only, because it does not ask who connects. TCPStore alone
    listens at all addresses."""
    # With port 0 the system picks a free one, and no other process can take it in between.
    listener = socket.create_server((host, 0))
    port, fd = listener.getsockname()[1], listener.detach()
    return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=fd)


def _join_group(member: Member, timeout: timedelta) -> DirectExchange:
    host = ray.util.get_node_ip_address()
    _use_interface_of(host)
    is_gpu = member.device.type == "cuda"
    device = str(torch.cuda.get_device_properties(member.device).uuid) if is_gpu else "cpu"
    own_store: TCPStore | None = None
    reason = "the first peer could open no store"
    if member.rank == 0:
        try:
            own_store = store_at(host, timeout)
        except DIST_ERRORS as error:
            reason = f"no store on {host}: {error}"  # raised below: the other peers wait for this offer
    address = (host, own_store.port) if own_store else None
    offers = ray.get(member.coordinator.gather.remote("offer", member.rank, (device, address)))
    _, address = offers[0]
    if address is None:
        raise RuntimeError(reason)
    store = own_store or TCPStore(address[0], address[1], is_master=False, timeout=timeout)
    return DirectExchange(member, backend_for([device for device, _ in offers]), store, timeout)


def backend_for(devices: Sequence[str]) -> str:
    """The backend of a group of peers on these devices, each ``cpu`` or the ID of a GPU.

    NCCL takes one rank a GPU. So it is used only if every peer has a GPU of its own; cohorts that share
    GPUs, or have peers on CPUs, use gloo.
    """
    return "gloo" if "cpu" in devices or len(set(devices)) < len(devices) else "nccl"


def _use_interface_of(address: str) -> None:
    """Makes gloo and NCCL listen where Ray does, unless the environment names an interface.

    gloo's default is the address that the host's name stands for. On many machines that is 127.0.1.1,
    which no other machine can reach.
    """
    for _, interface in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, suppress(OSError):
            request = struct.pack("256s", interface[:15].encode())
            answer = fcntl.ioctl(any_socket.fileno(), 0x8915, request)  # SIOCGIFADDR of Linux
            if socket.inet_ntoa(answer[20:24]) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
                return
