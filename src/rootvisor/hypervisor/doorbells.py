# SPDX-License-Identifier: Apache-2.0
"""Doorbells of a child: writes to a GPA that complete here and ring a port of the root (ioeventfds of /dev/mshv)."""

from __future__ import annotations

from ..tlfs import ports as tlfs
from ..tlfs import status
from .errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .event_rings import EventRings
    from .hypervisor import Hypervisor
    from .ports import Port

_SIZES = (0, 1, 2, 4, 8)
_FLAGS = tlfs.DOORBELL_SIZE_MASK | tlfs.DOORBELL_ANY_VALUE


class Doorbell:
    """A connection of type doorbell: a write of ``size`` bytes (0: any) of ``value`` (None: any) rings ``port``."""

    __slots__ = ("gpa", "port", "size", "value")

    def __init__(self, port: Port, gpa: int, value: int, flags: int) -> None:
        """``flags`` as in CONNECT_PORT. HV_STATUS_INVALID_PARAMETER for those that do not exist."""
        size = flags & tlfs.DOORBELL_SIZE_MASK
        if flags & ~_FLAGS or size > tlfs.DOORBELL_SIZE_MAX:
            raise HvError(status.INVALID_PARAMETER)
        self.port = port
        self.gpa = gpa
        self.size = _SIZES[size]
        self.value = None if flags & tlfs.DOORBELL_ANY_VALUE else value

    def matches(self, size: int, value: int) -> bool:
        """Whether a write of ``size`` bytes rings it; only as many bytes as are written are compared."""
        if self.size and self.size != size:
            return False
        return self.value is None or not (self.value ^ value) & ((1 << size * 8) - 1)


class Doorbells:
    """All of one child. :meth:`match` needs no lock: entries are replaced, never changed."""

    __slots__ = ("_rings", "by_gpa", "rung")

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._rings: EventRings = hypervisor.messages.rings
        self.by_gpa: dict[int, tuple[Doorbell, ...]] = {}
        #: writes that were a doorbell's
        self.rung = 0

    def match(self, gpa: int, size: int, value: int) -> bool:
        """A VP wrote ``size`` bytes of ``value`` to ``gpa``. True: a port rang, the write is complete."""
        for bell in self.by_gpa.get(gpa, ()):
            port = bell.port
            if port.alive and bell.matches(size, value):
                self.rung += 1
                self._rings.signal(port)
                return True
        return False

    def add(self, bell: Doorbell) -> None:
        """From now on it is looked at. Under Hypervisor.lock, as :meth:`remove`."""
        self.by_gpa[bell.gpa] = (*self.by_gpa.get(bell.gpa, ()), bell)

    def remove(self, bell: Doorbell) -> None:
        """From now on it is not."""
        rest = tuple(other for other in self.by_gpa.get(bell.gpa, ()) if other is not bell)
        if rest:
            self.by_gpa[bell.gpa] = rest
        else:
            self.by_gpa.pop(bell.gpa, None)
