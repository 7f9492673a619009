# SPDX-License-Identifier: Apache-2.0
"""Ports and connections between partitions (TLFS "Inter-Partition Communication", PDF5 11.6 to 11.8).

A port belongs to the partition that receives, a connection to the one that sends. Messages and events go to a SINT of
the port's VP; a doorbell's connection is a GPA, and its port one of the root's event rings.
"""

from __future__ import annotations

from ..tlfs import messages, status
from ..tlfs import ports as tlfs
from .doorbells import Doorbell
from .errors import HvError
from .root_partition import RootPartition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_partition import ChildPartition
    from .event_rings import EventRing
    from .hypervisor import Hypervisor
    from .partition import Partition
    from .root_messages import Outlet
    from .vp import VirtualProcessor

#: Ports that can exist at a time; they cost memory of the hypervisor's, not deposited pages.
PORT_LIMIT = 1 << 16
_MESSAGE_TYPE_LIMIT = 1 << 31


class Port:
    """Port ``id`` of partition ``owner``, which ``connection_partition`` may connect to.

    ``base`` and ``count`` are an event port's flags. ``home`` is the root VP that a port for any VP prefers; ``ring``
    and ``slot`` tell where a doorbell's id lies (:mod:`.event_rings`).
    """

    __slots__ = (
        "alive", "base", "connection_partition", "count", "home", "id", "kind", "owner", "ring", "sint", "slot",
        "target_vp",
    )  # fmt: skip

    def __init__(
        self,
        owner: int,
        port_id: int,
        kind: int,
        connection_partition: int,
        sint: int,
        target_vp: int,
        base: int = 0,
        count: int = 0,
    ) -> None:
        self.owner = owner
        self.id = port_id
        self.kind = kind
        self.connection_partition = connection_partition
        self.sint = sint
        self.target_vp = target_vp
        self.base = base
        self.count = count
        #: cleared by DELETE_PORT; then nothing gets into a ring or a slot on its behalf
        self.alive = True
        self.ring: EventRing | None = None
        self.slot = 0
        self.home: Outlet | None = None


