# SPDX-License-Identifier: Apache-2.0
"""The calling convention: order of checks, register forms, operands, repetitions."""

from __future__ import annotations

import struct

import pytest

from rootvisor.hypervisor import hypercall_abi
from rootvisor.hypervisor.hypercall_table import SIMPLE, TABLE
from rootvisor.hypervisor.root_partition import ROOT_FEATURES, ROOT_PRIVILEGES
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import privileges, status
from tests.kvm import guest as g
from tests.kvm.guest import Guest

RESERVED_BITS = [*range(27, 32), *range(44, 48), *range(60, 64)]
INDEX_HEADER = hv.GET_VP_INDEX_FROM_APIC_ID_INPUT.pack(hv.SELF, 0)
BEYOND_RAM = g.RAM + 0x1000


def apic_ids(*values: int) -> bytes:
    return INDEX_HEADER + struct.pack(f"<{len(values)}I", *values)


@pytest.fixture(params=["first", "again"])
def guest(guest: Guest, request: pytest.FixtureRequest) -> Guest:
    """A guest that makes its calls for the first time, and one that has made each before: simple calls are then
    executed in a shorter way."""
    if request.param == "again":
        calls = [call for call in TABLE.calls.values() if call.kind == SIMPLE and (call.size or call.output)]
        ops = [g.Op(g.HYPERCALL, rcx=call.code, rdx=1, r8=1) for call in calls]
        guest.run(ops)
        assert {op.rax for op in ops} == {status.INVALID_ALIGNMENT}
    return guest


# --- checks, in their order -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", [0x0000, 0x0005, 0xBEEF, 0x4000, 0x8001, 0xFFFF])
def test_code_unknown_is_invalid_code(guest: Guest, code: int) -> None:
    answer = guest.call(code)
    assert (answer.status, answer.reps, answer.rest) == (status.INVALID_HYPERCALL_CODE, 0, 0)


def test_code_unknown_wins_over_reserved_bits_and_operands(guest: Guest) -> None:
    answer = guest.call(0xBEEF, reserved=1 << 63, input_gpa=3, variable=9, count=5)
    assert answer.status == status.INVALID_HYPERCALL_CODE


def test_privilege_missing_wins_over_everything_else() -> None:
    with Guest(privileges=ROOT_PRIVILEGES & ~privileges.ACCESS_PARTITION_ID) as guest:
        guest.enable_hypercalls()
        answer = guest.call(hv.GET_PARTITION_ID, reserved=1 << 63, output_gpa=3)
        assert answer.status == status.ACCESS_DENIED


@pytest.mark.parametrize(
    ("code", "privilege"),
    [
        (hv.GET_PARTITION_ID, privileges.ACCESS_PARTITION_ID),
        (hv.DEPOSIT_MEMORY, privileges.ACCESS_MEMORY_POOL),
        (hv.WITHDRAW_MEMORY, privileges.ACCESS_MEMORY_POOL),
        (hv.MAP_STATS_PAGE, privileges.ACCESS_STATS),
        (hv.UNMAP_STATS_PAGE, privileges.ACCESS_STATS),
        (hv.ADD_LOGICAL_PROCESSOR, privileges.CPU_MANAGEMENT),
        (hv.GET_LOGICAL_PROCESSOR_RUN_TIME, privileges.CPU_MANAGEMENT),
        (hv.CREATE_VP, privileges.CPU_MANAGEMENT),
        (hv.MAP_DEVICE_INTERRUPT, privileges.CPU_MANAGEMENT),
        (hv.UNMAP_DEVICE_INTERRUPT, privileges.CPU_MANAGEMENT),
        (hv.SET_SYSTEM_PROPERTY, privileges.CPU_MANAGEMENT),
        (hv.GET_SYSTEM_PROPERTY, privileges.CPU_MANAGEMENT),
        (hv.ENTER_SLEEP_STATE, privileges.CPU_MANAGEMENT),
        (hv.NOTIFY_PARTITION_EVENT, privileges.CPU_MANAGEMENT),
        (hv.GET_PARTITION_PROPERTY_EX, privileges.CREATE_PARTITIONS),
    ],
)
def test_privilege_gates_the_call(code: int, privilege: int) -> None:
    with Guest(privileges=ROOT_PRIVILEGES & ~privilege) as guest:
        guest.enable_hypercalls()
        assert [guest.call(code).status for _ in range(2)] == [status.ACCESS_DENIED] * 2


