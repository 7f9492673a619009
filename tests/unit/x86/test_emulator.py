# SPDX-License-Identifier: Apache-2.0
"""The emulator where this machine's processor cannot judge: faults, repeated strings in parts, ports, 16-bit addresses,
order and size of accesses, bytes that are no instruction."""

from __future__ import annotations

import os
import random

import pytest

from rootvisor.x86 import emulator
from rootvisor.x86.emulator import Fault, Unsupported, emulate
from rootvisor.x86.flags import DF, ZF
from rootvisor.x86.strings import ITERATIONS

from .encodings import INTEGER_FORMS, MOVING_FORMS, VECTOR_FORMS, Encoding, Form
from .model import PAGE_FAULT, Model

FUZZ_CASES = int(os.environ.get("ROOTVISOR_X86_FUZZ", "20000"))
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
START = 0x20000  # above the base of GS that encodings reckon with
PAGES = 4


@pytest.fixture
def model() -> Model:
    made = Model(random.Random(7).randbytes(PAGES * 0x1000), START, 0x7000)
    made.registers = [START + 0x100 * (n + 1) for n in range(16)]
    return made


def run(model: Model, code: str, bits: int = 64) -> None:
    emulate(model, bytes.fromhex(code), bits)


def stored(model: Model, address: int, size: int) -> int:
    return int.from_bytes(model.memory[address - START :][:size], "little")


# --- accesses -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "accesses"),
    [
        ("8b 07", [("read", START, 4)]),
        ("89 07", [("write", START, 4)]),
        ("c7 07 01 00 00 00", [("write", START, 4)]),
        ("0f b6 07", [("read", START, 1)]),
        ("83 0f 01", [("read", START, 4), ("write", START, 4)]),
        ("3b 07", [("read", START, 4)]),
        ("f0 0f b1 07", [("read", START, 4), ("write", START, 4)]),
        ("0f a3 07", [("read", START, 4)]),
        ("0f 94 07", [("write", START, 1)]),
        ("0f 44 07", [("read", START, 4)]),
        ("0f 11 07", [("write", START, 8), ("write", START + 8, 8)]),
        ("c5 fe 6f 07", [("read", START + 8 * n, 8) for n in range(4)]),
        ("0f 18 07", []),
        ("0f ae 3f", []),
        ("0f 1f 07", []),
    ],
)
def test_device_sees_each_access_once(model: Model, code: str, accesses: list[tuple[str, int, int]]) -> None:
    """A register of a device may change with every access."""
    model.registers[RDI] = START
    model.registers[RAX] = 1
    run(model, code)
    assert model.accesses == accesses


@pytest.mark.parametrize(
    "code", ["8b 07", "89 07", "48 8b 07", "66 89 07", "01 07", "0f 11 07", "0f 10 07", "87 07"]
)
@pytest.mark.parametrize("before", range(1, 16))
def test_operand_across_pages_comes_in_pieces(model: Model, code: str, before: int) -> None:
    """The model asserts that no access crosses; the result is that of an operand within a page."""
    other = Model(
        bytes(model.memory), START + 8192 + before, model.rip
    )  # the same bytes elsewhere: no page in the way
    address = START + 0x1000 - before
    model.registers[RDI] = address
    other.registers = list(model.registers)
    other.registers[RDI] = address + 8192 + before
    model.vectors = [3 << 100 | 5] * 32
    other.vectors = list(model.vectors)
    run(model, code)
    run(other, code)
    assert model.memory == other.memory
    assert model.registers[RAX] == other.registers[RAX]
    assert model.vectors == other.vectors


WRITERS = [
    "89 07",
    "01 07",
    "c7 07 01 00 00 00",
    "48 87 07",
    "0f c1 07",
    "0f 11 07",
    "0f c7 0f",
    "0f b1 07",
    "f7 1f",
]
READERS = ["8b 07", "03 07", "48 0f b1 07", "0f 10 07", "0f 44 07", "f7 37", "0f bc 07"]


