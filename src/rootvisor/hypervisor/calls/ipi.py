# SPDX-License-Identifier: Apache-2.0
"""Inter-processor interrupts by hypercall, and the VP sets they take (TLFS "Virtual Interrupts", "VP sets")."""

from __future__ import annotations

from ...tlfs import hypercalls, status
from ..errors import HvError
from ..hypercall_table import TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..partition import Partition
    from ..vp import VirtualProcessor

_SPARSE = 0


def vps_in_mask(partition: Partition, mask: int, first: int = 0) -> list[VirtualProcessor]:
    """VPs of a 64-bit bank that begins at VP ``first``; bits of VPs that do not exist are ignored."""
    vps = []
    while mask:
        bit = mask & -mask
        mask ^= bit
        index = first + bit.bit_length() - 1
        if index < len(partition.vps):
            vps.append(partition.vps[index])
    return vps


def vps_in_set(
    partition: Partition, set_format: int, bank_mask: int, banks: memoryview
) -> list[VirtualProcessor]:
    """VPs of a sparse set (format 0: one u64 per bit of ``bank_mask``), or all of them (format 1).

    HV_STATUS_INVALID_PARAMETER for another format or a count of banks that does not fit the mask.
    """
    if set_format == 1:
        return list(partition.vps)
    if set_format != _SPARSE or len(banks) != bank_mask.bit_count() * 8:
        raise HvError(status.INVALID_PARAMETER)
    vps = []
    at = 0
    while bank_mask:
        bit = bank_mask & -bank_mask
        bank_mask ^= bit
        first = (bit.bit_length() - 1) * 64
        vps += vps_in_mask(partition, int.from_bytes(banks[at : at + 8], "little"), first)
        at += 8
    return vps


def _send(vps: list[VirtualProcessor], vector: int, target_vtl: int, reserved: bytes) -> None:
    if not 0x10 <= vector <= 0xFF or target_vtl & 0xF or any(reserved):
        raise HvError(status.INVALID_PARAMETER)
    for target in vps:
        target.interrupt(vector)


@TABLE.simple(hypercalls.SEND_IPI, hypercalls.SEND_IPI_INPUT)
def send_ipi(vp: VirtualProcessor, vector: int, target_vtl: int, reserved: bytes, mask: int) -> None:
    """TLFS HvCallSendSyntheticClusterIpi: VPs 0 to 63 by mask."""
    _send(vps_in_mask(vp.partition, mask), vector, target_vtl, reserved)


@TABLE.variable(hypercalls.SEND_IPI_EX, hypercalls.SEND_IPI_EX_INPUT)
def send_ipi_ex(
    vp: VirtualProcessor,
    banks: memoryview,
    vector: int,
    target_vtl: int,
    reserved: bytes,
    set_format: int,
    bank_mask: int,
) -> None:
    """TLFS HvCallSendSyntheticClusterIpiEx: any VP set. Linux leaves old bytes in the reserved field."""
    _send(vps_in_set(vp.partition, set_format, bank_mask, banks), vector, target_vtl, b"")
