# SPDX-License-Identifier: Apache-2.0
"""CPUID of a child's VPs: what KVM supports, less the features that the partition gave up, and on top of it the results
that the VMM registers (contract child-partitions 4.5).

KVM takes a CPUID table until a processor has run for the first time, so results are merged lazily: when something
depends on them, at the latest when the VP is resumed.
"""

from __future__ import annotations

from ..kvm import abi
from ..tlfs import msrs, processor_features, status
from ..tlfs.registers import VP_INDEX_ANY
from . import partition_cpuid
from .errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..kvm.system import CpuidEntry, Kvm
    from .child_partition import ChildPartition
    from .child_vp import ChildVp
    from .hypervisor import Hypervisor

    Words = tuple[int, int, int, int]
    Table = dict[tuple[int, int], list[int]]
    Result = tuple[bool, Words, Words]

_LEAF_XSAVE = 0xD
_X87_SSE, _AVX, _PKRU = 3, 1 << 2, 1 << 9
_CET_STATES = 3 << 11
_X2APIC, _TSC_DEADLINE, _OSXSAVE, _HYPERVISOR = 1 << 21, 1 << 24, 1 << 27, 1 << 31
_MONITOR, _VMX, _PDCM, _XTPR, _DTES = 1 << 3, 1 << 5, 1 << 15, 1 << 14, 1 << 2 | 1 << 4
_HTT = 1 << 28
_APIC = 1 << 9
_SVM, _TOPOEXT, _PERFCTR, _CMP_LEGACY = 1 << 2, 1 << 22, 1 << 23 | 1 << 24 | 1 << 28, 1 << 1
_PKU, _OSPKE = 1 << 3, 1 << 4
_ARAT = 1 << 2
_INVARIANT_TSC = 1 << 8
#: Performance monitoring, SGX, PT, AMX, AVX10, AMD topology: not offered.
_DROPPED = frozenset(
    (
        0x5,
        0xA,
        0xB,
        0xF,
        0x10,
        0x12,
        0x14,
        0x1D,
        0x1E,
        0x1F,
        0x24,
        0x8000000A,
        0x8000001E,
        0x80000022,
        0x80000026,
    )
)
#: Leaves whose result depends on ECX.
_INDEXED = frozenset((0x4, 0x7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1D, 0x1E, 0x1F, 0x20, 0x24,
                      0x8000001D, 0x8000001E, 0x80000020, 0x80000026))  # fmt: skip
_SIGNIFICANT_INDEX = 1
_EVERY_SUBLEAF = -1
#: struct kvm_cpuid2 holds this many entries.
_KVM_MAX_ENTRIES = 256
#: Registrations of a partition; QEMU makes 150 per VP.
RESULTS_LIMIT = 1 << 16
_CR4 = (abi.SYNC_SREGS_AT + abi.SREGS_CR4) // 8
_APIC_BASE = (abi.SYNC_SREGS_AT + abi.SREGS_APIC_BASE) // 8
_CR4_OSXSAVE, _APIC_ENABLED = 1 << 18, 1 << 11
FLAG_X2APIC_CAPABLE = 1 << 22
FLAG_NESTED = 1 << 1

_host_tables: dict[tuple[int, bool], tuple[Kvm, Table]] = {}


# --- the host -----------------------------------------------------------------------------------------------------
def _bank(table: Table, places: dict[int, tuple[processor_features.Place, ...]]) -> int:
    value = 0
    for feature, alternatives in places.items():
        for leaf, subleaf, register, bit in alternatives:
            words = table.get((leaf, subleaf))
            if words is not None and words[register] >> bit & 1:
                value |= 1 << feature
                break
    return value


def _clear(table: Table, places: dict[int, tuple[processor_features.Place, ...]], features: int) -> None:
    for feature, alternatives in places.items():
        if features >> feature & 1:
            for leaf, subleaf, register, bit in alternatives:
                words = table.get((leaf, subleaf))
                if words is not None:
                    words[register] &= ~(1 << bit)


