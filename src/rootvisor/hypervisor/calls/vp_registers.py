# SPDX-License-Identifier: Apache-2.0
"""GET and SET_VP_REGISTERS, TRANSLATE_VIRTUAL_ADDRESS (TLFS; kernel ``drivers/hv/mshv_root_hv_call.c``)."""

from __future__ import annotations

from ...kvm import abi
from ...tlfs import hypercalls, privileges, registers, status, translation
from .. import own_registers, page_walk, register_page, synthetic_registers, vp_registers
from ..errors import HvError
from ..hypercall_table import TABLE
from ..register_elements import read_each, write_each

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..child_vp import ChildVp
    from ..guest_vp import GuestVp
    from ..vp import VirtualProcessor

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_CPL = abi.SYNC_SREGS_AT + abi.SREGS_SS + abi.SEGMENT_DPL


def _child_vp(vp: VirtualProcessor, partition_id: int, vp_index: int, vtl: int) -> ChildVp | None:
    """The child's VP that a call names; None: one of the caller's own partition (:func:`_own_vp`)."""
    caller = vp.partition
    partition = caller.hypervisor.partition(caller, partition_id)
    if vtl & 0x1F:
        raise HvError(status.INVALID_PARAMETER)
    if partition is not caller:
        return partition.vp(vp_index)  # type: ignore[return-value]
    if vp_index != registers.VP_INDEX_SELF:
        partition.vp(vp_index)
    if not caller.privileges & (privileges.ACCESS_VP_REGISTERS | privileges.CREATE_PARTITIONS):
        raise HvError(status.ACCESS_DENIED)
    return None


def _own_vp(vp: VirtualProcessor, vp_index: int) -> GuestVp | None:
    """The VP of the caller's own partition. None: the calling VP of a root or child, which has the hypervisor's
    registers only.

    HV_STATUS_INVALID_VP_STATE for another VP of a root or child: it runs.
    """
    partition = vp.partition
    index = vp.index if vp_index == registers.VP_INDEX_SELF else vp_index
    if partition.hypervisor.guest is partition:
        return partition.vp(index)  # type: ignore[return-value]
    if index != vp.index:
        raise HvError(status.INVALID_VP_STATE)
    return None


def _by_its_thread(own: GuestVp, vp: VirtualProcessor, work: Callable[[], object]) -> None:
    """Has ``own`` do the work outside of the guest, for ``vp``, which holds Hypervisor.lock: the other may want it to
    come that far."""
    lock = vp.partition.hypervisor.lock
    lock.release()
    try:
        own.errand(work, vp)  # type: ignore[arg-type]
    finally:
        lock.acquire()


@TABLE.rep(
    hypercalls.GET_VP_REGISTERS,
    hypercalls.VP_REGISTERS_INPUT,
    registers.GET_ELEMENT_SIZE,
    registers.VALUE_SIZE,
)
def get_vp_registers(
    vp: VirtualProcessor,
    elements: memoryview,
    output: memoryview,
    start: int,
    count: int,
    partition_id: int,
    vp_index: int,
    vtl: int,
    _reserved: bytes,
) -> int:
    """16 bytes per name. INVALID_PARAMETER: a name that does not exist here; INVALID_VP_STATE: the VP runs."""
    target = _child_vp(vp, partition_id, vp_index, vtl)
    names = elements.cast("I")
    if target is not None:
        register_page.absorb(target)
        return vp_registers.read_many(target, names, output, start, count, vp.deadline)
    own = _own_vp(vp, vp_index)
    if own is not None:
        _by_its_thread(own, vp, lambda: own_registers.read_many(own, names, output, start, count))
        return count
    read_each(names, output, start, count, lambda name: synthetic_registers.get(vp, name))
    return count


@TABLE.rep(hypercalls.SET_VP_REGISTERS, hypercalls.VP_REGISTERS_INPUT, registers.SET_ELEMENT_SIZE)
def set_vp_registers(
    vp: VirtualProcessor,
    elements: memoryview,
    _output: memoryview,
    start: int,
    count: int,
    partition_id: int,
    vp_index: int,
    vtl: int,
    _reserved: bytes,
) -> int:
    """Stores values in order.

    INVALID_PARAMETER: unknown or read-only name; INVALID_REGISTER_VALUE; INVALID_VP_STATE: the VP runs.
    """
    target = _child_vp(vp, partition_id, vp_index, vtl)
    if target is not None:
        register_page.absorb(target)
        try:
            return vp_registers.write_many(target, elements, start, count, vp)
        finally:
            if not target.running:
                register_page.fill(target)
            target.may_be_awake()
    own = _own_vp(vp, vp_index)
    if own is not None:
        _by_its_thread(own, vp, lambda: own_registers.write_many(own, elements, start, count))
        return count
    write_each(elements, start, count, lambda name, value: synthetic_registers.set(vp, name, value))
    return count


@TABLE.simple(
    hypercalls.TRANSLATE_VIRTUAL_ADDRESS, registers.TRANSLATE_INPUT, registers.TRANSLATE_OUTPUT.size
)
def translate_virtual_address(
    vp: VirtualProcessor, partition_id: int, vp_index: int, flags: int, gva_page: int
) -> bytes:
    """Walks a child VP's page tables; the status is SUCCESS also when the walk fails, the code in the answer says why.

    A page that the walk reaches is valid whether there is memory or not: devices are read through it.
    """
    target = _child_vp(vp, partition_id, vp_index, flags >> 56)
    if target is None:
        mine = vp_index in (registers.VP_INDEX_SELF, vp.index)
        raise HvError(status.INVALID_PARAMETER if mine else status.INVALID_VP_STATE)
    if target.running:
        raise HvError(status.INVALID_VP_STATE)
    register_page.absorb(target)
    exempt = flags & translation.PRIVILEGE_EXEMPT
    walk = page_walk.translate(
        target,
        gva_page << 12 & _MASK64,
        write=bool(flags & translation.VALIDATE_WRITE),
        execute=bool(flags & translation.VALIDATE_EXECUTE),
        user=None if exempt else target.u8[_CPL] == 3,
        set_bits=bool(flags & translation.SET_PAGE_TABLE_BITS),
    )
    return registers.TRANSLATE_OUTPUT.pack(walk.code, registers.CACHE_WRITE_BACK, 0, walk.gpa >> 12)
