# SPDX-License-Identifier: Apache-2.0
"""VP state pages, and VP state that is too large for a register: local APIC, XSAVE image, SynIC pages, timers.

HVCALL_GET/SET_VP_STATE (contract child-partitions 4.4). The VP is parked. What is set and read again without the VP
running in between is the same to the byte.
"""

from __future__ import annotations

from struct import Struct

from ..kvm import abi
from ..kvm.errors import KvmError
from ..tlfs import status
from ..tlfs import vp_state as tlfs
from . import child_cpuid, register_page, vp_events, vp_registers
from .errors import HvError
from .fpu_image import MXCSR, MXCSR_MASK, SIZE, XSTATE_BV

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_vp import ChildVp
    from .overlay import OverlayPage

_WORDS = Struct("<44I")
_U64 = Struct("<Q")
_RESET_BY_INIT = (tlfs.SIM_PAGE, tlfs.SIEF_PAGE, tlfs.SYNTHETIC_TIMERS)
_PAGE = 4096
_ID = 0x20
_TPR = 0x80
_IRR = 0x200
_CURRENT_COUNT = 0x390
_APIC_BASE = (abi.SYNC_SREGS_AT + abi.SREGS_APIC_BASE) // 8
_CR8 = (abi.SYNC_SREGS_AT + abi.SREGS_CR8) // 8
_APIC_ENABLED, _X2APIC = 1 << 11, 1 << 10
_MXCSR_MASK = slice(MXCSR_MASK, MXCSR_MASK + 4)


def get_state(vp: ChildVp, kind: int) -> bytes:
    """The state of type ``kind``. HV_STATUS_INVALID_PARAMETER: no such type; INVALID_VP_STATE: the VP runs."""
    _require_parked(vp)
    if kind in _RESET_BY_INIT:
        vp.notice_init()
    if kind == tlfs.LAPIC:
        return _get_lapic(vp)
    if kind == tlfs.XSAVE:
        return _get_xsave(vp)
    if kind == tlfs.SIM_PAGE:
        return _get_page(vp.synic.simp)
    if kind == tlfs.SIEF_PAGE:
        return _get_page(vp.synic.siefp)
    if kind == tlfs.SYNTHETIC_TIMERS:
        return vp_registers.timers_state(vp)
    raise HvError(status.INVALID_PARAMETER)


def set_state(vp: ChildVp, kind: int, data: bytes) -> None:
    """Stores state of type ``kind``; ``data`` may be longer than the state.

    HV_STATUS_INVALID_PARAMETER: no such type, or data too short; INVALID_REGISTER_VALUE: KVM refuses it.
    """
    _require_parked(vp)
    if kind in _RESET_BY_INIT:
        vp.notice_init()
    try:
        if kind == tlfs.LAPIC:
            _set_lapic(vp, data)
        elif kind == tlfs.XSAVE:
            _set_xsave(vp, data)
        elif kind == tlfs.SIM_PAGE:
            _set_page(vp.synic.simp, data)
        elif kind == tlfs.SIEF_PAGE:
            _set_page(vp.synic.siefp, data)
        elif kind == tlfs.SYNTHETIC_TIMERS:
            if len(data) < tlfs.STIMERS_SIZE:
                raise HvError(status.INVALID_PARAMETER)
            vp_registers.set_timers_state(vp, data[: tlfs.STIMERS_SIZE])
        else:
            raise HvError(status.INVALID_PARAMETER)
    except KvmError:
        raise HvError(status.INVALID_REGISTER_VALUE) from None


def size(vp: ChildVp, kind: int) -> int:
    """Bytes of the state of type ``kind``: what a caller's pages must hold at least."""
    if kind == tlfs.XSAVE:
        return child_cpuid.max_xsave_size(vp.partition.hypervisor, vp.partition)
    return {tlfs.LAPIC: tlfs.LAPIC_SIZE, tlfs.SYNTHETIC_TIMERS: tlfs.STIMERS_SIZE}.get(kind, _PAGE)


def _require_parked(vp: ChildVp) -> None:
    if vp.running:
        raise HvError(status.INVALID_VP_STATE)


