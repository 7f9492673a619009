# SPDX-License-Identifier: Apache-2.0
"""Time for the root to act upon what a guest wrote, before the guest goes on.

A guest powers off by writing into a register of its chip set, and then reads the next register in a loop (Linux:
``drivers/acpi/acpica/hwesleep.c``, a byte in memory; ``hwsleep.c``, a word at a port). The VMM's main thread takes note
and interrupts RUN_VP, once. QEMU's processor thread forgets an interruption that comes while it is not in RUN_VP, or in
it with the guest's next intercept ready: its loop ends with a failed RUN_VP and with nothing else
(``accel/mshv/mshv-all.c``: ``mshv_cpu_exec``, ``sa_ipi_handler``), and there is never a second signal
(``system/cpus.c``: ``cpus_kick_thread``). Then both go on for ever. So after such a write the VP stays out of the guest
until the root's VPs have become idle, which they are as soon as nobody in there has anything to do about it. Other
writes are not delayed: they are many, and queues of devices are notified with words in memory.
"""

from __future__ import annotations

import os
from time import monotonic, sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: KVM_EXIT_IO's first bytes for OUT of a word: direction, size.
OUT_WORD = 0x0201
#: The data port of PCI configuration mechanism 1 (four ports) and VGA's registers take words all the time.
_CONFIGURATION = range(0xCFC, 0xD00)
_VGA = range(0x3B0, 0x3E0)
#: After this long the guest goes on all the same.
LIMIT_S = 0.25
_LOOK_S = 0.002
#: So many looks in a row find every VP idle.
_QUIET = 2


def is_command(port: int) -> bool:
    """Whether a word written to that port may be one that the VMM acts upon at once: power management is."""
    return port not in _CONFIGURATION and port not in _VGA


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
