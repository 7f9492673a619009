# SPDX-License-Identifier: Apache-2.0
"""Hypercalls of an ordinary partition: flushes, interrupts, registers, the start of VPs, and what is refused."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rootvisor.hypervisor.calls.address_spaces import (
    ALL_ADDRESS_SPACES,
    ALL_PROCESSORS,
    EXTENDED_RANGES,
    NON_GLOBAL_ONLY,
)
from rootvisor.tlfs import cpuid, msrs, registers, status
from rootvisor.tlfs import hypercalls as hv
from tests.kvm import guest as g
from tests.kvm.ordinary import CALL_PAGE, Ordinary, pages

row = pytest.mark.row

ALL = ALL_PROCESSORS | ALL_ADDRESS_SPACES
#: A 2 MiB page of linear addresses that has no memory of its own, its table entry, and two pages that it may lead to.
LINEAR = 0xC0200000
ENTRY = g.PAGE_TABLES + 0x2000 + 3 * 0x1000 + 8
FIRST, SECOND = 0xA00000, 0xC00000
VECTOR = 0x51


def point(guest: Ordinary, page: int) -> None:
    struct.pack_into("<Q", guest.ram, ENTRY, page | 0x87)


def flush(guest: Ordinary, form: str, flags: int = ALL, mask: int = 3, space: int = 0) -> int:
    """One flush of VPs 0 and 1 in each form."""
    element = struct.pack("<Q", LINEAR | 0x1FF)
    sparse = struct.pack("<QQQ", 0, 1, mask)
    head = struct.pack("<QQ", space, flags)
    plain = head + struct.pack("<Q", mask)
    if form == "space":
        return guest.call(hv.FLUSH_VIRTUAL_ADDRESS_SPACE, plain).status
    if form == "fast space":
        result = guest.fast(hv.FLUSH_VIRTUAL_ADDRESS_SPACE, plain)
        assert result.op.fault == 0
        return result.status
    if form == "list":
        result = guest.call(hv.FLUSH_VIRTUAL_ADDRESS_LIST, plain + element * 3, count=3)
        assert result.reps == (3 if not result.status else 0)
        return result.status
    if form == "fast list":
        return guest.fast(hv.FLUSH_VIRTUAL_ADDRESS_LIST, plain + element * 11, count=11).status
    if form == "space ex":
        return guest.call(hv.FLUSH_VIRTUAL_ADDRESS_SPACE_EX, head + sparse, variable=1).status
    if form == "fast list ex":
        return guest.fast(
            hv.FLUSH_VIRTUAL_ADDRESS_LIST_EX, head + sparse + element, variable=1, count=1
        ).status
    assert form == "list ex"
    return guest.call(
        hv.FLUSH_VIRTUAL_ADDRESS_LIST_EX, head + sparse + element * 2, variable=1, count=2
    ).status


FORMS = ["space", "fast space", "list", "fast list", "space ex", "list ex", "fast list ex"]


# --- flushes ------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["by KVM", "VP by VP"])
def flushing(request: pytest.FixtureRequest, ordinary2: Ordinary) -> Ordinary:
    """Both ways of emptying TLBs: KVM's own, where it has a second level of translation, and the VPs' threads."""
    if request.param == "VP by VP":
        ordinary2.partition._second_level = False
    elif not ordinary2.partition.flush_all():
        pytest.skip("this KVM has no second level of translation")
    return ordinary2


@row("TLB-01", "TLB-02", "TLB-03", "HC-02", "HC-03", "HC-10", "HC-11", "VPS-01")
@pytest.mark.parametrize("form", FORMS)
def test_flush_empties_the_tlb_of_every_vp_it_names(flushing: Ordinary, form: str) -> None:
    flushing.ram[FIRST : FIRST + 8] = b"first..."
    flushing.ram[SECOND : SECOND + 8] = b"second.."
    for turn in range(6):
        point(flushing, (FIRST, SECOND)[turn % 2])
        assert flush(flushing, form, ALL_ADDRESS_SPACES if turn % 3 else ALL) == 0
        for vp in (0, 1):
            assert flushing.read(LINEAR, vp).to_bytes(8, "little") == (b"first...", b"second..")[turn % 2]


@row("TLB-02")
def test_flush_of_a_vp_that_runs_waits_until_it_has_left_the_guest(ordinary2: Ordinary) -> None:
    ordinary2.partition._second_level = False
    spinner = threading.Thread(target=lambda: ordinary2.take(0x70, vp=1, turns=200_000_000))
    spinner.start()
    for _ in range(20):
        assert flush(ordinary2, "space") == 0
        deadline = time.monotonic() + 60  # it may just have been outside, and empties its TLB as it enters
        while ordinary2.partition.vps[1].flush_wanted:  # type: ignore[attr-defined]
            assert time.monotonic() < deadline
    assert ordinary2.call(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(0x70, 0, bytes(3), 2)).status == 0
    spinner.join(60)
    assert not spinner.is_alive()


@row("TLB-02")
def test_vps_that_flush_each_other_at_once_both_go_on(flushing: Ordinary) -> None:
    def batch() -> list[g.Op]:
        word = g.control(hv.FLUSH_VIRTUAL_ADDRESS_SPACE, fast=True)
        return [
            g.Op(g.HYPERCALL, rcx=word, rdx=0, r8=ALL, xmm=struct.pack("<Q", 3), target=CALL_PAGE)
            for _ in range(100)
        ]

    batches = [batch(), batch()]
    threads = [threading.Thread(target=flushing.run, args=(ops, vp)) for vp, ops in enumerate(batches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all((op.fault, op.rax) == (0, 0) for ops in batches for op in ops)


@row("TLB-01", "HC-02", "HC-03", "HC-10", "HC-11")
@pytest.mark.parametrize("form", FORMS)
def test_flush_with_unknown_flags_or_no_address_space(ordinary2: Ordinary, form: str) -> None:
    refused = [(ALL | 1 << bit, 0) for bit in (4, 8, 9, 63)]
    refused.append((ALL | (NON_GLOBAL_ONLY if "list" in form else EXTENDED_RANGES), 0))
    refused.append((ALL_PROCESSORS, 1 << 60))
    for flags, space in refused:
        assert flush(ordinary2, form, flags, space=space) == status.INVALID_PARAMETER, hex(flags)
    assert flush(ordinary2, form, ALL_PROCESSORS, space=g.PAGE_TABLES) == 0


@row("TLB-04")
@pytest.mark.parametrize("form", ["space", "list"])
def test_empty_mask_names_everybody(ordinary2: Ordinary, form: str) -> None:
    assert flush(ordinary2, form, ALL_ADDRESS_SPACES, mask=0) == 0


@row("VPS-01", "TLB-01")
@pytest.mark.parametrize(
    ("set_format", "mask", "banks", "expected"),
    [
        (0, 0, (), 0),
        (1, 0, (), 0),
        (0, 5, (0x21, 4), 0),
        (0, 1 << 63, ((1 << 64) - 1,), 0),
        (0, 3, (1,), status.INVALID_PARAMETER),
        (0, 1, (1, 1), status.INVALID_PARAMETER),
        (2, 1, (1,), status.INVALID_PARAMETER),
    ],
)
def test_vp_sets(
    ordinary2: Ordinary, set_format: int, mask: int, banks: tuple[int, ...], expected: int
) -> None:
    tail = struct.pack(f"<QQ{len(banks)}Q", set_format, mask, *banks)
    data = struct.pack("<QQ", 0, ALL_ADDRESS_SPACES) + tail
    assert ordinary2.call(hv.FLUSH_VIRTUAL_ADDRESS_SPACE_EX, data, variable=len(banks)).status == expected
    ipi = struct.pack("<II", VECTOR, 0) + tail
    assert ordinary2.call(hv.SEND_IPI_EX, ipi, variable=len(banks)).status == expected


@row("HC-01")
def test_switch_of_the_address_space_loads_cr3(ordinary2: Ordinary) -> None:
    other = g.SPARE + 0x1000
    ordinary2.ram[other : other + 4096] = ordinary2.ram[g.PAGE_TABLES : g.PAGE_TABLES + 4096]
    assert ordinary2.fast(hv.SWITCH_VIRTUAL_ADDRESS_SPACE, struct.pack("<Q", other)).status == 0
    assert int.from_bytes(ordinary2.partition.vps[0].vcpu.get_sregs()[232 + 8 : 240 + 8], "little") == other
    assert ordinary2.call(hv.SWITCH_VIRTUAL_ADDRESS_SPACE, struct.pack("<Q", g.PAGE_TABLES)).status == 0
    assert (
        ordinary2.fast(hv.SWITCH_VIRTUAL_ADDRESS_SPACE, struct.pack("<Q", 1 << 55)).status
        == status.INVALID_PARAMETER
    )


# --- interrupts ---------------------------------------------------------------------------------------------------
@row("IPI-01", "IPI-02", "HC-05", "HC-12", "VPS-01")
def test_interrupts_reach_every_vp_of_the_mask_or_set(ordinary2: Ordinary) -> None:
    assert ordinary2.call(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(VECTOR, 0, bytes(3), 3)).status == 0
    assert [ordinary2.take(VECTOR, vp) for vp in (0, 1)] == [1, 1]
    assert ordinary2.fast(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(VECTOR, 0, bytes(3), 2)).status == 0
    assert [ordinary2.take(VECTOR, 1, count=2), ordinary2.interrupts(VECTOR)] == [2, 1]
    sparse = hv.SEND_IPI_EX_INPUT.pack(VECTOR, 0, bytes(3), 0, 2 | 1) + struct.pack("<QQ", 1, 1)
    assert ordinary2.fast(hv.SEND_IPI_EX, sparse, variable=2).status == 0, "VP 64 does not exist, VP 0 does"
    assert ordinary2.take(VECTOR, count=2) == 2


@row("IPI-01", "HC-05", "HC-12")
@pytest.mark.parametrize("vector", [0, 15, 256])
def test_vector_out_of_range(ordinary2: Ordinary, vector: int) -> None:
    assert (
        ordinary2.call(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(vector, 0, bytes(3), 1)).status
        == status.INVALID_PARAMETER
    )
    data = hv.SEND_IPI_EX_INPUT.pack(vector, 0, bytes(3), 1, 0)
    assert ordinary2.call(hv.SEND_IPI_EX, data).status == status.INVALID_PARAMETER


# --- VPs ----------------------------------------------------------------------------------------------------------
def context(guest: Ordinary, cr0: int = 0x80050033) -> bytes:
    """The state that the agent begins in."""
    code = hv.SEGMENT.pack(0, 0xFFFFFFFF, 0x08, 0xA09B)
    data = hv.SEGMENT.pack(0, 0xFFFFFFFF, 0x10, 0xC093)
    task, ldt = hv.SEGMENT.pack(0, 0x67, 0, 0x008B), bytes(16)
    table = hv.DESCRIPTOR_TABLE.pack(0, 0)
    return hv.VP_CONTEXT.pack(
        guest._entry, 0, 2, code, data, data, data, data, data, task, ldt, table, table, 0x500, cr0, g.PAGE_TABLES,
        0x620, 0x0007_0406_0007_0406,
    )  # fmt: skip


def start(guest: Ordinary, vp: int, *, vtl: int = 0, partition: int = hv.SELF, cr0: int = 0x80050033) -> int:
    data = hv.START_VIRTUAL_PROCESSOR_INPUT.pack(partition, vp, vtl, context(guest, cr0))
    return guest.call(hv.START_VIRTUAL_PROCESSOR, data).status


@row("HC-27", "PRV-24")
def test_vp_starts_where_the_guest_says(usable_kvm: None) -> None:
    with Ordinary(vps=3) as guest:
        guest.enable_hypercalls()
        assert start(guest, 0) == status.INVALID_PARAMETER, "oneself"
        assert start(guest, 3) == status.INVALID_VP_INDEX
        assert start(guest, 1, vtl=1) == status.INVALID_PARAMETER
        assert start(guest, 1, partition=77) == status.INVALID_PARTITION_ID
        assert start(guest, 1, cr0=0x80050032) == status.INVALID_REGISTER_VALUE, "paging without protection"
        for vp in (1, 2):
            guest.ram[g.MAILBOXES + vp * g.MAILBOX_SIZE :][:4] = bytes(4)
            assert start(guest, vp) == 0
            guest._started.add(vp)
            guest._wait(vp)
            assert guest.rdmsr(msrs.VP_INDEX, vp) == vp
            assert start(guest, vp) == status.INVALID_VP_STATE, "it runs"
        assert guest.partition.defect is None


@row("HC-28", "PRV-24")
def test_vp_index_of_an_apic_id(ordinary2: Ordinary) -> None:
    head = hv.GET_VP_INDEX_FROM_APIC_ID_INPUT.pack(hv.SELF, 0)
    result = ordinary2.call(
        hv.GET_VP_INDEX_FROM_APIC_ID, head + struct.pack("<3I", 1, 0, 9), output=12, count=3
    )
    assert (result.status, result.reps) == (status.INVALID_PARAMETER, 2)
    assert struct.unpack_from("<2I", ordinary2.ram, g.OUTPUT) == (1, 0)


@row("HC-14", "HC-15", "PRV-21")
def test_registers_of_the_calling_vp(ordinary2: Ordinary) -> None:
    head = hv.VP_REGISTERS_INPUT.pack(hv.SELF, registers.VP_INDEX_SELF, 0, bytes(3))
    names = struct.pack(
        "<3I", registers.VP_INDEX, registers.GUEST_OS_ID, registers.PRIVILEGES_AND_FEATURES_INFO
    )
    result = ordinary2.call(hv.GET_VP_REGISTERS, head + names, output=48, count=3)
    assert (result.status, result.reps) == (0, 3)
    values = struct.unpack("<6Q", bytes(ordinary2.ram[g.OUTPUT : g.OUTPUT + 48]))
    low, high, ecx, edx = ordinary2.cpuid(cpuid.FEATURES)
    assert values == (0, 0, 0x8100_0007_0003_0000, 0, low | high << 32, ecx | edx << 32)

    def element(name: int, value: int) -> bytes:
        return struct.pack("<I12xQQ", name, value, 0)

    two = (
        element(registers.SINT0 + 3, 0x10033)
        + element(registers.SINT0 + 4, 3)
        + element(registers.SCONTROL, 1)
    )
    result = ordinary2.call(hv.SET_VP_REGISTERS, head + two, count=3)
    assert (result.status, result.reps) == (status.INVALID_REGISTER_VALUE, 1), (
        "what came before it stays written"
    )
    assert (ordinary2.rdmsr(msrs.SINT0 + 3), ordinary2.rdmsr(msrs.SCONTROL)) == (0x10033, 0)


@row("HC-14", "HC-15")
@pytest.mark.parametrize(
    ("partition", "vp", "vtl", "name", "expected"),
    [
        (77, 0, 0, registers.VP_INDEX, status.INVALID_PARTITION_ID),
        (hv.SELF, 9, 0, registers.VP_INDEX, status.INVALID_VP_INDEX),
        (hv.SELF, 0, 0x11, registers.VP_INDEX, status.INVALID_PARAMETER),
        (hv.SELF, 0, 0, registers.PENDING_EVENT0, status.INVALID_PARAMETER),
        (hv.SELF, 0, 0, registers.EXPLICIT_SUSPEND, status.INVALID_PARAMETER),
        (hv.SELF, 0, 0, 0xDEAD0000, status.INVALID_PARAMETER),
    ],
)
def test_registers_that_cannot_be_had(
    ordinary2: Ordinary, partition: int, vp: int, vtl: int, name: int, expected: int
) -> None:
    head = hv.VP_REGISTERS_INPUT.pack(partition, vp, vtl, bytes(3))
    result = ordinary2.call(hv.GET_VP_REGISTERS, head + struct.pack("<I", name), output=16, count=1)
    assert (result.status, result.reps) == (expected, 0)


def element(name: int, value: int) -> bytes:
    return struct.pack("<I12xQQ", name, value & (1 << 64) - 1, value >> 64)


def registers_of(guest: Ordinary, vp: int, *names: int) -> list[int]:
    head = hv.VP_REGISTERS_INPUT.pack(hv.SELF, vp, 0, bytes(3))
    data = head + struct.pack(f"<{len(names)}I", *names)
    result = guest.call(hv.GET_VP_REGISTERS, data, output=16 * len(names), count=len(names))
    assert (result.status, result.reps) == (0, len(names))
    return [int.from_bytes(result.output[at : at + 16], "little") for at in range(0, 16 * len(names), 16)]


@row("HC-14", "PRV-21")
def test_processor_registers_of_the_calling_vp(ordinary2: Ordinary) -> None:
    cr3, efer, rdx, code, apic, counter = registers_of(
        ordinary2, registers.VP_INDEX_SELF, registers.CR3, registers.EFER, registers.RDX, registers.CS,
        registers.APIC_ID, registers.TIME_REF_COUNT,
    )  # fmt: skip
    assert (cr3, efer, rdx, apic) == (g.PAGE_TABLES, 0x500, g.INPUT, 0)
    assert code >> 96 & 0xFFFF == 8
    assert counter <= ordinary2.rdmsr(msrs.TIME_REF_COUNT)


@contextmanager
def computing(guest: Ordinary, vp: int) -> Iterator[None]:
    """The VP is in the guest all the time, and waits for an interrupt that comes at the end."""
    thread = threading.Thread(target=guest.take, args=(0x77, vp, 1, 1 << 40))
    thread.start()
    try:
        while not guest.partition.vps[vp].in_guest:  # type: ignore[attr-defined]
            assert thread.is_alive()
        yield
    finally:
        assert guest.call(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(0x77, 0, bytes(3), 1 << vp)).status == 0
        thread.join()


@row("HC-14", "HC-15", "PRV-21")
@pytest.mark.parametrize("vp", [0, 1])
def test_processor_registers_are_written_and_read_back(ordinary2: Ordinary, vp: int) -> None:
    head = hv.VP_REGISTERS_INPUT.pack(hv.SELF, vp, 0, bytes(3))
    with computing(ordinary2, 1):
        wanted = {
            registers.LSTAR: 0xFFFF_8000_1234_5678,
            registers.XMM0 + 9: 0x1122_3344_5566_7788_99AA_BBCC_DDEE_FF00,
            registers.DR0: 0x1234,
            registers.STIMER0_COUNT: 1 << 60,
            registers.RBP: 0x5A5A_A5A5_0123_4567,
            registers.SINT0 + 5: 0x10055,
        }
        data = head + b"".join(element(name, value) for name, value in wanted.items())
        result = ordinary2.call(hv.SET_VP_REGISTERS, data, count=len(wanted))
        assert (result.status, result.reps) == (0, len(wanted))
        assert registers_of(ordinary2, vp, *wanted) == list(wanted.values())
    assert ordinary2.rdmsr(msrs.SINT0 + 5, vp) == 0x10055


@row("HC-15")
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (registers.CR4, 1 << 40, status.INVALID_REGISTER_VALUE),
        (registers.CR0, 1, status.INVALID_REGISTER_VALUE),
        (registers.EFER, 1 << 60, status.INVALID_REGISTER_VALUE),
        (registers.TSC, 5, status.INVALID_PARAMETER),
        (registers.TIME_REF_COUNT, 5, status.INVALID_PARAMETER),
        (registers.APIC_ID, 5, status.INVALID_PARAMETER),
        (registers.VP_INDEX, 5, status.INVALID_PARAMETER),
    ],
)
def test_registers_that_cannot_be_written_stay(
    ordinary2: Ordinary, name: int, value: int, expected: int
) -> None:
    head = hv.VP_REGISTERS_INPUT.pack(hv.SELF, registers.VP_INDEX_SELF, 0, bytes(3))
    result = ordinary2.call(hv.SET_VP_REGISTERS, head + element(name, value), count=1)
    assert (result.status, result.reps) == (expected, 0)
    assert ordinary2.rdmsr(msrs.VP_INDEX) == 0


# --- extended calls -----------------------------------------------------------------------------------------------
@row("HC-35", "PRV-23")
def test_there_is_no_extended_call_but_the_question_for_them(ordinary2: Ordinary) -> None:
    result = ordinary2.call(hv.EXT_QUERY_CAPABILITIES, output=8)
    assert (result.status, result.output) == (0, bytes(8))
    assert ordinary2.fast(hv.EXT_QUERY_CAPABILITIES).status == status.INVALID_PARAMETER


@row("HC-36", "HC-37", "MEM-01")
@pytest.mark.parametrize("code", [0x8002, 0x8003, 0x8004, 0x8006, 0x8041])
def test_extended_calls_without_a_capability_do_not_exist(ordinary2: Ordinary, code: int) -> None:
    assert ordinary2.call(code, output=8).status == status.INVALID_HYPERCALL_CODE


# --- what is refused ----------------------------------------------------------------------------------------------
def refused(guest: Ordinary, code: int, *expected: int) -> None:
    """The code, as a simple and as a repeated call, in both forms."""
    answers = [
        guest.call(code, bytes(512), output=64),
        guest.call(code, bytes(512), output=64, count=1),
        guest.fast(code),
    ]
    for answer in answers:
        assert answer.status in expected, f"{code:#x}: {answer}"


@row(
    "HC-06",
    "HC-07",
    "HC-08",
    "HC-16",
    "HC-23",
    "HC-25",
    "HC-26",
    "HC-31",
    "HC-32",
    "HC-33",
    "VSM-03",
    "VSM-04",
    "VSM-09",
)
@pytest.mark.parametrize(
    "code",
    [
        hv.MODIFY_VTL_PROTECTION_MASK, hv.ENABLE_PARTITION_VTL, hv.ENABLE_VP_VTL, hv.GET_SYSTEM_PROPERTY,
        hv.NOTIFY_PARTITION_EVENT, hv.ASSERT_VIRTUAL_INTERRUPT, hv.VTL_ACCESS_CHECK, hv.ACCEPT_GPA_PAGES,
        hv.MODIFY_SPARSE_GPA_PAGE_HOST_VISIBILITY, hv.QUERY_SPARSE_GPA_PAGE_HOST_VISIBILITY, hv.MAP_VP_STATE_PAGE,
        hv.UNMAP_VP_STATE_PAGE,
    ],
)  # fmt: skip
def test_calls_of_what_is_not_offered_are_denied(ordinary2: Ordinary, code: int) -> None:
    refused(ordinary2, code, status.ACCESS_DENIED)


@row("HC-16", "HC-33")
def test_translation_and_cpuid_of_others_are_not_for_a_guest(ordinary2: Ordinary) -> None:
    data = registers.TRANSLATE_INPUT.pack(hv.SELF, 1, 0, 1)
    answer = ordinary2.call(hv.TRANSLATE_VIRTUAL_ADDRESS, data, output=registers.TRANSLATE_OUTPUT.size)
    assert answer.status in (status.INVALID_VP_STATE, status.ACCESS_DENIED)
    answer = ordinary2.call(
        hv.GET_VP_CPUID_VALUES, struct.pack("<QII", hv.SELF, 0, 0) + bytes(8), output=16, count=1
    )
    assert answer.status == status.ACCESS_DENIED


@row("HC-24")
def test_retarget_of_an_unknown_device(ordinary2: Ordinary) -> None:
    data = hv.RETARGET_DEVICE_INTERRUPT_INPUT.pack(hv.SELF, 1 << 62 | 8, 1, 0, 0xFEE00000, 0, 0, 0x40, 0, 1)
    assert ordinary2.call(hv.RETARGET_DEVICE_INTERRUPT, data).status == status.INVALID_DEVICE_ID


@row("HC-09", "VSM-05", "VSM-06", "VSM-07", "VSM-13")
@pytest.mark.parametrize("code", [hv.VTL_CALL, hv.VTL_RETURN])
def test_there_is_no_other_vtl_to_go_to(ordinary2: Ordinary, code: int) -> None:
    assert ordinary2.one(g.HYPERCALL, rcx=code, target=CALL_PAGE).fault == g.UD
    assert ordinary2.call(hv.NOTIFY_LONG_SPIN_WAIT, bytes(8)).status == 0


@row("HC-19", "HC-20", "HC-21", "HC-22", "HC-29", "HC-34", "HC-38", "PAR-08", "MSC-04", "NST-04")
@pytest.mark.parametrize(
    "code",
    [
        0x69,
        0x6A,
        0x6B,
        0x71,
        0xAF,
        0xB0,
        0x103,
        0x106,
        0x107,
        0x112,
        0x113,
        0x0E,
        0x10,
        0xBEEF,
        0,
        5,
        0x7FFF,
        0xFFFF,
    ],
)
def test_codes_of_nothing_here_are_invalid_never_a_fault(ordinary2: Ordinary, code: int) -> None:
    refused(ordinary2, code, status.INVALID_HYPERCALL_CODE)


PARENT = {
    "PAR-01": [*range(0x40, 0x46), 0x47, 0x10A],
    "PAR-02": [0x48, 0x49, 0x4A, 0x4B, 0x4C, 0x6E, 0x90],
    "PAR-03": [0x4D, 0x91, 0x92, 0xAD, 0x110],
    "PAR-04": [0x4E, 0x4F, 0x53, 0x54, 0x56, 0xE5, 0x11F],
    "PAR-05": [0x57, 0x58, 0x59, 0x5A, 0x5B, 0x70, 0x95, 0x96],
    "PAR-06": [*range(0x5E, 0x69), 0x6C, 0x6D, 0x6F, 0x131],
    "PAR-07": [4, 9, 0x76, 0x77, 0x78, 0x79, 0x7A, 0x7C, 0x7D, *range(0x7F, 0x87), *range(0x88, 0x8B), 0x97],
}


@row(
    "PAR-01",
    "PAR-02",
    "PAR-03",
    "PAR-04",
    "PAR-05",
    "PAR-06",
    "PAR-07",
    "PRV-15",
    "PRV-18",
    "MEM-02",
    "MSC-07",
)
@pytest.mark.parametrize("name", sorted(PARENT))
def test_calls_of_a_root_or_parent(ordinary2: Ordinary, name: str) -> None:
    for code in PARENT[name]:
        refused(ordinary2, code, status.ACCESS_DENIED, status.INVALID_HYPERCALL_CODE)
    assert ordinary2.partition.ended == ""


@row("VSM-01", "VSM-02", "VSM-08", "VSM-10", "VSM-11", "VSM-12")
def test_registers_of_vtls_do_not_exist(ordinary2: Ordinary) -> None:
    head = hv.VP_REGISTERS_INPUT.pack(hv.SELF, registers.VP_INDEX_SELF, 0, bytes(3))
    for name in (*range(0xD0000, 0xD0012), 0xE0000):
        result = ordinary2.call(hv.GET_VP_REGISTERS, head + struct.pack("<I", name), output=16, count=1)
        assert result.status == status.INVALID_PARAMETER, hex(name)
        element = struct.pack("<I12xQQ", name, 1, 0)
        assert ordinary2.call(hv.SET_VP_REGISTERS, head + element, count=1).status == status.INVALID_PARAMETER


@row("NST-05")
def test_the_nested_bit_is_reserved(ordinary2: Ordinary) -> None:
    result = ordinary2.call(hv.NOTIFY_LONG_SPIN_WAIT, bytes(8), reserved=1 << 31)
    assert result.status == status.INVALID_HYPERCALL_INPUT


@row("VSM-12")
def test_assist_page_has_nothing_of_vtls(ordinary2: Ordinary) -> None:
    page = pages(0)[2]
    ordinary2.wrmsr(msrs.VP_ASSIST_PAGE, page | 1)
    assert [ordinary2.read(page + at) for at in range(8, 64, 8)] == [0] * 7
