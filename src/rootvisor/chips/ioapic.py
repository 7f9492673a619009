# SPDX-License-Identifier: Apache-2.0
"""The I/O APIC (Intel 82093AA, with the EOI register of version 0x20): 24 pins to interrupt messages.

Registers are behind an index and a window (datasheet 290566, 3.0); the EOI register is that of Intel's I/O controller
hubs (ICH9 datasheet, 13.5).
"""

from __future__ import annotations

from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PINS = 24
VERSION = 0x20
#: Bytes of the register block.
SIZE = 0x1000

_INDEX, _WINDOW, _EOI = 0x00, 0x10, 0x40
_ID, _VERSION, _ARBITRATION, _REDIRECTION = 0, 1, 2, 0x10
_ID_MASK = 0x0F00_0000

# a redirection entry
_VECTOR = 0xFF
_MODE_SHIFT = 8
_LOGICAL = 1 << 11
_REMOTE_IRR = 1 << 14
_LEVEL = 1 << 15
_MASKED = 1 << 16
_DESTINATION_SHIFT = 56
_WRITABLE = 0xFF00_0000_0001_AFFF  # all but delivery status and remote IRR, and reserved bits

# delivery modes
FIXED, LOWEST_PRIORITY, SMI, NMI, INIT, EXTINT = 0, 1, 2, 4, 5, 7


class IoApic:
    """``deliver(destination, logical, delivery_mode, vector, level)`` sends a message to the local APICs.

    It is called without the chip's lock held, so that it may call back. Level is what a device asserts, 1 or 0: the
    polarity of an entry is stored and means nothing here. Sources that share a pin are combined by whoever drives it.
    """

    __slots__ = ("_deliver", "_entries", "_id", "_index", "_lock", "_pins")

    def __init__(self, deliver: Callable[[int, bool, int, int, bool], None], apic_id: int = 0) -> None:
        self._deliver = deliver
        self._id = apic_id << 24 & _ID_MASK
        self._index = 0
        self._pins = 0
        self._entries = [_MASKED] * PINS
        self._lock = allocate_lock()

    # --- pins -----------------------------------------------------------------------------------------------------
    def set_pin(self, pin: int, level: int) -> None:
        """Drives a pin. An edge that finds its entry masked is lost (datasheet 3.2.4)."""
        bit = 1 << pin
        with self._lock:
            if bool(self._pins & bit) == bool(level):
                return
            self._pins ^= bit
            message = self._edge(pin) if level else None
        if message is not None:
            self._deliver(*message)

    def eoi(self, vector: int) -> None:
        """A processor has ended the level-triggered interrupt ``vector``: pins that are still asserted ask again."""
        messages = []
        with self._lock:
            for pin, entry in enumerate(self._entries):
                if entry & _REMOTE_IRR and entry & _VECTOR == vector:
                    self._entries[pin] = entry & ~_REMOTE_IRR
                    message = self._level(pin)
                    if message is not None:
                        messages.append(message)
        for message in messages:
            self._deliver(*message)

    def deliver_in_service(self) -> None:
        """Sends the messages again whose end has not come: after a restore, to whoever counts on hearing of it."""
        with self._lock:
            messages = [_message(entry) for entry in self._entries if entry & _REMOTE_IRR]
        for message in messages:
            self._deliver(*message)

    def _edge(self, pin: int) -> tuple[int, bool, int, int, bool] | None:
        """The message of a pin that was just asserted."""
        entry = self._entries[pin]
        if entry & _MASKED:
            return None
        if _is_level(entry):
            return self._level(pin)
        return _message(entry)

    def _level(self, pin: int) -> tuple[int, bool, int, int, bool] | None:
        """The message of a level-triggered pin, if it is asserted and the processors do not know of it yet."""
        entry = self._entries[pin]
        if not _is_level(entry) or entry & (_MASKED | _REMOTE_IRR) or not self._pins >> pin & 1:
            return None
        self._entries[pin] = entry | _REMOTE_IRR
        return _message(entry)

    # --- registers ------------------------------------------------------------------------------------------------
    def read(self, offset: int, size: int) -> int:
        """The register at ``offset``; a narrower access gets a part of it. Nothing lies between the registers."""
        with self._lock:
            value = self._read(offset & ~3)
        return value >> (offset & 3) * 8 & (1 << size * 8) - 1

    def _read(self, offset: int) -> int:
        if offset == _INDEX:
            return self._index
        if offset != _WINDOW:
            return 0
        index = self._index
        if index in (_ID, _ARBITRATION):
            return self._id
        if index == _VERSION:
            return VERSION | (PINS - 1) << 16
        pin = (index - _REDIRECTION) >> 1
        if not 0 <= pin < PINS:
            return 0
        return self._entries[pin] >> (index & 1) * 32 & 0xFFFF_FFFF

    def write(self, offset: int, size: int, value: int) -> None:
        """The register at ``offset``. The window takes 32 bits only."""
        if offset == _INDEX:
            self._index = value & 0xFF
        elif offset == _EOI:
            self.eoi(value & 0xFF)
        elif offset == _WINDOW and size >= 4:
            with self._lock:
                message = self._write(value & 0xFFFF_FFFF)
            if message is not None:
                self._deliver(*message)

    def _write(self, value: int) -> tuple[int, bool, int, int, bool] | None:
        index = self._index
        if index == _ID:
            self._id = value & _ID_MASK
        pin = (index - _REDIRECTION) >> 1
        if not 0 <= pin < PINS:
            return None
        entry = self._entries[pin]
        if index & 1:
            written = entry & 0xFFFF_FFFF | value << 32
        else:
            written = entry >> 32 << 32 | value
        entry = written & _WRITABLE | entry & _REMOTE_IRR
        if not entry & _LEVEL:
            entry &= ~_REMOTE_IRR  # how a driver clears it where there is no EOI register
        self._entries[pin] = entry
        return self._level(pin)

    # --- snapshots ------------------------------------------------------------------------------------------------
    def save(self) -> dict[str, Any]:
        """Registers and levels of the pins."""
        with self._lock:
            return {"id": self._id, "index": self._index, "pins": self._pins, "entries": list(self._entries)}

    def restore(self, state: dict[str, Any]) -> None:
        """What :meth:`save` gave. Nothing is delivered: what had been is in the local APICs.

        ValueError, KeyError or TypeError for what cannot be such a state.
        """
        entries = [entry & (_WRITABLE | _REMOTE_IRR) for entry in state["entries"]]
        if len(entries) != PINS:
            raise ValueError(f"an I/O APIC has {PINS} pins, the saved one {len(entries)}")
        identity, index, pins = state["id"] & _ID_MASK, state["index"] & 0xFF, state["pins"] & (1 << PINS) - 1
        with self._lock:
            self._id, self._index, self._pins, self._entries = identity, index, pins, entries


def _is_level(entry: int) -> bool:
    """Level-triggered; SMI, NMI, INIT and ExtINT are edges whatever the entry says (datasheet 3.2.4)."""
    return bool(entry & _LEVEL) and entry >> _MODE_SHIFT & 7 in (FIXED, LOWEST_PRIORITY)


def _message(entry: int) -> tuple[int, bool, int, int, bool]:
    return (
        entry >> _DESTINATION_SHIFT,
        bool(entry & _LOGICAL),
        entry >> _MODE_SHIFT & 7,
        entry & _VECTOR,
        _is_level(entry),
    )
