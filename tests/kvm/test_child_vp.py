# SPDX-License-Identifier: Apache-2.0
"""A child's VP on KVM: each kind of intercept, what the VP looks like in it, and suspension."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

import pytest

from rootvisor.kvm import abi
from rootvisor.tlfs import intercepts as tlfs
from tests.kvm.lone_child import CODE, DATA, IDT, STACK, TABLES, UNMAPPED, LoneChild


@pytest.fixture
def child(usable_kvm: None) -> Iterator[LoneChild]:
    with LoneChild() as made:
        yield made


class Header:
    def __init__(self, payload: bytes) -> None:
        fields = tlfs.INTERCEPT_HEADER.unpack(payload[:40])
        (self.vp, both, self.access, self.state, self.cs_base, self.cs_limit, self.cs, self.cs_attributes,
         self.rip, self.rflags) = fields  # fmt: skip
        self.length, self.cr8 = both & 0xF, both >> 4


class Io(Header):
    def __init__(self, payload: bytes) -> None:
        assert len(payload) == 128
        super().__init__(payload)
        self.port, self.info, self.count, self.rax, code = struct.unpack_from("<HBBxxxxQ16s", payload, 40)
        self.code = code[: self.count]
        self.rcx, self.rsi, self.rdi = struct.unpack_from("<QQQ", payload, 104)
        self.size = self.info & 7


class Memory(Header):
    def __init__(self, payload: bytes) -> None:
        assert len(payload) == 80
        super().__init__(payload)
        (self.cache, self.count, self.info, self.tpr, self.gva, self.gpa, code) = struct.unpack_from(
            "<IBBBxQQ16s", payload, 40
        )
        self.code = code[: self.count]


def io(answer: tuple[int, bytes]) -> Io:
    assert answer[0] == tlfs.X64_IO_PORT_INTERCEPT, hex(answer[0])
    return Io(answer[1])


def gpa(answer: tuple[int, bytes], kind: int = tlfs.UNMAPPED_GPA) -> Memory:
    assert answer[0] == kind, hex(answer[0])
    return Memory(answer[1])


# --- ports --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "port", "size", "length", "write"),
    [
        ("out_imm8", 0x80, 1, 2, True),
        ("out_imm32", 0x90, 4, 2, True),
        ("out_dx", 0x1234, 2, 2, True),
        ("in_imm8", 0x71, 1, 2, False),
        ("in_dx32", 0x1234, 4, 1, False),
        ("out_prefixed", 0x1234, 1, 4, True),
        ("out_7e", 0x7E, 1, 2, True),
    ],
)
def test_port_instruction_is_told_untouched(
    child: LoneChild, name: str, port: int, size: int, length: int, write: bool
) -> None:
    message = io(child.run(name, rax=0x1122334455667788, rdx=0x1234, rcx=5, rsi=6, rdi=7))
    assert (message.port, message.size, message.info >> 3, message.access) == (port, size, 0, int(write))
    assert (message.rip, message.length) == (child.address(name), length)
    assert (message.rax, message.rcx, message.rsi, message.rdi) == (0x1122334455667788, 5, 6, 7)
    assert message.code == bytes(child.ram[message.rip : message.rip + 16])
    assert message.state & 0x17 == tlfs.STATE_CR0_PE | tlfs.STATE_EFER_LMA
    assert (message.cs, message.cs_attributes, message.cs_limit) == (8, 0xA09B, 0xFFFFFFFF)
    assert (child.get("rip"), child.get("rax")) == (message.rip, 0x1122334455667788)
    assert child.vp.intercept_suspend
    assert not child.vp.running


def test_port_write_goes_on_where_the_root_says(child: LoneChild) -> None:
    first = io(child.run("out_imm8", rax=1))
    child.set(rip=first.rip + 2)
    second = io(child.again())
    assert (second.port, second.rip, second.size) == (0x90, child.address("out_imm32"), 4)


def test_port_read_keeps_what_the_root_put_into_rax(child: LoneChild) -> None:
    first = io(child.run("in_imm8", rax=1))
    child.set(rip=first.rip + 2, rax=0xABCD)
    assert io(child.again()).rax == 0xABCD


@pytest.mark.parametrize(
    "name", ["out_imm8", "in_imm8", "in_dx32", "out_7e", "rep_insw", "rep_outsb", "insb"]
)
def test_port_access_resumed_at_the_same_place_recurs(child: LoneChild, name: str) -> None:
    first = child.run(name, rax=0x55, rdx=0x99, rcx=3, rsi=DATA, rdi=DATA)
    before = child.all()
    for _ in range(3):
        assert child.again() == first
        assert child.all() == before


def test_rep_insw_leaves_registers_and_memory_alone(child: LoneChild) -> None:
    child.ram[DATA : DATA + 64] = bytes(range(64))
    message = io(child.run("rep_insw", rdx=0x170, rcx=256, rdi=DATA))
    assert message.info == 2 | tlfs.IO_STRING | tlfs.IO_REP
    assert (message.port, message.access, message.length) == (0x170, 0, 3)
    assert (message.rcx, message.rdi, message.rip) == (256, DATA, child.address("rep_insw"))
    assert bytes(child.ram[DATA : DATA + 64]) == bytes(range(64))
    assert (child.get("rcx"), child.get("rdi")) == (256, DATA)


def test_rep_insw_over_memory_that_is_not_there(child: LoneChild) -> None:
    child.no_access(DATA)
    message = io(child.run("rep_insw", rdx=0x170, rcx=16, rdi=DATA))
    assert (message.rcx, message.rdi, message.rip) == (16, DATA, child.address("rep_insw"))
    assert io(child.again()).rcx == 16


def test_insb_without_rep(child: LoneChild) -> None:
    child.ram[DATA] = 0x5A
    message = io(child.run("insb", rdx=0x170, rcx=9, rdi=DATA))
    assert (message.info, message.rcx, message.rdi, message.length) == (1 | tlfs.IO_STRING, 9, DATA, 1)
    assert child.ram[DATA] == 0x5A


@pytest.mark.parametrize("count", [1, 5])
def test_rep_outsb_shows_the_current_iteration(child: LoneChild, count: int) -> None:
    child.ram[DATA : DATA + 5] = b"hello"
    message = io(child.run("rep_outsb", rdx=0x402, rcx=count, rsi=DATA))
    assert message.info == 1 | tlfs.IO_STRING | tlfs.IO_REP
    assert (message.rcx, message.rsi, message.rip) == (count, DATA, child.address("rep_outsb"))
    assert (message.length, message.access, message.port) == (2, 1, 0x402)
    assert message.code == bytes(child.ram[message.rip : message.rip + 16])


def test_outsw_and_backwards(child: LoneChild) -> None:
    message = io(child.run("outsw", rdx=0x402, rcx=3, rsi=DATA, rflags=0x402))
    assert (message.info, message.rsi, message.rcx) == (2 | tlfs.IO_STRING, DATA, 3)
    assert message.rip == child.address("outsw")


def test_out_right_behind_outsb_is_told_apart(child: LoneChild) -> None:
    child.ram[DATA] = 0x41
    message = io(child.run("outsb_out", rdx=0x402, rax=0x42, rsi=DATA))
    assert (message.rip, message.info, message.rsi) == (child.address("outsb_out"), 1 | tlfs.IO_STRING, DATA)
    child.set(rip=message.rip + 1, rsi=DATA + 1)
    message = io(child.again())
    assert (message.rip, message.info, message.rax) == (child.address("outsb_out") + 1, 1, 0x42)


def test_outsb_from_memory_that_is_not_there(child: LoneChild) -> None:
    child.no_access(DATA)
    message = gpa(child.run("rep_outsb", rdx=0x402, rcx=5, rsi=DATA + 3), tlfs.GPA_INTERCEPT)
    assert (message.gpa, message.gva, message.info, message.access) == (DATA + 3, DATA + 3, 3, 0)
    assert (child.get("rip"), child.get("rcx"), child.get("rsi")) == (child.address("rep_outsb"), 5, DATA + 3)
    child.map(DATA, 4096)
    assert io(child.again()).rsi == DATA + 3


def test_port_in_real_mode(child: LoneChild) -> None:
    child.real_mode()
    child.set(rip=child.names["real_out"], rax=7)
    message = io(child.again())
    assert (message.port, message.rip, message.cs_base, message.cs) == (
        0x80, child.names["real_out"], CODE, 0xF000,
    )  # fmt: skip
    assert message.state & 0x17 == 0


# --- memory -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "registers", "at", "write"),
    [
        ("load32", {"rbx": UNMAPPED + 0x123}, UNMAPPED + 0x123, False),
        ("store8", {"rbx": UNMAPPED + 0xFFF}, UNMAPPED + 0xFFF, True),
        ("store32", {"rbx": UNMAPPED, "rcx": 4}, UNMAPPED + 32, True),
        ("store_imm", {"rbx": UNMAPPED + 8}, UNMAPPED + 8, True),
        ("store64", {"rbx": UNMAPPED + 8}, UNMAPPED + 8, True),
        ("read_modify", {"rbx": UNMAPPED + 8}, UNMAPPED + 8, True),
        ("sse_store", {"rbx": UNMAPPED + 8}, UNMAPPED + 8, True),
        ("xchg_", {"rbx": UNMAPPED + 8}, UNMAPPED + 8, True),
        ("bt_far", {"rbx": UNMAPPED, "rcx": 64 * 5 + 3}, UNMAPPED + 40, True),
        ("stos", {"rdi": UNMAPPED, "rcx": 3}, UNMAPPED, True),
        ("movs", {"rsi": UNMAPPED, "rdi": DATA, "rcx": 3}, UNMAPPED, False),
        ("movs", {"rsi": DATA, "rdi": UNMAPPED, "rcx": 3}, UNMAPPED, True),
        ("push_pop", {"rsp": UNMAPPED + 16}, UNMAPPED + 8, True),
        ("ret_", {"rsp": UNMAPPED + 16}, UNMAPPED + 16, False),
    ],
)
def test_operand_without_memory_is_told_exactly(
    child: LoneChild, name: str, registers: dict[str, int], at: int, write: bool
) -> None:
    message = gpa(child.run(name, **{"rax": 0x1111, **registers}))
    assert (message.gpa, message.gva, message.info) == (at, at, 3)
    assert message.access == int(write)
    assert message.rip == child.address(name)
    assert message.code == bytes(child.ram[message.rip : message.rip + 16])
    for register, value in registers.items():
        assert child.get(register) == value
    assert child.get("rip") == child.address(name)


@pytest.mark.parametrize("name", ["load32", "store32", "push_pop", "movs", "stos"])
def test_no_access_is_a_gpa_intercept_and_runs_again_once_mapped(child: LoneChild, name: str) -> None:
    child.no_access(DATA)
    registers = dict.fromkeys(("rbx", "rdi"), DATA + 64) | {
        "rsi": STACK - 64,
        "rsp": DATA + 256,
        "rcx": 4,
        "rax": 9,
    }
    message = gpa(child.run(name, **registers), tlfs.GPA_INTERCEPT)
    assert message.gpa & ~0xFFF == DATA
    assert child.again() == (tlfs.GPA_INTERCEPT, child.wait_page())
    child.map(DATA, 4096)
    kind, _payload = child.again()
    assert kind == tlfs.X64_IO_PORT_INTERCEPT or child.get("rip") != message.rip


def test_write_to_read_only_memory(child: LoneChild) -> None:
    child.map(DATA, 4096, writable=False)
    child.ram[DATA] = 0x77
    assert gpa(child.run("store8", rbx=DATA, rax=1), tlfs.GPA_INTERCEPT).access == 1
    assert child.ram[DATA] == 0x77
    child.run("load32", rbx=DATA, rcx=0)  # reading is allowed: it goes on to the next forbidden thing
    assert child.get("rip") != child.address("load32")


def test_fetch_from_a_page_that_is_not_there(child: LoneChild) -> None:
    child.no_access(DATA)
    child.set(rip=DATA + 0x10)
    message = gpa(child.again(), tlfs.GPA_INTERCEPT)
    assert (message.gpa, message.gva, message.access, message.info) == (DATA + 0x10, DATA + 0x10, 2, 3)
    child.set(rip=UNMAPPED + 7)
    message = gpa(child.again())
    assert (message.gpa, message.access, message.count) == (UNMAPPED + 7, 2, 0)


def test_fetch_that_crosses_into_a_page_that_is_not_there(child: LoneChild) -> None:
    code = bytes.fromhex("c704250050000011223344")  # movl $0x44332211, 0x5000
    child.ram[DATA + 0xFFB : DATA + 0xFFB + 11] = code
    child.no_access(DATA + 0x1000)
    child.set(rip=DATA + 0xFFB)
    message = gpa(child.again(), tlfs.GPA_INTERCEPT)
    assert (message.gpa, message.gva, message.access) == (DATA + 0x1000, DATA + 0x1000, 2)
    assert message.rip == DATA + 0xFFB
    assert message.code == code[:5]


def test_instruction_bytes_end_with_the_page_whose_successor_is_not_there(child: LoneChild) -> None:
    child.ram[DATA + 0xFFD : DATA + 0x1000] = bytes.fromhex("8b03f4")
    child.no_access(DATA + 0x1000)
    child.set(rip=DATA + 0xFFD, rbx=UNMAPPED)
    message = gpa(child.again())
    assert (message.gpa, message.code) == (UNMAPPED, bytes.fromhex("8b03f4"))


def test_operand_that_crosses_pages_names_the_page_that_is_missing(child: LoneChild) -> None:
    child.no_access(DATA + 0x1000)
    message = gpa(child.run("store64", rbx=DATA + 0xFFC, rax=1), tlfs.GPA_INTERCEPT)
    assert (message.gpa, message.gva, message.info, message.access) == (DATA + 0x1000, DATA + 0x1000, 3, 1)
    child.map(DATA + 0x1000, 4096)
    child.no_access(DATA)
    message = gpa(child.again(), tlfs.GPA_INTERCEPT)
    assert (message.gpa, message.gva) == (DATA + 0xFFC, DATA + 0xFFC)


def test_page_table_that_is_not_there(child: LoneChild) -> None:
    table = TABLES + 0x8000
    struct.pack_into("<Q", child.ram, TABLES + 0x1000 + 5 * 8, table | 7)  # 5 GiB: a directory of its own
    child.no_access(table)
    message = gpa(child.run("load32", rbx=(5 << 30) + (3 << 21) + 0x10), tlfs.GPA_INTERCEPT)
    assert message.gpa == table + 3 * 8
    assert (message.gva, message.info) == ((5 << 30) + (3 << 21) + 0x10, 1)
    child.map(table, 4096)
    child.ram[table + 24 : table + 32] = struct.pack("<Q", UNMAPPED | 0x87)
    message = gpa(child.again())
    assert (message.gpa, message.gva, message.info) == (UNMAPPED + 0x10, (5 << 30) + (3 << 21) + 0x10, 3)


def test_read_only_page_table_whose_bits_must_be_set(child: LoneChild) -> None:
    table = TABLES + 0x8000
    struct.pack_into("<Q", child.ram, TABLES + 0x1000 + 5 * 8, table | 7)
    struct.pack_into("<Q", child.ram, table, DATA & ~0x1FFFFF | 0x87)
    child.map(table, 4096, writable=False)
    message = gpa(child.run("load32", rbx=5 << 30), tlfs.GPA_INTERCEPT)
    assert (message.gpa & ~0xFFF, message.access, message.info) == (table, 1, 1)


def test_delivery_of_an_exception_through_an_idt_that_is_not_there(child: LoneChild) -> None:
    child.no_access(IDT)
    message = gpa(child.run("ud2_"), tlfs.GPA_INTERCEPT)
    assert message.gpa & ~0xFFF == IDT
    assert child.get("rip") == child.address("ud2_")


def test_interrupt_instruction_without_idt(child: LoneChild) -> None:
    child.no_access(IDT)
    message = gpa(child.run("int80"), tlfs.GPA_INTERCEPT)
    assert message.gpa == IDT + 0x80 * 16


def test_segment_load_without_descriptor_table(child: LoneChild) -> None:
    child.no_access(0x210000)
    message = gpa(child.run("load_ds", rax=0x10), tlfs.GPA_INTERCEPT)
    assert (message.gpa, message.access) == (0x210010, 0)
    child.map(0x210000, 4096)
    assert io(child.again()).port == 0x80


def test_memory_in_real_mode(child: LoneChild) -> None:
    child.real_mode()
    child.no_access(0x5000)
    child.set(rip=child.names["real_load"], rbx=0x5010)
    message = gpa(child.again(), tlfs.GPA_INTERCEPT)
    assert (message.gpa, message.gva, message.access) == (0x5010, 0x5010, 0)
    child.set(rip=child.names["real_push"], rsp=0x5002)
    assert gpa(child.again(), tlfs.GPA_INTERCEPT).gpa == 0x5000
    child.no_access(0)
    child.vp.vcpu.commit_sync_area()
    child.vp.vcpu.set_sregs(None, {"idt": (0, 0x3FF)})
    child.vp.vcpu.fill_sync_area()
    child.set(rip=child.names["real_int"], rsp=0x8000)
    assert gpa(child.again(), tlfs.GPA_INTERCEPT).gpa == 0x84


def test_memory_in_protected_mode(child: LoneChild) -> None:
    child.protected_mode()
    message = gpa(child.run("load32_32", rbx=UNMAPPED))
    assert (message.gpa, message.gva) == (UNMAPPED + 0x10, UNMAPPED + 0x10)
    assert gpa(child.run("push32", rsp=UNMAPPED + 4)).gpa == UNMAPPED


def test_address_beyond_the_width_of_the_child(child: LoneChild) -> None:
    if child.memory.width > 40:
        pytest.skip("every address that the processor has is the child's")
    beyond = 1 << child.memory.width
    struct.pack_into("<Q", child.ram, TABLES + 0x1000 + 6 * 8, beyond | 0x87)
    for name, write in (("load32", False), ("store32", True)):
        kind, payload = child.run(name, rbx=(6 << 30) + 0x40, rcx=0, rax=5)
        if kind == tlfs.UNRECOVERABLE_EXCEPTION:
            pytest.skip("the processor itself has no more address bits")
        message = gpa((kind, payload))
        assert message.gpa == beyond + 0x40 + (16 if write else 0)
        assert (message.access, message.rip) == (int(write), child.address(name))


# --- doorbells ----------------------------------------------------------------------------------------------------
def test_doorbell_completes_the_write_without_a_message(child: LoneChild) -> None:
    child.doorbells.rings = {(UNMAPPED, 4, None)}
    message = io(child.run("store_two", rbx=UNMAPPED, rax=0x1_0000_0005, rcx=6))
    assert message.port == 0x80
    assert child.doorbells.rung == [(UNMAPPED, 4, 5), (UNMAPPED, 4, 6)]


def test_doorbell_that_does_not_match_is_a_write_like_others(child: LoneChild) -> None:
    child.doorbells.rings = {(UNMAPPED, 4, 5)}
    assert gpa(child.run("store_two", rbx=UNMAPPED, rax=5, rcx=6)).gpa == UNMAPPED
    assert child.doorbells.rung == [(UNMAPPED, 4, 5)]
    assert child.get("rip") == child.address("store_two") + 2


def test_doorbell_and_rep_stos(child: LoneChild) -> None:
    child.doorbells.rings = {(UNMAPPED, 4, None), (UNMAPPED + 4, 4, None)}
    assert io(child.run("stosl_two", rdi=UNMAPPED, rax=7, rcx=2)).port == 0x80
    assert child.doorbells.rung == [(UNMAPPED, 4, 7), (UNMAPPED + 4, 4, 7)]
    assert (child.get("rdi"), child.get("rcx")) == (UNMAPPED + 8, 0)


# --- MSRs, debug exceptions, the end ------------------------------------------------------------------------------
def test_unknown_msr_faults_or_is_ignored(child: LoneChild) -> None:
    kind, _payload = child.run("rdmsr_", rcx=0xC0DE0000, rax=1, rdx=2)
    assert kind == tlfs.UNRECOVERABLE_EXCEPTION  # #GP without a handler


def test_unknown_msr_reads_zero_if_the_root_says_so(child: LoneChild) -> None:
    child.partition.unimplemented_msr_action = 1
    assert io(child.run("rdmsr_", rcx=0xC0DE0000, rax=1, rdx=2)).rax == 0
    assert io(child.run("wrmsr_", rcx=0xC0DE0000, rax=1, rdx=2)).rax == 1


def test_msr_intercept_shows_the_instruction(child: LoneChild) -> None:
    child.partition.intercepts.install(3, tlfs.TYPE_MSR, 0)
    for name, access in (("rdmsr_", 0), ("wrmsr_", 1)):
        kind, payload = child.run(name, rcx=0xC0DE0000, rax=1, rdx=2)
        assert kind == tlfs.X64_MSR_INTERCEPT
        header = Header(payload)
        assert (header.rip, header.length, header.access) == (child.address(name), 2, access)
        assert struct.unpack_from("<IxxxxQQ", payload, 40) == (0xC0DE0000, 2, 1)
        assert child.again() == (kind, payload)
        child.set(rip=header.rip + 2, rax=0x77)
        assert io(child.again()).rax == 0x77


def test_breakpoint_intercept(child: LoneChild) -> None:
    child.partition.intercepts.install(4, tlfs.TYPE_EXCEPTION, 3)
    child.vp.to_do = True
    kind, payload = child.run("int3_", rax=0x10)
    if kind == tlfs.UNRECOVERABLE_EXCEPTION:
        pytest.skip("this processor does not intercept INT3 (QEMU's emulation of SVM)")
    assert kind == tlfs.X64_EXCEPTION_INTERCEPT
    assert Header(payload).rip == child.address("int3_")
    assert Header(payload).length == 1
    assert struct.unpack_from("<HBB", payload, 40) == (3, 2, 16)
    child.set(rip=child.address("int3_") + 1)
    assert io(child.again()).port == 0x80


def test_debug_exception_intercept(child: LoneChild) -> None:
    child.partition.intercepts.install(4, tlfs.TYPE_EXCEPTION, 1)
    child.vp.to_do = True
    kind, payload = child.run("popf_step")
    assert kind == tlfs.X64_EXCEPTION_INTERCEPT
    vector, info, _count, _error, dr6 = struct.unpack_from("<HBBIQ", payload, 40)
    assert (vector, info, dr6 & 0x4000) == (1, 0, 0x4000)
    assert Header(payload).rip == child.address("popf_step") + 7  # a trap: behind the NOP
    child.partition.intercepts.install(0, tlfs.TYPE_EXCEPTION, 1)
    child.vp.to_do = True
    kind, _payload = child.again()
    assert kind == tlfs.UNRECOVERABLE_EXCEPTION  # the guest has no handler


def test_triple_fault_is_told(child: LoneChild) -> None:
    kind, payload = child.run("ud2_")
    assert kind == tlfs.UNRECOVERABLE_EXCEPTION
    assert len(payload) == 40


def test_registers_that_no_processor_takes(child: LoneChild) -> None:
    child.vp.u64[(abi.SYNC_SREGS_AT + abi.SREGS_CR4) // 8] |= 1 << 40
    child.vp.mark_dirty(abi.SYNC_SREGS)
    kind, payload = child.run("out_imm8")
    assert (kind, payload) == (tlfs.INVALID_VP_REGISTER_VALUE, struct.pack("<II", 0, 0))
    assert io(child.run("out_imm8")).port == 0x80


def test_halt_stays_inside(child: LoneChild) -> None:
    child.set(rip=child.address("hlt_"))
    child.resume()
    assert child.quiet()
    with child.lock:
        child.vp.suspend()
    assert not child.vp.running
    assert child.quiet(0.05)


# --- suspension ---------------------------------------------------------------------------------------------------
def test_explicit_suspend_stops_a_spinning_vp_and_tells_nobody(child: LoneChild) -> None:
    for _ in range(5):
        child.set(rip=child.address("count"), rcx=0)
        child.resume()
        time.sleep(0.02)
        with child.lock:
            child.vp.suspend()
        assert not child.vp.running
        assert not child.vp.intercept_suspend
        assert child.get("rcx") > 0
        before = child.get("rcx")
        time.sleep(0.02)
        assert child.get("rcx") == before
    assert child.root.told.empty()


def test_intercept_during_explicit_suspend_is_told_after_the_resume(child: LoneChild) -> None:
    """The instruction runs again, so that the root misses nothing."""
    child.set(rip=child.address("out_imm8"), rax=0x33)
    with child.lock:
        child.vp.explicit_suspend = False
        child.vp.resume(child.root_vp)
        child.vp.explicit_suspend = True  # before the VP gets the lock
        child.vp.suspend()
    assert child.quiet(0.1)
    assert not child.vp.intercept_suspend
    message = io(child.again())
    assert (message.rip, message.rax) == (child.address("out_imm8"), 0x33)


def test_vp_without_message_page_parks_silently(child: LoneChild) -> None:
    page, child.vp.message_page = child.vp.message_page, None
    child.set(rip=child.address("out_imm8"))
    child.resume()
    assert child.quiet(0.1)
    assert not child.vp.running
    assert child.vp.explicit_suspend
    child.vp.message_page = page
    assert io(child.again()).port == 0x80


def test_stop_ends_the_thread_whatever_the_vp_does(usable_kvm: None) -> None:
    for name in ("spin", "hlt_", "out_imm8"):
        with LoneChild() as child:
            child.set(rip=child.address(name))
            child.resume()
            time.sleep(0.02)
            with child.lock:
                child.vp.stop_and_join()  # a VP that does not stop hangs here, and the suite's time-out tells
            assert child.vp.vcpu.thread == 0


def test_vp_that_never_ran_is_stopped(child: LoneChild) -> None:
    with child.lock:
        child.vp.stop_and_join()
        child.vp.resume(child.root_vp)
    assert not child.vp.running


def test_application_processor_waits_for_its_startup(usable_kvm: None) -> None:
    with LoneChild(vps=2) as child:
        second = child.partition.vps[1]
        child.set(second, rax=0x1234)
        child.resume(second)
        assert child.quiet(0.1)
        with child.lock:
            second.suspend()
        assert not second.running
        child.resume(second)
        interrupts = child.partition.interrupts
        child.ram[0x8000:0x8003] = bytes.fromhex("e680f4")  # outb %al, $0x80; hlt
        with child.lock:
            interrupts.assert_interrupt(5, 0, 1, 0)
            interrupts.assert_interrupt(6, 0, 1, 8)
        message = io(child.wait(second))
        assert (message.vp, message.rip, message.cs, message.cs_base) == (1, 0, 0x800, 0x8000)
