# SPDX-License-Identifier: Apache-2.0
"""A virtual processor: running it, its registers, the register page, its state."""

from __future__ import annotations

import mmap
import time
from _signal import SIGUSR1, pthread_kill  # type: ignore[import-not-found, unused-ignore]
from _thread import get_ident
from fcntl import ioctl

from rootvisor.tlfs import registers, translation

from . import abi, messages, vp_calls
from .errors import MshvError
from .handle import Handle
from .memory import Memory
from .register_page import RegisterPage
from .segments import Segment, Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from .partition import Partition

#: Types of :meth:`Vp.get_state` and :meth:`Vp.set_state`.
STATE_LAPIC = 0
STATE_XSAVE = 1
STATE_SIMP = 2
STATE_SIEFP = 3
STATE_SYNTHETIC_TIMERS = 4


def register_number(name: str | int) -> int:
    """The number of a register: ``"rip"`` or ``"RIP"`` (names of ``tlfs.registers``; ``"xmm3"``, ``"sint2"`` and the
    like too), or a number as it is. KeyError for an unknown name."""
    if isinstance(name, int):
        return name
    number = _NUMBERS.get(name)
    if number is None:
        number = _find_register(name.upper())
        _NUMBERS[name] = number
    return number


_NUMBERS: dict[str, int] = {}
#: First of a series -> how many there are.
_SERIES = {"XMM": 16, "FP_MMX": 8, "SINT": 16, "MTRR_PHYS_BASE": 16, "MTRR_PHYS_MASK": 16}


def _find_register(name: str) -> int:
    number = getattr(registers, name, None)
    if isinstance(number, int) and registers.register_name(number) == f"HV_REGISTER_{name}":
        return number
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :]
    if stem in _SERIES and digits and int(digits) < _SERIES[stem]:
        first = getattr(registers, stem + "0")
        assert isinstance(first, int)
        return first + int(digits)
    raise KeyError(f"there is no register {name.lower()}; see rootvisor.tlfs.registers")


