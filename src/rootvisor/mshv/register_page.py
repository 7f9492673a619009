# SPDX-License-Identifier: Apache-2.0
"""The page through which a stopped processor's registers are read and written without a call.

Layout: ``struct hv_vp_register_page`` (Linux: ``include/hyperv/hvhdk.h``). What is written becomes the processor's when
it runs next, and before any call on its registers; the page says by dirty bits what was written.
"""

from __future__ import annotations

from rootvisor.tlfs import registers as layout

from .segments import Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_DIRTY = layout.PAGE_DIRTY >> 2


class _Register:
    """A 64-bit register of the page; with a dirty class it can be written."""

    __slots__ = ("_dirty", "_index")

    def __init__(self, offset: int, dirty: int = 0) -> None:
        self._index = offset >> 3
        self._dirty = dirty

    def __get__(self, page: RegisterPage, owner: type[RegisterPage] | None = None) -> int:
        return page.u64[self._index]

    def __set__(self, page: RegisterPage, value: int) -> None:
        if not self._dirty:
            raise AttributeError(
                "the hypervisor takes only general registers, RIP, RFLAGS, XMM0-5 and segments from the page"
            )
        page.u64[self._index] = value & _MASK
        page.u32[_DIRTY] |= self._dirty


class _Segment:
    """A segment register of the page."""

    __slots__ = ("_index",)

    def __init__(self, offset: int) -> None:
        self._index = offset >> 3

    def __get__(self, page: RegisterPage, owner: type[RegisterPage] | None = None) -> Segment:
        return Segment.from_value(page.u64[self._index] | page.u64[self._index + 1] << 64)

    def __set__(self, page: RegisterPage, value: Segment) -> None:
        number = int(value)
        page.u64[self._index] = number & _MASK
        page.u64[self._index + 1] = number >> 64
        page.u32[_DIRTY] |= layout.DIRTY_SEGMENTS


def _general(number: int) -> _Register:
    return _Register(layout.PAGE_GENERAL + 8 * number, layout.DIRTY_GENERAL)


class RegisterPage:
    """Registers of a stopped processor as attributes: ``page.rip += message.instruction_length``.

    Control registers, ``efer``, ``dr7``, ``xfem``, ``pending_interruption`` and ``interrupt_state`` are read-only.
    ``u32`` and ``u64`` are the whole page in these units, for who wants it quicker.
    """

    __slots__ = ("_map", "u8", "u32", "u64")

    rax = _general(0)
    rcx = _general(1)
    rdx = _general(2)
    rbx = _general(3)
    rsp = _general(4)
    rbp = _general(5)
    rsi = _general(6)
    rdi = _general(7)
    r8 = _general(8)
    r9 = _general(9)
    r10 = _general(10)
    r11 = _general(11)
    r12 = _general(12)
    r13 = _general(13)
    r14 = _general(14)
    r15 = _general(15)
    rip = _Register(layout.PAGE_RIP, layout.DIRTY_RIP)
    rflags = _Register(layout.PAGE_RFLAGS, layout.DIRTY_RFLAGS)
    es = _Segment(layout.PAGE_SEGMENTS)
    cs = _Segment(layout.PAGE_SEGMENTS + 16)
    ss = _Segment(layout.PAGE_SEGMENTS + 32)
    ds = _Segment(layout.PAGE_SEGMENTS + 48)
    fs = _Segment(layout.PAGE_SEGMENTS + 64)
    gs = _Segment(layout.PAGE_SEGMENTS + 80)
    cr0 = _Register(layout.PAGE_CR0)
    cr3 = _Register(layout.PAGE_CR3)
    cr4 = _Register(layout.PAGE_CR4)
    cr8 = _Register(layout.PAGE_CR8)
    efer = _Register(layout.PAGE_EFER)
    dr7 = _Register(layout.PAGE_DR7)
    xfem = _Register(layout.PAGE_XFEM)
    pending_interruption = _Register(layout.PAGE_PENDING_INTERRUPTION)
    interrupt_state = _Register(layout.PAGE_INTERRUPT_STATE)

    def __init__(self, page: mmap.mmap) -> None:
        self._map = page
        self.u8 = memoryview(page)
        self.u32 = self.u8.cast("I")
        self.u64 = self.u8.cast("Q")

    @property
    def version(self) -> int:
        """1."""
        return self.u8[0] | self.u8[1] << 8

    @property
    def valid(self) -> bool:
        """Whether the hypervisor has put registers into the page."""
        return bool(self.u8[layout.PAGE_VALID])

    @property
    def dirty(self) -> int:
        """Which classes were written since the hypervisor took them: ``tlfs.registers.DIRTY_*``."""
        return self.u32[_DIRTY]

    def xmm(self, number: int) -> int:
        """XMM0 to XMM5."""
        at = self._xmm(number)
        return self.u64[at] | self.u64[at + 1] << 64

    def set_xmm(self, number: int, value: int) -> None:
        """Writes XMM0 to XMM5."""
        at = self._xmm(number)
        self.u64[at] = value & _MASK
        self.u64[at + 1] = value >> 64 & _MASK
        self.u32[_DIRTY] |= layout.DIRTY_XMM

    def _xmm(self, number: int) -> int:
        if not 0 <= number < 6:
            raise ValueError("the page has XMM0 to XMM5")
        return (layout.PAGE_XMM >> 3) + 2 * number

    def general(self, number: int) -> int:
        """A general register by its number in instructions: 0 RAX, 1 RCX, 2 RDX, 3 RBX, ... 15 R15."""
        return self.u64[(layout.PAGE_GENERAL >> 3) + number]

    def set_general(self, number: int, value: int) -> None:
        """Writes a general register by its number."""
        self.u64[(layout.PAGE_GENERAL >> 3) + number] = value & _MASK
        self.u32[_DIRTY] |= layout.DIRTY_GENERAL

    def close(self) -> None:
        """Unmaps the page."""
        for view in (self.u64, self.u32, self.u8):
            view.release()
        self._map.close()
