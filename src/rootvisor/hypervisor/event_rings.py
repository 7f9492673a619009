# SPDX-License-Identifier: Apache-2.0
"""Event rings of the root: the ids of ports that rang, one ring per SINT and root VP, in the VP's SIRBP page.

A ring is ``signal_masked`` u8, ``ring_full`` u8, two bytes, and 63 u32 (0: free). The consumer is
``mshv_synic.c:synic_event_ring_get_queued_port``: it takes ids at its tail and clears them; when it finds none it looks
at ``ring_full`` (then it calls NOTIFY_PORT_RING_EMPTY and looks again), clears ``signal_masked``, and looks once more.
We produce at the head, and send one message per change of ``signal_masked`` from 0 to 1.

The consumer's tail begins at 0 when its CPU comes on-line (``hv_common.c:hv_common_cpu_init``) and survives that the
mshv module is unloaded and loaded again. Both switch the SynIC off and on, so that is no sign; INIT itself is not seen,
because KVM serves it. The sign is the VP assist page: the kernel enables it in the function that makes the tail
(``hv_init.c:hv_cpu_init``), before any other use of the SynIC, and the module never touches it. It must: INIT disables
the page.
"""

from __future__ import annotations

from _thread import allocate_lock

from ..tlfs import messages, msrs
from ..tlfs.ports import ANY_VP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .ports import Port
    from .root_messages import Outlet, RootMessages, Rung

_ENTRIES = messages.EVENT_RING_ENTRIES
_MASKED = messages.EVENT_RING_SIGNAL_MASKED_OFFSET
_FULL = messages.EVENT_RING_FULL_OFFSET
_DATA = messages.EVENT_RING_DATA_OFFSET // 4
_EMPTY_RING = bytes(messages.EVENT_RING_SIZE)

STORED = 1
SIGNAL = 2


class EventRing:
    """Our side of one ring; ``octets`` is its memory, ``words`` the same as u32. Called with the lock held."""

    __slots__ = ("_fence", "head", "octets", "open", "overflow", "words")

    def __init__(self) -> None:
        self.octets = memoryview(bytearray(messages.EVENT_RING_SIZE))
        self.words = self.octets.cast("I")
        self.head = 0
        #: the root drains it: SINT and ring page are on
        self.open = False
        #: ports that found no room, in order; they wait for NOTIFY_PORT_RING_EMPTY
        self.overflow: dict[Port, None] = {}
        self._fence = allocate_lock()

    def lies_in(self, octets: memoryview) -> None:
        """The ring's memory is (now) there."""
        self.octets = octets
        self.words = octets.cast("I")

    def put(self, port: Port) -> int:
        """STORED when there was room, SIGNAL when the consumer must be told."""
        octets = self.octets
        words = self.words
        at = _DATA + self.head
        result = STORED
        if words[at]:
            octets[_FULL] = 1
            with (
                self._fence
            ):  # the flag is visible before we look again: either we see room, or the consumer the flag
                pass
            if words[at]:
                result = 0
        if result:
            words[at] = port.id
            self.head = (self.head + 1) % _ENTRIES
            port.ring = self
            port.slot = at
        else:
            self.overflow[port] = None
        with self._fence:  # the id is visible before we look whether the consumer has finished
            pass
        if not octets[_MASKED]:
            octets[_MASKED] = 1
            result |= SIGNAL
        return result

    def holds(self, port: Port) -> bool:
        """The port's id lies in the ring, not taken yet, or waits for room in it."""
        return (port.ring is self and self.words[port.slot] == port.id) or port in self.overflow

    def refill(self) -> int:
        """NOTIFY_PORT_RING_EMPTY: what waits for room moves in. SIGNAL as :meth:`put`."""
        waiting = list(self.overflow)
        self.overflow.clear()
        result = 0
        for index, port in enumerate(waiting):
            done = self.put(port)
            result |= done & SIGNAL
            if not done & STORED:
                for other in waiting[index + 1 :]:
                    self.overflow[other] = None
                break
        return result

    def withdraw(self) -> list[tuple[int, int]]:
        """Takes back everything that the consumer has not taken; the head is then where its tail is.

        Only while the consumer does not run: from an exit of its own VP. Returns (slot, id); :attr:`overflow` stays.
        """
        words = self.words
        taken = []
        for _ in range(_ENTRIES):
            last = (self.head - 1) % _ENTRIES
            port_id = words[_DATA + last]
            if not port_id:
                break
            words[_DATA + last] = 0
            taken.append((_DATA + last, port_id))
            self.head = last
        self.octets[_MASKED] = self.octets[_FULL] = 0
        taken.reverse()
        return taken

    def restart(self) -> None:
        """The consumer begins anew with its tail at 0."""
        self.octets[:] = _EMPTY_RING
        self.head = 0


