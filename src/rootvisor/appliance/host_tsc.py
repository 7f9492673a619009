# SPDX-License-Identifier: Apache-2.0
"""The frequency of this machine's time stamp counter, which is also that of the emulated processor.

QEMU TCG answers RDTSC with the host's counter. The appliance's kernel would calibrate it against an emulated timer
between two reads of which the host may run something else for a while, and is off by up to half a percent on a busy
machine; everything that is loaded before it corrects itself a second later (KVM) keeps the wrong figure.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable

#: rdtsc; shl rdx,32; or rax,rdx; ret
_CODE = bytes.fromhex("0f31 48c1e220 4809d0 c3")
#: Two readings this far apart give the frequency to about 20 ppm; KVM tolerates 250.
_LEAST_SECONDS = 0.02
_READINGS = 16
_PLAUSIBLE_KHZ = range(100_000, 20_000_000)


class TscMeasurement:
    """Measures between its construction and :meth:`khz`, so that what lies between costs no further time."""

    def __init__(self) -> None:
        self._code: mmap.mmap | None = None
        self._start: tuple[int, int] | None = None
        if os.uname().machine == "x86_64":
            try:
                self._code = mmap.mmap(
                    -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
                )
            except OSError:  # a hardened machine; the appliance calibrates for itself
                return
            self._code.write(_CODE)
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
            self._rdtsc: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
            self._start = self._reading()

    def khz(self) -> int | None:
        """Counts per millisecond; None where they cannot be told. Waits until enough time has passed."""
        if self._start is None:
            return None
        first_ns, first = self._start
        rest = first_ns / 1e9 + _LEAST_SECONDS - time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
        if rest > 0:
            time.sleep(rest)
        last_ns, last = self._reading()
        khz = round((last - first) * 1_000_000 / (last_ns - first_ns))
        return khz if khz in _PLAUSIBLE_KHZ else None

    def _reading(self) -> tuple[int, int]:
        """Nanoseconds and count of one moment: the closest of several readings, should one be interrupted."""
        clock, rdtsc = time.clock_gettime_ns, self._rdtsc
        raw = time.CLOCK_MONOTONIC_RAW
        best = (1 << 62, 0, 0)
        for _ in range(_READINGS):
            before = clock(raw)
            count = rdtsc()
            after = clock(raw)
            best = min(best, (after - before, (before + after) // 2, count))
        return best[1], best[2]