@pytest.mark.parametrize("bit", RESERVED_BITS)
def test_control_reserved_bit_is_invalid_input(guest: Guest, bit: int) -> None:
    answer = guest.call(hv.GET_PARTITION_ID, reserved=1 << bit)
    assert (answer.status, answer.rest) == (status.INVALID_HYPERCALL_INPUT, 0)


@pytest.mark.parametrize(
    "fields", [{"variable": 1}, {"count": 1}, {"count": 2, "start": 1}, {"start": 1}, {"count": 0xFFF}]
)
def test_control_fields_of_other_forms_on_a_simple_call_are_invalid_input(
    guest: Guest, fields: dict[str, int]
) -> None:
    assert guest.call(hv.GET_PARTITION_ID, **fields).status == status.INVALID_HYPERCALL_INPUT  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields", [{"count": 0}, {"count": 2, "start": 2}, {"count": 2, "start": 3}, {"count": 1, "variable": 1}]
)
def test_control_rep_fields_that_make_no_sense_are_invalid_input(
    guest: Guest, fields: dict[str, int]
) -> None:
    answer = guest.call(hv.GET_VP_INDEX_FROM_APIC_ID, apic_ids(0, 0), **fields)
    assert answer.status == status.INVALID_HYPERCALL_INPUT


def test_control_is_checked_before_operands(guest: Guest) -> None:
    assert guest.call(hv.GET_PARTITION_ID, count=1, output_gpa=3).status == status.INVALID_HYPERCALL_INPUT


# --- memory operands ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offset", [1, 2, 4, 7])
def test_input_not_aligned_is_invalid_alignment(guest: Guest, offset: int) -> None:
    answer = guest.call(hv.GET_LOGICAL_PROCESSOR_RUN_TIME, input_gpa=g.INPUT + offset)
    assert answer.status == status.INVALID_ALIGNMENT


@pytest.mark.parametrize("offset", [1, 4])
def test_output_not_aligned_is_invalid_alignment(guest: Guest, offset: int) -> None:
    assert guest.call(hv.GET_PARTITION_ID, output_gpa=g.OUTPUT + offset).status == status.INVALID_ALIGNMENT


def test_input_that_straddles_a_page_is_invalid_alignment(guest: Guest) -> None:
    answer = guest.call(hv.CREATE_VP, input_gpa=g.INPUT + 4096 - 32)
    assert answer.status == status.INVALID_ALIGNMENT


def test_input_that_ends_with_its_page_is_read(guest: Guest) -> None:
    at = g.INPUT + 4096 - 40
    guest.ram[at : at + 40] = hv.CREATE_VP_INPUT.pack(hv.SELF, 99, 0, 0, 0, 0)
    assert guest.call(hv.CREATE_VP, input_gpa=at).status == status.INVALID_VP_INDEX


def test_rep_list_counts_for_the_page_limit(guest: Guest) -> None:
    fits = (4096 - 16) // 4
    good = guest.call(hv.GET_VP_INDEX_FROM_APIC_ID, apic_ids(*[0] * fits), count=fits)
    assert (good.status, good.reps) == (0, fits)
    bad = guest.call(hv.GET_VP_INDEX_FROM_APIC_ID, apic_ids(0), count=fits + 1)
    assert bad.status == status.INVALID_ALIGNMENT


def test_rep_output_list_counts_for_the_page_limit(guest: Guest) -> None:
    answer = guest.call(
        hv.GET_VP_INDEX_FROM_APIC_ID, apic_ids(0, 0, 0), count=3, output_gpa=g.OUTPUT + 4096 - 8
    )
    assert answer.status == status.INVALID_ALIGNMENT


@pytest.mark.parametrize("gpa", [BEYOND_RAM, g.RAM, 0xFEE00000, 1 << 40, 1 << 52, (1 << 64) - 4096])
def test_operand_outside_memory_is_invalid_alignment(guest: Guest, gpa: int) -> None:
    assert guest.call(hv.GET_PARTITION_ID, output_gpa=gpa).status == status.INVALID_ALIGNMENT
    assert guest.call(hv.GET_LOGICAL_PROCESSOR_RUN_TIME, input_gpa=gpa).status == status.INVALID_ALIGNMENT


