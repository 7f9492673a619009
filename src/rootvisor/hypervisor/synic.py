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

#: Messages that wait for one SINT's slot before posters get INSUFFICIENT_BUFFERS (TLFS: 16 per port).
QUEUE_LIMIT = 16


class Synic:
    """``interrupt(vector)`` delivers a fixed edge interrupt to this VP's local APIC."""

    __slots__ = ("_interrupt", "_lock", "_queues", "scontrol", "siefp", "simp", "sints", "sirbp")

    def __init__(
        self, simp: OverlayPage, siefp: OverlayPage, sirbp: OverlayPage, interrupt: Callable[[int], None]
    ) -> None:
        self.scontrol = 0
        self.simp = simp
        self.siefp = siefp
        self.sirbp = sirbp
        self.sints = [msrs.SINT_MASKED] * messages.SINT_COUNT
        self._queues: list[list[bytes]] = [[] for _ in range(messages.SINT_COUNT)]
        self._interrupt = interrupt
        self._lock = allocate_lock()

    def write_sint(self, sint: int, value: int) -> None:
        """An unmasked vector below 16 is refused (TLFS "SINTx registers")."""
        if not value & msrs.SINT_MASKED and value & msrs.SINT_VECTOR < 16:
            raise GeneralProtection
        self.sints[sint] = value

    def post_message(self, sint: int, message_type: int, sender: int, payload: bytes) -> None:
        """Places a message in the SINT's slot, or queues it and marks the resident one as having a successor.

        HV_STATUS_INVALID_SYNIC_STATE when the SynIC or the message page is off, INSUFFICIENT_BUFFERS when the queue is
        full, INVALID_PARAMETER for a payload over 240 bytes.
        """
        if len(payload) > messages.MESSAGE_PAYLOAD_MAX or not message_type:
            raise HvError(status.INVALID_PARAMETER)
        if not self.scontrol & 1 or not self.simp.enabled:
            raise HvError(status.INVALID_SYNIC_STATE)
        message = messages.MESSAGE_HEADER.pack(message_type, len(payload), 0, sender) + payload
        with self._lock:
            queue = self._queues[sint]
            if len(queue) >= QUEUE_LIMIT:
                self._deliver(sint)  # the guest may have freed the slot and forgotten EOM
            if len(queue) >= QUEUE_LIMIT:
                raise HvError(status.INSUFFICIENT_BUFFERS)
            queue.append(message)
            self._deliver(sint)

    def end_of_message(self) -> None:
        """EOM: every SINT whose slot is free gets its next message."""
        if not self.scontrol & 1 or not self.simp.enabled:
            return  # what waits is kept
        with self._lock:
            for sint, queue in enumerate(self._queues):
                if queue:
                    self._deliver(sint)

    def _deliver(self, sint: int) -> None:
        """Moves the head of the queue into a free slot. Called with the lock held."""
        page = self.simp.view
        base = sint * messages.MESSAGE_SLOT_SIZE
        queue = self._queues[sint]
        if any(page[base : base + 4]):
            page[base + messages.MESSAGE_FLAGS_OFFSET] |= messages.MESSAGE_FLAG_PENDING
            # The guest may have freed the slot before it saw the flag; then nobody would write EOM.
            if any(page[base : base + 4]):
                return
        message = queue.pop(0)
        page[base + 4 : base + len(message)] = message[4:]
        if queue:
            page[base + messages.MESSAGE_FLAGS_OFFSET] |= messages.MESSAGE_FLAG_PENDING
        page[base : base + 4] = message[:4]  # the type last: it publishes the message
        self._raise(sint)

    def signal_event(self, sint: int, flag: int) -> None:
        """Sets an event flag; interrupts on the change from clear to set only."""
        if not 0 <= flag < messages.EVENT_FLAGS_PER_SINT:
            raise HvError(status.INVALID_PARAMETER)
        if not self.scontrol & 1 or not self.siefp.enabled or self.sints[sint] & msrs.SINT_MASKED:
            raise HvError(status.INVALID_SYNIC_STATE)
        with self._lock:
            page = self.siefp.view
            offset = sint * messages.MESSAGE_SLOT_SIZE + flag // 8
            bit = 1 << (flag % 8)
            if page[offset] & bit:
                return
            page[offset] |= bit
        self._raise(sint)

    def _raise(self, sint: int) -> None:
        value = self.sints[sint]
        if not value & (msrs.SINT_MASKED | msrs.SINT_POLLING):
            self._interrupt(value & msrs.SINT_VECTOR)

    def reset(self) -> None:
        """INIT: SINTs masked, pages off, queues empty."""
        with self._lock:
            self.scontrol = 0
            for sint in range(messages.SINT_COUNT):
                self.sints[sint] = msrs.SINT_MASKED
                self._queues[sint].clear()
            for page in (self.simp, self.siefp, self.sirbp):
                page.disable()
