# SPDX-License-Identifier: Apache-2.0
"""Partition properties (``include/hyperv/hvhdk.h``; kernel ``drivers/hv/mshv_root_hv_call.c``).

A property of the caller itself, which VMMs ask for before they have a partition, tells what a child can have at most.
"""

from __future__ import annotations

from struct import pack

from ...tlfs import hypercalls, privileges, status
from ...tlfs import partition_properties as tlfs
from ..errors import HvError
from ..hypercall_table import TABLE
from .callers import cast_child, root_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..child_partition import ChildPartition
    from ..partition import Partition
    from ..vp import VirtualProcessor

_VENDORS = {b"GenuineIntel": tlfs.VENDOR_INTEL, b"HygonGenuine": tlfs.VENDOR_HYGON}


def _vendor(partition: Partition, _child: ChildPartition | None) -> int:
    for leaf, _index, _flags, _eax, ebx, ecx, edx in partition.hypervisor.kvm.supported_cpuid():
        if leaf == 0:
            return _VENDORS.get(pack("<III", ebx, edx, ecx), tlfs.VENDOR_AMD)
    return tlfs.VENDOR_AMD


def _address_width(partition: Partition, child: ChildPartition | None) -> int:
    from ..child_memory import address_width

    if child is not None:
        return child.memory.width
    return address_width(partition.hypervisor.kvm.supported_cpuid())


def _processor(name: str) -> Callable[[Partition, ChildPartition | None], int]:
    def get(partition: Partition, child: ChildPartition | None) -> int:
        from .. import child_cpuid

        value: int = getattr(child_cpuid, name)(partition.hypervisor, child)
        return value

    return get


#: Properties of the caller and of children alike.
_COMMON: dict[int, Callable[[Partition, ChildPartition | None], int]] = {
    tlfs.PROCESSOR_VENDOR: _vendor,
    tlfs.PHYSICAL_ADDRESS_WIDTH: _address_width,
    tlfs.PROCESSOR_CLOCK_FREQUENCY: lambda partition, _child: partition.hypervisor.root.reference_time.tsc_hz,
    tlfs.XSAVE_FEATURES: _processor("xsave_features"),
    tlfs.XSAVE_STATES: _processor("xsave_states"),
    tlfs.MAX_XSAVE_DATA_SIZE: _processor("max_xsave_size"),
    tlfs.PROCESSOR_FEATURES0: _processor("features0"),
    tlfs.PROCESSOR_FEATURES1: _processor("features1"),
}
#: Those that only a child has.
_OF_CHILD: dict[int, Callable[[ChildPartition, VirtualProcessor], int]] = {
    tlfs.PRIVILEGE_FLAGS: lambda child, _vp: child.privileges,
    tlfs.SYNTHETIC_PROC_FEATURES: lambda child, _vp: child.synthetic_features,
    tlfs.TIME_FREEZE: lambda child, _vp: int(child.time.frozen),
    tlfs.REFERENCE_TIME: lambda child, vp: child.time.now(vp),
    tlfs.PROCESSORS_PER_SOCKET: lambda child, _vp: child.processors_per_socket,
    tlfs.GPA_PAGE_ACCESS_TRACKING: lambda child, _vp: int(child.memory.dirty is not None),
    tlfs.UNIMPLEMENTED_MSR_ACTION: lambda child, _vp: child.unimplemented_msr_action,
}


@TABLE.simple(
    hypercalls.GET_PARTITION_PROPERTY,
    hypercalls.GET_PARTITION_PROPERTY_INPUT,
    8,
    privileges.CREATE_PARTITIONS,
)
def get_partition_property(vp: VirtualProcessor, partition_id: int, code: int) -> bytes:
    """A property's value. UNKNOWN_PROPERTY; INVALID_PARTITION_STATE once the child is finalized."""
    from ..child_partition import INITIALIZED

    root = root_of(vp)
    partition = root.hypervisor.partition(root, partition_id)
    child = None if partition is root else cast_child(partition)
    if child is not None and child.state > INITIALIZED:
        raise HvError(status.INVALID_PARTITION_STATE)
    common = _COMMON.get(code)
    if common is not None:
        return tlfs.PROPERTY_OUTPUT.pack(common(partition, child))
    own = _OF_CHILD.get(code)
    if own is None or child is None:
        raise HvError(status.UNKNOWN_PROPERTY)
    return tlfs.PROPERTY_OUTPUT.pack(own(child, vp))


# --- setting --------------------------------------------------------------------------------------------------------
def _set_synthetic_features(child: ChildPartition, value: int, _vp: VirtualProcessor) -> None:
    child.synthetic_features = value


def _set_time_freeze(child: ChildPartition, value: int, vp: VirtualProcessor) -> None:
    if value > 1:
        raise HvError(status.PROPERTY_VALUE_OUT_OF_RANGE)
    if value:
        child.time.freeze(vp)
    else:
        child.time.thaw(vp)