def test_operands_that_a_call_does_not_have_are_not_looked_at(guest: Guest) -> None:
    assert guest.call(hv.GET_PARTITION_ID, output=8, input_gpa=3).output == struct.pack("<Q", 1)
    event = hv.NOTIFY_PARTITION_EVENT_INPUT.pack(4, 0)
    assert guest.call(hv.NOTIFY_PARTITION_EVENT, event, output_gpa=(1 << 64) - 3).status == 0


def test_failure_leaves_the_output_alone(guest: Guest) -> None:
    answer = guest.call(hv.GET_LOGICAL_PROCESSOR_RUN_TIME, struct.pack("<I", 9), output=32)
    assert answer.status == status.INVALID_LP_INDEX
    assert answer.output == b"\xee" * 32


def test_output_is_as_long_as_defined(guest: Guest) -> None:
    assert guest.call(hv.GET_PARTITION_ID, output=16).output[8:] == b"\xee" * 8


def test_input_and_output_may_share_a_page(guest: Guest) -> None:
    """Linux 7.3 puts the output of GET_PARTITION_ID into its input page."""
    guest.call(hv.GET_PARTITION_ID, output_gpa=g.INPUT)
    assert guest.ram[g.INPUT : g.INPUT + 8] == struct.pack("<Q", 1)


# --- registers ------------------------------------------------------------------------------------------------------
def test_registers_other_than_rax_are_kept(guest: Guest) -> None:
    op = guest.one(
        g.HYPERCALL, rcx=0x46, rdx=0x1111, r8=g.OUTPUT, rax=0x2222, rbx=0x3333, rsi=0x4444, rdi=0x5555,
        xmm=bytes(range(96)),
    )  # fmt: skip
    assert (op.fault, op.rax) == (0, 0)
    assert (op.rcx, op.rdx, op.r8) == (0x46, 0x1111, g.OUTPUT)
    assert (op.rbx, op.rsi, op.rdi, op.xmm) == (0x3333, 0x4444, 0x5555, bytes(range(96)))


def test_ring_3_is_undefined_opcode(guest: Guest) -> None:
    op = guest.one(g.RING3, rcx=0x46, r8=g.OUTPUT)
    assert op.fault == g.UD
    page = guest.partition.hypercall_page.gpn << 12
    assert page <= op.fault_rip < page + len(hypercall_abi.PAGE_CODE)
    assert guest.call(hv.GET_PARTITION_ID).status == 0


def test_ring_3_is_undefined_opcode_for_an_unknown_code_too(guest: Guest) -> None:
    assert guest.one(g.RING3, rcx=0xFFFF_FFFF_FFFF_FFFF).fault == g.UD


def test_32_bit_takes_register_pairs(guest: Guest) -> None:
    op = guest.one(g.LEGACY, rdx=0, rax=hv.GET_PARTITION_ID, rdi=0, rsi=g.OUTPUT, rbx=7, rcx=9)
    assert (op.fault, op.rax & 0xFFFFFFFF, op.rdx & 0xFFFFFFFF) == (0, 0, 0)
    assert (op.rbx & 0xFFFFFFFF, op.rcx & 0xFFFFFFFF) == (7, 9)
    assert guest.ram[g.OUTPUT : g.OUTPUT + 8] == struct.pack("<Q", 1)


def test_32_bit_code_with_another_call_in_rcx_leaves_that_call_alone(guest: Guest) -> None:
    """What a VP remembers of a call is found by RCX."""
    op = guest.one(g.LEGACY, rdx=0, rax=0xBEEF, rcx=hv.GET_PARTITION_ID)
    assert op.rax & 0xFFFFFFFF == status.INVALID_HYPERCALL_CODE
    for _ in range(2):
        assert guest.call(hv.GET_PARTITION_ID, output=8).output == struct.pack("<Q", 1)


def test_32_bit_answers_reps_in_edx(guest: Guest) -> None:
    data = apic_ids(0, 0, 55)
    guest.ram[g.INPUT : g.INPUT + len(data)] = data
    op = guest.one(g.LEGACY, rax=hv.GET_VP_INDEX_FROM_APIC_ID, rdx=3, rbx=0, rcx=g.INPUT, rdi=0, rsi=g.OUTPUT)
    assert (op.rax & 0xFFFFFFFF, op.rdx & 0xFFFFFFFF) == (status.INVALID_PARAMETER, 2)


