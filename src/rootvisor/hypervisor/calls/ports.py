# SPDX-License-Identifier: Apache-2.0
"""Ports of the root for its children, doorbells above all (``mshv_root_hv_call.c``, ``mshv_synic.c``)."""

from __future__ import annotations

from ...tlfs import hypercalls, messages, privileges, status
from ...tlfs import ports as tlfs
from ..errors import HvError
from ..hypercall_table import TABLE
from .callers import root_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor


@TABLE.simple(hypercalls.CREATE_PORT, tlfs.CREATE_PORT_INPUT, privilege=privileges.CREATE_PORT)
def create_port(
    vp: VirtualProcessor,
    owner_id: int,
    port_id: int,
    port_vtl: int,
    min_vtl: int,
    connection_partition_id: int,
    kind: int,
    info: bytes,
    _proximity: int,
) -> None:
    """A port of the caller's (or of a child) that another of its partitions may connect to. No memory is asked for."""
    root = root_of(vp)
    hypervisor = root.hypervisor
    owner = hypervisor.partition(root, owner_id)
    connecting = hypervisor.partition(root, connection_partition_id)
    if port_vtl or min_vtl:
        raise HvError(status.INVALID_PARAMETER)
    port = hypervisor.ports.create(owner, port_id, connecting, kind, info)
    if port.target_vp == tlfs.ANY_VP:
        port.home = vp.synic.outlet  # doorbells spread over the root's VPs as their VMMs do


@TABLE.simple(hypercalls.CONNECT_PORT, tlfs.CONNECT_PORT_INPUT, privilege=privileges.CONNECT_PORT)
def connect_port(
    vp: VirtualProcessor,
    connection_partition_id: int,
    connection_id: int,
    vtl: int,
    reserved: bytes,
    owner_id: int,
    port_id: int,
    kind: int,
    gpa: int,
    value: int,
    flags: int,
    _proximity: int,
) -> None:
    """A connection of a child (a doorbell: a GPA of it) to a port."""
    root = root_of(vp)
    hypervisor = root.hypervisor
    partition = hypervisor.partition(root, connection_partition_id)
    owner = hypervisor.partition(root, owner_id)
    if vtl or any(reserved):
        raise HvError(status.INVALID_PARAMETER)
    hypervisor.ports.connect(partition, connection_id, owner, port_id, kind, gpa, value, flags)


@TABLE.simple(hypercalls.DISCONNECT_PORT, tlfs.DISCONNECT_PORT_INPUT, privilege=privileges.CONNECT_PORT)
def disconnect_port(vp: VirtualProcessor, partition_id: int, connection_id: int, flags: int) -> None:
    """The connection is no more; writes to a doorbell's GPA are ordinary ones again."""
    root = root_of(vp)
    partition = root.hypervisor.partition(root, partition_id)
    if flags & ~tlfs.DISCONNECT_DOORBELL:
        raise HvError(status.INVALID_PARAMETER)
    root.hypervisor.ports.disconnect(partition, connection_id, bool(flags))


@TABLE.simple(hypercalls.DELETE_PORT, tlfs.DELETE_PORT_INPUT, privilege=privileges.CREATE_PORT)
def delete_port(vp: VirtualProcessor, owner_id: int, port_id: int) -> None:
    """When it returns, nothing of the port gets into a ring any more (contract T18)."""
    root = root_of(vp)
    root.hypervisor.ports.delete(root.hypervisor.partition(root, owner_id), port_id)


@TABLE.simple(
    hypercalls.NOTIFY_PORT_RING_EMPTY,
    tlfs.NOTIFY_PORT_RING_EMPTY_INPUT,
    privilege=privileges.ACCESS_SYNIC_REGS,
)
def notify_port_ring_empty(vp: VirtualProcessor, sint: int) -> None:
    """The caller has emptied its ring and seen ``ring_full``: what found no room moves in."""
    root = root_of(vp)
    if sint >= messages.SINT_COUNT:
        raise HvError(status.INVALID_PARAMETER)
    outlet = vp.synic.outlet
    if outlet is not None:
        root.hypervisor.messages.rings.refill(outlet, sint)
