# SPDX-License-Identifier: Apache-2.0
"""Registers, register page, state and CPUID of a child's VP on a processor of KVM's; no thread, no partition."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from rootvisor.hypervisor import child_cpuid, register_page, vp_registers, vp_state
from rootvisor.hypervisor.errors import HvError
from rootvisor.kvm import abi, selftest
from rootvisor.kvm.system import Kvm
from rootvisor.tlfs import registers as names
from rootvisor.tlfs import status
from rootvisor.tlfs import vp_state as tlfs
from tests.unit.hypervisor.parked_vp import ParkedVp

ROOT_VP: Any = None
LONG_MODE = {names.CR4: 0x20, names.CR3: 0x1000, names.EFER: 0xD00, names.CR0: 0x80050033}


@pytest.fixture(scope="session")
def xsave() -> bool:
    return selftest.check().xsave


@pytest.fixture
def vps(xsave: bool) -> Iterator[list[Any]]:
    """VP 0 and VP 1 after CREATE_VP."""
    kvm = Kvm()
    vm = kvm.create_vm()
    vm.create_irqchip()
    made = []
    for index in range(2):
        vp = ParkedVp(vm.create_vcpu(index), xsave=xsave, supported=kvm.supported_cpuid)
        vp.u64[abi.RUN_VALID_REGS // 8] = abi.SYNC_REGS | abi.SYNC_SREGS | abi.SYNC_EVENTS
        vp_registers.reset(vp)  # type: ignore[arg-type]
        made.append(vp)
    yield made
    vm.close()
    kvm.close()


@pytest.fixture
def vp(vps: list[Any]) -> Any:
    return vps[0]


def get(vp: Any, name: int) -> int:
    return vp_registers.get(vp, name)


def put(vp: Any, name: int, value: int) -> None:
    vp_registers.set(vp, name, value, ROOT_VP)


def settle(vp: Any) -> None:
    """What KVM_RUN does with marked registers, without running the guest."""
    vp_registers.before_run(vp)
    vp.vcpu.commit_sync_area()
    for at in range(abi.SYNC_REGS_AT, abi.SYNC_EVENTS_AT + 64):
        vp.u8[at] = 0xAA
    vp.vcpu.fill_sync_area()


# --- after CREATE_VP ----------------------------------------------------------------------------------------------
def test_state_after_create(vps: list[Any]) -> None:
    for index, vp in enumerate(vps):
        assert get(vp, names.RIP) == 0xFFF0
        assert get(vp, names.RFLAGS) == 2
        assert get(vp, names.CR0) == 0x60000010
        cs = get(vp, names.CS)
        assert cs & 0xFFFFFFFFFFFFFFFF == 0xFFFF0000
        assert cs >> 96 & 0xFFFF == 0xF000
        assert get(vp, names.RDX) >> 8 & 0xF
        assert get(vp, names.INTERNAL_ACTIVITY_STATE) == index
        assert get(vp, names.APIC_BASE) == 0xFEE00800 | (0x100 if index == 0 else 0)
        assert get(vp, names.EXPLICIT_SUSPEND) == 1
        assert get(vp, names.INTERCEPT_SUSPEND) == 0
        lapic = struct.unpack("<44I", vp_state.get_state(vp, tlfs.LAPIC)[:176])
        assert lapic[0] == index << 24
        assert lapic[4] == 0xFF
        for lvt in lapic[32:38]:
            assert lvt & 0x10000


def test_a_processor_that_has_run_is_as_new(vps: list[Any]) -> None:
    for vp in vps:
        known = (*vp_registers.SLOTS, *vp_registers._GET)
        skipped = (names.TSC, names.TSC_DEADLINE, names.SSP)
        new = {}
        for name in known:
            try:
                new[name] = get(vp, name)
            except HvError:
                continue
        state = {kind: vp_state.get_state(vp, kind) for kind in (tlfs.LAPIC, tlfs.XSAVE)}
        for name, value in (
            (names.RAX, 1), (names.RIP, 2), *LONG_MODE.items(), (names.LSTAR, 3 << 40), (names.XMM0, 4), (names.DR0, 5),
            (names.FP_CONTROL_STATUS, 0), (names.CS, 0xA09B_0010_FFFF_FFFF << 64),
            (names.PENDING_INTERRUPTION, 0x41_0001), (names.APIC_BASE, 0xFEE00C00), (names.MTRR_DEF_TYPE, 0x806),
            (names.PAT, 0),
        ):  # fmt: skip
            put(vp, name, value)
        settle(vp)
        put(vp, names.INTERNAL_ACTIVITY_STATE, 0)
        assert vp.vcpu.has_run
        vp_registers.reset(vp)
        for name, value in new.items():
            accessed = 1 << 112 if names.ES <= name <= names.GS else 0  # AMD makes new processors without it
            assert get(vp, name) | accessed == value | accessed or name in skipped, names.register_name(name)
        for kind, expected in state.items():
            assert vp_state.get_state(vp, kind)[:512] == expected[:512]


# --- registers ----------------------------------------------------------------------------------------------------
COMMON = [
    names.TSC, names.EFER, names.KERNEL_GS_BASE, names.APIC_BASE, names.PAT, names.SYSENTER_CS, names.SYSENTER_EIP,
    names.SYSENTER_ESP, names.STAR, names.LSTAR, names.CSTAR, names.SFMASK, names.MTRR_DEF_TYPE,
    *range(names.MTRR_PHYS_BASE0, names.MTRR_PHYS_BASE0 + 8), *range(names.MTRR_PHYS_MASK0, names.MTRR_PHYS_MASK0 + 8),
    *range(names.MTRR_FIX64K00000, names.MTRR_FIX4KC0000 + 8), names.DEBUG_CTL, names.EOM,
]  # fmt: skip
SYNIC = [*range(names.SINT0, names.SINT0 + 16), names.SCONTROL, names.SIEFP, names.SIMP]


def test_the_msr_list_of_rust_vmm_can_be_read_and_written_back(vp: Any) -> None:
    assert len(COMMON) == 42
    wanted = COMMON + SYNIC + [names.REFERENCE_TSC, names.GUEST_OS_ID]
    bank0 = child_cpuid.features0(vp.hypervisor, vp.partition)
    bank1 = child_cpuid.features1(vp.hypervisor, vp.partition)
    if bank0 >> 38 & 1:
        wanted.append(names.TSC_AUX)
    if bank1 >> 8 & 1:
        wanted += range(names.U_CET, names.U_CET + 8)
    if child_cpuid.xsave_features(vp.hypervisor, vp.partition) >> 12 & 1:
        wanted.append(names.U_XSS)
    for name in wanted:
        value = get(vp, name)
        put(vp, name, value)
        if name != names.TSC:
            assert get(vp, name) == value, names.register_name(name)


def test_every_64_bit_register_keeps_a_value_that_kvm_takes(vp: Any) -> None:
    values = {
        **{names.RAX + n: 0x1111_2222_3333_4444 * (n % 7 + 1) for n in range(16)},
        names.RIP: 0xFFFF_8000_1234_5678, names.RFLAGS: 0x246, **LONG_MODE, names.CR2: 0xDEAD_BEEF_0000, names.CR8: 5,
        names.KERNEL_GS_BASE: 0xFFFF_8880_0000_0000, names.PAT: 0x0007_0406_0007_0406, names.SYSENTER_CS: 0x10,
        names.SYSENTER_EIP: 0x8100_0000, names.SYSENTER_ESP: 0x8200_0000,
        names.STAR: 0x0023_0010_0000_0000, names.LSTAR: 0xFFFF_FFFF_8100_0040, names.CSTAR: 0xFFFF_FFFF_8100_0080,
        names.SFMASK: 0x47700, names.MTRR_DEF_TYPE: 0x806, names.MTRR_PHYS_BASE0: 6, names.MTRR_PHYS_MASK0: 0x800,
        names.MTRR_FIX64K00000: 0x0606_0606_0606_0606, names.MTRR_FIX4KC0000 + 7: 0x0505_0505_0505_0505,
        names.DR0: 0x1000, names.DR3: 0x4000, names.DR6: 0xFFFF_0FF0, names.DR7: 0x400,
    }  # fmt: skip
    put(vp, names.CS, 0xA09B_0010_FFFF_FFFF << 64)
    for name, value in values.items():
        put(vp, name, value)
    settle(vp)
    for name, value in values.items():
        assert get(vp, name) == value, names.register_name(name)
    assert get(vp, names.CS) == 0xA09B_0010_FFFF_FFFF << 64


def test_long_mode_without_lma_is_completed_at_the_resume(vp: Any) -> None:
    for name, value in {**LONG_MODE, names.EFER: 0x100}.items():
        put(vp, name, value)
    settle(vp)
    assert get(vp, names.EFER) == 0x500


def test_segments_and_tables_pass_through_kvm(vp: Any) -> None:
    for name, attributes in {
        names.ES: 0xC093, names.CS: 0xC09B, names.SS: 0xC093, names.DS: 0xC093, names.FS: 0x4093, names.GS: 0xC0F3,
        names.LDTR: 0x0082, names.TR: 0x008B,
    }.items():  # fmt: skip
        limit = 0xFFFFFFFF if attributes & 0x8000 else 0xFFFF  # AMD derives the granularity from it
        put(vp, name, 0x12345000 | limit << 64 | (name & 7) * 8 << 96 | attributes << 112)
    put(vp, names.CR0, 0x60000011)
    put(vp, names.GDTR, 0x7F << 48 | 0xFFFFC000 << 64)
    put(vp, names.IDTR, 0xFFF << 48 | 0xFFFFD000 << 64)
    before = {name: get(vp, name) for name in (*range(names.ES, names.TR + 1), names.IDTR, names.GDTR)}
    settle(vp)
    for name, value in before.items():
        assert get(vp, name) == value, names.register_name(name)


def test_fpu_registers_pass_through_kvm(vp: Any) -> None:
    rng = random.Random(1)
    values = {names.XMM0 + n: rng.getrandbits(128) for n in range(16)}
    values |= {names.FP_MMX0 + n: rng.getrandbits(80) for n in range(8)}
    values[names.FP_CONTROL_STATUS] = 0x27F | 0x3800 << 16 | 0x80 << 32 | 0x1234 << 64
    for name, value in values.items():
        put(vp, name, value)
    xmm_control = get(vp, names.XMM_CONTROL_STATUS)
    put(vp, names.XMM_CONTROL_STATUS, xmm_control & ~(0xFFFFFFFF << 64) | 0x1FA0 << 64)
    settle(vp)
    for name, value in values.items():
        assert get(vp, name) == value, names.register_name(name)
    assert get(vp, names.XMM_CONTROL_STATUS) >> 64 & 0xFFFFFFFF == 0x1FA0


def test_events_pass_through_kvm(vp: Any) -> None:
    page_fault = 1 | 3 << 1 | 1 << 4 | 14 << 16 | 7 << 32
    put(vp, names.PENDING_INTERRUPTION, page_fault)
    settle(vp)
    assert get(vp, names.PENDING_INTERRUPTION) == page_fault
    for value in (0, 1 | 2 << 1 | 2 << 16, 1 | 0x41 << 16, 0):
        put(vp, names.PENDING_INTERRUPTION, value)
        settle(vp)
        assert get(vp, names.PENDING_INTERRUPTION) == value
    event = 1 | 1 << 8 | 14 << 16 | 2 << 32 | 0xFFFF_8000_0000_1000 << 64
    put(vp, names.PENDING_EVENT0, event)
    settle(vp)
    assert get(vp, names.PENDING_EVENT0) == event
    put(vp, names.RAX, 1)  # a change of general registers does not lose it
    settle(vp)
    assert get(vp, names.PENDING_EVENT0) == event
    put(vp, names.PENDING_EVENT0, 0)
    put(vp, names.INTERRUPT_STATE, 3)
    settle(vp)
    assert get(vp, names.PENDING_EVENT0) == 0
    assert get(vp, names.INTERRUPT_STATE) == 3
    put(vp, names.INTERRUPT_STATE, 0)
    settle(vp)
    assert get(vp, names.INTERRUPT_STATE) == 0


def test_an_nmi_that_arrives_while_events_are_changed_is_not_lost(vp: Any) -> None:
    put(vp, names.INTERRUPT_STATE, 1)
    vp.vcpu.ioctl(abi.KVM_NMI)
    settle(vp)
    assert vp_state.get_state(vp, tlfs.LAPIC)[21 * 4] & 4


@pytest.mark.parametrize("value", [1, 0, 2])
def test_activity_state_passes_through_kvm(vps: list[Any], value: int) -> None:
    put(vps[1], names.INTERNAL_ACTIVITY_STATE, value)
    assert get(vps[1], names.INTERNAL_ACTIVITY_STATE) == value


def test_registers_of_a_processor_that_waits_for_sipi_are_kept(vps: list[Any]) -> None:
    vp = vps[1]
    put(vp, names.RBX, 0x1234)
    put(vp, names.CR2, 0x5678)
    vp_registers.before_run(vp)
    vp.vcpu.finish_exit()  # KVM_RUN, as far as it comes
    assert get(vp, names.RBX) == 0x1234
    assert get(vp, names.CR2) == 0x5678


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (names.CR0, 1 << 32), (names.CR8, 16), (names.EFER, 1 << 40), (names.RFLAGS, 1 << 40), (names.DR7, 1 << 32),
        (names.XMM_CONTROL_STATUS, 0x8000_0000 << 64), (names.PAT, 0xFF), (names.MTRR_DEF_TYPE, 0xFF),
        (names.XFEM, 0), (names.XFEM, 1 << 40), (names.APIC_BASE, 0xFEE00001), (names.INITIAL_APIC_ID, 7),
        (names.PENDING_EVENT1, 1), (names.INTERRUPT_STATE, 4), (names.INTERNAL_ACTIVITY_STATE, 8),
        (names.INTERCEPT_SUSPEND, 1), (names.EXPLICIT_SUSPEND, 2),
    ],
)  # fmt: skip
def test_an_invalid_value_is_refused(vp: Any, name: int, value: int) -> None:
    with pytest.raises(HvError) as caught:
        put(vp, name, value)
    assert caught.value.status == status.INVALID_REGISTER_VALUE


def test_an_unknown_name_is_an_invalid_parameter(vp: Any) -> None:
    for name in (0x00040006, 0x00080018, 0x00090020, 0xFFFFFFFF, 0x0002FFFF):
        with pytest.raises(HvError) as caught:
            get(vp, name)
        assert caught.value.status == status.INVALID_PARAMETER
        with pytest.raises(HvError) as caught:
            put(vp, name, 0)
        assert caught.value.status == status.INVALID_PARAMETER


# --- state --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind", [tlfs.LAPIC, tlfs.XSAVE, tlfs.SIM_PAGE, tlfs.SIEF_PAGE, tlfs.SYNTHETIC_TIMERS]
)
def test_state_comes_back_to_the_byte(vp: Any, kind: int) -> None:
    before = vp_state.get_state(vp, kind)
    vp_state.set_state(vp, kind, before.ljust(4096, b"\0"))
    assert vp_state.get_state(vp, kind) == before
    settle(vp)
    assert vp_state.get_state(vp, kind) == before


@pytest.mark.parametrize("x2apic", [False, True])
def test_a_local_apic_with_everything_in_it_comes_back(vps: list[Any], x2apic: bool) -> None:
    vp = vps[1]
    if x2apic:
        put(vp, names.APIC_BASE, 0xFEE00C00)
    put(vp, names.CR8, 3)
    words = list(struct.unpack("<44I", vp_state.get_state(vp, tlfs.LAPIC)))
    assert words[0] == (1 if x2apic else 1 << 24)
    words[4] = 0x1FF
    words[6], words[14], words[22] = 1 << 3, 1 << 3, 1 << 7  # in service, level, requested
    words[21] |= 4  # NMI
    words[32] = 0x20031  # periodic timer
    words[35] = 0x8700  # LINT0: ExtINT
    words[36] = 0x400
    words[40], words[41], words[42] = 1 << 30, 1 << 29, 0xB
    state = struct.pack("<44I", *words)
    vp_state.set_state(vp, tlfs.LAPIC, state)
    assert vp_state.get_state(vp, tlfs.LAPIC) == state
    assert get(vp, names.CR8) == 3
    vp_registers.before_run(vp)
    after = struct.unpack("<44I", vp_state.get_state(vp, tlfs.LAPIC))
    assert after[:41] == tuple(words[:41])
    assert 0 < after[41] <= 1 << 29
    words[21] &= ~4
    vp_state.set_state(vp, tlfs.LAPIC, struct.pack("<44I", *words))
    assert not vp_state.get_state(vp, tlfs.LAPIC)[84] & 4


def test_xsave_is_compacted_and_fits_one_page(vp: Any) -> None:
    put(vp, names.XMM0 + 7, 0x1234)
    state = vp_state.get_state(vp, tlfs.XSAVE)
    assert len(state) == child_cpuid.max_xsave_size(vp.hypervisor, vp.partition) <= 4096
    states = child_cpuid.xsave_states(vp.hypervisor, vp.partition)
    assert struct.unpack_from("<Q", state, 520)[0] == states | 1 << 63
    assert struct.unpack_from("<Q", state, 512)[0] & 2
    assert state[160 + 7 * 16] == 0x34
    other = bytearray(state)
    other[160 + 7 * 16] = 0x99
    vp_state.set_state(vp, tlfs.XSAVE, bytes(other))
    settle(vp)
    assert get(vp, names.XMM0 + 7) == 0x1299
    assert vp_state.get_state(vp, tlfs.XSAVE) == bytes(other)


# --- CPUID --------------------------------------------------------------------------------------------------------
def kvm_cpuid(vp: Any, leaf: int, subleaf: int = 0) -> tuple[int, ...]:
    """What KVM has got."""
    buffer = bytearray(8 + 40 * 256)
    struct.pack_into("<I", buffer, 0, 256)
    vp.vcpu.ioctl(abi.KVM_GET_CPUID2, buffer)
    for number in range(struct.unpack_from("<I", buffer)[0]):
        entry = struct.unpack_from("<7I", buffer, 8 + 40 * number)
        if entry[0] == leaf and (entry[1] == subleaf or not entry[2] & 1):
            return entry[3:]
    return ()


def test_registered_results_reach_kvm_before_the_first_run(vp: Any) -> None:
    ones = (0xFFFFFFFF,) * 4
    vp.partition.cpuid_results.register(0, 0x80000002, None, True, (1, 2, 3, 4), ones)
    vp.stored.cpuid_stale = True
    vp_registers.before_run(vp)
    assert kvm_cpuid(vp, 0x80000002) == (1, 2, 3, 4)
    assert vp.stored.cpuid_final
    with pytest.raises(HvError):
        child_cpuid.apply(vp)


def test_the_default_leaves_are_sane(vps: list[Any], xsave: bool) -> None:
    for vp in vps:
        assert kvm_cpuid(vp, 1)[1] >> 24 == vp.index
        assert kvm_cpuid(vp, 0xB)[3] == vp.index
        assert not kvm_cpuid(vp, 1)[2] >> 5 & 1
        assert bool(kvm_cpuid(vp, 1)[2] >> 26 & 1) == xsave
        known = child_cpuid.table(vp)
        assert child_cpuid.value(vp, known, 0, 0, 1, 0)[0] >= 7


# --- register page ------------------------------------------------------------------------------------------------
def test_the_page_shows_the_registers(vp: Any) -> None:
    vp.register_page = memoryview(bytearray(4096))
    register_page.refresh(vp)
    page = vp.register_page
    assert page[0:8] == bytes((1, 0, 1, 0, 0, 0, 0, 0))
    for offset, name in (
        (0x88, names.RIP), (0x90, names.RFLAGS), (0x18, names.RDX), (0x160, names.CR0), (0x188, names.DR7),
        (0x1A8, names.XFEM), (0x180, names.EFER),
    ):  # fmt: skip
        assert int.from_bytes(page[offset : offset + 8], "little") == get(vp, name)
    assert int.from_bytes(page[0x110:0x120], "little") == get(vp, names.CS)
