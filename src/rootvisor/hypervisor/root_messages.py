# SPDX-License-Identifier: Apache-2.0
"""Messages of the hypervisor to the root: slot 0 (SINT0) of a root VP's message page, one at a time.

The root's handler (``mshv_synic.c:mshv_isr``) reads that slot only. It takes what it knows, clears the type, and writes
EOM if it then sees the pending flag; a message that it does not know blocks the slot for good (contract T2). So nothing
else ever comes there, and messages wait here, without a limit but the number of children's VPs, until the slot is free.

A message may go to any root VP whose SynIC is on. When a VP's SynIC goes off (CPU off-line, module unloaded) what waits
for it, and what lies in its slot unseen, moves to another (T22); while none is on, messages wait.
"""

from __future__ import annotations

from _thread import allocate_lock

from ..kvm.vm import msi_message
from ..tlfs import messages, msrs
from .event_rings import EventRing, EventRings
from .interrupt_remapping import MSI_BASE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_partition import ChildPartition
    from .child_vp import ChildVp
    from .hypervisor import Hypervisor
    from .overlay import OverlayPage
    from .ports import Port
    from .vp import VirtualProcessor

    #: Interrupts to send once the lock is free: outlet and vector.
    Rung = list[tuple["Outlet", int]]

_FLAGS = messages.MESSAGE_FLAGS_OFFSET
_PENDING = messages.MESSAGE_FLAG_PENDING
_SENDER = slice(8, 16)
_COLLAPSING = tuple(
    kind.to_bytes(4, "little") for kind in (messages.OPAQUE_INTERCEPT, messages.SYNIC_SINT_INTERCEPT)
)


class Outlet:
    """SINT0 of one root VP, and the VP's event rings. ``words`` and ``octets`` are its slot 0."""

    __slots__ = (
        "_messages", "_page", "msi", "octets", "queue", "ready", "rings", "sint_messages", "synic", "vp", "words",
    )  # fmt: skip

    def __init__(self, owner: RootMessages, vp: VirtualProcessor) -> None:
        self._messages = owner
        self.vp = vp
        self.synic = vp.synic
        self.queue: list[bytes] = []
        #: SCONTROL and SIMP are enabled and SINT0 is not masked
        self.ready = False
        self.rings = tuple(EventRing() for _ in range(messages.SINT_COUNT))
        self.sint_messages = tuple(
            _message(messages.SYNIC_SINT_INTERCEPT, 0, messages.SYNIC_SINT_INTERCEPT_PAYLOAD.pack(sint))
            for sint in range(messages.SINT_COUNT)
        )
        self._page: memoryview | None = None
        self.octets = self.words = memoryview(b"")
        self.msi = bytearray()
        self.locate()

    def locate(self) -> None:
        """Looks where the VP's pages are, and at SINT0's vector."""
        synic = self.synic
        page = synic.simp.view
        if page is not self._page:
            self._page = page
            self.octets = page[: messages.MESSAGE_SLOT_SIZE]
            self.words = self.octets.cast("I")
        rings = synic.sirbp.view
        size = messages.EVENT_RING_SIZE
        for sint, ring in enumerate(self.rings):
            ring.lies_in(rings[sint * size : (sint + 1) * size])

    # --- what the VP does (its own exits) -----------------------------------------------------------------------------
    def changed(self) -> None:
        """A register of the VP's SynIC was written."""
        self._messages.refresh(self)

    def write_page(self, page: OverlayPage, value: int) -> None:
        """SIMP, SIEFP or SIRBP is written; nothing is posted while the page moves."""
        with self._messages.lock:
            page.write(value)
            self.locate()
        self._messages.refresh(self)

    def end_of_message(self) -> None:
        """EOM: the next message, if the slot is free."""
        if self.queue:
            self._messages.advance(self)

    def came_online(self) -> None:
        """The VP went through INIT and begins anew (see :mod:`.event_rings`)."""
        self._messages.came_online(self)