@pytest.mark.parametrize("code", WRITERS + READERS)
def test_second_page_that_is_missing_faults_before_any_access(model: Model, code: str) -> None:
    model.registers[RDI] = START + 0x1000 - 3
    model.absent = {(START >> 12) + 1}
    before = model.state()
    with pytest.raises(Fault) as caught:
        run(model, code)
    assert (caught.value.vector, caught.value.address) == (PAGE_FAULT, START + 0x1000)
    assert model.accesses == []
    assert model.state() == before


@pytest.mark.parametrize("code", WRITERS)
def test_readonly_page_faults_as_a_write_before_it_is_read(model: Model, code: str) -> None:
    model.registers[RDI] = START + 0x80
    model.readonly = {START >> 12}
    before = model.state()
    with pytest.raises(Fault) as caught:
        run(model, code)
    assert caught.value.error_code == 2
    assert model.accesses == []
    assert model.state() == before


def every_form() -> list[Form]:
    return [form for form in INTEGER_FORMS + MOVING_FORMS + VECTOR_FORMS if "string" not in form.kind]


@pytest.mark.parametrize("form", every_form(), ids=[form.name for form in every_form()])
def test_fault_leaves_the_state_as_it_was(form: Form) -> None:
    source = random.Random(form.name)
    for _ in range(6):
        size = source.choice(form.sizes)
        encoding = Encoding(form, size, 64, source, START + 0x100)
        model = Model(source.randbytes(0x2000), START, 0x7001_0000)
        model.registers = [source.getrandbits(64) for _ in range(16)]
        model.registers[RSP] = START + 0x800
        encoding.aim(model.registers, START + 0x100)
        model.absent = {START >> 12, (START >> 12) + 1}
        before = model.state()
        try:
            emulate(model, encoding.code, 64)
        except Fault:
            assert model.state() == before
        assert model.accesses == []


@pytest.mark.parametrize(
    ("code", "absent"),
    [("ff 37", "stack"), ("8f 07", "operand"), ("ff 17", "stack"), ("66 0f 38 f8 07", "line")],
)
def test_what_an_instruction_writes_is_probed_before_a_device_is_read(
    model: Model, code: str, absent: str
) -> None:
    model.registers[RDI] = START + 0x100
    model.registers[RSP] = model.registers[RAX] = START + 0x1800
    if absent == "operand":
        model.registers[RDI], model.registers[RSP] = START + 0x1800, START + 0x100
    model.absent = {(START >> 12) + 1}
    before = model.state()
    with pytest.raises(Fault):
        run(model, code)
    assert [access for access in model.accesses if access[1] < START + 0x1000 and absent != "operand"] == []
    assert model.state() == before


@pytest.mark.parametrize(
    "code", ["66 0f 7f 07", "66 0f 6f 07", "0f 28 07", "0f 2b 07", "66 0f e7 07", "48 0f c7 0f"]
)
def test_operand_that_must_be_aligned(model: Model, code: str) -> None:
    model.registers[RDI] = START + 8
    before = model.state()
    with pytest.raises(Fault) as caught:
        run(model, code)
    assert (caught.value.vector, caught.value.error_code) == (13, 0)
    assert model.state() == before
    assert "exception 13, error code 0x0" in str(caught.value)


def test_division_by_zero_and_overflow(model: Model) -> None:
    model.registers[RDI] = START
    for value in (0, 1):
        model.memory[:4] = value.to_bytes(4, "little")
        model.registers[RDX] = 5
        before = model.state()
        for code in ("f7 37", "f7 3f"):
            with pytest.raises(Fault) as caught:
                run(model, code)
            assert (caught.value.vector, caught.value.error_code) == (0, None)
            assert model.state() == before


def test_jump_to_a_non_canonical_address(model: Model) -> None:
    model.registers[RDI] = START
    model.memory[:8] = (1 << 47).to_bytes(8, "little")
    before = model.state()
    for code in ("ff 27", "ff 17"):
        with pytest.raises(Fault) as caught:
            run(model, code)
        assert caught.value.vector == 13
        assert model.state() == before
    model.memory[:8] = (0xFFFF_8000_0000_0000).to_bytes(8, "little")
    run(model, "ff 27")
    assert model.rip == 0xFFFF_8000_0000_0000