class Ports:
    """All ports and connections. Under Hypervisor.lock. Errors are HvError."""

    __slots__ = ("_connections", "_doorbells", "_hypervisor", "_ports")

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        #: (partition, id)
        self._ports: dict[tuple[int, int], Port] = {}
        self._connections: dict[tuple[int, int], Port] = {}
        self._doorbells: dict[tuple[int, int], Doorbell] = {}

    def root_port(self, port_id: int) -> Port | None:
        """The root's port with that id."""
        return self._ports.get((self._hypervisor.root.id, port_id))

    # --- the root's calls ---------------------------------------------------------------------------------------------
    def create(
        self, owner: Partition, port_id: int, connection_partition: Partition, kind: int, info: bytes
    ) -> Port:
        """CREATE_PORT. INVALID_PORT_ID: 0, more than 24 bits, or in use. INVALID_PARAMETER: type, SINT, flags, reserved
        fields. INVALID_VP_INDEX: the root has no such VP. NO_RESOURCES."""
        in_root = isinstance(owner, RootPartition)
        if kind == tlfs.PORT_EVENT:
            sint, target_vp, base, count, reserved = tlfs.EVENT_PORT.unpack(info)
            if not count or base + count > messages.EVENT_FLAGS_PER_SINT:
                raise HvError(status.INVALID_PARAMETER)
        elif kind in (tlfs.PORT_MESSAGE, tlfs.PORT_DOORBELL):
            sint, target_vp, reserved = tlfs.MESSAGE_PORT.unpack(info)
            base = count = 0
            if kind == tlfs.PORT_DOORBELL and not in_root:
                raise HvError(status.INVALID_PARAMETER)
        else:
            raise HvError(status.INVALID_PARAMETER)
        if not 0 < port_id <= tlfs.ID_MASK or (owner.id, port_id) in self._ports:
            raise HvError(status.INVALID_PORT_ID)
        # The root's SINT0 is the hypervisor's own (contract T2).
        if (
            reserved
            or sint >= messages.SINT_COUNT
            or (in_root and sint == messages.INTERCEPTION_SINT and kind != tlfs.PORT_EVENT)
        ):
            raise HvError(status.INVALID_PARAMETER)
        if in_root and target_vp != tlfs.ANY_VP:
            owner.vp(target_vp)
        if len(self._ports) >= PORT_LIMIT:
            raise HvError(status.NO_RESOURCES)
        port = Port(owner.id, port_id, kind, connection_partition.id, sint, target_vp, base, count)
        self._ports[(owner.id, port_id)] = port
        return port

    def connect(
        self,
        partition: Partition,
        connection_id: int,
        owner: Partition,
        port_id: int,
        kind: int,
        gpa: int,
        value: int,
        flags: int,
    ) -> None:
        """CONNECT_PORT; ``gpa``, ``value`` and ``flags`` are a doorbell's.

        INVALID_CONNECTION_ID: more than 24 bits, or in use. INVALID_PORT_ID: no such port. ACCESS_DENIED: the port is
        for another partition. INVALID_PARAMETER: the port has another type, or a doorbell's flags do not exist.
        """
        port = self._ports.get((owner.id, port_id))
        key = (partition.id, connection_id)
        if connection_id > tlfs.ID_MASK:
            raise HvError(status.INVALID_CONNECTION_ID)
        if port is None:
            raise HvError(status.INVALID_PORT_ID)
        if port.connection_partition != partition.id:
            raise HvError(status.ACCESS_DENIED)
        if port.kind != kind:
            raise HvError(status.INVALID_PARAMETER)
        if kind != tlfs.PORT_DOORBELL:
            if key in self._connections:
                raise HvError(status.INVALID_CONNECTION_ID)
            self._connections[key] = port
            return
        if isinstance(partition, RootPartition):
            raise HvError(status.INVALID_PARAMETER)  # the root's writes do not come by here
        if key in self._doorbells:
            raise HvError(status.INVALID_CONNECTION_ID)
        bell = Doorbell(port, gpa, value, flags)
        self._doorbells[key] = bell
        _child(partition).doorbells.add(bell)

    def disconnect(self, partition: Partition, connection_id: int, doorbell: bool) -> None:
        """DISCONNECT_PORT; doorbells have connection ids of their own. INVALID_CONNECTION_ID."""
        key = (partition.id, connection_id)
        if doorbell:
            bell = self._doorbells.pop(key, None)
            if bell is not None:
                _child(partition).doorbells.remove(bell)
                return
        elif self._connections.pop(key, None) is not None:
            return
        raise HvError(status.INVALID_CONNECTION_ID)

    def delete(self, owner: Partition, port_id: int) -> None:
        """DELETE_PORT. Connections stay, and fail with INVALID_PORT_ID; the id may be used again at once."""
        port = self._ports.pop((owner.id, port_id), None)
        if port is None:
            raise HvError(status.INVALID_PORT_ID)
        self._kill(port)

    def remove_partition(self, partition_id: int) -> None:
        """The partition ends: its ports, its connections, and ports that were for it."""
        for port_key, port in list(self._ports.items()):
            if partition_id in (port.owner, port.connection_partition):
                del self._ports[port_key]
                self._kill(port)
        for key in [key for key in self._connections if key[0] == partition_id]:
            del self._connections[key]
        partition = self._hypervisor.partitions.get(partition_id)
        for key in [key for key in self._doorbells if key[0] == partition_id]:
            bell = self._doorbells.pop(key)
            if partition is not None:
                _child(partition).doorbells.remove(bell)

    def _kill(self, port: Port) -> None:
        if self._hypervisor.guest is not None:
            port.alive = False
            return
        hub = self._hypervisor.messages
        with hub.lock:
            port.alive = False
            hub.rings.forget(port)

    # --- everybody's calls --------------------------------------------------------------------------------------------
    def post_message(
        self,
        partition: Partition,
        connection_id: int,
        message_type: int,
        payload: bytes,
        vp: VirtualProcessor,
    ) -> None:
        """POST_MESSAGE by ``vp``. INVALID_CONNECTION_ID, INVALID_PORT_ID, INVALID_PARAMETER (type 0 or bit 31, another
        kind of port), INSUFFICIENT_BUFFERS, INVALID_VP_INDEX, INVALID_SYNIC_STATE."""
        port = self._connected(partition, connection_id)
        if port.kind != tlfs.PORT_MESSAGE or not 0 < message_type < _MESSAGE_TYPE_LIMIT:
            raise HvError(status.INVALID_PARAMETER)
        target = self._target(port, vp)
        target.synic.post_message(port.sint, message_type, port.id, payload)

    def signal_event(self, partition: Partition, connection_id: int, flag: int, vp: VirtualProcessor) -> None:
        """SIGNAL_EVENT. As :meth:`post_message`; INVALID_PARAMETER also for a flag beyond the port's."""
        port = self._connected(partition, connection_id)
        if port.kind != tlfs.PORT_EVENT or flag >= port.count:
            raise HvError(status.INVALID_PARAMETER)
        self._target(port, vp).synic.signal_event(port.sint, port.base + flag)

    def _connected(self, partition: Partition, connection_id: int) -> Port:
        port = self._connections.get((partition.id, connection_id))
        if port is None:
            raise HvError(status.INVALID_CONNECTION_ID)
        if not port.alive:
            raise HvError(status.INVALID_PORT_ID)
        return port

    def _target(self, port: Port, sender: VirtualProcessor) -> VirtualProcessor:
        owner = self._hypervisor.partitions[port.owner]
        if port.target_vp != tlfs.ANY_VP:
            vp = owner.vp(port.target_vp)
            vp.settle(sender)
            return vp
        for vp in owner.vps:
            vp.settle(sender)
            synic = vp.synic
            if synic.scontrol & 1 and (
                synic.simp.enabled if port.kind == tlfs.PORT_MESSAGE else synic.siefp.enabled
            ):
                return vp
        raise HvError(status.INVALID_SYNIC_STATE)


def _child(partition: Partition) -> ChildPartition:
    """Doorbells are only ever connected to children (:meth:`Ports.connect`)."""
    return partition  # type: ignore[return-value]
