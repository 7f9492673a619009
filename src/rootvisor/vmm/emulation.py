# SPDX-License-Identifier: Apache-2.0
"""Instructions that touch device memory: carried out here, on the stopped processor's registers.

The message tells which address the access was about; every other operand is found by having the hypervisor walk the
guest's page tables.
"""

from __future__ import annotations

from ..mshv import vp_calls
from ..tlfs import intercepts as types
from ..tlfs import registers as names
from ..tlfs import translation
from ..x86.emulator import emulate
from ..x86.processor import Fault, Unsupported
from .message_fields import (
    ACCESS,
    CS_ATTRIBUTES,
    MEMORY_BYTES,
    MEMORY_COUNT,
    MEMORY_GPA,
    MEMORY_GVA,
    MEMORY_INFO,
    PORT_BYTES,
    PORT_COUNT,
    RIP,
    STATE,
)
from .vector_registers import read_vector, write_vector

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..bus.address_space import GuestMemory, MmioSpace, PortSpace
    from ..mshv import Vp

_LONG, _DEFAULT_32 = 1 << 13, 1 << 14  # segment attributes L and D/B
_PAGE = 0xFFF
_LONGEST = 16
_GVA_VALID = types.MEMORY_GVA_VALID | types.MEMORY_GVA_GPA_VALID
_TRAP_FLAG = 1 << 8
_DEBUG, _SINGLE_STEP = 1, 1 << 14  # exception, and its bit in DR6
_PAGE_FAULT = 14
_PRESENT, _WRITE, _USER = 1, 2, 4  # error code of a page fault

#: Walks that end at an address, whether there is memory or not.
_TRANSLATED = (
    translation.SUCCESS,
    translation.GPA_UNMAPPED,
    translation.GPA_NO_READ_ACCESS,
    translation.GPA_NO_WRITE_ACCESS,
    translation.GPA_ILLEGAL_OVERLAY_ACCESS,
)

_NAMES = {
    types.INVALID_VP_REGISTER_VALUE: "cannot run with the registers that it has",
    types.UNSUPPORTED_FEATURE: "uses a feature that the hypervisor has not",
    types.X64_HALT: "is halted for good",
}


class GuestFault(Exception):
    """The guest does something that no machine of this kind carries out: one line."""


def cannot_go_on(message: memoryview) -> str:
    """What a message means that is never asked for."""
    kind = int.from_bytes(message[:4], "little")
    return _NAMES.get(kind, f"stopped with message {kind:#010x}, which this VMM does not know")


