# SPDX-License-Identifier: Apache-2.0
"""The register page that a VMM maps (``hv_vp_register_page``; contract child-partitions 4.2).

The page is filled when a VP stops and after every change while it is stopped; the VMM stores into it and says in
``dirty`` which classes it has changed. Control registers and what follows are never taken from the page.
"""

from __future__ import annotations

from struct import Struct

from ..kvm import abi
from ..tlfs import registers as names
from . import segments, vp_events
from .fpu_image import XMM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_vp import ChildVp

_REGS = abi.SYNC_REGS_AT // 8
_SREGS = abi.SYNC_SREGS_AT // 8
_RAX, _RBX, _RCX, _RDX, _RSI, _RDI, _RSP, _RBP, _R8 = range(_REGS, _REGS + 9)
_RIP = _REGS + 16
_RFLAGS = _REGS + 17
_CR0 = _SREGS + abi.SREGS_CR0 // 8
_CR3, _CR4, _CR8, _EFER = _CR0 + 2, _CR0 + 3, _CR0 + 4, _CR0 + 5
_RFLAGS_VALID = 0x3F7FD7
_XMM_BYTES = 96
_XMM = slice(names.PAGE_XMM, names.PAGE_XMM + _XMM_BYTES)
_IMAGE_XMM = slice(XMM, XMM + _XMM_BYTES)
_SEGMENTS = slice(names.PAGE_SEGMENTS, names.PAGE_SEGMENTS + 96)
_FIRST = Struct("<HBxI8Q")
_REST = Struct("<10Q")
_GENERAL = Struct("<8Q")
_DIRTY = Struct("<I")
_DIRTY_REGS = abi.RUN_DIRTY_REGS // 8
_NOT_GENERAL = abi.SYNC_SREGS | abi.SYNC_EVENTS
#: Two words of ``struct kvm_vcpu_events``: exception, then interrupt (injected, nr, soft, shadow) and NMI (injected,
#: pending, masked).
_EVENTS = abi.SYNC_EVENTS_AT // 8
_INJECTED_SHADOW_MASKED = 0x00FF_00FF_FF00_00FF
#: R8-R15, RIP and RFLAGS lie in the same order here and in ``struct kvm_regs``.
_UPPER_PAGE = slice(names.PAGE_GENERAL + 64, names.PAGE_RFLAGS + 8)
_UPPER_RUN = slice(abi.SYNC_REGS_AT + 64, abi.SYNC_REGS_AT + 144)
_R8_PAGE = slice(names.PAGE_GENERAL + 64, names.PAGE_RIP)
_R8_RUN = slice(abi.SYNC_REGS_AT + 64, abi.SYNC_REGS_AT + 128)


def refresh(vp: ChildVp) -> None:
    """The VP has just stopped: fills the page. What was known of its FPU state is forgotten."""
    stored = vp.stored
    stored.fpu.forget()
    stored.dr7 = stored.xcr0 = None
    stored.page_filled = False
    fill(vp)


def fill(vp: ChildVp) -> None:
    """Fills the page of a VP that is parked; no-op without a page.

    When it has been filled since the VP stopped, and only general registers were changed, only they are written.
    """
    page = vp.register_page
    if page is None:
        return
    u64 = vp.u64
    u8 = vp.u8
    stored = vp.stored
    _FIRST.pack_into(
        page, 0, names.PAGE_VERSION, 1, 0,
        u64[_RAX], u64[_RCX], u64[_RDX], u64[_RBX], u64[_RSP], u64[_RBP], u64[_RSI], u64[_RDI],
    )  # fmt: skip
    page[_UPPER_PAGE] = u8[_UPPER_RUN]
    if (
        stored.page_filled
        and not u64[_DIRTY_REGS] & _NOT_GENERAL
        and not stored.fpu.changed
        and stored.dr7 is not None
        and stored.xcr0 is not None
    ):
        return
    stored.page_filled = True
    page[_XMM] = stored.fpu.load(vp)[_IMAGE_XMM]
    page[_SEGMENTS] = segments.pack_user_segments(u8)
    if stored.dr7 is None:
        stored.dr7 = vp.vcpu.dr7()
    if stored.xcr0 is None:
        # Only who may use XSETBV can have changed it.
        stored.xcr0 = vp.vcpu.xcr0() if vp.partition.hypervisor.root.xsave else 1
    if u64[_EVENTS] & 0xFF or u64[_EVENTS + 1] & _INJECTED_SHADOW_MASKED:
        interruption, state = vp_events.pending_interruption(vp), vp_events.interrupt_state(vp)
    else:
        interruption = state = 0
    _REST.pack_into(
        page, names.PAGE_CR0,
        u64[_CR0], u64[_CR3], u64[_CR4], u64[_CR8], u64[_EFER], stored.dr7,
        interruption, state, 0, stored.xcr0,
    )  # fmt: skip


def absorb(vp: ChildVp) -> None:
    """Takes over the classes that the VMM has marked, and clears the marks; no-op without a page or marks."""
    page = vp.register_page
    if page is None or vp.running:
        return
    (dirty,) = _DIRTY.unpack_from(page, names.PAGE_DIRTY)
    if not dirty:
        return
    u64 = vp.u64
    if dirty & names.DIRTY_GENERAL:
        (
            u64[_RAX], u64[_RCX], u64[_RDX], u64[_RBX], u64[_RSP], u64[_RBP], u64[_RSI], u64[_RDI],
        ) = _GENERAL.unpack_from(page, names.PAGE_GENERAL)  # fmt: skip
        vp.u8[_R8_RUN] = page[_R8_PAGE]
    if dirty & names.DIRTY_RIP:
        if vp.intercept_suspend:
            vp_events.end_shadow(vp)
        u64[_RIP] = int.from_bytes(page[names.PAGE_RIP : names.PAGE_RIP + 8], "little")
    if dirty & names.DIRTY_RFLAGS:
        flags = int.from_bytes(page[names.PAGE_RFLAGS : names.PAGE_RFLAGS + 8], "little")
        u64[_RFLAGS] = flags & _RFLAGS_VALID | 2
    if dirty & (names.DIRTY_GENERAL | names.DIRTY_RIP | names.DIRTY_RFLAGS):
        vp.mark_dirty(abi.SYNC_REGS)
    if dirty & names.DIRTY_SEGMENTS:
        segments.unpack_user_segments(vp.u8, page[_SEGMENTS])
        vp.mark_dirty(abi.SYNC_SREGS)
    if dirty & names.DIRTY_XMM:
        vp.stored.fpu.set_xmm(vp, page[_XMM])
    _DIRTY.pack_into(page, names.PAGE_DIRTY, 0)
