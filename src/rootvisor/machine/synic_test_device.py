# SPDX-License-Identifier: Apache-2.0
"""A device for SynIC tests (kvm-unit-tests ``x86/hyperv.c``): a port whose writes make connections of the guest with
itself, and raise SINTs.

A write has the connection's id in bits 31:24, the command in 23:16, the VP in 15:8 and the SINT in 7:0.
"""

from __future__ import annotations

from ..hypervisor.errors import HvError
from ..tlfs import messages
from ..tlfs import ports as tlfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..hypervisor.computer_partition import ComputerPartition

PORT = 0x3000
_SET_SINT, _CREATE_MESSAGE, _DESTROY_MESSAGE, _CREATE_EVENT, _DESTROY_EVENT = 3, 4, 5, 6, 7


class SynicTestDevice:
    """At port :data:`PORT`; what makes no sense is ignored."""

    __slots__ = ("_partition",)

    def __init__(self, partition: ComputerPartition) -> None:
        self._partition = partition

    def read(self, _offset: int, size: int) -> int:
        """Nothing to read."""
        return (1 << (size * 8)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A command."""
        if offset or size != 4:
            return
        connection, command, vp, sint = value >> 24, value >> 16 & 0xFF, value >> 8 & 0xFF, value & 0xFF
        partition = self._partition
        if vp >= len(partition.vps) or sint >= messages.SINT_COUNT:
            return
        if command == _SET_SINT:
            partition.vps[vp].synic.signal_sint(sint)
            return
        with partition.hypervisor.lock:
            try:
                if command == _CREATE_MESSAGE:
                    self._create(connection, tlfs.PORT_MESSAGE, tlfs.MESSAGE_PORT.pack(sint, vp, 0))
                elif command == _CREATE_EVENT:
                    self._create(
                        connection, tlfs.PORT_EVENT, tlfs.EVENT_PORT.pack(sint, vp, connection, 1, 0)
                    )
                elif command in (_DESTROY_MESSAGE, _DESTROY_EVENT):
                    ports = partition.hypervisor.ports
                    ports.disconnect(partition, connection, False)
                    ports.delete(partition, connection)
            except HvError:
                return

    def _create(self, connection: int, kind: int, info: bytes) -> None:
        """A port of the guest's and a connection to it, both with the same id."""
        partition = self._partition
        ports = partition.hypervisor.ports
        ports.create(partition, connection, partition, kind, info)
        ports.connect(partition, connection, partition, connection, kind, 0, 0, 0)
