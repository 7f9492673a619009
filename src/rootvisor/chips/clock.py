# SPDX-License-Identifier: Apache-2.0
"""The real-time clock (MC146818 at ports 0x70/0x71) and the ACPI power management timer."""

from __future__ import annotations

from time import gmtime, monotonic_ns, time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PM_TIMER_HZ = 3_579_545

_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR = 0, 2, 4, 6, 7, 8, 9
_STATUS_A, _STATUS_B, _STATUS_C, _STATUS_D = 10, 11, 12, 13
_CENTURY = 0x32
_STATUS_A_RUNNING = 0x26  # 32.768 kHz base, 1024 Hz rate
_STATUS_B_BINARY, _STATUS_B_24_HOURS = 0x04, 0x02
_STATUS_D_VALID = 0x80


class RealTimeClock:
    """Shows the host's time in UTC. Setting it is accepted and forgotten with the run; there are no alarms."""

    __slots__ = ("_index", "_ram")

    def __init__(self) -> None:
        self._index = 0
        self._ram = bytearray(128)
        self._ram[_STATUS_A] = _STATUS_A_RUNNING
        self._ram[_STATUS_B] = _STATUS_B_24_HOURS

    def read(self, offset: int, size: int) -> int:
        """Port 0x70 reads as ones, 0x71 is the register behind the index."""
        if offset == 0 or size != 1:
            return (1 << (size * 8)) - 1
        index = self._index
        if index in (_STATUS_A, _STATUS_B):
            return self._ram[index]
        if index == _STATUS_C:
            return 0
        if index == _STATUS_D:
            return _STATUS_D_VALID
        now = gmtime(time())
        values = {
            _SECONDS: now.tm_sec, _MINUTES: now.tm_min, _HOURS: now.tm_hour, _WEEKDAY: (now.tm_wday + 1) % 7 + 1,
            _DAY: now.tm_mday, _MONTH: now.tm_mon, _YEAR: now.tm_year % 100, _CENTURY: now.tm_year // 100,
        }  # fmt: skip
        value = values.get(index)
        if value is None:
            return self._ram[index]
        if self._ram[_STATUS_B] & _STATUS_B_BINARY:
            return value
        return value // 10 << 4 | value % 10

    def write(self, offset: int, size: int, value: int) -> None:
        """Index, or the register behind it."""
        if size != 1:
            return
        if offset == 0:
            self._index = value & 0x7F
        elif self._index not in (_STATUS_C, _STATUS_D):
            self._ram[self._index] = value

    def save(self) -> dict[str, Any]:
        """Index and registers; the time is the host's."""
        return {"index": self._index, "ram": bytes(self._ram)}

    def restore(self, state: dict[str, Any]) -> None:
        """What :meth:`save` gave. ValueError, KeyError or TypeError for what cannot be such a state."""
        index, ram = state["index"] & 0x7F, bytearray(memoryview(state["ram"]))
        if len(ram) != len(self._ram):
            raise ValueError(f"a real-time clock has {len(self._ram)} registers, the saved one {len(ram)}")
        self._index, self._ram = index, ram


class PmTimer:
    """A free-running 32-bit counter at 3.579545 MHz (ACPI 6.5, 4.8.3.3)."""

    __slots__ = ("_offset",)

    def __init__(self) -> None:
        self._offset = 0

    def _count(self) -> int:
        return monotonic_ns() * PM_TIMER_HZ // 1_000_000_000 + self._offset & 0xFFFF_FFFF

    def read(self, offset: int, size: int) -> int:
        """The counter."""
        return self._count() >> (offset * 8) & (1 << (size * 8)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Read-only."""

    def save(self) -> dict[str, Any]:
        """The count."""
        return {"count": self._count()}

    def restore(self, state: dict[str, Any]) -> None:
        """What :meth:`save` gave: counts on from there. KeyError or TypeError for what cannot be such a state."""
        self._offset += state["count"] - self._count()