def _set_reference_time(child: ChildPartition, value: int, vp: VirtualProcessor) -> None:
    if value >> 63:
        raise HvError(status.PROPERTY_VALUE_OUT_OF_RANGE)
    child.time.set(value, vp)


def _set_processors_per_socket(child: ChildPartition, value: int, _vp: VirtualProcessor) -> None:
    child.processors_per_socket = value


def _set_tracking(child: ChildPartition, value: int, _vp: VirtualProcessor) -> None:
    """KVM's memory slots change: no VP may run meanwhile."""
    if value > 1:
        raise HvError(status.PROPERTY_VALUE_OUT_OF_RANGE)
    child.hold()
    try:
        if value:
            child.memory.start_tracking()
        else:
            child.memory.stop_tracking()
    finally:
        child.let_go()


def _set_msr_action(child: ChildPartition, value: int, _vp: VirtualProcessor) -> None:
    if value > tlfs.MSR_ACTION_IGNORE:
        raise HvError(status.PROPERTY_VALUE_OUT_OF_RANGE)
    child.unimplemented_msr_action = value


#: code -> (only before INITIALIZE, function)
_SET: dict[int, tuple[bool, Callable[[ChildPartition, int, VirtualProcessor], None]]] = {
    tlfs.SYNTHETIC_PROC_FEATURES: (True, _set_synthetic_features),
    tlfs.TIME_FREEZE: (False, _set_time_freeze),
    tlfs.REFERENCE_TIME: (False, _set_reference_time),
    tlfs.PROCESSORS_PER_SOCKET: (False, _set_processors_per_socket),
    tlfs.GPA_PAGE_ACCESS_TRACKING: (False, _set_tracking),
    tlfs.UNIMPLEMENTED_MSR_ACTION: (False, _set_msr_action),
}


@TABLE.simple(
    hypercalls.SET_PARTITION_PROPERTY,
    hypercalls.SET_PARTITION_PROPERTY_INPUT,
    0,
    privileges.CREATE_PARTITIONS,
)
def set_partition_property(vp: VirtualProcessor, partition_id: int, code: int, value: int) -> None:
    """INVALID_PARTITION_STATE: an early property after INITIALIZE, or a finalized partition;
    ACCESS_DENIED: one that cannot be set; PROPERTY_VALUE_OUT_OF_RANGE; UNKNOWN_PROPERTY."""
    from ..child_partition import CREATED, INITIALIZED

    root = root_of(vp)
    partition = root.hypervisor.partition(root, partition_id)
    if partition is root:
        raise HvError(status.OPERATION_DENIED)
    child = cast_child(partition)
    if code == tlfs.PRIVILEGE_FLAGS:
        # Privileges follow SYNTHETIC_PROC_FEATURES; after INITIALIZE the state is what is wrong first.
        raise HvError(status.ACCESS_DENIED if child.state == CREATED else status.INVALID_PARTITION_STATE)
    entry = _SET.get(code)
    if entry is None:
        readable = code in _COMMON
        raise HvError(status.ACCESS_DENIED if readable else status.UNKNOWN_PROPERTY)
    early, function = entry
    if child.state > (CREATED if early else INITIALIZED):
        raise HvError(status.INVALID_PARTITION_STATE)
    function(child, value, vp)


@TABLE.simple(
    hypercalls.GET_PARTITION_PROPERTY_EX,
    hypercalls.GET_PARTITION_PROPERTY_EX_INPUT,
    tlfs.PROPERTY_EX_OUTPUT_SIZE,
    privileges.CREATE_PARTITIONS,
)
def get_partition_property_ex(vp: VirtualProcessor, partition_id: int, code: int, _argument: int) -> bytes:
    """Banked properties: VMM capabilities (assignable synthetic features only), assignable synthetic features.

    The 8-byte ones of GET_PARTITION_PROPERTY can be had by this call too."""
    from ..child_features import ASSIGNABLE, TIMERS

    vp.partition.hypervisor.partition(vp.partition, partition_id)
    if code == tlfs.VMM_CAPABILITIES:
        value = pack("<HHIQ", 1, 0, 0, _CAPABILITY_ASSIGNABLE_FEATURES)
    elif code == tlfs.ASSIGNABLE_SYNTHETIC_PROC_FEATURES:
        assignable = ASSIGNABLE | (TIMERS if vp.partition.hypervisor.child_timers else 0)
        value = pack("<HHIQ", 1, 0, 0, assignable)
    else:
        value = get_partition_property(vp, partition_id, code) or b""
    return value + bytes(tlfs.PROPERTY_EX_OUTPUT_SIZE - len(value))


_CAPABILITY_ASSIGNABLE_FEATURES = 1 << 4
