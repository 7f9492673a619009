# SPDX-License-Identifier: Apache-2.0
"""The CPUID that a partition sees: KVM's list, topology of its own, and the hypervisor leaves (TLFS "Feature and
Interface Discovery")."""

from __future__ import annotations

from ..kvm.system import CpuidEntry
from ..tlfs import cpuid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .partition import Partition

#: Leaf 1 ECX: FMA, XSAVE, OSXSAVE, AVX, F16C.
_XSAVE_1_ECX = 1 << 12 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29
#: Leaf 7.0 EBX: AVX2, MPX, AVX512*, SHA is independent of XSAVE.
_XSAVE_7_EBX = (
    1 << 5 | 1 << 14 | 1 << 16 | 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31
)
#: Leaf 7.0 ECX: AVX512VBMI, PKU, OSPKE, VBMI2, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ.
_XSAVE_7_ECX = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14
#: Leaf 7.0 EDX: AVX512_4VNNIW, 4FMAPS, VP2INTERSECT, AMX, AVX512_FP16.
_XSAVE_7_EDX = 1 << 2 | 1 << 3 | 1 << 8 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 25
_HYPERVISOR_PRESENT = 1 << 31
_X2APIC = 1 << 21
_TSC_DEADLINE = 1 << 24
_MONITOR = 1 << 3
_VMX = 1 << 5
_SVM = 1 << 2
_TOPOEXT = 1 << 22
_PERFCTR = 1 << 23 | 1 << 24 | 1 << 28
#: Leaves that describe what is hidden: performance monitoring (0xA), PT, SGX, SVM, AMD topology and PMU.
_DROPPED = frozenset((0xA, 0x12, 0x14, 0x1F, 0x8000000A, 0x8000001E, 0x80000022, 0x80000026))
_SIGNIFICANT_INDEX = 1


def partition_cpuid(
    partition: Partition, supported: list[CpuidEntry], apic_id: int, vps: int, xsave: bool
) -> list[CpuidEntry]:
    """Entries for the VP with ``apic_id``. ``xsave`` False hides XSAVE and everything that needs it."""
    entries: list[CpuidEntry] = []
    for leaf, index, flags, eax, ebx, ecx, edx in supported:
        if 0x40000000 <= leaf < 0x50000000 or leaf in _DROPPED or leaf == 0xB:
            continue
        if leaf == 1:
            ebx = ebx & 0x0000FFFF | min(vps, 255) << 16 | apic_id << 24
            ecx = (ecx | _HYPERVISOR_PRESENT | _X2APIC | _TSC_DEADLINE) & ~(_VMX | _MONITOR)
            edx = edx | 1 << 28 if vps > 1 else edx & ~(1 << 28)
            if not xsave:
                ecx &= ~_XSAVE_1_ECX
        elif leaf == 4:
            eax = eax & 0x03FFC3FF | (min(vps, 64) - 1) << 26
        elif leaf == 6:
            eax, ebx, ecx, edx = 1 << 2, 0, 0, 0  # ARAT, or Linux insists on a PIT
        elif leaf == 7 and index == 0:
            if not xsave:
                ebx &= ~_XSAVE_7_EBX
                ecx &= ~_XSAVE_7_ECX
                edx &= ~_XSAVE_7_EDX
        elif leaf == 7 and not xsave:
            eax = ebx = ecx = edx = 0
        elif (leaf == 0xD and not xsave) or (leaf in (0x1D, 0x1E, 0x24) and not xsave):
            continue
        elif leaf == 0x80000001:
            ecx &= ~(_SVM | _TOPOEXT | _PERFCTR)
            if not xsave:
                ecx &= ~(1 << 11 | 1 << 16)  # XOP, FMA4
        elif leaf == 0x80000007:
            edx |= 1 << 8  # invariant TSC
        elif leaf == 0x80000008:
            ecx = ecx & ~0xFFFF | (vps - 1 & 0xFF)
        entries.append((leaf, index, flags, eax, ebx, ecx, edx))
    entries += _topology(apic_id, vps)
    entries += hypervisor_leaves(partition)
    entries.sort(key=lambda entry: (entry[0], entry[1]))
    return entries


def _topology(apic_id: int, vps: int) -> list[CpuidEntry]:
    """Leaf 0xB: one thread per core, all cores in one package."""
    shift = max(vps - 1, 0).bit_length()
    return [
        (0xB, 0, _SIGNIFICANT_INDEX, 0, 1, 0x100, apic_id),
        (0xB, 1, _SIGNIFICANT_INDEX, shift, vps, 0x201, apic_id),
        (0xB, 2, _SIGNIFICANT_INDEX, 0, 0, 2, apic_id),
    ]


def hypervisor_leaves(partition: Partition) -> list[CpuidEntry]:
    """0x40000000 .. 0x40000082. The last ones are all zero on purpose: without them KVM would answer an Intel guest
    with the highest basic leaf, and Linux reads 0x40000082 without looking at the maximum."""
    version = partition.hypervisor.version
    leaves = [*range(cpuid.VENDOR_AND_MAX, cpuid.ISOLATION + 1), 0x40000080, 0x40000081, 0x40000082]
    if not partition.hypervisor_present:
        return [(leaf, 0, 0, 0, 0, 0, 0) for leaf in leaves]
    values: dict[int, tuple[int, int, int, int]] = {
        cpuid.VENDOR_AND_MAX: (partition.last_leaf, *cpuid.VENDOR),
        cpuid.INTERFACE: (cpuid.INTERFACE_SIGNATURE, 0, 0, 0),
        cpuid.VERSION: (version.build, version.major << 16 | version.minor, version.service_pack, 0),
        cpuid.FEATURES: (
            partition.privileges & 0xFFFFFFFF,
            partition.privileges >> 32,
            0,
            partition.features,
        ),
        cpuid.RECOMMENDATIONS: (partition.recommendations, 0xFFFFFFFF, 0, 0),
        cpuid.LIMITS: (partition.max_vps, partition.hypervisor.max_lps, 0, 0),
    }
    return [(leaf, 0, 0, *values.get(leaf, (0, 0, 0, 0))) for leaf in leaves]
