# SPDX-License-Identifier: Apache-2.0
"""TLB flushes by hypercall and the switch of address spaces (TLFS "Virtual MMU", PDF5 chapter 12).

Every flush empties the whole TLB of the VPs it names: more than asked is always legal.
"""

from __future__ import annotations

from ...tlfs import hypercalls, privileges, status
from ..errors import HvError
from ..hypercall_table import GUEST_TABLE
from .ipi import vps_in_mask, vps_in_set

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor

ALL_PROCESSORS, ALL_ADDRESS_SPACES, NON_GLOBAL_ONLY, EXTENDED_RANGES = 1, 2, 4, 8
_ELEMENT = 8
_ADDRESS_BITS = 52


def _check(vp: VirtualProcessor, address_space: int, flags: int, known: int) -> None:
    """INVALID_PARAMETER: an unknown flag, or an address space that is none."""
    if not vp.partition.features & privileges.FEATURE_EXTENDED_GVA_RANGES:
        known &= ~EXTENDED_RANGES
    if flags & ~known or (address_space >> _ADDRESS_BITS and not flags & ALL_ADDRESS_SPACES):
        raise HvError(status.INVALID_PARAMETER)


def _flush(vp: VirtualProcessor, targets: list[VirtualProcessor]) -> None:
    """On return no VP of ``targets`` runs with an old translation. Not under Hypervisor.lock: a target may need it."""
    if vp.partition.flush_all():  # type: ignore[attr-defined]
        return
    for target in targets:
        target.flush_wanted = True  # type: ignore[attr-defined]
    for target in targets:
        if target is not vp:
            target.await_flush()  # type: ignore[attr-defined]


def _masked(vp: VirtualProcessor, flags: int, mask: int) -> list[VirtualProcessor]:
    """An empty mask names everybody, as old guests have it (contract TLB-04)."""
    if flags & ALL_PROCESSORS or not mask:
        return vp.partition.vps
    return vps_in_mask(vp.partition, mask)


_SPACE = ALL_PROCESSORS | ALL_ADDRESS_SPACES | NON_GLOBAL_ONLY
_LIST = ALL_PROCESSORS | ALL_ADDRESS_SPACES | EXTENDED_RANGES


@GUEST_TABLE.simple(hypercalls.FLUSH_VIRTUAL_ADDRESS_SPACE, hypercalls.FLUSH_INPUT, alone=False)
def flush_virtual_address_space(vp: VirtualProcessor, address_space: int, flags: int, mask: int) -> None:
    """Empties the TLBs of VPs 0 to 63 by mask. INVALID_PARAMETER: flags, address space."""
    _check(vp, address_space, flags, _SPACE)
    _flush(vp, _masked(vp, flags, mask))


@GUEST_TABLE.rep(hypercalls.FLUSH_VIRTUAL_ADDRESS_LIST, hypercalls.FLUSH_INPUT, _ELEMENT)
def flush_virtual_address_list(
    vp: VirtualProcessor,
    _elements: memoryview,
    _output: memoryview,
    _start: int,
    count: int,
    address_space: int,
    flags: int,
    mask: int,
) -> int:
    """The same for ranges of addresses. INVALID_PARAMETER: flags, address space."""
    _check(vp, address_space, flags, _LIST)
    _flush(vp, _masked(vp, flags, mask))
    return count


@GUEST_TABLE.variable(hypercalls.FLUSH_VIRTUAL_ADDRESS_SPACE_EX, hypercalls.FLUSH_EX_INPUT)
def flush_virtual_address_space_ex(
    vp: VirtualProcessor, banks: memoryview, address_space: int, flags: int, set_format: int, bank_mask: int
) -> None:
    """Empties the TLBs of a VP set. INVALID_PARAMETER: flags, address space, set."""
    _check(vp, address_space, flags, _SPACE)
    _flush(vp, _set(vp, flags, set_format, bank_mask, banks))


@GUEST_TABLE.rep_variable(hypercalls.FLUSH_VIRTUAL_ADDRESS_LIST_EX, hypercalls.FLUSH_EX_INPUT, _ELEMENT)
def flush_virtual_address_list_ex(
    vp: VirtualProcessor,
    banks: memoryview,
    _elements: memoryview,
    _start: int,
    count: int,
    address_space: int,
    flags: int,
    set_format: int,
    bank_mask: int,
) -> int:
    """The same for ranges of addresses. INVALID_PARAMETER: flags, address space, set."""
    _check(vp, address_space, flags, _LIST)
    _flush(vp, _set(vp, flags, set_format, bank_mask, banks))
    return count


def _set(
    vp: VirtualProcessor, flags: int, set_format: int, bank_mask: int, banks: memoryview
) -> list[VirtualProcessor]:
    if flags & ALL_PROCESSORS:
        return vp.partition.vps
    return vps_in_set(vp.partition, set_format, bank_mask, banks)


@GUEST_TABLE.simple(
    hypercalls.SWITCH_VIRTUAL_ADDRESS_SPACE, hypercalls.SWITCH_VIRTUAL_ADDRESS_SPACE_INPUT, alone=False
)
def switch_virtual_address_space(vp: VirtualProcessor, cr3: int) -> None:
    """Loads CR3 of the caller. INVALID_PARAMETER: reserved bits."""
    if cr3 >> _ADDRESS_BITS:
        raise HvError(status.INVALID_PARAMETER)
    vp.vcpu.set_sregs(cr3=cr3)
