# SPDX-License-Identifier: Apache-2.0
"""The real-time clock (MC146818 at ports 0x70/0x71) and the ACPI power management timer."""

from __future__ import annotations

from time import gmtime, monotonic_ns, time

PM_TIMER_HZ = 3_579_545

_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR = 0, 2, 4, 6, 7, 8, 9
_STATUS_A, _STATUS_B, _STATUS_C, _STATUS_D = 10, 11, 12, 13
_CENTURY = 0x32
_STATUS_A_RUNNING = 0x26  # 32.768 kHz base, 1024 Hz rate
_STATUS_B_SET, _STATUS_B_BINARY, _STATUS_B_24_HOURS = 0x80, 0x04, 0x02
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


class PmTimer:
    """A free-running 32-bit counter at 3.579545 MHz (ACPI 6.5, 4.8.3.3)."""

    __slots__ = ()

    def read(self, offset: int, size: int) -> int:
        """The counter."""
        count = monotonic_ns() * PM_TIMER_HZ // 1_000_000_000 & 0xFFFFFFFF
        return count >> (offset * 8) & (1 << (size * 8)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Read-only."""
