# SPDX-License-Identifier: Apache-2.0
"""CPUID as the guest sees it (contract/root-partition sections 0 and 1)."""

from __future__ import annotations

import struct

import pytest

from rootvisor.tlfs import cpuid
from tests.kvm.guest import Guest


def test_hypervisor_present(guest2: Guest) -> None:
    for vp in (0, 1):
        _, ebx, ecx, _ = guest2.cpuid(1, vp=vp)
        assert ecx >> 31 & 1, "hypervisor present"
        assert ecx >> 21 & 1, "x2APIC"
        assert ecx >> 24 & 1, "TSC deadline"
        assert not ecx >> 5 & 1, "VMX"
        assert not ecx >> 26 & 1, "XSAVE is hidden"
        assert ebx >> 24 == vp


def test_vendor_and_interface(guest: Guest) -> None:
    eax, ebx, ecx, edx = guest.cpuid(0x40000000)
    assert 0x40000005 <= eax <= 0x4000FFFF
    assert struct.pack("<3I", ebx, ecx, edx) == b"Microsoft Hv"
    assert guest.cpuid(0x40000001) == (0x31237648, 0, 0, 0)


def test_version_is_one_that_the_mshv_driver_knows(guest: Guest) -> None:
    assert 27744 <= guest.cpuid(0x40000002)[0] <= 27751


def test_root_predicates_of_both_kernels(guest: Guest) -> None:
    eax, ebx, ecx, edx = guest.cpuid(0x40000003)
    assert eax == 0x8AF6
    for bit in (0, 1, 12):
        assert ebx >> bit & 1, f"EBX.{bit}"
    for bit in (20, 22):
        assert not ebx >> bit & 1, f"EBX.{bit}"
    assert ecx == 0
    assert edx >> 8 & 1, "frequency MSRs"
    assert edx >> 10 & 1, "crash MSRs"


def test_what_is_shown_is_what_is_enforced(guest: Guest) -> None:
    eax, ebx, _, edx = guest.cpuid(0x40000003)
    assert ebx << 32 | eax == guest.partition.privileges
    assert edx == guest.partition.features


def test_recommendations(guest: Guest) -> None:
    eax, ebx, ecx, edx = guest.cpuid(0x40000004)
    assert (eax & ~cpuid.RECOMMEND_APIC_MSRS, ebx, ecx, edx) == (0x220, 0xFFFFFFFF, 0, 0)


def test_limits(guest: Guest) -> None:
    assert guest.cpuid(0x40000005)[:2] == (64, 64)


@pytest.mark.parametrize("leaf", [0x40000080, 0x40000081, 0x40000082, 0x40000006, 0x4000000A, 0x4000000C])
def test_leaf_is_zero(guest: Guest, leaf: int) -> None:
    assert guest.cpuid(leaf) == (0, 0, 0, 0)


def test_no_foreign_signature(guest: Guest) -> None:
    for base in range(0x40000100, 0x40002000, 0x100):
        _, ebx, ecx, edx = guest.cpuid(base)
        assert b"KVM" not in struct.pack("<3I", ebx, ecx, edx)


def test_arat_and_invariant_tsc(guest: Guest) -> None:
    assert guest.cpuid(6)[0] >> 2 & 1
    assert guest.cpuid(0x80000007)[3] >> 8 & 1


def test_leaves_are_the_same_on_all_vps(guest2: Guest) -> None:
    for leaf in range(0x40000000, 0x4000000D):
        assert guest2.cpuid(leaf) == guest2.cpuid(leaf, vp=1)


def test_topology_tells_vps_apart(guest2: Guest) -> None:
    assert guest2.cpuid(0xB, 0, vp=0)[3] == 0
    assert guest2.cpuid(0xB, 0, vp=1)[3] == 1
    assert guest2.cpuid(0xB, 1)[1] & 0xFFFF == 2
