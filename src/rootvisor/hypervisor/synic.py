# SPDX-License-Identifier: Apache-2.0
"""The synthetic interrupt controller of one VP: message and event flag pages, SINTs, queues (TLFS, PDF5 ch. 11)."""

from __future__ import annotations

from _thread import allocate_lock

from ..tlfs import messages, msrs, status
from .errors import GeneralProtection, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .overlay import OverlayPage
    from .root_messages import Outlet
    from .synthetic_timers import SyntheticTimer

#: Messages that wait for one SINT's slot before posters get INSUFFICIENT_BUFFERS (TLFS: 16 per port).
QUEUE_LIMIT = 16


class Synic:
    """``interrupt(vector)`` delivers a fixed edge interrupt to this VP's local APIC.

    In the root, ``outlet`` owns slot 0: only messages of the hypervisor's own come there (:mod:`.root_messages`).
    """

    __slots__ = (
        "_fence", "_interrupt", "_lock", "_queued", "_queues", "_timers", "auto_eoi", "mirror", "notify_sints",
        "outlet", "scontrol", "siefp", "simp", "sints", "sirbp", "watch",
    )  # fmt: skip

    def __init__(
        self, simp: OverlayPage, siefp: OverlayPage, sirbp: OverlayPage, interrupt: Callable[[int], None]
    ) -> None:
        self.scontrol = 0
        self.simp = simp
        self.siefp = siefp
        self.sirbp = sirbp
        self.sints = [msrs.SINT_MASKED] * messages.SINT_COUNT
        #: SINTs whose free slot the parent wants to hear of (register 0x10006 bits 63:48, one bit per SINT)
        self.notify_sints = 0
        self.outlet: Outlet | None = None
        self._queues: list[list[bytes]] = [[] for _ in range(messages.SINT_COUNT)]
        self._queued = 0
        #: timers whose message waits, by SINT; each brings its own buffer
        self._timers: list[list[SyntheticTimer]] = [[] for _ in range(messages.SINT_COUNT)]
        #: told of every new value of a SINT: KVM's local APIC has to know of automatic EOI
        self.mirror: Callable[[int, int], None] | None = None
        #: delivers an interrupt that ends by itself, where KVM's local APIC does not know of any
        self.auto_eoi: Callable[[int], None] | None = None
        #: told when something waits for its slot: :meth:`end_of_message` is to be called now and then from there on,
        #: until :meth:`waits` says no. A guest that writes EOI and no EOM gets the rest so.
        self.watch: Callable[[], None] | None = None
        self._interrupt = interrupt
        self._lock = allocate_lock()
        #: taking a lock is a full memory barrier; nobody ever waits for this one
        self._fence = allocate_lock()

    # --- registers ------------------------------------------------------------------------------------------------
    def write_scontrol(self, value: int) -> None:
        """SCONTROL: bit 0 enables, the rest is kept."""
        self.scontrol = value
        if self.outlet is not None:
            self.outlet.changed()
        self._retry_timers()

    def write_sint(self, sint: int, value: int) -> None:
        """An unmasked vector below 16 is refused (TLFS "SINTx registers")."""
        if not value & msrs.SINT_MASKED and value & msrs.SINT_VECTOR < 16:
            raise GeneralProtection
        self.sints[sint] = value
        if self.mirror is not None:
            self.mirror(sint, value)
        if self.outlet is not None:
            self.outlet.changed()

    def write_page(self, page: OverlayPage, value: int) -> None:
        """SIMP, SIEFP or SIRBP (``page`` is :attr:`simp`, :attr:`siefp` or :attr:`sirbp`)."""
        if self.outlet is not None:
            self.outlet.write_page(page, value)
        else:
            page.write(value)
        if page is self.simp:
            self._retry_timers()

    # --- messages -------------------------------------------------------------------------------------------------
    def accepts_messages(self) -> bool:
        """The SynIC and the message page are on."""
        return bool(self.scontrol & 1) and self.simp.enabled

    def post_message(self, sint: int, message_type: int, sender: int, payload: bytes) -> None:
        """Places a message in the SINT's slot, or queues it and marks the resident one as having a successor.

        HV_STATUS_INVALID_SYNIC_STATE when the SynIC or the message page is off, INSUFFICIENT_BUFFERS when the queue is
        full, INVALID_PARAMETER for a payload over 240 bytes and for a slot that belongs to the hypervisor.
        """
        if len(payload) > messages.MESSAGE_PAYLOAD_MAX or not message_type or self._reserved(sint):
            raise HvError(status.INVALID_PARAMETER)
        if not self.accepts_messages():
            raise HvError(status.INVALID_SYNIC_STATE)
        message = messages.MESSAGE_HEADER.pack(message_type, len(payload), 0, sender) + payload
        with self._lock:
            queue = self._queues[sint]
            if len(queue) >= QUEUE_LIMIT:
                self._deliver(sint)  # the guest may have freed the slot and forgotten EOM
            if len(queue) >= QUEUE_LIMIT:
                raise HvError(status.INSUFFICIENT_BUFFERS)
            queue.append(message)
            self._queued += 1
            self._deliver(sint)
        self._watched()

    def post_message_direct(self, sint: int, message: bytes) -> None:
        """The parent's way: ``message`` (header and payload, at most a slot) goes into the slot now, or not at all.

        HV_STATUS_OBJECT_IN_USE when the slot is not free (the resident message is marked, so that the guest writes
        EOM), INVALID_SYNIC_STATE when the SynIC or the message page is off, INVALID_PARAMETER for no type, a payload
        over 240 bytes or no such SINT.
        """
        if (
            not 0 <= sint < messages.SINT_COUNT
            or self._reserved(sint)
            or not any(message[:4])
            or message[4] > messages.MESSAGE_PAYLOAD_MAX
        ):
            raise HvError(status.INVALID_PARAMETER)
        if not self.accepts_messages():
            raise HvError(status.INVALID_SYNIC_STATE)
        with self._lock:
            if self._queues[sint] or self._occupied(sint):
                raise HvError(status.OBJECT_IN_USE)
            self._place(sint, message, False)

    def post_timer(self, timer: SyntheticTimer) -> None:
        """Places an expired timer's message, now or when the SynIC is on and the slot free."""
        with self._lock:
            self._timers[timer.sint].append(timer)
            self._queued += 1
            if self.accepts_messages():
                self._deliver(timer.sint)
        self._watched()

    def withdraw_timer(self, timer: SyntheticTimer) -> None:
        """The timer was stopped or set anew: its message is not to come any more."""
        with self._lock:
            for waiting in self._timers:
                if timer in waiting:
                    waiting.remove(timer)
                    self._queued -= 1

    def waits(self) -> bool:
        """Whether messages wait for their slots."""
        return bool(self._queued) and self.accepts_messages()

    def _watched(self) -> None:
        if self._queued and self.watch is not None:
            self.watch()

    def _retry_timers(self) -> None:
        """The SynIC may have come on: timers that expired before it have their messages."""
        if self._queued and self.outlet is None:
            self.end_of_message()

    def end_of_message(self) -> None:
        """EOM: every SINT whose slot is free gets its next message."""
        if self.outlet is not None:
            self.outlet.end_of_message()
        if not self._queued or not self.accepts_messages():
            return  # what waits is kept
        with self._lock:
            for sint in range(messages.SINT_COUNT):
                if self._queues[sint] or self._timers[sint]:
                    self._deliver(sint)

    def take_deliverable(self) -> int:
        """The SINTs of :attr:`notify_sints` whose slot is free now; they are asked for no longer."""
        free = self.deliverable()
        self.notify_sints &= ~free
        return free

    def deliverable(self) -> int:
        """The SINTs of :attr:`notify_sints` whose slot is free now."""
        wanted = self.notify_sints
        free = 0
        if not wanted or not self.accepts_messages():
            return 0
        with self._lock:
            for sint in range(messages.SINT_COUNT):
                if wanted >> sint & 1 and not self._queues[sint] and not self._occupied(sint):
                    free |= 1 << sint
        return free

    def _reserved(self, sint: int) -> bool:
        return sint == messages.INTERCEPTION_SINT and self.outlet is not None

    def _occupied(self, sint: int) -> bool:
        """Whether the slot holds a message, which then carries the pending flag."""
        page = self.simp.view
        base = sint * messages.MESSAGE_SLOT_SIZE
        if not any(page[base : base + 4]):
            return False
        page[base + messages.MESSAGE_FLAGS_OFFSET] |= messages.MESSAGE_FLAG_PENDING
        # The guest may have freed the slot before it saw the flag; then nobody would write EOM.
        with self._fence:
            pass
        return any(page[base : base + 4])

    def _deliver(self, sint: int) -> None:
        """Moves the head of the queue into a free slot. Called with the lock held."""
        queue, timers = self._queues[sint], self._timers[sint]
        if (queue or timers) and not self._occupied(sint):
            message = queue.pop(0) if queue else timers.pop(0).message()
            self._queued -= 1
            self._place(sint, message, bool(queue or timers))

    def _place(self, sint: int, message: bytes, more: bool) -> None:
        page = self.simp.view
        base = sint * messages.MESSAGE_SLOT_SIZE
        page[base + 4 : base + len(message)] = message[4:]
        page[base + messages.MESSAGE_FLAGS_OFFSET] = messages.MESSAGE_FLAG_PENDING if more else 0
        page[base : base + 4] = message[:4]  # the type last: it publishes the message
        self._raise(sint)

    # --- events ---------------------------------------------------------------------------------------------------
    def signal_event(self, sint: int, flag: int) -> None:
        """Sets an event flag; interrupts on the change from clear to set only.

        HV_STATUS_INVALID_SYNIC_STATE also when the SINT is masked.
        """
        if self.sints[sint] & msrs.SINT_MASKED:
            raise HvError(status.INVALID_SYNIC_STATE)
        self.set_event_flag(sint, flag)

    def set_event_flag(self, sint: int, flag: int) -> bool:
        """Sets an event flag and interrupts unless the SINT is masked; False when it was set already.

        HV_STATUS_INVALID_PARAMETER without such a SINT or flag, INVALID_SYNIC_STATE when SynIC or page is off.
        """
        if not 0 <= sint < messages.SINT_COUNT or not 0 <= flag < messages.EVENT_FLAGS_PER_SINT:
            raise HvError(status.INVALID_PARAMETER)
        if not self.scontrol & 1 or not self.siefp.enabled:
            raise HvError(status.INVALID_SYNIC_STATE)
        bit = sint * messages.EVENT_FLAGS_PER_SINT + flag
        with self._lock:
            page = self.siefp.view
            if page[bit >> 3] >> (bit & 7) & 1:
                return False
            _set_bit(page, bit)
        self._raise(sint)
        return True

    def signal_sint(self, sint: int) -> None:
        """Raises a SINT without a message or flag, as a device of the hypervisor's own may."""
        if self.scontrol & 1:
            self._raise(sint)

    def _raise(self, sint: int) -> None:
        value = self.sints[sint]
        if value & (msrs.SINT_MASKED | msrs.SINT_POLLING):
            return
        vector = value & msrs.SINT_VECTOR
        if self.auto_eoi is not None and self._ends_itself(vector):
            self.auto_eoi(vector)
        else:
            self._interrupt(vector)

    def _ends_itself(self, vector: int) -> bool:
        """Whether a SINT asks for automatic EOI of the vector; that of one is that of all who share it."""
        return any(
            value & msrs.SINT_AUTO_EOI and not value & msrs.SINT_MASKED and value & msrs.SINT_VECTOR == vector
            for value in self.sints
        )

    def reset(self) -> None:
        """INIT: SINTs masked, pages off, queues empty."""
        with self._lock:
            self.scontrol = 0
            self.notify_sints = 0
            for sint in range(messages.SINT_COUNT):
                self.sints[sint] = msrs.SINT_MASKED
                self._queues[sint].clear()
                self._timers[sint].clear()
                if self.mirror is not None:
                    self.mirror(sint, msrs.SINT_MASKED)
            self._queued = 0
        for page in (self.simp, self.siefp, self.sirbp):
            page.reset()
        if self.outlet is not None:
            self.outlet.changed()


def _set_bit(page: memoryview, bit: int) -> None:
    """Atomic with respect to the guest, which clears flags while we set others."""
    from ..kvm.atomic import set_bit  # events are rare, and it needs ctypes

    set_bit(page, bit)
