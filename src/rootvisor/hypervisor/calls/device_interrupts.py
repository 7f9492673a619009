# SPDX-License-Identifier: Apache-2.0
"""Map, unmap and retarget device interrupts (kernel ``arch/x86/hyperv/irqdomain.c``)."""

from __future__ import annotations

from struct import pack

from ...tlfs import hypercalls, privileges, status
from ..errors import HvError
from ..hypercall_table import TABLE
from ..root_partition import RootPartition
from .ipi import vps_in_mask, vps_in_set

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..partition import Partition
    from ..vp import VirtualProcessor

_FIXED = 0
_TRIGGER_MODES = (0, 1)


def _owner(vp: VirtualProcessor, partition_id: int) -> RootPartition:
    """The partition whose devices are meant: only the root has any."""
    if not isinstance(vp.partition, RootPartition):
        raise HvError(status.INVALID_DEVICE_ID)
    root = vp.partition
    if root.hypervisor.partition(root, partition_id) is not root:
        raise HvError(status.INVALID_DEVICE_ID)
    return root


def _target(partition: Partition, flags: int, mask_or_format: int, header: memoryview) -> VirtualProcessor:
    """The VP of a device interrupt's target: a set if the flag says so (bank mask and banks in ``header``), else a
    64-bit mask. Of several VPs the first is taken, as a processor set with lowest priority would."""
    if flags & hypercalls.TARGET_PROCESSOR_SET:
        if mask_or_format == 0 and len(header) < 8:
            raise HvError(status.INVALID_HYPERCALL_INPUT)
        vps = vps_in_set(partition, mask_or_format, int.from_bytes(header[0:8], "little"), header[8:])
    else:
        vps = vps_in_mask(partition, mask_or_format)
    if not vps:
        raise HvError(status.INVALID_VP_INDEX)
    return vps[0]


@TABLE.variable(
    hypercalls.MAP_DEVICE_INTERRUPT,
    hypercalls.MAP_DEVICE_INTERRUPT_INPUT,
    hypercalls.DEVICE_INTERRUPT_OUTPUT.size,
    privileges.CPU_MANAGEMENT,
)
def map_device_interrupt(
    vp: VirtualProcessor,
    header: memoryview,
    partition_id: int,
    device_id: int,
    _flags: int,
    _logical_entry: bytes,
    interrupt_type: int,
    trigger_mode: int,
    vector_count: int,
    vector: int,
    target_flags: int,
    set_format: int,
) -> bytes:
    """The entry that the device is to raise: an MSI message or an IO-APIC redirection entry (16 bytes).

    INVALID_DEVICE_ID, INVALID_VP_INDEX (no VP in the target), INVALID_PARAMETER (vector below 16, not fixed, more than
    one vector), NO_RESOURCES.
    """
    partition = _owner(vp, partition_id)
    if interrupt_type != _FIXED or trigger_mode not in _TRIGGER_MODES or vector_count != 1:
        raise HvError(status.INVALID_PARAMETER)
    target = _target(partition, target_flags, set_format, header)
    answer = partition.interrupts.map(device_id, vector, target.index, target.apic_id)
    if partition.trace is not None:
        partition.trace.event(
            "map-interrupt", f"device {device_id:#x} vector {vector:#x} -> VP {target.index}"
        )
    return pack("<4I", *answer)


@TABLE.simple(
    hypercalls.UNMAP_DEVICE_INTERRUPT,
    hypercalls.UNMAP_DEVICE_INTERRUPT_INPUT,
    0,
    privileges.CPU_MANAGEMENT,
)
def unmap_device_interrupt(
    vp: VirtualProcessor, partition_id: int, device_id: int, source: int, _reserved: int, low: int, high: int
) -> None:
    """Forgets an entry that MAP returned."""
    partition = _owner(vp, partition_id)
    partition.interrupts.unmap(device_id, source, low, high)


@TABLE.variable(hypercalls.RETARGET_DEVICE_INTERRUPT, hypercalls.RETARGET_DEVICE_INTERRUPT_INPUT)
def retarget_device_interrupt(
    vp: VirtualProcessor,
    header: memoryview,
    partition_id: int,
    device_id: int,
    source: int,
    _reserved: int,
    address: int,
    data: int,
    _reserved2: int,
    vector: int,
    target_flags: int,
    mask_or_format: int,
) -> None:
    """Sends an entry's interrupt to another VP or vector; the device is not touched."""
    partition = _owner(vp, partition_id)
    entry = partition.interrupts.find(device_id, source, address, data)
    target = _target(partition, target_flags, mask_or_format, header)
    partition.interrupts.retarget(entry, vector, target.index, target.apic_id)
