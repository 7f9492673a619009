# SPDX-License-Identifier: Apache-2.0
"""Registers of a child's VP by name, against a processor that only remembers."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rootvisor.hypervisor import child_cpuid, segments, vp_registers
from rootvisor.hypervisor.errors import HvError
from rootvisor.kvm import abi
from rootvisor.tlfs import registers as names
from rootvisor.tlfs import status

from .parked_vp import ParkedVp

ROOT_VP: Any = object()


@pytest.fixture
def vp() -> Any:
    return ParkedVp()


def get(vp: Any, name: int) -> int:
    return vp_registers.get(vp, name)


def put(vp: Any, name: int, value: int) -> None:
    vp_registers.set(vp, name, value, ROOT_VP)


def refused(vp: Any, name: int, value: int | None = None) -> int:
    with pytest.raises(HvError) as caught:
        if value is None:
            get(vp, name)
        else:
            put(vp, name, value)
    return caught.value.status


SEGMENT = 0xA09B_0010_FFFF_FFFF_FFFF_8000_0000_1000
TABLE = 0xFFFF_8000_0000_2000 << 64 | 0x7F << 48
#: name -> a value that is kept as it is
KEPT: dict[int, int] = {
    **{names.RAX + n: 0x0123_4567_89AB_CDEF ^ n for n in range(16)},
    names.RIP: 0xFFFF_FFFF_8100_0000,
    names.RFLAGS: 0x246,
    names.CR0: 0x8005_0033,
    names.CR2: 0x7FFF_FFFF_F000,
    names.CR3: 0x1234_5000,
    names.CR4: 0x3_50EF0 & 0x1FFFFFFFF,
    names.CR8: 9,
    names.INTERMEDIATE_CR0: 0x8005_0031,
    names.INTERMEDIATE_CR3: 0x1000,
    names.INTERMEDIATE_CR4: 0x20,
    names.INTERMEDIATE_CR8: 2,
    names.EFER: 0xD01,
    names.APIC_BASE: 0xFEE0_0D00,
    **{names.ES + n: SEGMENT + n for n in range(8)},
    names.IDTR: TABLE,
    names.GDTR: TABLE + (1 << 64),
    **{names.XMM0 + n: (0xF0E0_D0C0 << 96) + n for n in range(16)},
    **{names.FP_MMX0 + n: (0x4000 << 64) + n for n in range(8)},
    names.FP_CONTROL_STATUS: 0x1234 << 64 | 0x37F,
    names.XMM_CONTROL_STATUS: 0x5678 | 0x1F80 << 64 | 0xFFFF << 96,
    names.XFEM: 3,
    **dict.fromkeys(range(names.DR0, names.DR7), 0x1000),
    names.DR7: 0x455,
    **dict.fromkeys((*range(names.TSC, names.EFER), *range(names.KERNEL_GS_BASE, names.APIC_BASE)), 0x77),
    **dict.fromkeys(range(names.PAT, names.INITIAL_APIC_ID), 0x78),
    **dict.fromkeys(range(names.MTRR_PHYS_BASE0, names.MTRR_PHYS_BASE0 + 8), 0x79),
    **dict.fromkeys(range(names.MTRR_PHYS_MASK0, names.MTRR_PHYS_MASK0 + 8), 0x800),
    **dict.fromkeys(range(names.MTRR_FIX64K00000, names.MTRR_FIX4KC0000 + 8), 0x0606_0606),
    **dict.fromkeys((names.MTRR_DEF_TYPE, names.TSC_AUX, names.BNDCFGS, names.DEBUG_CTL, names.SPEC_CTRL), 1),
    **dict.fromkeys(range(names.U_XSS, names.INTERRUPT_SSP_TABLE + 1), 0x80),
    **dict.fromkeys((names.TSC_DEADLINE, names.TSC_ADJUST, names.MISC_ENABLE), 0x81),
    names.INITIAL_APIC_ID: 0,
    names.APIC_ID: 0,
    names.PENDING_INTERRUPTION: 1 | 3 << 1 | 1 << 4 | 13 << 16 | 0x18 << 32,
    names.INTERRUPT_STATE: 3,
    names.PENDING_EVENT0: 1 | 1 << 8 | 14 << 16 | 5 << 32 | 0x1000 << 64,
    names.PENDING_EVENT1: 0,
    names.INTERNAL_ACTIVITY_STATE: 2,
    names.DELIVERABILITY_NOTIFICATIONS: 0x0024 << 48,
    names.GUEST_OS_ID: 0x8100_0007_0304_0000,
    names.HYPERCALL: 0x1234_5001,
    names.REFERENCE_TSC: 0x1234_6001,
    names.VP_ASSIST_PAGE: 0x1234_7001,
    **{names.SINT0 + n: 0x10000 | 0x30 + n for n in range(16)},
    names.SCONTROL: 1,
    names.SIEFP: 0x5001,
    names.SIMP: 0x6001,
    names.SIRBP: 0x7001,
    names.EOM: 0,
    **{names.STIMER0_CONFIG + n: 0x9000 + n for n in range(8)},
    **{names.GUEST_CRASH_P0 + n: 0xC0DE + n for n in range(5)},
    names.DISPATCH_SUSPEND: 1,
}
READ_ONLY = (names.VP_INDEX, names.SVERSION, names.VP_RUNTIME, names.VP_ROOT_SIGNAL_COUNT, names.GUEST_CRASH_CTL,
             names.HYPERVISOR_VERSION, names.PRIVILEGES_AND_FEATURES_INFO)  # fmt: skip


@pytest.mark.parametrize("name", sorted(KEPT), ids=names.register_name)
def test_a_value_is_kept(vp: Any, name: int) -> None:
    put(vp, name, KEPT[name])
    assert get(vp, name) == KEPT[name]


@pytest.mark.parametrize("name", sorted(KEPT.keys() - vp_registers.WIDE), ids=names.register_name)
def test_the_upper_half_of_a_64_bit_register_is_not_looked_at(vp: Any, name: int) -> None:
    put(vp, name, KEPT[name] | 0xDEAD_BEEF << 64)
    assert get(vp, name) == KEPT[name]


def test_every_name_of_the_contract_is_here() -> None:
    known = set(KEPT) | set(READ_ONLY) | {names.EXPLICIT_SUSPEND, names.INTERCEPT_SUSPEND, names.MTRR_CAP}
    named = {number for number in names._NAMES if number < 0x90000}
    assert named - known <= {
        *range(names.FEATURES_INFO, names.GUEST_CRASH_P0),
    }


def test_registers_that_share_a_place() -> None:
    for plain, intermediate in (
        (names.CR0, names.INTERMEDIATE_CR0),
        (names.CR3, names.INTERMEDIATE_CR3),
        (names.CR4, names.INTERMEDIATE_CR4),
        (names.CR8, names.INTERMEDIATE_CR8),
    ):
        vp: Any = ParkedVp()
        put(vp, intermediate, 5)
        assert get(vp, plain) == 5


def test_general_registers_use_no_ioctl_and_mark_their_block(vp: Any) -> None:
    put(vp, names.RAX, 7)
    assert vp.dirty == abi.SYNC_REGS
    put(vp, names.CR3, 0x1000)
    assert vp.dirty == abi.SYNC_REGS | abi.SYNC_SREGS
    put(vp, names.INTERRUPT_STATE, 2)
    assert vp.dirty == abi.SYNC_REGS | abi.SYNC_SREGS | abi.SYNC_EVENTS
    assert vp.vcpu.msrs == {}


def test_values_of_kvm_run_match_kvm_regs_order(vp: Any) -> None:
    put(vp, names.RCX, 0xC)
    put(vp, names.RBX, 0xB)
    regs = abi.SYNC_REGS_AT // 8
    assert vp.u64[regs + abi.REGS.index("rcx")] == 0xC
    assert vp.u64[regs + abi.REGS.index("rbx")] == 0xB


@pytest.mark.parametrize("name", READ_ONLY, ids=names.register_name)
def test_a_read_only_register_cannot_be_written(vp: Any, name: int) -> None:
    get(vp, name)
    assert refused(vp, name, 1) == status.INVALID_PARAMETER


def test_mtrr_cap_takes_only_its_own_value(vp: Any) -> None:
    vp.vcpu.msrs[0xFE] = 0x508
    vp.vcpu.readonly_msrs.add(0xFE)
    put(vp, names.MTRR_CAP, 0x508)
    assert refused(vp, names.MTRR_CAP, 0x509) == status.INVALID_REGISTER_VALUE


def test_an_msr_that_kvm_lacks_is_an_unknown_name(vp: Any) -> None:
    vp.vcpu.unknown_msrs.add(0x6A0)
    assert refused(vp, names.U_CET) == status.INVALID_PARAMETER
    assert refused(vp, names.U_CET, 0) == status.INVALID_PARAMETER


def test_registers_that_vmms_take_for_granted_are_plain_values_without_an_msr(vp: Any) -> None:
    vp.vcpu.unknown_msrs |= {0xC0000103, 0x1D9}
    for name in (names.TSC_AUX, names.DEBUG_CTL):
        assert get(vp, name) == 0
        put(vp, name, 5)
        assert get(vp, name) == 5
    vp.vcpu.readonly_msrs.add(0x1D9)
    vp.vcpu.unknown_msrs.clear()
    assert refused(vp, names.DEBUG_CTL, 7) == status.INVALID_REGISTER_VALUE


def test_a_processor_without_shadow_stacks_has_no_pointer(vp: Any) -> None:
    vp.vcpu.ssp = None
    assert refused(vp, names.SSP) == status.INVALID_PARAMETER
    vp.vcpu.shadow_stack_pointer = lambda value=None: None
    assert refused(vp, names.SSP, 0) == status.INVALID_PARAMETER


@pytest.mark.parametrize("name", [0x40006, 0x80018, 0x80048, 0x9FFFF, 0xA0016, 0xB0008, 0xFFFFFFFF])
def test_a_name_that_is_not_there_is_an_invalid_parameter(vp: Any, name: int) -> None:
    assert refused(vp, name) == status.INVALID_PARAMETER
    assert refused(vp, name, 0) == status.INVALID_PARAMETER


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (names.RFLAGS, 1 << 22), (names.RFLAGS, 8), (names.CR0, 1 << 32), (names.CR3, 1 << 63), (names.CR8, 0x10),
        (names.EFER, 1 << 9), (names.APIC_BASE, 1), (names.INTERRUPT_STATE, 4), (names.PENDING_EVENT0, 1 | 5 << 1),
        (names.PENDING_EVENT0, 1 | 32 << 16), (names.PENDING_EVENT0, 1 | 2 << 16), (names.PENDING_EVENT1, 1),
        (names.PENDING_INTERRUPTION, 1 | 1 << 1), (names.PENDING_INTERRUPTION, 1 | 7 << 1),
        (names.PENDING_INTERRUPTION, 1 | 256 << 16), (names.PENDING_INTERRUPTION, 1 | 3 << 1 | 32 << 16),
        (names.PENDING_INTERRUPTION, 1 | 3 << 1 | 2 << 16), (names.PENDING_INTERRUPTION, 1 | 1 << 9),
        (names.INTERNAL_ACTIVITY_STATE, 8), (names.EXPLICIT_SUSPEND, 2), (names.INTERCEPT_SUSPEND, 1),
        (names.DISPATCH_SUSPEND, 2), (names.XFEM, 2), (names.DR7, 1 << 32), (names.INITIAL_APIC_ID, 1),
        (names.SINT0, 5), (names.XMM_CONTROL_STATUS, 1 << 80),
    ],
)  # fmt: skip
def test_an_invalid_value_changes_nothing(vp: Any, name: int, value: int) -> None:
    before = get(vp, name)
    assert refused(vp, name, value) == status.INVALID_REGISTER_VALUE
    assert get(vp, name) == before


def test_deliverability_of_what_the_local_apic_does_is_an_invalid_parameter(vp: Any) -> None:
    for value in (1, 2, 0x3C):
        assert refused(vp, names.DELIVERABILITY_NOTIFICATIONS, value) == status.INVALID_PARAMETER


# --- suspension ---------------------------------------------------------------------------------------------------
def test_a_running_vp_has_only_what_needs_no_processor(vp: Any) -> None:
    vp.running = True
    for name in (
        names.RAX,
        names.CR0,
        names.CS,
        names.XMM0,
        names.PAT,
        names.DR7,
        names.INTERNAL_ACTIVITY_STATE,
    ):
        assert refused(vp, name) == status.INVALID_VP_STATE
        assert refused(vp, name, 0) == status.INVALID_VP_STATE
    for name in (
        names.EXPLICIT_SUSPEND, names.INTERCEPT_SUSPEND, names.VP_ROOT_SIGNAL_COUNT, names.SINT0, names.VP_INDEX,
    ):  # fmt: skip
        get(vp, name)
    assert refused(vp, 0x40006) == status.INVALID_PARAMETER


def test_the_vp_runs_when_both_suspend_registers_are_zero(vp: Any) -> None:
    vp.intercept_suspend = True
    put(vp, names.INTERCEPT_SUSPEND, 0)
    assert not vp.running
    put(vp, names.EXPLICIT_SUSPEND, 0)
    assert vp.running
    assert vp.resumed_by is ROOT_VP
    put(vp, names.EXPLICIT_SUSPEND, 0)  # again: nothing
    put(vp, names.EXPLICIT_SUSPEND, 1)
    assert not vp.running
    assert get(vp, names.EXPLICIT_SUSPEND) == 1


def test_intercept_suspend_last_resumes_too(vp: Any) -> None:
    vp.intercept_suspend = True
    put(vp, names.EXPLICIT_SUSPEND, 0)
    assert not vp.running
    assert not vp.stored.cpuid_final
    put(vp, names.INTERCEPT_SUSPEND, 0)
    assert vp.running
    assert vp.stored.cpuid_final


def test_rip_written_after_an_intercept_ends_the_interrupt_shadow(vp: Any) -> None:
    put(vp, names.INTERRUPT_STATE, names.INTERRUPT_SHADOW)
    put(vp, names.RIP, 0x1000)  # a VMM that restores a guest
    assert get(vp, names.INTERRUPT_STATE) == names.INTERRUPT_SHADOW
    vp.intercept_suspend = True
    put(vp, names.RIP, 0x1002)
    assert get(vp, names.INTERRUPT_STATE) == 0


# --- before the VP runs -------------------------------------------------------------------------------------------
def test_long_mode_active_follows_from_its_enables(vp: Any) -> None:
    put(vp, names.CR0, 0x8000_0011)
    put(vp, names.EFER, 0x100)
    assert get(vp, names.EFER) == 0x100
    vp_registers.before_run(vp)
    assert get(vp, names.EFER) == 0x500
    put(vp, names.CR0, 0x11)
    vp_registers.before_run(vp)
    assert get(vp, names.EFER) == 0x100


def test_registers_of_an_application_processor_go_by_ioctl() -> None:
    for index, committed in ((0, 0), (1, abi.SYNC_REGS)):
        vp: Any = ParkedVp()
        vp.index = vp.vcpu.index = index
        put(vp, names.RAX, 1)
        vp_registers.before_run(vp)
        assert vp.vcpu.committed == committed


def test_fpu_state_is_read_once_per_stop_and_written_back_once(vp: Any) -> None:
    for number in range(16):
        get(vp, names.XMM0 + number)
        put(vp, names.XMM0 + number, number)
    assert vp.vcpu.reads_of_xsave == 1
    assert not any(vp.vcpu.image[160:416])
    vp_registers.before_run(vp)
    assert vp.vcpu.image[160 + 16 * 15] == 15
    assert vp.vcpu.image[512] == 2
    get(vp, names.XMM0)
    assert vp.vcpu.reads_of_xsave == 2


def test_fpu_state_that_nobody_changed_is_not_written(vp: Any) -> None:
    get(vp, names.XMM0)
    vp.vcpu.image[160] = 9
    vp_registers.before_run(vp)
    assert vp.vcpu.image[160] == 9


def test_reset_prepares_kvm_and_masks_lint0() -> None:
    vp: Any = ParkedVp()
    vp_registers.reset(vp)
    assert vp.vcpu.cpuid
    assert vp.vcpu.page[0x350:0x354] == bytes((0, 0, 1, 0))
    assert vp.vcpu.activity == abi.MP_STATE_RUNNABLE
    assert get(vp, names.RDX) == child_cpuid.signature(vp) == 0xA20F12


# --- segments -----------------------------------------------------------------------------------------------------
def test_segment_attributes_are_those_of_the_descriptor(vp: Any) -> None:
    put(vp, names.CS, 0xA09B_0010_FFFF_FFFF << 64 | 0x1000)
    at = abi.SYNC_SREGS_AT + abi.SREGS_CS
    # type, present, dpl, db, s, l, g, avl, unusable
    assert bytes(vp.u8[at + 14 : at + 23]) == bytes((0xB, 1, 0, 0, 1, 1, 1, 0, 0))
    put(vp, names.DS, 0x1073_0000_0000_0000 << 64)
    at = abi.SYNC_SREGS_AT + abi.SREGS_DS
    assert bytes(vp.u8[at + 14 : at + 23]) == bytes((3, 0, 3, 0, 1, 0, 0, 1, 1))


def test_packed_segments_are_those_read_one_by_one() -> None:
    rng = random.Random(3)
    for _ in range(200):
        vp: Any = ParkedVp()
        values = [rng.getrandbits(112) | (rng.getrandbits(16) & 0xF0FF) << 112 for _ in range(6)]
        packed = memoryview(b"".join(value.to_bytes(16, "little") for value in values))
        segments.unpack_user_segments(vp.u8, packed)
        assert [get(vp, names.ES + n) for n in range(6)] == values
        assert segments.pack_user_segments(vp.u8) == bytes(packed)


def test_random_values_of_random_names_never_do_more_than_raise_a_status() -> None:
    rng = random.Random(5)
    vp: Any = ParkedVp()
    known = [*KEPT, *READ_ONLY, 0x40006, 0x12345]
    for _ in range(5000):
        name = rng.choice(known)
        try:
            put(vp, name, rng.getrandbits(rng.choice((1, 8, 32, 64, 128))))
            get(vp, name)
        except HvError as error:
            assert error.status in (status.INVALID_PARAMETER, status.INVALID_REGISTER_VALUE)
