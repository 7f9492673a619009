# SPDX-License-Identifier: Apache-2.0
"""A virtual processor's thread: runs it, and answers what it stops for."""

from __future__ import annotations

from _thread import allocate_lock, start_new_thread

from ..mshv import MshvError
from ..tlfs import intercepts as types
from ..tlfs import registers as layout
from .emulation import Emulation, GuestFault, cannot_go_on
from .message_fields import ACCESS, EOI_VECTOR, LENGTH, PORT, PORT_INFO, PORT_RAX, RIP, STATE, TYPE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..bus.address_space import GuestMemory, MmioSpace, PortSpace
    from ..chips.ioapic import IoApic
    from ..mshv import Vp

_PAGE_RAX = layout.PAGE_GENERAL >> 3
_PAGE_RIP = layout.PAGE_RIP >> 3
_PAGE_DIRTY = layout.PAGE_DIRTY >> 2
_DIRTY_RIP = layout.DIRTY_RIP
_DIRTY_RIP_GENERAL = layout.DIRTY_RIP | layout.DIRTY_GENERAL

_IO_COMPLEX = types.IO_STRING | types.IO_REP
_KEEP = {1: ~0xFF, 2: ~0xFFFF, 4: 0}
_STOP_TIMEOUT_S = 30.0


class Processor:
    """Runs ``vp`` on a thread of its own.

    ``failed(reason)``: the guest cannot go on, and it is not its own wish; ``reset(detail)``: it did what resets a
    processor. Both are called from the thread, and return; then the thread waits to be stopped.
    """

    __slots__ = (
        "_emulation", "_ended", "_failed", "_go", "_held", "_io_apic", "_mmio", "_over", "_parked", "_pause", "_ports",
        "_reset", "_stop", "exits", "vp",
    )  # fmt: skip

    def __init__(
        self,
        vp: Vp,
        ports: PortSpace,
        mmio: MmioSpace,
        memory: GuestMemory,
        io_apic: IoApic,
        failed: Callable[[str], None],
        reset: Callable[[str], None],
    ) -> None:
        self.vp = vp
        self._ports = ports
        self._mmio = mmio
        self._io_apic = io_apic
        self._failed = failed
        self._reset = reset
        self._emulation = Emulation(vp, ports, mmio, memory)
        self._pause = False
        self._held = False
        self._stop = False
        #: free while the thread is parked: paused, or not started
        self._parked = allocate_lock()
        #: free while the thread may run
        self._go = allocate_lock()
        #: free once the thread shall end
        self._over = allocate_lock()
        self._over.acquire()
        #: held while the thread lives
        self._ended = allocate_lock()
        #: message type -> how often
        self.exits: dict[int, int] = {}

    # --- from other threads -----------------------------------------------------------------------------------------
    def start(self) -> None:
        """Starts the thread."""
        self._ended.acquire()
        self._parked.acquire()
        try:
            start_new_thread(self._body, ())
        except RuntimeError as error:
            self._parked.release()
            self._ended.release()
            raise OSError("this machine has no more threads; raise the limit (ulimit -u)") from error

    def ask_to_pause(self) -> None:
        """Has the thread park; :meth:`await_pause` says when it has."""
        self._go.acquire()
        self._pause = True

    def await_pause(self) -> None:
        """Waits until nothing of the processor runs. OSError when that takes half a minute."""
        self.vp.interrupt(timeout=_STOP_TIMEOUT_S)
        if not self._parked.acquire(timeout=_STOP_TIMEOUT_S):
            raise OSError(f"virtual processor {self.vp.index} does not stop")
        self._held = True

    def resume(self) -> None:
        """Undoes a pause that was awaited."""
        self._pause = self._held = False
        self._parked.release()
        self._go.release()

    def stop(self) -> None:
        """Ends the thread, paused or not, and waits for that."""
        if not self._stop:
            self._stop = True
            self._over.release()
        if not self._ended.locked():
            return
        if self._held:
            self.resume()
        elif self._go.locked():
            self._go.release()
        self.vp.interrupt(timeout=_STOP_TIMEOUT_S)
        self._ended.acquire(timeout=_STOP_TIMEOUT_S)

    # --- the thread -------------------------------------------------------------------------------------------------
    def _body(self) -> None:
        try:
            self._run()
        except MshvError as error:
            if not self._stop:
                self._failed(f"virtual processor {self.vp.index}: {error}")
                self._wait_for_end()
        except Exception as error:  # a defect of ours ends this guest, with its name
            self._failed(
                f"virtual processor {self.vp.index}: internal error: {type(error).__name__}: {error}"
            )
            self._wait_for_end()
        finally:
            self._ended.release()

    def _wait_for_end(self) -> None:
        """The processor cannot go on: the thread is as good as paused, until the machine is taken apart."""
        self._parked.release()
        self._over.acquire()
        self._over.release()

    def _park(self) -> None:
        self._parked.release()
        self._go.acquire()
        self._go.release()
        self._parked.acquire()

    def _run(self) -> None:
        vp = self.vp
        wait = vp.wait
        message = vp.message
        u8, u16, u32, u64 = message, message.cast("H"), message.cast("I"), message.cast("Q")
        page = vp.register_page
        page32, page64 = page.u32, page.u64
        read, write = self._ports.read, self._ports.write
        exits = self.exits
        keep = _KEEP
        if self._pause:
            self._park()
        while True:
            if not wait():
                if self._stop:
                    return
                if self._pause:
                    self._park()
                continue
            kind = u32[TYPE]
            exits[kind] = exits.get(kind, 0) + 1
            if kind == types.X64_IO_PORT_INTERCEPT:
                info = u8[PORT_INFO]
                if info & _IO_COMPLEX:
                    self._emulate(message)
                    continue
                size = info & 7
                if u8[ACCESS] == types.ACCESS_WRITE:
                    write(u16[PORT], size, u64[PORT_RAX] & (1 << 8 * size) - 1)
                    page64[_PAGE_RIP] = u64[RIP] + (u8[LENGTH] & 15)
                    page32[_PAGE_DIRTY] |= _DIRTY_RIP
                else:
                    value = read(u16[PORT], size)
                    page64[_PAGE_RAX] = u64[PORT_RAX] & keep[size] & 0xFFFF_FFFF_FFFF_FFFF | value
                    page64[_PAGE_RIP] = u64[RIP] + (u8[LENGTH] & 15)
                    page32[_PAGE_DIRTY] |= _DIRTY_RIP_GENERAL
                if u16[STATE] & types.STATE_INTERRUPT_SHADOW:
                    self._emulation.end_shadow()
            elif kind == types.UNMAPPED_GPA or kind == types.GPA_INTERCEPT:
                self._emulate(message)
            elif kind == types.X64_APIC_EOI:
                self._io_apic.eoi(u32[EOI_VECTOR])
            elif kind == types.UNRECOVERABLE_EXCEPTION:
                self._reset(f"triple fault of virtual processor {vp.index} at {u64[RIP]:#x}")
                self._wait_for_end()
                return
            else:
                self._failed(f"virtual processor {vp.index} {cannot_go_on(message)}")
                self._wait_for_end()
                return

    def _emulate(self, message: memoryview) -> None:
        try:
            self._emulation.run(message)
        except GuestFault as fault:
            self._failed(f"virtual processor {self.vp.index} {fault}")
            self._wait_for_end()