# --- state pages --------------------------------------------------------------------------------------------------
def map_page(vp: ChildVp, kind: int) -> int:
    """The number of the VP's page of type ``kind``, taken from the child's pool if there is none yet.

    HV_STATUS_INSUFFICIENT_MEMORY asks for a deposit. The page is zero, or filled with the registers.
    """
    mapped = vp.stored.state_pages
    if kind not in mapped:
        gpn = vp.partition.deposits.allocate()
        vp.partition.hypervisor.deposited.lend(gpn)
        page = vp.partition.hypervisor.root.memory.view(gpn << 12, _PAGE)
        page[:] = bytes(_PAGE)
        mapped[kind] = gpn
        if kind == tlfs.PAGE_INTERCEPT_MESSAGE:
            vp.message_page = page
        else:
            vp.register_page = page
            if not vp.running:
                register_page.fill(vp)
    return mapped[kind]


def unmap_page(vp: ChildVp, kind: int) -> None:
    """Gives the page back to the pool. A VP that loses its message page is suspended for it could tell no intercept.

    HV_STATUS_INVALID_PARAMETER: not mapped.
    """
    mapped = vp.stored.state_pages
    if kind in mapped and kind == tlfs.PAGE_INTERCEPT_MESSAGE:
        vp.suspend()  # lets Hypervisor.lock go while it waits
    if kind not in mapped:
        raise HvError(status.INVALID_PARAMETER)
    if kind == tlfs.PAGE_INTERCEPT_MESSAGE:
        vp.message_page = None
    else:
        register_page.absorb(vp)
        vp.register_page = None
    _give_back(vp, mapped.pop(kind))


def unmap_pages(vp: ChildVp) -> None:
    """Gives all state pages of a VP back that is about to be destroyed; its thread has ended."""
    vp.message_page = vp.register_page = None
    for gpn in vp.stored.state_pages.values():
        _give_back(vp, gpn)
    vp.stored.state_pages.clear()


def _give_back(vp: ChildVp, gpn: int) -> None:
    vp.partition.deposits.release(gpn)
    vp.partition.hypervisor.deposited.take_back(gpn)


# --- local APIC ---------------------------------------------------------------------------------------------------
def _x2apic(vp: ChildVp) -> bool:
    return vp.u64[_APIC_BASE] & (_APIC_ENABLED | _X2APIC) == _APIC_ENABLED | _X2APIC


def _word(page: bytearray, offset: int) -> int:
    return int.from_bytes(page[offset : offset + 4], "little")


def _commit(vp: ChildVp) -> None:
    """HV_STATUS_INVALID_VP_STATE when the VP has registers that no processor can have; running it tells which."""
    try:
        vp.vcpu.commit_sync_area()
    except KvmError:
        raise HvError(status.INVALID_VP_STATE) from None


def _get_lapic(vp: ChildVp) -> bytes:
    _commit(vp)  # the APIC's mode decides on the format
    page = vp.vcpu.lapic()
    words = [0 if offset is None else _word(page, offset) for offset in tlfs.LAPIC_REGISTERS]
    if _x2apic(vp):
        words[tlfs.LAPIC_ID] = vp.apic_id
    if vp_events.nmi_pending(vp):
        words[tlfs.LAPIC_IRR] |= tlfs.LAPIC_IRR_NMI
    # The timer in KVM goes on, the VP's time does not.
    if vp.stored.timer_count is None:
        vp.stored.timer_count = words[tlfs.LAPIC_CURRENT_COUNT]
    words[tlfs.LAPIC_CURRENT_COUNT] = vp.stored.timer_count
    return _WORDS.pack(*words)


def _set_lapic(vp: ChildVp, data: bytes) -> None:
    if len(data) < tlfs.LAPIC_SIZE:
        raise HvError(status.INVALID_PARAMETER)
    words = list(_WORDS.unpack_from(data))
    vcpu = vp.vcpu
    _commit(vp)
    page = vcpu.lapic()
    x2apic = _x2apic(vp)
    if x2apic and words[tlfs.LAPIC_ID] != vp.apic_id:
        raise HvError(status.INVALID_REGISTER_VALUE)
    nmi = bool(words[tlfs.LAPIC_IRR] & tlfs.LAPIC_IRR_NMI)
    words[tlfs.LAPIC_IRR] &= ~0xFFFF  # vectors that do not exist
    for offset, word in zip(tlfs.LAPIC_REGISTERS, words, strict=True):
        if offset is None or (x2apic and offset == _ID):
            continue
        page[offset : offset + 4] = word.to_bytes(4, "little")
    page[_TPR : _TPR + 4] = (vp.u64[_CR8] << 4 & 0xFF).to_bytes(4, "little")
    vcpu.set_lapic(page)
    vp_events.set_nmi_pending(vp, nmi)
    vp.stored.timer_count = words[tlfs.LAPIC_CURRENT_COUNT]


