# SPDX-License-Identifier: Apache-2.0
"""Random bytes that the emulator takes for an instruction, executed by this machine's processor as well: combinations
of prefixes and fields that nobody thought of.

What the emulator refuses, or what reaches beyond the tests' memory, does not get to the processor.
"""

from __future__ import annotations

import os
import random

import pytest

from rootvisor.x86 import decoder
from rootvisor.x86.emulator import Fault, Unsupported, emulate
from rootvisor.x86.flags import AF, CF, DF, OF, PF, SF, STATUS, ZF

from . import oracle
from .encodings import M32
from .model import Model

COUNT = int(os.environ.get("ROOTVISOR_X86_FUZZ", "20000"))
SEED = os.environ.get("ROOTVISOR_X86_SEED", "rootvisor")
INVALID_OPCODE = 6
CS = 1
_UNDEFINED = ((1, OF), (2, SF), (4, ZF), (8, AF), (16, CF), (32, PF))
_HEADS = tuple(
    bytes.fromhex(head)
    for head in (
        "", "", "0f", "0f", "48", "66", "67", "f2", "f3", "f0", "0f38", "660f38", "660f3a", "f20f", "f30f", "660f",
        "c5f8", "c5f9", "c5fa", "c5fb", "c5", "c4e1", "c4e2", "c4e3", "c4", "62f1", "62f2", "62", "f348", "f00f",
        "f20f38", "f30f38", "480f", "4c0f",
    )
)  # fmt: skip
_PREFIXES = bytes((0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x26, 0x2E, 0x36, 0x3E, 0x65))


class _Elsewhere(Exception):
    """The instruction does something that the processor cannot repeat here."""


class _Confined(Model):
    def __init__(self, memory: bytes, flags: int, bits: int) -> None:
        super().__init__(memory, oracle.WINDOW, oracle.CODE, flags)
        self.bits = bits

    def segment_base(self, number: int, /) -> int:
        if number == 5 and self.bits == 64:
            return oracle.GS_BASE
        if (
            number >= 4 or number == CS
        ):  # the processor refuses writes to a code segment before it looks at memory
            raise _Elsewhere
        return 0

    def input(self, port: int, size: int, /) -> int:
        raise _Elsewhere

    def output(self, port: int, size: int, value: int, /) -> None:
        raise _Elsewhere


def random_code(source: random.Random) -> bytes:
    prefixes = bytes(source.choice(_PREFIXES) for _ in range(source.choice((0, 0, 0, 1, 2))))
    code = bytearray(source.choice(_HEADS) + source.randbytes(12))
    if source.random() < 0.5 and len(code) > 3:  # more operands of the kind [register] and [register + byte]
        for at in (1, 2, 3, 4):
            code[at] &= 0x7F if source.random() < 0.5 else 0xFF
    return (prefixes + bytes(code))[:15]


def undefined(code: bytes, bits: int, count: int) -> int:
    decoded = decoder.load().Decoder(bits, code).decode()
    opcode = decoded.op_code()
    simple = opcode.table == 0 and opcode.op_code in (0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3)
    double = opcode.table == 1 and opcode.op_code in (0xA4, 0xA5, 0xAC, 0xAD)
    if not simple and not double:
        unknown = int(decoded.rflags_undefined)
        return sum(flag for bit, flag in _UNDEFINED if unknown & bit)
    size = decoder.load().MemorySizeExt.size(decoded.memory_size) or decoder.load().RegisterExt.size(
        decoded.op0_register
    )
    last = decoded.op_count - 1
    if decoded.op_kind(last):
        count = decoded.immediate(last)
    count &= 63 if size == 8 else 31
    if not count:
        return 0
    return (OF if count != 1 else 0) | AF | (CF if count >= int(size) * 8 else 0)


def oversized(code: bytes, bits: int, count: int) -> bool:
    """A double shift by more than its 16 bits: the result is undefined."""
    decoded = decoder.load().Decoder(bits, code).decode()
    opcode = decoded.op_code()
    if opcode.table != 1 or opcode.op_code not in (0xA4, 0xA5, 0xAC, 0xAD) or opcode.operand_size != 16:
        return False
    return (decoded.immediate(2) if decoded.op_kind(2) else count) & 31 > 16


def attempt(source: random.Random, bits: int) -> tuple[oracle.Case, Model] | None:
    """A case that the processor may execute, and what the emulator made of it."""
    code = random_code(source)
    mask = M32 if bits == 32 else (1 << 64) - 1
    model = _Confined(
        source.randbytes(oracle.WINDOW_SIZE), 0x202 | source.getrandbits(12) & (STATUS | DF), bits
    )
    middle = oracle.WINDOW + oracle.WINDOW_SIZE // 2
    for number in range(16):
        if source.random() < 0.75:
            model.registers[number] = middle + source.randrange(-256, 256) & (
                ~63 if source.random() < 0.3 else ~0
            )
        else:
            model.registers[number] = (
                source.choice((0, 1, source.getrandbits(8), source.getrandbits(64))) & mask
            )
    if source.random() < 0.4:
        model.registers[1] = source.randrange(1, 12)
    width = model.width = oracle.width()
    vectors = source.randbytes(32 * 64)
    model.vectors = [int.from_bytes(vectors[n * 64 :][:width], "little") for n in range(32)]
    general, memory, flags = list(model.registers), bytes(model.memory), model.rflags
    try:
        emulate(model, code, bits)
    except (Unsupported, _Elsewhere, Fault):
        return None
    length = model.rip - oracle.CODE
    if not 0 < length <= len(code) or not model.accesses:
        return None  # a jump, a string with more to do, no memory
    code = code[:length]
    locks = 0xF0 in code or 0x86 in code or 0x87 in code
    if locks and any(address % max(size, 8) for _, address, size in model.accesses):
        return None  # Linux slows down who locks across cache lines
    if oversized(code, bits, general[1]):
        return None
    return oracle.Case(code, bits, general, flags, memory, width, vectors), model


@pytest.mark.parametrize("bits", [64, 32])
def test_random_instructions_are_executed_as_the_processor_does(bits: int) -> None:
    source = random.Random(f"{SEED} {bits}")
    width = oracle.width()
    knows_all = width == 64 and all(map(oracle.has, ("movbe", "movdiri", "movdir64b", "bmi2")))
    opcodes = set()
    for _ in range(max(1, COUNT // 2000)):
        attempts = [attempt(source, bits) for _ in range(1000)]
        good = [one for one in attempts if one is not None]
        results = oracle.run([case for case, _ in good])
        for (case, model), expected in zip(good, results, strict=True):
            what = f"{bits}: {case.code.hex(' ')}"
            if expected.trap == INVALID_OPCODE and not knows_all:
                continue
            assert expected.trap is None, what
            count, mask = (16, (1 << 64) - 1) if bits == 64 else (8, M32)
            got = [value & mask for value in model.registers[:count]]
            assert got == [value & mask for value in expected.general[:count]], what
            defined = (STATUS | DF) & ~undefined(case.code, bits, case.general[1])
            assert model.rflags & defined == expected.flags & defined, what
            assert model.memory == expected.memory, what
            vectors = [int.from_bytes(expected.vectors[n * 64 :][:width], "little") for n in range(32)]
            registers = 32 if width == 64 and bits == 64 else count
            assert model.vectors[:registers] == vectors[:registers], what
            opcodes.add(decoder.load().Decoder(bits, case.code).decode().code)
    assert len(opcodes) > 50, "the fuzz does not reach instructions any more"
