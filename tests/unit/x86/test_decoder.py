# SPDX-License-Identifier: Apache-2.0
"""Lengths, memory accesses and stored values of instructions, in 16-, 32- and 64-bit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rootvisor.x86 import decoder
from rootvisor.x86.instruction import (
    CS,
    DS,
    ES,
    FS,
    GS,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RIP,
    RSI,
    RSP,
    SELECTOR_IMMEDIATE,
    SELECTOR_MEMORY,
    SELECTOR_NONE,
    SELECTOR_REGISTER,
    SOURCE_IMMEDIATE,
    SOURCE_REGISTER,
    SS,
    Access,
    Instruction,
)

R8 = 8
FULL = 0xFFFF_FFFF_FFFF_FFFF
R, W, RW = "r", "w", "rw"


def decode(code: str, bits: int = 64) -> Instruction:
    instruction = decoder.decode(bytes.fromhex(code), bits)
    assert instruction is not None, f"{code} is no instruction"
    return instruction


def kind(access: Access) -> str:
    return ("r" if access.read else "") + ("w" if access.write else "")


def shown(access: Access) -> tuple[int, int, int, int, str]:
    """Segment, base, displacement, size, kind."""
    return access.segment, access.base, access.displacement, access.size, kind(access)


@pytest.mark.parametrize(
    ("code", "bits", "length"),
    [
        ("90", 64, 1),
        ("e680", 64, 2),
        ("ee", 32, 1),
        ("6648 3eee", 64, 4),
        ("66ef", 16, 2),
        ("f36c", 64, 2),
        ("48b81122334455667788", 64, 10),
        ("c7840012345678 9abcdef0", 64, 11),
        ("660f3a0fc108", 64, 6),
        ("c5f877", 64, 3),
        ("62f17c48280410", 64, 7),
        ("2e2e2e2e2e2e2e2e2e2e2e2e2e2e90", 64, 15),
    ],
)
def test_length(code: str, bits: int, length: int) -> None:
    assert decode(code.replace(" ", ""), bits).length == length


@pytest.mark.parametrize(
    ("code", "bits", "expected"),
    [
        # every addressing form
        ("8b03", 64, (DS, RBX, 0, 4, R)),
        ("8b4310", 64, (DS, RBX, 0x10, 4, R)),
        ("8b43f0", 64, (DS, RBX, -0x10, 4, R)),
        ("8b8300100000", 64, (DS, RBX, 0x1000, 4, R)),
        ("8b4500", 64, (SS, RBP, 0, 4, R)),
        ("8b0424", 64, (SS, RSP, 0, 4, R)),
        ("418b00", 64, (DS, R8, 0, 4, R)),
        ("8b0510000000", 64, (DS, RIP, 0x16, 4, R)),
        ("c7050000000011223344", 64, (DS, RIP, 10, 4, W)),
        ("8b042510000000", 64, (DS, -1, 0x10, 4, R)),
        ("a11020304050607080", 64, (DS, -1, -0x7F8F9FAFBFCFDFF0, 4, R)),
        ("a0 11223344", 32, (DS, -1, 0x44332211, 1, R)),
        ("a2 1122", 16, (DS, -1, 0x2211, 1, W)),
        ("8b4702", 16, (DS, RBX, 2, 2, R)),
        ("8b4e02", 16, (SS, RBP, 2, 2, R)),
        ("678b0424", 16, (SS, RSP, 0, 2, R)),
        ("66678b03", 16, (DS, RBX, 0, 4, R)),
        ("678b07", 32, (DS, RBX, 0, 4, R)),
        # segment prefixes
        ("648b03", 64, (FS, RBX, 0, 4, R)),
        ("65488b042528000000", 64, (GS, -1, 0x28, 8, R)),
        ("268b03", 32, (ES, RBX, 0, 4, R)),
        ("2e8b03", 16, (CS, RBP, 0, 2, R)),
        # sizes and directions
        ("8803", 64, (DS, RBX, 0, 1, W)),
        ("668903", 64, (DS, RBX, 0, 2, W)),
        ("488903", 64, (DS, RBX, 0, 8, W)),
        ("0103", 64, (DS, RBX, 0, 4, RW)),
        ("ff03", 64, (DS, RBX, 0, 4, RW)),
        ("8703", 64, (DS, RBX, 0, 4, RW)),
        ("f00fb10b", 64, (DS, RBX, 0, 4, RW)),
        ("0fc70b", 64, (DS, RBX, 0, 8, RW)),
        ("480fc70b", 64, (DS, RBX, 0, 16, RW)),
        ("0fb603", 64, (DS, RBX, 0, 1, R)),
        ("4863 03", 64, (DS, RBX, 0, 4, R)),
        ("8403", 64, (DS, RBX, 0, 1, R)),
        ("0fc303", 64, (DS, RBX, 0, 4, W)),
        ("0f44 03", 64, (DS, RBX, 0, 4, R)),
        # SSE, AVX, AVX-512, x87
        ("0f1003", 64, (DS, RBX, 0, 16, R)),
        ("660f7f03", 64, (DS, RBX, 0, 16, W)),
        ("f20f1003", 64, (DS, RBX, 0, 8, R)),
        ("c5fe6f03", 64, (DS, RBX, 0, 32, R)),
        ("c5fe7f03", 64, (DS, RBX, 0, 32, W)),
        ("62f17c482803", 64, (DS, RBX, 0, 64, R)),
        ("dd03", 64, (DS, RBX, 0, 8, R)),
        ("db3b", 64, (DS, RBX, 0, 10, W)),
        ("0fae03", 64, (DS, RBX, 0, 512, W)),
        ("d933", 64, (DS, RBX, 0, 28, W)),
        # descriptor tables
        ("0f0113", 64, (DS, RBX, 0, 10, R)),
        ("0f010b", 64, (DS, RBX, 0, 10, W)),
        ("0f0113", 32, (DS, RBX, 0, 6, R)),
        ("8c03", 64, (DS, RBX, 0, 2, W)),
    ],
)
def test_single_operand(code: str, bits: int, expected: tuple[int, int, int, int, str]) -> None:
    instruction = decode(code.replace(" ", ""), bits)
    assert [shown(access) for access in instruction.accesses] == [expected]
    width = {64: 32, 32: 16, 16: 32}[bits] if "67" in code[:4] else bits
    assert instruction.accesses[0].mask == {64: FULL, 32: 0xFFFFFFFF, 16: 0xFFFF}[width]


def test_index_and_scale() -> None:
    (access,) = decode("428b84c300010000").accesses  # mov eax, [rbx + r8*8 + 0x100]
    assert (access.base, access.index, access.scale, access.displacement) == (RBX, R8, 8, 0x100)
    (access,) = decode("8b04cd00010000").accesses  # mov eax, [rcx*8 + 0x100]
    assert (access.base, access.index, access.scale) == (-1, RCX, 8)
    (access,) = decode("8b00", 16).accesses  # mov ax, [bx + si]
    assert (access.base, access.index, access.scale) == (RBX, RSI, 1)


def test_address_size_prefix_cuts_the_address() -> None:
    (access,) = decode("678b03").accesses
    assert access.mask == 0xFFFFFFFF
    (access,) = decode("67f3a4").accesses[:1]
    assert access.mask == 0xFFFFFFFF


def test_xlat_adds_al() -> None:
    (access,) = decode("d7").accesses
    assert (access.base, access.index, access.index_mask, access.size) == (RBX, RAX, 0xFF, 1)


# --- the stack ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "bits", "expected"),
    [
        ("50", 64, [(SS, RSP, -8, 8, W)]),
        ("6650", 64, [(SS, RSP, -2, 2, W)]),
        ("50", 32, [(SS, RSP, -4, 4, W)]),
        ("50", 16, [(SS, RSP, -2, 2, W)]),
        ("6650", 16, [(SS, RSP, -4, 4, W)]),
        ("58", 64, [(SS, RSP, 0, 8, R)]),
        ("9c", 64, [(SS, RSP, -8, 8, W)]),
        ("9d", 64, [(SS, RSP, 0, 8, R)]),
        ("e800000000", 64, [(SS, RSP, -8, 8, W)]),
        ("c3", 64, [(SS, RSP, 0, 8, R)]),
        ("c20800", 64, [(SS, RSP, 0, 8, R)]),
        ("ff33", 64, [(DS, RBX, 0, 8, R), (SS, RSP, -8, 8, W)]),
        ("8f03", 64, [(DS, RBX, 0, 8, W), (SS, RSP, 0, 8, R)]),
        ("ff13", 64, [(DS, RBX, 0, 8, R), (SS, RSP, -8, 8, W)]),
        ("ff23", 64, [(DS, RBX, 0, 8, R)]),
        ("c8100000", 64, [(SS, RSP, -8, 8, W)]),
        (
            "c8100002", 64,
            [(SS, RBP, -8, 8, R), (SS, RSP, -8, 8, W), (SS, RSP, -16, 8, W), (SS, RSP, -24, 8, W)],
        ),
        ("cb", 64, [(SS, RSP, 0, 4, R), (SS, RSP, 4, 4, R)]),
        ("48cf", 64, [(SS, RSP, 8 * n, 8, R) for n in range(5)]),
        ("cf", 16, [(SS, RSP, 2 * n, 2, R) for n in range(3)]),
        ("60", 32, [(SS, RSP, -4 - 4 * n, 4, W) for n in range(8)]),
        ("9a00001000", 16, [(SS, RSP, -2, 2, W), (SS, RSP, -4, 2, W)]),
    ],
)  # fmt: skip
def test_stack(code: str, bits: int, expected: list[tuple[int, int, int, int, str]]) -> None:
    got = []
    for access in decode(code, bits).accesses:
        segment, base, displacement, size, what = shown(access)
        if displacement >= 0x8000:  # a negative displacement of 16- and 32-bit code comes as unsigned
            displacement -= 1 << (16 if displacement < 0x10000 else 32)
        got.append((segment, base, displacement, size, what))
    assert got == expected


def test_leave_reads_at_rbp() -> None:
    (access,) = decode("c9").accesses
    assert shown(access) == (SS, RBP, 0, 8, R)


def test_implicit_stack_takes_the_width_of_the_stack() -> None:
    assert decode("50").accesses[0].mask == 0
    assert decode("50", 32).accesses[0].mask == 0
    assert decode("8b0424").accesses[0].mask == FULL
    assert [access.mask for access in decode("ff33").accesses] == [FULL, 0]


# --- string instructions ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "size", "rep", "rsi", "rdi", "io", "expected"),
    [
        ("a4", 1, False, True, True, 0, [(DS, RSI, R), (ES, RDI, W)]),
        ("f3a5", 4, True, True, True, 0, [(DS, RSI, R), (ES, RDI, W)]),
        ("f348a5", 8, True, True, True, 0, [(DS, RSI, R), (ES, RDI, W)]),
        ("64a4", 1, False, True, True, 0, [(FS, RSI, R), (ES, RDI, W)]),
        ("f3aa", 1, True, False, True, 0, [(ES, RDI, W)]),
        ("ac", 1, False, True, False, 0, [(DS, RSI, R)]),
        ("f2ae", 1, True, False, True, 0, [(ES, RDI, R)]),
        ("f3a6", 1, True, True, True, 0, [(DS, RSI, R), (ES, RDI, R)]),
        ("6c", 1, False, False, True, 1, [(ES, RDI, W)]),
        ("f36d", 4, True, False, True, 1, [(ES, RDI, W)]),
        ("f3666f", 2, True, True, False, 2, [(DS, RSI, R)]),
        ("6e", 1, False, True, False, 2, [(DS, RSI, R)]),
    ],
)
def test_string(
    code: str, size: int, rep: bool, rsi: bool, rdi: bool, io: int, expected: list[tuple[int, int, str]]
) -> None:
    instruction = decode(code)
    assert (instruction.string, instruction.rep) == (size, rep)
    assert (instruction.moves_rsi, instruction.moves_rdi, instruction.io) == (rsi, rdi, io)
    assert [(a.segment, a.base, kind(a)) for a in instruction.accesses] == expected
    assert {a.size for a in instruction.accesses} == {size}


def test_address_size_of_string_instructions() -> None:
    assert decode("f3a4").address_mask == FULL
    assert decode("67f3a4").address_mask == 0xFFFFFFFF
    assert decode("f3a4", 16).address_mask == 0xFFFF


@pytest.mark.parametrize(
    ("code", "io"),
    [("e471", 1), ("ed", 1), ("ec", 1), ("e571", 1), ("e680", 2), ("e780", 2), ("ee", 2), ("ef", 2)],
)
def test_port_instructions(code: str, io: int) -> None:
    instruction = decode(code)
    assert (instruction.io, instruction.string, instruction.accesses) == (io, 0, ())


# --- special operands ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("code", "what"), [("0fa30b", R), ("0fab0b", RW), ("0fb30b", RW), ("0fbb0b", RW)])
def test_bit_offset_in_a_register_moves_the_operand(code: str, what: str) -> None:
    (access,) = decode(code).accesses
    assert (access.bit, access.size, kind(access)) == (RCX, 4, what)
    assert decode("0fba2b05").accesses[0].bit == -1  # an immediate does not
    assert decode("0fabcb").accesses == ()


def test_gather_names_its_vector_register() -> None:
    (access,) = decode("c4e2ed9004cb").accesses  # vpgatherdq ymm0, [rbx + xmm1*8], ymm2
    assert (access.base, access.index, access.scale, access.size) == (RBX, 1, 8, 8)
    assert (access.vector, access.vector_index) == (2, 4)


def test_masked_store_through_rdi() -> None:
    (access,) = decode("660ff7c1").accesses
    assert shown(access) == (DS, RDI, 0, 16, W)


def test_clzero_writes_its_cache_line() -> None:
    (access,) = decode("0f01fc").accesses
    assert (access.base, access.size, access.mask, kind(access)) == (RAX, 64, FULL & ~63, W)


def test_xsave_area_is_assumed_to_be_large() -> None:
    (access,) = decode("0fae23").accesses
    assert access.size == 2688


@pytest.mark.parametrize(
    "code", ["0f18 0b", "0f0d0b", "0f1f03", "8d03", "0f013b", "0f05", "f4", "0fa2", "0f30"]
)
def test_no_access(code: str) -> None:
    assert decode(code.replace(" ", "")).accesses == ()


# --- what descriptors are needed ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "bits", "selector", "value", "offset"),
    [
        ("8ed8", 64, SELECTOR_REGISTER, RAX, 0),
        ("8e1b", 64, SELECTOR_MEMORY, 0, 0),
        ("0fa1", 64, SELECTOR_MEMORY, 0, 0),
        ("1f", 32, SELECTOR_MEMORY, 0, 0),
        ("ff2b", 64, SELECTOR_MEMORY, 0, 4),
        ("48ff1b", 64, SELECTOR_MEMORY, 0, 8),
        ("0fb203", 64, SELECTOR_MEMORY, 0, 4),
        ("c403", 32, SELECTOR_MEMORY, 0, 4),
        ("cb", 64, SELECTOR_MEMORY, 1, 0),
        ("48cf", 64, SELECTOR_MEMORY, 1, 0),
        ("ea78563412 3300", 32, SELECTOR_IMMEDIATE, 0x33, 0),
        ("0f00d3", 64, SELECTOR_REGISTER, RBX, 0),
        ("0f001b", 64, SELECTOR_MEMORY, 0, 0),
        ("0f02c3", 64, SELECTOR_REGISTER, RBX, 0),
        ("0f0303", 64, SELECTOR_MEMORY, 0, 0),
        ("8b03", 64, SELECTOR_NONE, 0, 0),
        ("0f00cb", 64, SELECTOR_NONE, 0, 0),
    ],
)
def test_selector(code: str, bits: int, selector: int, value: int, offset: int) -> None:
    instruction = decode(code.replace(" ", ""), bits)
    assert (instruction.selector, instruction.selector_value, instruction.selector_offset) == (
        selector, value, offset,
    )  # fmt: skip


@pytest.mark.parametrize(("code", "vector"), [("cc", 3), ("cd80", 0x80), ("f1", 1), ("90", -1), ("0f0b", -1)])
def test_interrupt_vector(code: str, vector: int) -> None:
    assert decode(code).interrupt == vector


# --- stored values ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "source", "value", "shift"),
    [
        ("8903", SOURCE_REGISTER, RAX, 0),
        ("44 8903", SOURCE_REGISTER, R8, 0),
        ("8803", SOURCE_REGISTER, RAX, 0),
        ("8823", SOURCE_REGISTER, RAX, 8),
        ("883b", SOURCE_REGISTER, RBX, 8),
        ("408823", SOURCE_REGISTER, RSP, 0),
        ("66890b", SOURCE_REGISTER, RCX, 0),
        ("a21122334455667788", SOURCE_REGISTER, RAX, 0),
        ("aa", SOURCE_REGISTER, RAX, 0),
        ("f348ab", SOURCE_REGISTER, RAX, 0),
        ("0fc30b", SOURCE_REGISTER, RCX, 0),
        ("c60380", SOURCE_IMMEDIATE, 0x80, 0),
        ("66c7038012", SOURCE_IMMEDIATE, 0x1280, 0),
        ("c70344332211", SOURCE_IMMEDIATE, 0x11223344, 0),
        ("48c703ffffffff", SOURCE_IMMEDIATE, FULL, 0),
    ],
)
def test_source_of_a_plain_store(code: str, source: int, value: int, shift: int) -> None:
    instruction = decode(code.replace(" ", ""))
    assert (instruction.source, instruction.source_value, instruction.source_shift) == (source, value, shift)


@pytest.mark.parametrize("code", ["0103", "8703", "f00fb10b", "0f1103", "8b03", "50", "c6c080", "89c3"])
def test_no_source(code: str) -> None:
    assert decode(code).source == 0


# --- what is no whole instruction ---------------------------------------------------------------------------------
@pytest.mark.parametrize("code", ["", "66", "c7", "c70344", "48b8112233", "62f17c48", "2e" * 14])
def test_incomplete(code: str) -> None:
    raw = bytes.fromhex(code)
    assert decoder.decode(raw, 64) is None
    assert decoder.incomplete(raw, 64)


@pytest.mark.parametrize("code", ["06" + "00" * 14, "60" + "00" * 14, "f00fa3" + "00" * 12, "2e" * 15])
def test_invalid(code: str) -> None:
    raw = bytes.fromhex(code)
    assert decoder.decode(raw, 64) is None
    assert not decoder.incomplete(raw, 64)


def test_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "CACHE_LIMIT", 16)
    for number in range(200):
        assert decoder.decode(bytes((0xE6, number)), 64) is not None
    assert len(decoder._cache) <= 16


def test_any_bytes_decode_or_not_but_never_raise() -> None:
    state = 12345
    for _ in range(20000):
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 128) - 1
        for bits in (16, 32, 64):
            instruction = decoder.decode((state >> 8 & (1 << 128) - 1).to_bytes(16, "little"), bits)
            if instruction is not None:
                assert 1 <= instruction.length <= 15
                for access in instruction.accesses:
                    assert access.size > 0
                    assert access.read or access.write


def test_extension_is_loaded_without_the_package_around_it() -> None:
    source = Path(decoder.__file__).resolve().parents[2]
    program = (
        f"import sys; sys.path.insert(0, {str(source)!r}); from rootvisor.x86.decoder import decode;"
        "assert 'iced_x86' not in sys.modules; assert decode(b'\\x90', 64).length == 1; print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "iced_x86" not in loaded
    assert not [name for name in loaded if name.startswith("iced_x86.") and name != "iced_x86._iced_x86_py"]