class Emulation:
    """A processor as :mod:`rootvisor.x86.emulator` wants it, between two runs of ``vp``."""

    __slots__ = (
        "_gpa_page", "_gva_page", "_memory", "_mmio", "_page", "_pages", "_ports", "_user", "count", "rip", "vp",
    )  # fmt: skip

    def __init__(self, vp: Vp, ports: PortSpace, mmio: MmioSpace, memory: GuestMemory) -> None:
        self.vp = vp
        self._ports = ports
        self._mmio = mmio
        self._memory = memory
        self._page = vp.register_page
        self.rip = 0
        self._user = False
        # The page that the message is about, and pages that were walked to for this instruction: GVA -> (GPA, writable)
        self._gva_page = -1
        self._gpa_page = 0
        self._pages: dict[int, tuple[int, bool]] = {}
        self.count = 0

    def run(self, message: memoryview) -> None:
        """Carries out the instruction of a message about memory or a port. GuestFault when that cannot be."""
        u16, u64 = message.cast("H"), message.cast("Q")
        self.count += 1
        self.rip = rip = u64[RIP]
        state, attributes = u16[STATE], u16[CS_ATTRIBUTES]
        self._user = state & types.STATE_CPL == 3
        self._pages.clear()
        if attributes & _LONG and state & types.STATE_EFER_LMA:
            bits = 64
        else:
            bits = 32 if attributes & _DEFAULT_32 else 16
        if message[0] == types.X64_IO_PORT_INTERCEPT & 0xFF and u16[1] == types.X64_IO_PORT_INTERCEPT >> 16:
            self._gva_page = -1
            code = bytes(message[PORT_BYTES : PORT_BYTES + message[PORT_COUNT]])
        else:
            if message[ACCESS] == types.ACCESS_EXECUTE:
                raise GuestFault(f"fetches instructions from {u64[MEMORY_GPA]:#x}, where there is no memory")
            if message[MEMORY_INFO] & _GVA_VALID == _GVA_VALID:
                self._gva_page = u64[MEMORY_GVA] & ~_PAGE
                self._gpa_page = u64[MEMORY_GPA] & ~_PAGE
            else:
                self._gva_page = -1
            code = bytes(message[MEMORY_BYTES : MEMORY_BYTES + message[MEMORY_COUNT]])
        page = self._page
        try:
            try:
                emulate(self, code or self._fetch(bits), bits)
            except Unsupported as problem:
                if not problem.incomplete:
                    raise
                emulate(self, self._fetch(bits), bits)
        except Unsupported as problem:
            raise GuestFault(f"at {rip:#x}: {problem}") from None
        except Fault as fault:
            if self.rip != rip:
                page.rip = self.rip
            self._inject(fault.vector, fault.error_code, fault.address)
            return
        page.rip = self.rip
        if page.rflags & _TRAP_FLAG:
            self._inject(_DEBUG, None, _SINGLE_STEP)
        if state & types.STATE_INTERRUPT_SHADOW:
            self.end_shadow()

    def end_shadow(self) -> None:
        """The instruction after STI or MOV SS is done: interrupts come again."""
        self.vp.set_registers(interrupt_state=self._page.interrupt_state & ~names.INTERRUPT_SHADOW)

    def _inject(self, vector: int, error_code: int | None, parameter: int) -> None:
        event = names.PENDING | names.EVENT_TYPE_EXCEPTION << 1 | vector << 16 | parameter << 64
        if error_code is not None:
            event |= names.EVENT_DELIVER_ERROR_CODE | error_code << 32
        self.vp.set_registers(pending_event0=event)

    def _fetch(self, bits: int) -> bytes:
        """The instruction's bytes from memory, as many as there are."""
        base = 0 if bits == 64 else self.segment_base(1)
        start = base + self.rip & (0xFFFF_FFFF_FFFF_FFFF if bits == 64 else 0xFFFF_FFFF)
        code = b""
        while len(code) < _LONGEST:
            at = start + len(code)
            count = min(_LONGEST - len(code), _PAGE + 1 - (at & _PAGE))
            walked = vp_calls.translate(self.vp, self.vp.index, at, translation.VALIDATE_EXECUTE)
            if walked.code not in _TRANSLATED or not self._memory.contains(walked.gpa, count):
                break
            code += bytes(self._memory.view(walked.gpa, count))
        return code

    # --- registers --------------------------------------------------------------------------------------------------
    @property
    def rflags(self) -> int:
        """Flags."""
        return self._page.rflags

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._page.rflags = value

    def general(self, number: int, /) -> int:
        """A general register."""
        return self._page.general(number)

    def set_general(self, number: int, value: int, /) -> None:
        """Writes one."""
        self._page.set_general(number, value)

    def segment_base(self, number: int, /) -> int:
        """Base of ES, CS, SS, DS, FS, GS."""
        return self._page.u64[(names.PAGE_SEGMENTS >> 3) + 2 * number]

    def stack_mask(self) -> int:
        """Width of the stack pointer."""
        return 0xFFFF_FFFF if self._page.ss.attributes & _DEFAULT_32 else 0xFFFF

    def vector(self, number: int, size: int, /) -> int:
        """A vector register."""
        return read_vector(self.vp, number, size)

    def set_vector(self, number: int, size: int, value: int, /) -> None:
        """Writes one."""
        write_vector(self.vp, number, size, value)

    # --- memory and ports -------------------------------------------------------------------------------------------
    def read(self, address: int, size: int, write_intent: bool, /) -> int:
        """Device memory, or RAM."""
        page = address & ~_PAGE
        if page == self._gva_page:
            return self._mmio.read(self._gpa_page | address & _PAGE, size)
        gpa = self._walk(address, write_intent) | address & _PAGE
        if self._memory.contains(gpa, size):
            return int.from_bytes(self._memory.view(gpa, size), "little")
        return self._mmio.read(gpa, size)

    def write(self, address: int, size: int, value: int, /) -> None:
        """Device memory, or RAM."""
        page = address & ~_PAGE
        if page == self._gva_page:
            self._mmio.write(self._gpa_page | address & _PAGE, size, value)
            return
        gpa = self._walk(address, True) | address & _PAGE
        if self._memory.contains(gpa, size):
            self._memory.view(gpa, size)[:] = value.to_bytes(size, "little")
        else:
            self._mmio.write(gpa, size, value)

    def probe(self, address: int, size: int, write: bool, /) -> None:
        """Whether the guest may."""
        page = address & ~_PAGE
        if page != self._gva_page:
            self._walk(address, write)

    def _walk(self, address: int, write: bool) -> int:
        """The GPA of the guest's page around ``address``; Fault when its page tables say no."""
        page = address & ~_PAGE
        known = self._pages.get(page)
        if known is not None and (known[1] or not write):
            return known[0]
        flags = translation.VALIDATE_WRITE if write else translation.VALIDATE_READ
        walked = vp_calls.translate(self.vp, self.vp.index, page, flags | translation.SET_PAGE_TABLE_BITS)
        if walked.code not in _TRANSLATED:
            code = (_WRITE if write else 0) | (_USER if self._user else 0)
            code |= 0 if walked.code == translation.PAGE_NOT_PRESENT else _PRESENT
            raise Fault(_PAGE_FAULT, code, address)
        self._pages[page] = (walked.gpa & ~_PAGE, write)
        return walked.gpa & ~_PAGE

    def input(self, port: int, size: int, /) -> int:
        """IN, INS."""
        return self._ports.read(port, size)

    def output(self, port: int, size: int, value: int, /) -> None:
        """OUT, OUTS."""
        self._ports.write(port, size, value)