# --- string instructions ------------------------------------------------------------------------------------------
def finish(model: Model, code: str, bits: int = 64) -> int:
    """Repeats the instruction as a processor would, until RIP moves; returns the number of calls."""
    start = model.rip
    for calls in range(1, 1000):
        run(model, code, bits)
        if model.rip != start:
            return calls
    raise AssertionError("the instruction does not end")


def test_repeated_move_goes_on_in_bounded_parts(model: Model) -> None:
    model.registers[RSI], model.registers[RDI], model.registers[RCX] = START, START + 0x2000, 1000
    expected = bytes(model.memory[:8000])
    run(model, "f3 48 a5")
    assert model.rip == 0x7000, "there is more to do"
    assert model.registers[RCX] == 1000 - ITERATIONS
    assert model.registers[RSI] == START + 8 * ITERATIONS
    assert model.registers[RDI] == START + 0x2000 + 8 * ITERATIONS
    assert finish(model, "f3 48 a5") == -(-1000 // ITERATIONS) - 1
    assert model.rip == 0x7003
    assert model.registers[RCX] == 0
    assert bytes(model.memory[0x2000 : 0x2000 + 8000]) == expected


def test_count_that_is_a_whole_number_of_parts_ends_with_the_last(model: Model) -> None:
    model.registers[RDI], model.registers[RCX] = START, 2 * ITERATIONS
    assert finish(model, "f3 aa") == 2
    assert len(model.accesses) == 2 * ITERATIONS


def test_backwards(model: Model) -> None:
    model.rflags |= DF
    model.registers[RSI], model.registers[RDI], model.registers[RCX] = START + 36, START + 40, 10
    expected = bytes(model.memory[:40])
    finish(model, "f3 a5")
    assert bytes(model.memory[4:44]) == expected
    assert (model.registers[RSI], model.registers[RDI]) == (START - 4, START)


def test_zero_count_touches_nothing(model: Model) -> None:
    model.registers[RCX] = 0
    before = list(model.registers)
    run(model, "f3 a4")
    assert (model.registers, model.accesses, model.rip) == (before, [], 0x7002)


def test_fault_in_the_middle_leaves_whole_iterations(model: Model) -> None:
    """The guest maps the page and goes on: every element is written once."""
    model.registers[RDI], model.registers[RCX] = START + 0x1000 - 16, 8
    model.absent = {(START >> 12) + 1}
    with pytest.raises(Fault) as caught:
        run(model, "f3 ab")
    assert caught.value.address == START + 0x1000
    assert (model.registers[RDI], model.registers[RCX], model.rip) == (START + 0x1000, 4, 0x7000)
    model.absent = set()
    run(model, "f3 ab")
    assert (model.registers[RCX], model.rip) == (0, 0x7002)
    assert model.accesses == [("write", START + 0x1000 - 16 + 4 * n, 4) for n in range(8)]


@pytest.mark.parametrize(
    ("code", "registers"), [("f3 a5", (RSI, RDI)), ("f3 a7", (RSI, RDI)), ("f3 6d", (RDX, RDI))]
)
def test_destination_that_faults_does_not_cost_an_element_of_a_fifo(
    model: Model, code: str, registers: tuple[int, int]
) -> None:
    model.registers[RSI], model.registers[RDI], model.registers[RCX] = START, START + 0x1000 - 8, 6
    model.memory[:24] = model.memory[0xFF8:0x1010]
    model.absent = {(START >> 12) + 1}
    with pytest.raises(Fault):
        run(model, code)
    taken = [access for access in model.accesses if access[0] == "in" or START <= access[1] < START + 0x100]
    assert len(taken) == 2
    assert model.registers[RCX] == 4


def test_comparison_stops_at_the_difference(model: Model) -> None:
    model.memory[:64] = model.memory[0x1000:0x1040]
    model.memory[20] ^= 1
    model.registers[RSI], model.registers[RDI], model.registers[RCX] = START, START + 0x1000, 64
    run(model, "f3 a6")
    assert (model.registers[RCX], model.registers[RSI], model.rip) == (43, START + 21, 0x7002)
    assert not model.rflags & ZF


def test_scan_across_parts(model: Model) -> None:
    """strlen of a long string: the direction to go on comes with the registers."""
    model.memory[:1000] = bytes([1]) * 1000
    model.memory[1000] = 0
    model.registers[RDI], model.registers[RCX], model.registers[RAX] = START, (1 << 64) - 1, 0
    finish(model, "f2 ae")
    assert model.registers[RDI] == START + 1001
    assert model.registers[RCX] == (1 << 64) - 1002
    assert model.rflags & ZF


def test_narrow_addresses_wrap(model: Model) -> None:
    low = Model(bytes(0x10000), 0)
    low.registers[RDI], low.registers[RCX], low.registers[RAX] = 0xABCD_FFFE, 0x1_0004, 0x77
    run(low, "f3 aa", 16)
    assert (low.registers[RDI], low.registers[RCX]) == (0xABCD_0002, 0x1_0000)
    assert [access[1] for access in low.accesses] == [0xFFFE, 0xFFFF, 0, 1]
    low.registers[RDI], low.registers[RCX] = 0xFFFF_FFFF_0000_0010, 0xFFFF_0000_0000_0002
    run(low, "67 f3 aa", 64)
    assert (low.registers[RDI], low.registers[RCX]) == (0x12, 0)


def test_string_segments(model: Model) -> None:
    model.segments = [0x100, 0, 0, 0x200, 0x300, 0x400]
    model.registers[RSI], model.registers[RDI] = START, START + 0x1000
    run(model, "a4", 32)
    assert model.accesses == [("read", START + 0x200, 1), ("write", START + 0x1100, 1)]
    model.accesses.clear()
    run(model, "65 a4", 32)
    assert model.accesses == [("read", START + 0x401, 1), ("write", START + 0x1101, 1)]
    model.accesses.clear()
    run(model, "64 a4", 64)
    assert model.accesses == [("read", START + 0x302, 1), ("write", START + 0x1002, 1)]


# --- ports --------------------------------------------------------------------------------------------------------
def test_ports(model: Model) -> None:
    model.registers[RDX], model.registers[RAX] = 0xABCD_03F8, 0xFFFF_FFFF_1234_5678
    run(model, "ef")
    run(model, "ee")
    run(model, "66 e7 80")
    assert model.accesses == [("out", 0x3F8, 4), ("out", 0x3F8, 1), ("out", 0x80, 2)]
    model.ports[0x3F8] = 0x9ABC_DEF0
    run(model, "ec")
    assert model.registers[RAX] == 0xFFFF_FFFF_1234_56F0
    run(model, "66 ed")
    assert model.registers[RAX] == 0xFFFF_FFFF_1234_DEF0
    run(model, "ed")
    assert model.registers[RAX] == 0x9ABC_DEF0


def test_string_ports(model: Model) -> None:
    model.registers[RDX], model.registers[RCX] = 0x1F0, 3
    model.registers[RSI] = model.registers[RDI] = START
    words = [stored(model, START + 2 * n, 2) for n in range(3)]
    run(model, "66 f3 6f")
    assert model.ports[0x1F0] == words[2]
    assert [access for access in model.accesses if access[0] == "out"] == [("out", 0x1F0, 2)] * 3
    assert (model.registers[RSI], model.registers[RDI]) == (START + 6, START)
    model.registers[RCX] = 2
    model.ports[0x1F0] = 0x55AA
    run(model, "66 f3 6d")
    assert stored(model, START, 4) == 0x55AA_55AA
    assert model.registers[RDI] == START + 4


# --- addresses --------------------------------------------------------------------------------------------------------
BX, BP, SI, DI, DISP = 0x1000, 0x2000, 0x0300, 0x0040, 0x0005
DS_BASE, SS_BASE = 0x10_0000, 0x20_0000


@pytest.mark.parametrize(
    ("mod_rm", "address"),
    [
        (0x00, DS_BASE + BX + SI), (0x01, DS_BASE + BX + DI), (0x02, SS_BASE + BP + SI), (0x03, SS_BASE + BP + DI),
        (0x04, DS_BASE + SI), (0x05, DS_BASE + DI), (0x06, DS_BASE + DISP), (0x07, DS_BASE + BX),
        (0x40, DS_BASE + BX + SI + DISP), (0x42, SS_BASE + BP + SI + DISP), (0x46, SS_BASE + BP + DISP),
        (0x47, DS_BASE + BX + DISP), (0x84, DS_BASE + SI + DISP), (0x86, SS_BASE + BP + DISP),
    ],
)  # fmt: skip
def test_16_bit_addresses(mod_rm: int, address: int) -> None:
    model = Model(bytes(0x30_0000), 0)
    model.segments = [0x70_0000, 0x70_0000, SS_BASE, DS_BASE, 0, 0]
    for register, value in ((RBX, BX), (RBP, BP), (RSI, SI), (RDI, DI)):
        model.registers[register] = 0xFFFF_0000 | value
    displacement = (
        bytes([DISP]) if mod_rm >> 6 == 1 else bytes([DISP, 0]) if mod_rm >> 6 == 2 or mod_rm == 6 else b""
    )
    emulate(model, bytes([0x8B, mod_rm]) + displacement, 16)
    assert model.accesses == [("read", address, 2)]
    assert model.rip == 2 + len(displacement)


def test_16_bit_address_wraps_in_its_segment() -> None:
    model = Model(bytes(0x20_0000), 0)
    model.segments[3] = 0x10_0000
    model.registers[RBX], model.registers[RSI] = 0xFFF0, 0x0020
    run(model, "8a 00", 16)
    assert model.accesses == [("read", 0x10_0010, 1)]


def test_linear_address_wraps_in_32_bit_code(model: Model) -> None:
    model.segments[3] = 0xFFFF_F000
    model.registers[RDI] = START + 0x1010
    run(model, "8b 07", 32)
    assert model.accesses == [("read", START + 0x10, 4)]


def test_segments_in_64_bit_code(model: Model) -> None:
    model.segments = [1, 2, 3, 4, 0x10, 0x20]
    model.registers[RDI] = START
    for code in ("8a 07", "2e 8a 07", "36 8a 07", "26 8a 07", "3e 8a 07", "64 8a 07", "65 8a 07"):
        run(model, code)
    assert [access[1] - START for access in model.accesses] == [0, 0, 0, 0, 0, 0x10, 0x20]


def test_instruction_pointer_wraps_with_the_code(model: Model) -> None:
    model.registers[RDI] = START
    for bits, rip, after in ((64, (1 << 64) - 1, 1), (32, 0xFFFF_FFFF, 1), (64, 0xFFFF_FFFF, 0x1_0000_0001)):
        model.rip = rip
        run(model, "8b 07", bits)
        assert model.rip == after


def test_narrow_stack(model: Model) -> None:
    """16-bit code on a 16-bit stack: the upper half of ESP stays."""
    model.stack = 0xFFFF
    model.segments = [0, 0, START, 0, 0, 0]
    model.registers[RSP], model.registers[RBX] = 0xABCD_0000, START + 0x10
    model.memory += bytes(0x10000)
    model.rip = 0x100
    value = stored(model, START + 0x10, 2)
    run(model, "67 ff 33", 16)
    assert model.registers[RSP] == 0xABCD_FFFE
    assert stored(model, START + 0xFFFE, 2) == value
    run(model, "67 8f 43 10", 16)
    assert model.registers[RSP] == 0xABCD_0000
    assert stored(model, START + 0x20, 2) == value
    model.memory[0x10:0x12] = (0x4321).to_bytes(2, "little")
    start = model.rip
    run(model, "67 ff 13", 16)
    assert model.rip == 0x4321
    assert stored(model, START + 0xFFFE, 2) == start + 3


# --- what is not emulated -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "bits"),
    [
        ("0f 0b", 64), ("0f a2", 64), ("f4", 64), ("0f 6f 07", 64), ("d9 07", 64), ("0f ae 07", 64), ("48 ff 2f", 64),
        ("ff 1f", 32), ("c4 07", 32), ("62 07", 32), ("c4 e2 69 90 04 0f", 64), ("62 f1 7e 49 6f 07", 64),
        ("8e 07", 64), ("e8 00 00 00 00", 64), ("c3", 64), ("06 00 00", 64), ("0f ff c0", 64), ("50", 64),
        ("0f 01 17", 64),
    ],
)  # fmt: skip
def test_unsupported(model: Model, code: str, bits: int) -> None:
    before = model.state()
    with pytest.raises(Unsupported) as caught:
        run(model, code, bits)
    assert model.state() == before
    assert not caught.value.incomplete
    assert "is not emulated" in str(caught.value)
    assert bytes.fromhex(code).startswith(caught.value.code)