def _limit_xsave(table: Table, disabled: int) -> None:
    """Takes XSAVE features away, with everything that needs them, and makes leaf 0xD agree."""
    present = _bank(table, processor_features.XSAVE) & ~disabled
    if not present & processor_features.XSAVE_XSAVE:
        present = 0
    if not present & processor_features.XSAVE_AVX:
        present &= ~processor_features.XSAVE_NEEDS_AVX
        _clear(table, processor_features.BANK0, processor_features.BANK0_NEEDS_AVX)
    _clear(table, processor_features.XSAVE, ~present)
    if not present & processor_features.XSAVE_XSAVE:
        for key in [key for key in table if key[0] == _LEAF_XSAVE]:
            del table[key]
        if (1, 0) in table:
            table[1, 0][2] &= ~_OSXSAVE
        if (7, 0) in table:
            table[7, 0][2] &= ~(_PKU | _OSPKE)
        return
    root = table.get((_LEAF_XSAVE, 0))
    if root is None:
        return
    allowed = _X87_SSE | (_AVX if present & processor_features.XSAVE_AVX else 0) | _PKRU
    states = root[0] & allowed
    root[0], root[3] = states, 0
    supervisor = 0
    one = table.get((_LEAF_XSAVE, 1))
    if one is not None:
        supervisor = one[2] & _CET_STATES if present & processor_features.XSAVE_XSAVES else 0
        one[2], one[3] = supervisor, 0
    for key in [key for key in table if key[0] == _LEAF_XSAVE and key[1] > 1]:
        if not (states | supervisor) >> key[1] & 1:
            del table[key]
    root[2] = _standard_size(table, states)
    root[1] = _standard_size(table, _X87_SSE)


def _host(hypervisor: Hypervisor) -> Table:
    """What a child may have at most: KVM's list without what is never offered. Made once."""
    kvm = hypervisor.kvm
    xsave = hypervisor.root.xsave
    cached = _host_tables.get((id(kvm), xsave))
    if cached is not None and cached[0] is kvm:
        return cached[1]
    table: Table = {}
    for leaf, index, flags, *words in kvm.supported_cpuid():
        if leaf in _DROPPED or 0x40000000 <= leaf < 0x50000000:
            continue
        table[leaf, index if flags & _SIGNIFICANT_INDEX else 0] = words
    if (1, 0) in table:
        words = table[1, 0]
        words[1] &= 0xFF00
        words[2] = (words[2] | _X2APIC | _TSC_DEADLINE) & ~(
            _MONITOR | _VMX | _PDCM | _XTPR | _DTES | _OSXSAVE | _HYPERVISOR
        )
        words[3] &= ~_HTT
    for (leaf, _subleaf), words in table.items():
        if leaf in (4, 0x8000001D):
            words[0] &= 0x3FFF  # cache type, level, flags; not how many share it
    if (6, 0) in table:
        table[6, 0][:] = (_ARAT, 0, 0, 0)
    if (0x80000001, 0) in table:
        table[0x80000001, 0][2] &= ~(_SVM | _TOPOEXT | _PERFCTR | _CMP_LEGACY)
    if (0x80000007, 0) in table:
        table[0x80000007, 0][3] |= _INVARIANT_TSC
    if (0x80000008, 0) in table:
        table[0x80000008, 0][2] = 0
    _limit_xsave(table, processor_features.XSAVE_LARGE if xsave else ~0)
    _host_tables.clear()
    _host_tables[id(kvm), xsave] = (kvm, table)
    return table


def _partition(child: ChildPartition) -> Table:
    """The host's table less what the partition was created without."""
    table = {key: list(words) for key, words in _host(child.hypervisor).items()}
    disabled0, disabled1, disabled_xsave = child.disabled_features
    _clear(table, {**processor_features.BANK0, **processor_features.BANK0_CLEARED}, disabled0)
    _clear(table, processor_features.BANK1, disabled1)
    _limit_xsave(table, disabled_xsave)
    if not child.flags & FLAG_X2APIC_CAPABLE:
        table[1, 0][2] &= ~_X2APIC
    return table


def _table(hypervisor: Hypervisor, child: ChildPartition | None) -> Table:
    return _host(hypervisor) if child is None else _partition(child)


# --- properties ---------------------------------------------------------------------------------------------------
def features0(hypervisor: Hypervisor, child: ChildPartition | None) -> int:
    """Property 0x6000A: processor features, bank 0, of a child, or (None) the most that a child can have."""
    return _bank(_table(hypervisor, child), processor_features.BANK0)


def features1(hypervisor: Hypervisor, child: ChildPartition | None) -> int:
    """Property 0x6000B: processor features, bank 1."""
    return _bank(_table(hypervisor, child), processor_features.BANK1)


