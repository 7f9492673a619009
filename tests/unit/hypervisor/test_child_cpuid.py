# SPDX-License-Identifier: Apache-2.0
"""CPUID of a child: feature banks, registered results and their masks, what KVM gets."""

from __future__ import annotations

from typing import Any

import pytest

from rootvisor.hypervisor import child_cpuid
from rootvisor.hypervisor.errors import HvError
from rootvisor.tlfs import status
from rootvisor.tlfs.registers import VP_INDEX_ANY

from .parked_vp import SUPPORTED, ParkedVp

ONES = (0xFFFFFFFF,) * 4
EVERY = 0xFFFF_FFFF_FFFF_FFFF


@pytest.fixture
def vp() -> Any:
    return ParkedVp()


def words(vp: Any, leaf: int, subleaf: int = 0) -> tuple[int, ...]:
    return tuple(child_cpuid.table(vp)[leaf, subleaf])


def register(vp: Any, vp_index: int, leaf: int, subleaf: int | None, values: Any, masks: Any = ONES) -> None:
    vp.partition.cpuid_results.register(vp_index, leaf, subleaf, True, values, masks)


# --- defaults and features ----------------------------------------------------------------------------------------
def test_the_apic_id_is_the_vps() -> None:
    vp: Any = ParkedVp()
    vp.apic_id = 9
    assert words(vp, 1)[1] == 9 << 24 | 0x0800
    assert words(vp, 0xB) == (0, 1, 0x100, 9)


def test_what_is_never_offered_is_gone(vp: Any) -> None:
    table = child_cpuid.table(vp)
    assert (0xA, 0) not in table
    assert not table[0x80000001, 0][2] & (1 << 2 | 1 << 22)  # SVM, topology extensions
    assert not table[7, 0][1] >> 16 & 1  # AVX-512
    assert not table[7, 0][3] >> 24 & 1  # AMX
    assert table[0xD, 0][0] == 0x207
    assert (0xD, 5) not in table
    assert table[0xD, 9] == [8, 0x980, 2, 0]
    assert table[0xD, 0][2] == 0x988


def test_banks_are_what_cpuid_shows(vp: Any) -> None:
    bank0 = child_cpuid.features0(vp.hypervisor, None)
    assert bank0 & 1  # SSE3
    assert bank0 >> 38 & 1  # RDTSCP
    assert not bank0 >> 30 & 1
    assert child_cpuid.features1(vp.hypervisor, None) >> 17 & 1  # TSC deadline
    xsave = child_cpuid.xsave_features(vp.hypervisor, None)
    assert xsave & 7 == 7
    assert not xsave >> 6 & 0x1F
    assert child_cpuid.max_xsave_size(vp.hypervisor, None) <= 4096


def test_disabled_features_are_gone_and_an_unknown_one_is_no_error(vp: Any) -> None:
    everything = child_cpuid.features0(vp.hypervisor, vp.partition)
    assert everything == child_cpuid.features0(vp.hypervisor, None)
    for bit in range(64):
        vp.partition.disabled_features = (1 << bit, 0, 0)
        assert child_cpuid.features0(vp.hypervisor, vp.partition) == everything & ~(1 << bit)
    vp.partition.disabled_features = (EVERY, EVERY, EVERY)
    assert child_cpuid.features0(vp.hypervisor, vp.partition) == 0
    assert child_cpuid.features1(vp.hypervisor, vp.partition) == 0
    assert child_cpuid.xsave_features(vp.hypervisor, vp.partition) == 0
    assert child_cpuid.xsave_states(vp.hypervisor, vp.partition) == 3


def test_avx_takes_with_it_what_needs_it(vp: Any) -> None:
    vp.partition.disabled_features = (0, 0, 1 << 2)
    table = child_cpuid.table(vp)
    assert not table[1, 0][2] & (1 << 12 | 1 << 28 | 1 << 29)  # FMA, AVX, F16C
    assert not table[7, 0][1] >> 5 & 1  # AVX2
    assert table[0xD, 0][0] == 0x203
    assert table[1, 0][2] >> 26 & 1


def test_x2apic_depends_on_the_partitions_flag() -> None:
    for flags, expected in ((0, 0), (child_cpuid.FLAG_X2APIC_CAPABLE, 1)):
        assert words(ParkedVp(flags=flags), 1)[2] >> 21 & 1 == expected


def test_no_xsave_where_the_machine_cannot_even_if_it_is_registered() -> None:
    vp: Any = ParkedVp(xsave=False)
    register(vp, 0, 1, None, (0, 0, 0xFFFFFFFF, 0))
    register(vp, 0, 0xD, 0, (7, 0x340, 0x340, 0))
    assert not words(vp, 1)[2] & (1 << 26 | 1 << 27 | 1 << 28 | 1 << 12 | 1 << 29)
    assert (0xD, 0) not in child_cpuid.table(vp)
    assert child_cpuid.max_xsave_size(vp.hypervisor, vp.partition) == 576


# --- registered results -------------------------------------------------------------------------------------------
def test_a_mask_selects_bits(vp: Any) -> None:
    register(vp, 0, 0, None, (0xFF, 0, 0, 0), (0xF0, 0, 0, 0))
    assert words(vp, 0) == (0x10 & 0x0F | 0xF0, *SUPPORTED[0][4:])


def test_without_always_override_zero_registers_stay(vp: Any) -> None:
    vp.partition.cpuid_results.register(0, 6, None, False, (5, 6, 7, 8), ONES)
    assert words(vp, 6) == (5, 0, 0, 0)
    vp.partition.cpuid_results.register(0, 0x1234, None, False, (5, 6, 7, 8), ONES)
    assert words(vp, 0x1234) == (0, 0, 0, 0)