def _message(message_type: int, sender: int, payload: bytes) -> bytes:
    return messages.MESSAGE_HEADER.pack(message_type, len(payload), 0, sender) + payload


def _collapses(message: bytes) -> bool:
    """Whether one that waits stands for a second one: such messages only make the root look."""
    return message[:4] in _COLLAPSING


class RootMessages:
    """Every root VP's outlet. ``lock`` is innermost: nothing else is taken or waited for while it is held."""

    __slots__ = ("_fence", "_hypervisor", "_opaque", "_waiting", "delivered", "lock", "outlets", "rings")

    def __init__(self, hypervisor: Hypervisor) -> None:
        """Takes over slot 0 of all the root's VPs."""
        self._hypervisor = hypervisor
        self.lock = allocate_lock()
        self._fence = allocate_lock()
        #: (partition, VP) -> its OPAQUE message
        self._opaque: dict[tuple[int, int], bytes] = {}
        self._waiting: list[bytes] = []
        #: messages put into a slot
        self.delivered = 0
        self.rings = EventRings(self)
        self.outlets = [Outlet(self, vp) for vp in hypervisor.root.vps]
        for outlet in self.outlets:
            outlet.synic.outlet = outlet
            self.refresh(outlet)

    def port_of(self, port_id: int) -> Port | None:
        """The root's port with that id."""
        return self._hypervisor.ports.root_port(port_id)

    # --- posting ------------------------------------------------------------------------------------------------------
    def post_opaque(self, child: ChildPartition, vp: ChildVp) -> None:
        """Tells the root that the VP's message page holds an intercept. Any thread, with or without locks.

        It goes to the root VP that resumed the child's VP. One that waits already stands for both; one in a slot does
        not, because its receiver may have acted on it before the slot is cleared.
        """
        if self._hypervisor.root_scheduler is not None:
            return  # DISPATCH_VP tells
        key = (child.id, vp.index)
        message = self._opaque.get(key)
        if message is None:
            payload = messages.OPAQUE_INTERCEPT_PAYLOAD.pack(vp.index)
            message = self._opaque[key] = _message(messages.OPAQUE_INTERCEPT, child.id, payload)
        self._post(message, vp.root_vp)

    def post(
        self,
        message_type: int,
        sender: int,
        payload: bytes,
        preferred_root_vp: VirtualProcessor | None = None,
    ) -> None:
        """Any other message that ``mshv_isr`` knows; each is delivered, also when the same one waits already."""
        self._post(_message(message_type, sender, payload), preferred_root_vp)

    def _post(self, message: bytes, preferred: VirtualProcessor | None) -> None:
        rung: Rung = []
        with self.lock:
            self._place(message, preferred, rung)
        self.interrupt(rung)

    def _place(self, message: bytes, preferred: VirtualProcessor | None, rung: Rung) -> None:
        outlet = preferred.synic.outlet if preferred is not None else None
        if outlet is None or not outlet.ready:
            for outlet in self.outlets:
                if outlet.ready:
                    break
            else:
                if message not in self._waiting or not _collapses(message):
                    self._waiting.append(message)
                return
        self.put(outlet, message, rung)

    def put(self, outlet: Outlet, message: bytes, rung: Rung) -> None:
        """Into the slot, or the queue behind it. Lock held."""
        queue = outlet.queue
        if not queue and not outlet.words[0]:
            self._fill(outlet, message, 0, rung)
            return
        if message not in queue or not _collapses(message):
            queue.append(message)
        self._advance(outlet, rung)

    def _advance(self, outlet: Outlet, rung: Rung) -> None:
        """The queue is not empty: its head moves into the slot if that is free, else the root is told to write EOM."""
        words = outlet.words
        if words[0]:
            outlet.octets[_FLAGS] |= _PENDING
            with (
                self._fence
            ):  # the flag is visible before we look again: either we see the slot free, or EOM comes
                pass
            if words[0]:
                return
        queue = outlet.queue
        message = queue.pop(0)
        self._fill(outlet, message, _PENDING if queue else 0, rung)

    def _fill(self, outlet: Outlet, message: bytes, flags: int, rung: Rung) -> None:
        octets = outlet.octets
        octets[4 : len(message)] = message[4:]
        octets[_FLAGS] = flags
        outlet.words[0] = int.from_bytes(message[:4], "little")  # the type last: it publishes the message
        self.delivered += 1
        sint = outlet.synic.sints[messages.INTERCEPTION_SINT]
        if not sint & msrs.SINT_POLLING:
            rung.append((outlet, sint & msrs.SINT_VECTOR))

    def interrupt(self, rung: Rung) -> None:
        """Sends what the lock's holder has collected; without the lock."""
        for outlet, vector in rung:
            vp = outlet.vp
            msi = outlet.msi
            if not msi or msi[8] != vector:
                msi = outlet.msi = msi_message(MSI_BASE | vp.apic_id << 12, vector)
            vp.interrupts += 1
            vp.partition.vm.signal_msi(msi)

    # --- what root VPs do ---------------------------------------------------------------------------------------------
    def advance(self, outlet: Outlet) -> None:
        """EOM with messages waiting."""
        rung: Rung = []
        with self.lock:
            if outlet.queue and outlet.ready:
                self._advance(outlet, rung)
        self.interrupt(rung)

    def refresh(self, outlet: Outlet) -> None:
        """SynIC registers of the outlet's VP changed, by an exit of that very VP: its handler does not run now."""
        rung: Rung = []
        with self.lock:
            synic = outlet.synic
            ready = (
                bool(synic.scontrol & 1)
                and synic.simp.enabled
                and not synic.sints[messages.INTERCEPTION_SINT] & msrs.SINT_MASKED
            )
            moving: list[bytes] = []
            if ready != outlet.ready:
                outlet.ready = ready
                if ready:
                    moving, self._waiting = self._waiting, []
                else:
                    moving = self._take_back(outlet)
            for message in moving:
                self._place(message, outlet.vp, rung)
            self.rings.refresh(outlet, rung)
        self.interrupt(rung)

    def _take_back(self, outlet: Outlet) -> list[bytes]:
        """Everything that this root VP has not seen, in order. Its rings' messages are not worth anything elsewhere."""
        moving = []
        if outlet.words[0]:
            length = messages.MESSAGE_HEADER.size + min(outlet.octets[4], messages.MESSAGE_PAYLOAD_MAX)
            outlet.octets[_FLAGS] = 0
            moving.append(bytes(outlet.octets[:length]))
            outlet.words[0] = messages.MESSAGE_NONE
        moving += outlet.queue
        outlet.queue.clear()
        return [message for message in moving if message not in outlet.sint_messages]

    def came_online(self, outlet: Outlet) -> None:
        """See :meth:`Outlet.came_online`."""
        rung: Rung = []
        with self.lock:
            self.rings.came_online(outlet, rung)
        self.interrupt(rung)

    # --- the end of a partition ---------------------------------------------------------------------------------------
    def purge(self, partition_id: int) -> bool:
        """Forgets what waits from that partition, whose VPs have stopped. False while a slot holds one of its messages:
        its interrupt is pending, so whoever asks lets the root run on and asks again (T3)."""
        sender = partition_id.to_bytes(8, "little")
        with self.lock:
            for key in [key for key in self._opaque if key[0] == partition_id]:
                del self._opaque[key]
            self._waiting = [message for message in self._waiting if message[_SENDER] != sender]
            for outlet in self.outlets:
                outlet.queue[:] = [message for message in outlet.queue if message[_SENDER] != sender]
            return not any(outlet.words[0] and outlet.octets[_SENDER] == sender for outlet in self.outlets)