def test_32_bit_fast_takes_two_pairs(guest: Guest) -> None:
    """SEND_IPI to itself: EBX:ECX is the vector, EDI:ESI the mask."""
    op = guest.one(g.LEGACY, rax=hv.SEND_IPI | hv.CONTROL_FAST, rbx=0, rcx=0x66, rdi=0, rsi=1)
    assert op.rax & 0xFFFFFFFF == 0
    assert guest.take(0x66) == 1


def test_32_bit_fast_output_is_undefined_opcode(guest: Guest) -> None:
    assert guest.one(g.LEGACY, rax=hv.GET_PARTITION_ID | hv.CONTROL_FAST).fault == g.UD


# --- fast forms -----------------------------------------------------------------------------------------------------
def test_fast_input_in_two_registers(guest: Guest) -> None:
    answer = guest.fast(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(0x61, 0, bytes(3), 1))
    assert (answer.op.fault, answer.status) == (0, 0)
    assert guest.take(0x61) == 1


def test_fast_input_in_xmm(guest: Guest) -> None:
    """SEND_IPI_EX: 24 bytes and a bank (contract 2.3: RDX, R8, XMM0 low, banks from XMM0 high)."""
    data = hv.SEND_IPI_EX_INPUT.pack(0x62, 0, bytes(3), 0, 1) + struct.pack("<Q", 1)
    assert guest.fast(hv.SEND_IPI_EX, data, variable=1).status == 0
    assert guest.take(0x62) == 1


def test_fast_output_begins_at_the_next_16_bytes(guest: Guest) -> None:
    """GET_PARTITION_ID has no input: RDX is the answer; the rest is kept."""
    filler = bytes(range(112))
    answer = guest.fast(hv.GET_PARTITION_ID, filler)
    assert answer.status == 0
    assert answer.output == struct.pack("<Q", 1) + filler[8:]


def test_fast_output_behind_input(guest: Guest) -> None:
    """16 bytes of header and three elements are 28 bytes: the output begins in XMM1."""
    answer = guest.fast(hv.GET_VP_INDEX_FROM_APIC_ID, apic_ids(0, 0, 0) + b"\xee" * 84, count=3)
    assert (answer.status, answer.reps) == (0, 3)
    assert answer.output[:28] == apic_ids(0, 0, 0)
    assert answer.output[32:44] == bytes(12)
    assert answer.output[44:] == b"\xee" * 68


def test_fast_output_of_completed_elements_arrives_with_a_failure(guest: Guest) -> None:
    answer = guest.fast(hv.GET_VP_INDEX_FROM_APIC_ID, apic_ids(0, 0, 77) + b"\xee" * 84, count=3)
    assert (answer.status, answer.reps) == (status.INVALID_PARAMETER, 2)
    assert answer.output[32:44] == bytes(8) + b"\xee" * 4


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        (hv.MAP_DEVICE_INTERRUPT, {"variable": 6}),
        (hv.GET_PARTITION_PROPERTY_EX, {}),
        (hv.GET_VP_INDEX_FROM_APIC_ID, {"count": 13}),
        (hv.DEPOSIT_MEMORY, {"count": 14}),
    ],
)
def test_fast_form_too_large_for_the_registers_is_invalid_input(
    guest: Guest, code: int, fields: dict[str, int]
) -> None:
    answer = guest.fast(code, **fields)  # type: ignore[arg-type]
    assert (answer.op.fault, answer.status) == (0, status.INVALID_HYPERCALL_INPUT)


def test_fast_xmm_input_without_the_feature_is_undefined_opcode(guest: Guest) -> None:
    guest.partition.features = ROOT_FEATURES & ~privileges.FEATURE_XMM_INPUT
    data = hv.SEND_IPI_EX_INPUT.pack(0x62, 0, bytes(3), 0, 1) + struct.pack("<Q", 1)
    assert guest.fast(hv.SEND_IPI_EX, data, variable=1).op.fault == g.UD
    assert guest.fast(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(0x61, 0, bytes(3), 0)).op.fault == 0


def test_fast_output_without_the_feature_is_undefined_opcode(guest: Guest) -> None:
    guest.partition.features = ROOT_FEATURES & ~privileges.FEATURE_XMM_OUTPUT
    assert guest.fast(hv.GET_PARTITION_ID).op.fault == g.UD