# --- XSAVE --------------------------------------------------------------------------------------------------------
def _components(vp: ChildVp) -> tuple[int, list[tuple[int, int, int, int]]]:
    """(all states, [(component, offset in the standard format, offset in the compacted one, size)])."""
    states = child_cpuid.xsave_states(vp.partition.hypervisor, vp.partition)
    known = child_cpuid.xsave_components(vp.partition.hypervisor)
    found = []
    at = tlfs.XSAVE_LEGACY_SIZE + tlfs.XSAVE_HEADER_SIZE
    for component in range(2, 63):
        if states >> component & 1:
            length, offset, aligned = known[component]
            if aligned:
                at = at + 63 & ~63
            found.append((component, offset, at, length))
            at += length
    return states, found


def _get_xsave(vp: ChildVp) -> bytes:
    states, components = _components(vp)
    child_cpuid.ensure(vp)
    image = vp.stored.fpu.load(vp)
    end = components[-1][2] + components[-1][3] if components else 576
    compacted = bytearray(end)
    compacted[:XSTATE_BV] = image[:XSTATE_BV]
    present = _U64.unpack_from(image, XSTATE_BV)[0] & states
    _U64.pack_into(compacted, XSTATE_BV, present)
    _U64.pack_into(compacted, XSTATE_BV + 8, states | tlfs.XSAVE_COMPACTED)
    for component, offset, at, length in components:
        if present >> component & 1:
            compacted[at : at + length] = image[offset : offset + length]
    return bytes(compacted)


def _set_xsave(vp: ChildVp, data: bytes) -> None:
    """An image in compacted format with any of the partition's states."""
    states, components = _components(vp)
    if len(data) < tlfs.XSAVE_LEGACY_SIZE + tlfs.XSAVE_HEADER_SIZE:
        raise HvError(status.INVALID_PARAMETER)
    present, layout = Struct("<QQ").unpack_from(data, XSTATE_BV)
    held = layout & ~tlfs.XSAVE_COMPACTED
    if not layout & tlfs.XSAVE_COMPACTED or held & ~states or present & ~held or any(data[528:576]):
        raise HvError(status.INVALID_REGISTER_VALUE)
    child_cpuid.ensure(vp)
    fpu = vp.stored.fpu
    image = fpu.load(vp)
    mask = int.from_bytes(image[_MXCSR_MASK], "little") or 0xFFBF
    if int.from_bytes(data[MXCSR : MXCSR + 4], "little") & ~mask:
        raise HvError(status.INVALID_REGISTER_VALUE)
    fresh = bytearray(SIZE)
    fresh[:XSTATE_BV] = data[:XSTATE_BV]
    fresh[_MXCSR_MASK] = image[_MXCSR_MASK]  # the processor's, not the guest's
    _U64.pack_into(fresh, XSTATE_BV, present)
    at = tlfs.XSAVE_LEGACY_SIZE + tlfs.XSAVE_HEADER_SIZE
    known = child_cpuid.xsave_components(vp.partition.hypervisor)
    for component, offset, _at, length in components:
        if held >> component & 1:
            if known[component][2]:
                at = at + 63 & ~63
            if at + length > len(data):
                raise HvError(status.INVALID_PARAMETER)
            if present >> component & 1:
                fresh[offset : offset + length] = data[at : at + length]
            at += length
    vp.vcpu.set_xsave(fresh)
    image[:] = fresh
    fpu.loaded = True
    fpu.changed = False


# --- SynIC pages --------------------------------------------------------------------------------------------------
def _get_page(page: OverlayPage) -> bytes:
    return bytes(page.view) if page.enabled else bytes(_PAGE)


def _set_page(page: OverlayPage, data: bytes) -> None:
    if len(data) < _PAGE:
        raise HvError(status.INVALID_PARAMETER)
    if page.enabled:
        page.view[:] = data[:_PAGE]