def test_the_vps_own_beats_any_whichever_comes_first(vp: Any) -> None:
    register(vp, 0, 0x80000002, None, (1, 1, 1, 1))
    register(vp, VP_INDEX_ANY, 0x80000002, None, (2, 2, 2, 2))
    assert words(vp, 0x80000002) == (1, 1, 1, 1)
    vp.index = 1
    assert words(vp, 0x80000002) == (2, 2, 2, 2)


def test_a_named_subleaf_beats_every_subleaf(vp: Any) -> None:
    register(vp, 0, 7, 1, (0x80, 0, 0, 0))
    register(vp, 0, 7, None, (0xBB, 0, 0, 0))
    assert words(vp, 7)[0] == 0xBB
    assert words(vp, 7, 1)[0] == 0x80


def test_a_later_registration_replaces_the_earlier(vp: Any) -> None:
    register(vp, 0, 0x80000002, None, (1, 1, 1, 1))
    register(vp, 0, 0x80000002, None, (0, 4, 0, 0), (0, 0xFF, 0, 0))
    assert words(vp, 0x80000002) == (0, 4, 0, 0)


def test_topology_can_be_put_on_top_by_setting_bits(vp: Any) -> None:
    """Cloud Hypervisor's way: mask = value."""
    for subleaf, values in ((0, (0, 1, 0x100, 0)), (1, (1, 2, 0x201, 0))):
        register(vp, 0, 0xB, subleaf, values, values)
    assert words(vp, 0xB) == (0, 1, 0x100, 0)
    assert words(vp, 0xB, 1) == (1, 2, 0x201, 0)


def test_too_many_results_are_refused_and_forgotten_ones_make_room(
    vp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_cpuid, "RESULTS_LIMIT", 3)
    for leaf in range(3):
        register(vp, 0, leaf, None, ONES)
    with pytest.raises(HvError) as caught:
        register(vp, 0, 3, None, ONES)
    assert caught.value.status == status.NO_RESOURCES
    register(vp, 0, 2, None, (0, 0, 0, 0))
    vp.partition.cpuid_results.forget(0)
    register(vp, 1, 3, None, ONES)


# --- what KVM gets ------------------------------------------------------------------------------------------------
def test_kvm_gets_no_empty_subleaf_and_never_too_many_entries(vp: Any) -> None:
    for subleaf in range(64):
        register(vp, 0, 0xD, subleaf, (0, 0, 0, 0))
    for leaf in range(0x1000, 0x1400):
        register(vp, 0, leaf, None, ONES)
    entries = child_cpuid.entries(vp)
    assert len(entries) <= 256
    assert not [entry for entry in entries if entry[0] == 0xD and entry[1]]


def test_results_are_merged_once_until_more_come(vp: Any) -> None:
    child_cpuid.ensure(vp)
    first = vp.vcpu.cpuid
    child_cpuid.ensure(vp)
    assert vp.vcpu.cpuid is first


# --- HVCALL_GET_VP_CPUID_VALUES -----------------------------------------------------------------------------------
def test_values_follow_the_processors_state(vp: Any) -> None:
    known = child_cpuid.table(vp)
    assert child_cpuid.value(vp, known, 1, 0, 1, 0)[2] >> 27 & 1 == 0
    vp.u64[child_cpuid._CR4] |= 1 << 18
    assert child_cpuid.value(vp, known, 1, 0, 1, 0)[2] >> 27 & 1 == 1
    assert child_cpuid.value(vp, known, 0xD, 0, 7, 0)[1] == 0x340
    assert child_cpuid.value(vp, known, 0xD, 0, 3, 0)[1] == 576
    assert child_cpuid.value(vp, known, 0xD, 1, 7, 0)[1] == 0x340
    assert child_cpuid.value(vp, known, 0xB, 7, 1, 0) == (0, 0, 7, 0)
    assert child_cpuid.value(vp, known, 0x7777, 0, 1, 0) == (0, 0, 0, 0)
    assert child_cpuid.value(vp, known, 0x80000001, 5, 1, 0)[0] == 0xA20F12


def test_registered_state_components_are_those_that_there_is_room_for(vp: Any) -> None:
    register(vp, 0, 0xD, 0, (0x602E7, 0x988, 0x2B00, 1))
    register(vp, 0, 0xD, 17, (64, 2752, 0, 0))
    register(vp, 0, 7, 0, ONES)
    table = child_cpuid.table(vp)
    assert table[0xD, 0][0] == 0x207
    assert table[0xD, 0][3] == 0
    assert (0xD, 17) not in table
    assert not table[7, 0][1] >> 16 & 1


def test_a_vmm_that_registers_every_subleaf_of_leaf_13_alike_does_no_harm(vp: Any) -> None:
    """Cloud Hypervisor: mask = value and no named subleaf, so that the last one is put on top of all."""
    before = child_cpuid.table(vp)
    register(vp, 0, 0xD, None, (8, 0x980, 2, 0), (8, 0x980, 2, 0))
    table = child_cpuid.table(vp)
    assert table[0xD, 0][0] == before[0xD, 0][0]
    assert table[0xD, 2] == before[0xD, 2]
    assert table[0xD, 9] == before[0xD, 9]


def test_address_widths_are_those_of_the_partition(vp: Any) -> None:
    assert words(vp, 0x80000008)[0] == 0x3028
    register(vp, 0, 0x80000008, None, (0x2E27, 0, 0, 0), (0xFFFF, 0, 0, 0))
    assert words(vp, 0x80000008)[0] == 0x3027