@pytest.mark.parametrize("code", ["", "8b", "66", "c7 07 01 00", "48 8b 84 24 00 00", "c5 fe"])
def test_incomplete(model: Model, code: str) -> None:
    with pytest.raises(Unsupported) as caught:
        run(model, code)
    assert caught.value.incomplete
    assert "incomplete" in str(caught.value)


def test_bytes_behind_the_instruction_do_not_matter(model: Model) -> None:
    model.registers[RDI] = START
    for tail in ("", "ff", "00" * 14, "f3 a4"):
        run(model, "8b 07" + tail)
    assert model.rip == 0x7008


def test_plans_are_bounded(model: Model) -> None:
    """A guest that writes code as it goes does not fill our memory."""
    model.registers[RDI] = START
    for number in range(emulator.CACHE_LIMIT * 2 + 10):
        emulate(model, b"\xc7\x07" + number.to_bytes(4, "little"), 64)
    assert all(len(plans) <= emulator.CACHE_LIMIT for plans in emulator._plans.values())


def test_random_bytes_end_in_a_declared_way() -> None:
    """Whatever a guest has at RIP: executed, Fault or Unsupported; and after those two nothing has changed, but whole
    iterations of a string instruction."""
    source = random.Random("bytes")
    outcomes = {"done": 0, "fault": 0, "unsupported": 0}
    heads = [b"", b"\x66", b"\xf0", b"\xf3", b"\xf2", b"\x67", b"\x0f", b"\x66\x0f", b"\xf3\x0f", b"\x48", b"\xc5",
             b"\xc4", b"\x62", b"\x0f\x38", b"\x66\x0f\x3a", b"\x48\x0f", b"\x64", b"\x0f\xc7"]  # fmt: skip
    memory = source.randbytes(0x3000)
    for _ in range(FUZZ_CASES):
        code = source.choice(heads) + source.randbytes(source.choice((3, 8, 15)))
        bits = source.choice((16, 32, 64))
        model = Model(memory, START, source.getrandbits(32), 2 | source.getrandbits(12))
        model.registers = [
            START + source.randrange(0x2F00) if source.random() < 0.7 else source.getrandbits(64)
            for _ in range(16)
        ]
        if source.random() < 0.5:
            model.registers[RCX] = source.randrange(600)
        if bits == 16:
            model.segments = [START - 0x100] * 6
            model.registers = [value & 0xFFF if source.random() < 0.8 else value for value in model.registers]
        model.absent = {source.randrange(START >> 12, (START >> 12) + 8)}
        model.stack = source.choice((0xFFFF, 0xFFFF_FFFF))
        before = model.state()
        try:
            emulate(model, code, bits)
            outcomes["done"] += 1
        except Unsupported:
            outcomes["unsupported"] += 1
            assert model.state() == before, code.hex()
        except Fault:
            outcomes["fault"] += 1
            if model.registers[RSI] == before[2][RSI] and model.registers[RDI] == before[2][RDI]:  # type: ignore[index]
                assert model.state() == before, code.hex()
        assert all(0 <= value < 1 << 64 for value in model.registers), code.hex()
        assert 0 <= model.rip < 1 << 64, code.hex()
    assert min(outcomes.values()) > FUZZ_CASES // 50, outcomes
