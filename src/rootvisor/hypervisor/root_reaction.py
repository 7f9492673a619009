# SPDX-License-Identifier: Apache-2.0
"""Time for the root to act upon what a guest wrote, before the guest goes on.

A guest powers off by writing a byte into a register of its chip set, and then reads the next register in a loop (Linux:
``drivers/acpi/acpica/hwesleep.c``). The VMM's main thread takes note and interrupts RUN_VP, once. QEMU's processor
thread forgets an interruption that comes while it is not in RUN_VP, or in it with the guest's next intercept ready
(``accel/mshv/mshv-all.c``: ``sa_ipi_handler``); then both go on for ever. So after a byte to a device the VP stays out
of the guest until the root's VPs have become idle, which they are as soon as nobody in there has anything to do about
the byte. Other writes are not delayed: drivers write words, and many.
"""

from __future__ import annotations

import os
from time import monotonic, sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: After this long the guest goes on all the same.
LIMIT_S = 0.25
_LOOK_S = 0.002
#: So many looks in a row find every VP idle.
_QUIET = 2


def thread_is_idle(thread_id: int) -> bool:
    """Whether a thread of this process sleeps, as that of a VP does that has executed HLT. True when there is none."""
    try:
        fd = os.open(f"/proc/self/task/{thread_id}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        stat = os.read(fd, 512)
    finally:
        os.close(fd)
    return stat.rpartition(b") ")[2][:1] not in (b"R", b"D")


def wait(threads: Iterable[int], urgent: Callable[[], bool]) -> None:
    """Returns when all the threads (ids of the kernel) are idle, when `urgent` says so, or after LIMIT_S."""
    chosen = [thread for thread in threads if thread]
    end = monotonic() + LIMIT_S
    quiet = 0
    while quiet < _QUIET and not urgent() and monotonic() < end:
        sleep(_LOOK_S)
        quiet = quiet + 1 if all(map(thread_is_idle, chosen)) else 0
