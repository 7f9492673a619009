# SPDX-License-Identifier: Apache-2.0
"""ACPI fixed hardware (PM1 event and control, power button) and the ways to reset (port 0xCF9, keyboard controller)."""

from __future__ import annotations

from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

S5_TYPE = 5
RESET_PORT = 0xCF9
RESET_VALUE = 6
KEYBOARD_COMMAND_PORT = 0x64
_KEYBOARD_RESET = 0xFE
_POWER_BUTTON = 1 << 8
_SCI_ENABLED = 1
_SLEEP_ENABLE = 1 << 13


class PowerManagement:
    """Ports: status (2 bytes), enable (2), control (2) at one base (ACPI 6.5, 4.8.3).

    ``sci(level)`` drives the system control interrupt, ``end(how, detail)`` ends the partition.
    """

    __slots__ = ("_enable", "_end", "_lock", "_sci", "_status")

    def __init__(self, sci: Callable[[int], None], end: Callable[[str, str], None]) -> None:
        self._sci = sci
        self._end = end
        self._status = 0
        self._enable = 0
        self._lock = allocate_lock()

    def press_power_button(self) -> None:
        """A person presses the button; the kernel decides what it means."""
        with self._lock:
            self._status |= _POWER_BUTTON
            self._update()

    @property
    def button_enabled(self) -> bool:
        """Whether a kernel listens to the button: one whose driver is loaded has enabled its event."""
        return bool(self._enable & _POWER_BUTTON)

    def read(self, offset: int, size: int) -> int:
        """Any part of the six bytes."""
        block = self._status | self._enable << 16 | _SCI_ENABLED << 32
        return block >> (offset * 8) & (1 << (size * 8)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Status bits are cleared by writing ones; SLP_EN with SLP_TYP 5 powers off."""
        with self._lock:
            for index in range(size):
                byte = value >> (index * 8) & 0xFF
                at = offset + index
                if at < 2:
                    self._status &= ~(byte << (at * 8))
                elif at < 4:
                    shift = (at - 2) * 8
                    self._enable = self._enable & ~(0xFF << shift) | byte << shift
                elif at == 5 and byte << 8 & _SLEEP_ENABLE and byte >> 2 & 7 == S5_TYPE:
                    self._end("poweroff", "ACPI S5")
            self._update()

    def _update(self) -> None:
        self._sci(int(bool(self._status & self._enable)))

    def save(self) -> dict[str, Any]:
        """Events and which of them are enabled."""
        with self._lock:
            return {"status": self._status, "enable": self._enable}

    def restore(self, state: dict[str, Any]) -> None:
        """What :meth:`save` gave; drives the interrupt accordingly.

        KeyError or TypeError for what cannot be such a state.
        """
        status, enable = state["status"] & 0xFFFF, state["enable"] & 0xFFFF
        with self._lock:
            self._status, self._enable = status, enable
            self._update()


class ResetControl:
    """Port 0xCF9: bits 1 and 2 together reset the machine."""

    __slots__ = ("_end", "_value")

    def __init__(self, end: Callable[[str, str], None]) -> None:
        self._end = end
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        """What was written, without the reset bit."""
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """A reset, or a stored value."""
        if value & RESET_VALUE == RESET_VALUE:
            self._end("reset", "reset register 0xCF9")
        self._value = value & 0xFB


class KeyboardReset:
    """The command port of a keyboard controller that is not there: reads as ones, 0xFE pulses the reset line."""

    __slots__ = ("_end",)

    def __init__(self, end: Callable[[str, str], None]) -> None:
        self._end = end

    def read(self, offset: int, size: int) -> int:
        """No controller."""
        return (1 << (size * 8)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Only the reset command means something."""
        if value & 0xFF == _KEYBOARD_RESET:
            self._end("reset", "keyboard controller")