# --- repetitions ----------------------------------------------------------------------------------------------------
def test_rep_answers_the_count(guest2: Guest) -> None:
    answer = guest2.call(hv.GET_VP_INDEX_FROM_APIC_ID, apic_ids(1, 0, 1), count=3, output=12)
    assert (answer.status, answer.reps, answer.rest) == (0, 3, 0)
    assert answer.output == struct.pack("<3I", 1, 0, 1)


def test_rep_start_skips_elements(guest2: Guest) -> None:
    answer = guest2.call(hv.GET_VP_INDEX_FROM_APIC_ID, apic_ids(99, 99, 1), count=3, start=2, output=12)
    assert (answer.status, answer.reps) == (0, 3)
    assert answer.output == b"\xee" * 8 + struct.pack("<I", 1)


def test_rep_failure_answers_the_element(guest: Guest) -> None:
    answer = guest.call(hv.GET_VP_INDEX_FROM_APIC_ID, apic_ids(0, 0, 99, 0), count=4, output=16)
    assert (answer.status, answer.reps) == (status.INVALID_PARAMETER, 2)
    assert answer.output == bytes(8) + b"\xee" * 8


def test_rep_refused_for_its_header_answers_the_start(guest: Guest) -> None:
    data = hv.GET_VP_INDEX_FROM_APIC_ID_INPUT.pack(77, 0) + bytes(16)
    answer = guest.call(hv.GET_VP_INDEX_FROM_APIC_ID, data, count=4, start=3)
    assert (answer.status, answer.reps) == (status.INVALID_PARTITION_ID, 3)


def test_rep_continues_until_all_is_done(guest2: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry does one element and gives the VP back; RCX shows the progress, the caller sees one answer."""
    monkeypatch.setattr(hypercall_abi, "SLICE_NS", -1)
    wanted = [n % 2 for n in range(40)]
    before = guest2.partition.vps[0].exits[2]
    answer = guest2.call(hv.GET_VP_INDEX_FROM_APIC_ID, apic_ids(*wanted), count=40, output=160)
    assert (answer.status, answer.reps) == (0, 40)
    assert answer.output == struct.pack("<40I", *wanted)
    assert guest2.partition.vps[0].exits[2] - before >= 40
    assert answer.op.rcx >> 48 & 0xFFF == 39
    assert answer.op.rcx & 0xFFFF_FFFF_FFFF == g.control(hv.GET_VP_INDEX_FROM_APIC_ID, count=40)


def test_rep_continues_in_registers(guest2: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypercall_abi, "SLICE_NS", -1)
    answer = guest2.fast(hv.GET_VP_INDEX_FROM_APIC_ID, apic_ids(1, 0, 1, 0), count=4)
    assert (answer.status, answer.reps) == (0, 4)
    assert answer.output[32:48] == struct.pack("<4I", 1, 0, 1, 0)


def test_rep_continues_in_32_bit(guest2: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypercall_abi, "SLICE_NS", -1)
    data = apic_ids(1, 0, 1)
    guest2.ram[g.INPUT : g.INPUT + len(data)] = data
    op = guest2.one(g.LEGACY, rax=hv.GET_VP_INDEX_FROM_APIC_ID, rdx=3, rcx=g.INPUT, rsi=g.OUTPUT)
    assert (op.rax & 0xFFFFFFFF, op.rdx & 0xFFFFFFFF) == (0, 3)
    assert guest2.ram[g.OUTPUT : g.OUTPUT + 12] == struct.pack("<3I", 1, 0, 1)


def test_interrupts_are_taken_between_the_parts_of_a_rep_call(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest with interrupts off is not disturbed; the call ends all the same (no livelock)."""
    monkeypatch.setattr(hypercall_abi, "SLICE_NS", -1)
    guest.partition.vps[0].interrupt(0x70)
    assert guest.call(hv.GET_VP_INDEX_FROM_APIC_ID, apic_ids(*[0] * 20), count=20).reps == 20
    assert guest.take(0x70) == 1


def test_unknown_codes_do_not_grow_the_statistics(guest: Guest) -> None:
    counts = guest.partition.vps[0].hypercalls
    known = len(counts)
    guest.run([g.Op(g.HYPERCALL, rcx=code) for code in range(0x1000, 0x1400)])
    assert len(counts) <= known + 1
    assert counts[hypercall_abi.UNKNOWN_CODE] == 0x400