def xsave_features(hypervisor: Hypervisor, child: ChildPartition | None) -> int:
    """Property 0x60002: XSAVE features."""
    return _bank(_table(hypervisor, child), processor_features.XSAVE)


def xsave_states(hypervisor: Hypervisor, child: ChildPartition | None) -> int:
    """Property 0x60007: state components of an XSAVE image, as in XCR0; x87 and SSE where there is no XSAVE."""
    root = _table(hypervisor, child).get((_LEAF_XSAVE, 0))
    return root[0] if root is not None else _X87_SSE


def max_xsave_size(hypervisor: Hypervisor, child: ChildPartition | None) -> int:
    """Property 0x60008: bytes of a compacted XSAVE image with all of :func:`xsave_states`; never over 4096."""
    table = _table(hypervisor, child)
    root = table.get((_LEAF_XSAVE, 0))
    return _compacted_size(table, root[0] if root is not None else _X87_SSE)


def xsave_components(hypervisor: Hypervisor) -> dict[int, tuple[int, int, bool]]:
    """State component -> (size, offset in the standard format, aligned to 64 in the compacted one)."""
    table = _host(hypervisor)
    return {
        key[1]: (words[0], words[1], bool(words[2] & 2))
        for key, words in table.items()
        if key[0] == _LEAF_XSAVE and key[1] > 1
    }


def _standard_size(table: Table, states: int) -> int:
    size = 576
    for (leaf, subleaf), words in table.items():
        if leaf == _LEAF_XSAVE and subleaf > 1 and states >> subleaf & 1:
            size = max(size, words[0] + words[1])
    return size


def _compacted_size(table: Table, states: int) -> int:
    size = 576
    for subleaf in range(2, 63):
        if states >> subleaf & 1 and (_LEAF_XSAVE, subleaf) in table:
            words = table[_LEAF_XSAVE, subleaf]
            if words[2] & 2:
                size = size + 63 & ~63
            size += words[0]
    return size


# --- registered results -------------------------------------------------------------------------------------------
class CpuidResults:
    """Results registered by HVCALL_REGISTER_INTERCEPT_RESULT: (VP or ANY, leaf, subleaf or every) -> what it says."""

    __slots__ = ("_count", "_results")

    def __init__(self) -> None:
        self._results: dict[int, dict[tuple[int, int], Result]] = {}
        self._count = 0

    def register(
        self, vp_index: int, leaf: int, subleaf: int | None, always: bool, values: Words, masks: Words
    ) -> None:
        """A later registration of the same key replaces the earlier. HV_STATUS_NO_RESOURCES when there are too many."""
        results = self._results.setdefault(vp_index, {})
        key = (leaf, _EVERY_SUBLEAF if subleaf is None else subleaf)
        if key not in results:
            if self._count >= RESULTS_LIMIT:
                raise HvError(status.NO_RESOURCES)
            self._count += 1
        results[key] = (always, values, masks)

    def forget(self, vp_index: int) -> None:
        """The VP was deleted."""
        self._count -= len(self._results.pop(vp_index, ()))

    def apply(self, vp_index: int, table: Table) -> None:
        """Merges the results for a VP into ``table``. What names a subleaf beats what does not, the VP beats ANY."""
        for results in (self._results.get(VP_INDEX_ANY), self._results.get(vp_index)):
            if results is None:
                continue
            for (leaf, subleaf), result in sorted(results.items()):  # "every subleaf" comes first
                if subleaf != _EVERY_SUBLEAF:
                    if leaf in _INDEXED or not subleaf:  # else the processor does not look at ECX
                        _merge(table.setdefault((leaf, subleaf), [0, 0, 0, 0]), result)
                elif leaf in _INDEXED:
                    for key in [key for key in table if key[0] == leaf] or [(leaf, 0)]:
                        _merge(table.setdefault(key, [0, 0, 0, 0]), result)
                else:
                    _merge(table.setdefault((leaf, 0), [0, 0, 0, 0]), result)


def _merge(words: list[int], result: Result) -> None:
    always, values, masks = result
    for register in range(4):
        if always or words[register]:
            words[register] = words[register] & ~masks[register] | values[register] & masks[register]


