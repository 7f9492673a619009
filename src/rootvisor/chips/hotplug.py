# SPDX-License-Identifier: Apache-2.0
"""PCI functions that come and go on bus 0: a block of general-purpose events, and registers with a bit for each slot.

The operating system's side is AML (:mod:`rootvisor.boot.acpi_hotplug`): event 1 has it read which slots are new and
which shall be ejected, and it writes what it has ejected. Source of the event block: ACPI 6.5, 4.8.4.
"""

from __future__ import annotations

from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

GPE_BYTES = 4
REGISTER_BYTES = 12
_EVENT = 1 << 1
_INSERTED, _EJECT_ASKED, _EJECT = 0, 4, 8


class GeneralEvents:
    """Status (two bytes, written ones clear) and enable bits (two bytes). ``sci(level)`` drives the interrupt."""

    __slots__ = ("_enable", "_lock", "_sci", "_status")

    def __init__(self, sci: Callable[[int], None]) -> None:
        self._sci = sci
        self._status = self._enable = 0
        self._lock = allocate_lock()

    def raise_event(self, bits: int) -> None:
        """Something happened."""
        with self._lock:
            self._status |= bits
            self._update()

    def read(self, offset: int, size: int) -> int:
        """Any part of the four bytes."""
        return (self._status | self._enable << 16) >> offset * 8 & (1 << size * 8) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Any part of them."""
        with self._lock:
            for index in range(size):
                byte, at = value >> index * 8 & 0xFF, offset + index
                if at < 2:
                    self._status &= ~(byte << at * 8)
                elif at < GPE_BYTES:
                    shift = (at - 2) * 8
                    self._enable = self._enable & ~(0xFF << shift) | byte << shift
            self._update()

    def _update(self) -> None:
        self._sci(int(bool(self._status & self._enable)))

    def save(self) -> dict[str, Any]:
        """The registers."""
        return {"status": self._status, "enable": self._enable}

    def restore(self, state: dict[str, Any]) -> None:
        """What :meth:`save` gave; the interrupt line is the interrupt controller's to restore."""
        self._status, self._enable = state["status"] & 0xFFFF, state["enable"] & 0xFFFF


class PciSlots:
    """The registers: slots with something new (reading clears), slots to eject (likewise), slots that were ejected.

    ``ejected(number)`` is called in the thread of the guest's access.
    """

    __slots__ = ("_asked", "_ejected", "_events", "_inserted", "_lock")

    def __init__(self, events: GeneralEvents, ejected: Callable[[int], None]) -> None:
        self._events = events
        self._ejected = ejected
        self._inserted = self._asked = 0
        self._lock = allocate_lock()

    def inserted(self, number: int) -> None:
        """There is a function in slot ``number`` now."""
        with self._lock:
            self._inserted |= 1 << number
        self._events.raise_event(_EVENT)

    def ask_to_eject(self, number: int) -> None:
        """The operating system shall let the function in slot ``number`` go."""
        with self._lock:
            self._asked |= 1 << number
        self._events.raise_event(_EVENT)

    def read(self, offset: int, size: int) -> int:
        """Whole registers; anything else reads as zero."""
        value = 0
        if size == 4:
            with self._lock:
                if offset == _INSERTED:
                    value, self._inserted = self._inserted, 0
                elif offset == _EJECT_ASKED:
                    value, self._asked = self._asked, 0
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Ejects."""
        if offset != _EJECT or size != 4:
            return
        for number in range(32):
            if value >> number & 1:
                self._ejected(number)

    def save(self) -> dict[str, Any]:
        """What has not been read yet."""
        return {"inserted": self._inserted, "asked": self._asked}

    def restore(self, state: dict[str, Any]) -> None:
        """What :meth:`save` gave."""
        self._inserted, self._asked = state["inserted"] & 0xFFFF_FFFF, state["asked"] & 0xFFFF_FFFF