class Vp(Handle):
    """A virtual processor of ``partition``. While a thread is in :meth:`run`, other calls on this object wait for it;
    the partition's (interrupts, properties) do not."""

    __slots__ = ("_buffer", "_interrupted", "_page", "_thread", "index", "message", "partition")

    def __init__(self, partition: Partition, index: int, fd: int) -> None:
        super().__init__(fd, partition._scratch)
        self.partition = partition
        self.index = index
        self._buffer = bytearray(abi.MESSAGE_SIZE)
        #: the last message as it came, for who wants it quicker than as an object
        self.message = memoryview(self._buffer)
        self._page: RegisterPage | None = None
        self._thread = 0
        self._interrupted = False

    # --- running --------------------------------------------------------------------------------------------------
    def run(self) -> messages.Message | None:
        """Runs the processor until it needs something: the message, or None when a signal came first.

        The processor stands at the instruction that caused the message. To let it go on, write what the instruction
        was to give into registers, and RIP, then call again. Faults of mapped memory never get here. A halted
        processor sleeps in this call until an interrupt comes. MshvError.
        """
        return messages.decode(self._buffer) if self.wait() else None

    def wait(self) -> bool:
        """As :meth:`run`, but leaves the message in :attr:`message` (256 bytes). False when a signal came first."""
        self._thread = get_ident()  # before the look at _interrupted: see interrupt()
        try:
            if self._interrupted:
                raise InterruptedError
            ioctl(self.fd, abi.RUN_VP, self._buffer)
        except InterruptedError:
            self._interrupted = False
            return False
        except OSError as error:
            raise MshvError("MSHV_RUN_VP", error.errno or 0) from error
        finally:
            self._thread = 0
        return True

    def interrupt(self, number: int = 0, timeout: float = 10.0) -> bool:
        """Makes :meth:`run` return None in the thread that is in it, and at once when none is; from another thread.

        Sends signal ``number`` (SIGUSR1 unless told), for which the process needs a handler, until the thread has
        left; the signal is not lost when it comes just before the ioctl. False after ``timeout`` seconds.
        """
        self._interrupted = True
        deadline = time.monotonic() + timeout
        while (thread := self._thread) and self._interrupted:
            try:
                pthread_kill(thread, number or SIGUSR1)
            except ProcessLookupError:
                break
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

    # --- registers ------------------------------------------------------------------------------------------------
    def get_registers(self, *names: str | int) -> list[int]:
        """Registers as integers of up to 128 bits, in the order of ``names``.

        rip, cr3 = vp.get_registers("rip", "cr3")
        """
        return vp_calls.get_registers(self, self.index, [register_number(name) for name in names])

    def get_segment(self, name: str | int) -> Segment:
        """A segment register: base, limit, selector, attributes."""
        return Segment.from_value(self.get_registers(name)[0])

    def get_table(self, name: str | int) -> Table:
        """IDTR or GDTR: base and limit."""
        return Table.from_value(self.get_registers(name)[0])

    def set_registers(
        self, _values: dict[str | int, int | Segment | Table] | None = None, /, **named: int | Segment | Table
    ) -> None:
        """Sets registers in the given order, with one hypercall.

            vp.set_registers(rip=0x1000, rflags=2, cs=Segment.code64())

        MshvError (``reps`` of them were set) when one is unknown to the hypervisor or its value is not allowed.
        """
        merged: dict[str | int, int | Segment | Table] = dict(_values or {})
        merged.update(named)
        pairs = [(register_number(name), int(value)) for name, value in merged.items()]
        vp_calls.set_registers(self, self.index, pairs)

    def translate(
        self, gva: int, *, write: bool = False, execute: bool = False, privileged: bool = False
    ) -> vp_calls.Translation:
        """Walks the guest's page tables as the processor would. ``privileged``: without regard to CPL."""
        flags = translation.VALIDATE_READ
        flags |= translation.VALIDATE_WRITE if write else 0
        flags |= translation.VALIDATE_EXECUTE if execute else 0
        flags |= translation.PRIVILEGE_EXEMPT if privileged else 0
        return vp_calls.translate(self, self.index, gva, flags)

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """What CPUID answers this processor: EAX, EBX, ECX, EDX."""
        return self.cpuid_values([(leaf, subleaf)])[0]

    def cpuid_values(self, leaves: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
        """What CPUID answers this processor for (leaf, subleaf), with one call."""
        return vp_calls.cpuid_values(self, self.index, leaves)

    @property
    def register_page(self) -> RegisterPage:
        """The page that the processor shares with this process; valid after :meth:`run` and before the next.

        MshvError where the hypervisor has none.
        """
        if self._page is None:
            self._page = RegisterPage(self._map_page(abi.MMAP_REGISTERS))
        return self._page

    def map_message_page(self) -> memoryview:
        """The page where the hypervisor writes intercept messages, read-only."""
        return memoryview(self._map_page(abi.MMAP_INTERCEPT_MESSAGE)).toreadonly()

    def _map_page(self, which: int) -> mmap.mmap:
        try:
            return mmap.mmap(self.fd, abi.PAGE, mmap.MAP_SHARED, offset=which * abi.PAGE)
        except OSError as error:
            raise MshvError("mmap", error.errno or 0) from error

    # --- state ----------------------------------------------------------------------------------------------------
    def get_state(self, kind: int) -> bytes:
        """State that is no register: :data:`STATE_LAPIC`, :data:`STATE_XSAVE`, ...

        LAPIC, SIMP and SIEFP have 4096 bytes, synthetic timers 200; XSAVE is a compacted image.
        """
        size = abi.PAGE
        while True:
            with Memory(size, name="state") as buffer:
                argument = bytearray(abi.VP_STATE_ARGUMENT.pack(kind, size, buffer.address))
                try:
                    self.ioctl(abi.GET_VP_STATE, argument)
                except MshvError:
                    needed = abi.VP_STATE_ARGUMENT.unpack(argument)[1]
                    if needed <= size:
                        raise
                    size = -(-needed // abi.PAGE) * abi.PAGE
                    continue
                return bytes(buffer.view[: abi.VP_STATE_ARGUMENT.unpack(argument)[1]])

    def set_state(self, kind: int, data: bytes) -> None:
        """Writes state that :meth:`get_state` gave."""
        size = max(1, -(-len(data) // abi.PAGE)) * abi.PAGE
        with Memory(size, name="state") as buffer:
            buffer.view[: len(data)] = data
            self.ioctl(abi.SET_VP_STATE, abi.VP_STATE_ARGUMENT.pack(kind, size, buffer.address))

    def close(self) -> None:
        """Closes the processor; the partition keeps it until it is closed itself. No thread may be in :meth:`run`."""
        page, self._page = self._page, None
        if page is not None:
            page.close()
        super().close()

    def __enter__(self) -> Vp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