class EventRings:
    """All rings, and the ports that rang while no root VP could take them. ``messages.lock`` guards everything."""

    __slots__ = ("_messages", "_waiting")

    def __init__(self, owner: RootMessages) -> None:
        self._messages = owner
        self._waiting: dict[Port, None] = {}

    def signal(self, port: Port) -> None:
        """The port rings. Once it is deleted nothing of it gets into a ring (T18)."""
        rung: Rung = []
        with self._messages.lock:
            if port.alive:
                self.place(port, rung)
        self._messages.interrupt(rung)

    def place(self, port: Port, rung: Rung) -> None:
        """The port's id goes to a ring; lock held."""
        if port.ring is not None and port.ring.open and port.ring.holds(port):
            return  # an event that was not taken yet stands for this one as well
        outlet = self._outlet(port)
        if outlet is None:
            self._waiting[port] = None
        elif outlet.rings[port.sint].put(port) & SIGNAL:
            self._tell(outlet, port.sint, rung)

    def _outlet(self, port: Port) -> Outlet | None:
        sint = port.sint
        home = port.home
        if home is not None and home.rings[sint].open:
            return home
        for outlet in self._messages.outlets:
            if outlet.rings[sint].open and port.target_vp in (ANY_VP, outlet.vp.index):
                return outlet
        return None

    def _tell(self, outlet: Outlet, sint: int, rung: Rung) -> None:
        value = outlet.synic.sints[sint]
        if value & msrs.SINT_AS_INTERCEPT:
            self._messages.put(outlet, outlet.sint_messages[sint], rung)
        else:
            rung.append((outlet, value & msrs.SINT_VECTOR))

    def refill(self, outlet: Outlet, sint: int) -> None:
        """NOTIFY_PORT_RING_EMPTY from the VP of ``outlet``."""
        rung: Rung = []
        with self._messages.lock:
            if outlet.rings[sint].open and outlet.rings[sint].refill() & SIGNAL:
                self._tell(outlet, sint, rung)
        self._messages.interrupt(rung)

    def forget(self, port: Port) -> None:
        """The port is deleted; lock held. What lies in a ring already stays: its consumer looks the id up."""
        self._waiting.pop(port, None)
        if port.ring is not None:
            port.ring.overflow.pop(port, None)
        for outlet in self._messages.outlets:
            outlet.rings[port.sint].overflow.pop(port, None)

    def refresh(self, outlet: Outlet, rung: Rung) -> None:
        """The VP's SynIC changed; lock held. Rings that it no longer drains hand over what they hold."""
        synic = outlet.synic
        page_on = outlet.ready and synic.sirbp.enabled
        homeless: dict[Port, None] = {}
        opened = False
        for sint, ring in enumerate(outlet.rings):
            is_open = page_on and not synic.sints[sint] & msrs.SINT_MASKED
            if is_open == ring.open:
                continue
            ring.open = is_open
            if is_open:
                opened = True
            else:
                self._empty(ring, homeless)
        if opened:
            homeless.update(self._waiting)
            self._waiting.clear()
        for port in homeless:
            self.place(port, rung)

    def _empty(self, ring: EventRing, homeless: dict[Port, None]) -> None:
        by_id = self._messages.port_of
        for slot, port_id in ring.withdraw():
            port = by_id(port_id)
            if port is not None and port.ring is ring and port.slot == slot:  # not one that had the id before
                homeless[port] = None
        homeless.update(ring.overflow)
        ring.overflow.clear()

    def came_online(self, outlet: Outlet, rung: Rung) -> None:
        """INIT of the root VP (see the module): rings are empty, heads 0; what they held goes elsewhere. Lock held."""
        homeless: dict[Port, None] = {}
        for ring in outlet.rings:
            self._empty(ring, homeless)
            ring.restart()
        for port in homeless:
            self.place(port, rung)