def table(vp: ChildVp, registered: bool = True) -> Table:
    """The VP's CPUID: (leaf, subleaf) -> [EAX, EBX, ECX, EDX]."""
    child = vp.partition
    result = _partition(child)
    xsave = _bank(result, processor_features.XSAVE)
    base = {key: list(words) for key, words in result.items() if key[0] == _LEAF_XSAVE}
    if (1, 0) in result:
        result[1, 0][1] |= (vp.apic_id & 0xFF) << 24
    # One thread, the rest left open: VMMs that can only set bits put their topology on top.
    result[0xB, 0] = [0, 1, 0x100, vp.apic_id]
    result[0xB, 1] = [0, 0, 1, vp.apic_id]
    for leaf, _index, _flags, *words in partition_cpuid.hypervisor_leaves(child):
        result[leaf, 0] = words
        if any(words):
            result[1, 0][2] |= _HYPERVISOR
    if registered:
        child.cpuid_results.apply(vp.index, result)
        _correct(child, result, base, xsave)
    return result


def _correct(child: ChildPartition, table: Table, base: Table, xsave: int) -> None:
    """What nobody can promise: registered state components that no XSAVE image has room for, or that the partition gave
    up; more address bits than there are. KVM refuses other widths of linear addresses."""
    for key in [key for key in table if key[0] == _LEAF_XSAVE and key[1] > 1]:
        if key in base:
            table[key] = base[key]  # size and place of a component are the processor's
        else:
            del table[key]
    _limit_xsave(table, ~xsave)
    widths = table.get((0x80000008, 0))
    if widths is not None:
        linear = widths[0] >> 8 & 0xFF
        widths[0] = (
            widths[0] & ~0xFFFF
            | (linear if linear in (48, 57) else 48) << 8
            | min(widths[0] & 0xFF or 36, child.memory.width)
        )


def entries(vp: ChildVp) -> list[CpuidEntry]:
    """The VP's CPUID for KVM. Subleaves without a bit are left out where KVM answers zero anyway."""
    found: list[CpuidEntry] = []
    for (leaf, subleaf), words in sorted(table(vp).items()):
        if subleaf and not any(words):
            continue
        flags = _SIGNIFICANT_INDEX if leaf in _INDEXED or subleaf else 0
        found.append((leaf, subleaf, flags, *(word & 0xFFFFFFFF for word in words)))  # type: ignore[arg-type]
    return found[:_KVM_MAX_ENTRIES]


def apply(vp: ChildVp) -> None:
    """KVM_SET_CPUID2. HV_STATUS_INVALID_VP_STATE when the VP has run already."""
    stored = vp.stored
    if stored.cpuid_final:
        raise HvError(status.INVALID_VP_STATE)
    vp.vcpu.set_cpuid(entries(vp))
    # With "Hv#1" KVM hides the invariant TSC until its own copy of this MSR is set (kvm_hv_invtsc_suppressed).
    vp.vcpu.set_msr(msrs.TSC_INVARIANT_CONTROL, 1)
    stored.cpuid_stale = False


def ensure(vp: ChildVp) -> None:
    """Gives KVM what was registered since the last time."""
    if vp.stored.cpuid_stale:
        apply(vp)


def signature(vp: ChildVp) -> int:
    """Family, model and stepping: EAX of leaf 1, which RDX holds after a reset."""
    return _host(vp.partition.hypervisor)[1, 0][0]


def value(vp: ChildVp, known: Table, leaf: int, subleaf: int, xfem: int, xss: int) -> Words:
    """What the VP's CPUID answers out of ``known`` (see :func:`table`), leaf 0xD for ``xfem`` and ``xss``."""
    words = known.get((leaf, subleaf if leaf in _INDEXED else 0))
    if words is None:
        return (0, 0, subleaf & 0xFF, vp.apic_id) if leaf in (0xB, 0x1F) else (0, 0, 0, 0)
    eax, ebx, ecx, edx = words
    if leaf == 1:
        ecx = ecx | _OSXSAVE if vp.u64[_CR4] & _CR4_OSXSAVE else ecx & ~_OSXSAVE
        edx = edx | _APIC if vp.u64[_APIC_BASE] & _APIC_ENABLED else edx & ~_APIC
    elif leaf == _LEAF_XSAVE and subleaf == 0:
        ebx = _standard_size(known, xfem)
    elif leaf == _LEAF_XSAVE and subleaf == 1 and ebx:
        ebx = _compacted_size(known, xfem | xss)
    return eax & 0xFFFFFFFF, ebx & 0xFFFFFFFF, ecx & 0xFFFFFFFF, edx & 0xFFFFFFFF
