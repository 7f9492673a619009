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

The root may be idle for a moment and yet have something to do: code of the VMM that runs for the first time is read
from a disk. So a guest that then reads the same register again and again (:class:`Watch`) waits before each of these
reads, until the root has been idle for longer.
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
#: So many looks in a row find every VP idle; after a read that is repeated, many more.
QUIET = 2
QUIET_AT_POLL = 25
#: A port that has had so many words is no place for commands: old virtio devices are notified with words at ports.
_OFTEN = 32
_PORTS = 256
#: The accesses after a command that are watched.
_WATCHED = 32


class Watch:
    """Which of a VP's writes are commands, and whether it only reads one register again and again after one."""

    __slots__ = ("_last", "_words", "left")

    def __init__(self) -> None:
        #: how many words the VP has written, by port
        self._words: dict[int, int] = {}
        #: accesses that are still looked at; while it is 0 nobody need call :meth:`polls`
        self.left = 0
        self._last = (-1, -1)

    def is_command(self, port: int) -> bool:
        """Whether the word that the VP writes to that port may be one that the VMM acts upon at once, as power
        management is."""
        if port in _CONFIGURATION or port in _VGA:
            return False
        if len(self._words) >= _PORTS:
            self._words.clear()
        count = self._words[port] = self._words.get(port, 0) + 1
        return count <= _OFTEN

    def command(self) -> None:
        """The VP has written one."""
        self.left = _WATCHED
        self._last = (-1, -1)

    def polls(self, rip: int, place: int, write: bool) -> bool:
        """The VP's next access, of the instruction at ``rip`` to the address or port ``place``: whether it is the read
        that it did last."""
        self.left -= 1
        last, self._last = self._last, (-1, -1) if write else (rip, place)
        return not write and last == (rip, place)


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


def wait(threads: Iterable[int], urgent: Callable[[], bool], wanted: int = QUIET) -> None:
    """Returns when `wanted` looks in a row, 2 ms apart, have found all the threads (ids of the kernel) idle, when
    `urgent` says so, or after LIMIT_S."""
    chosen = [thread for thread in threads if thread]
    end = monotonic() + LIMIT_S
    quiet = 0
    while quiet < wanted and not urgent() and monotonic() < end:
        sleep(_LOOK_S)
        quiet = quiet + 1 if all(map(thread_is_idle, chosen)) else 0
