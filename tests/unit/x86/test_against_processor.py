# SPDX-License-Identifier: Apache-2.0
"""Every form that the emulator knows, against this machine's processor: random registers, flags, memory, addressing.

ROOTVISOR_X86_CASES is the number of cases for each form; ROOTVISOR_X86_SEED makes others.
"""

from __future__ import annotations

import os
import random
import struct

import pytest

from rootvisor.x86 import decoder
from rootvisor.x86.emulator import Fault, emulate
from rootvisor.x86.flags import AF, CF, DF, OF, PF, SF, STATUS, ZF

from . import oracle
from .encodings import INTEGER_FORMS, M32, M64, MOVING_FORMS, RSP, VECTOR_FORMS, Encoding, Form
from .model import Model

CASES = int(os.environ.get("ROOTVISOR_X86_CASES", "600"))
SEED = os.environ.get("ROOTVISOR_X86_SEED", "rootvisor")
STATES = 12  # registers and memories for one encoding
_REGISTERS = struct.Struct("<16Q")
_UNDEFINED = ((1, OF), (2, SF), (4, ZF), (8, AF), (16, CF), (32, PF))  # RflagsBits of iced-x86


def number(source: random.Random, bits: int = 64) -> int:
    """A number as programs have them: all sizes, ends of ranges."""
    kind = source.randrange(6)
    if kind == 0:
        return (
            source.choice((0, 1, 2, M64, 1 << 63, 0x7F, 0x80, 0xFF, 0x8000, 0xFFFF, 1 << 31, M32))
            & (1 << bits) - 1
        )
    if kind == 1:
        return source.getrandbits(source.randrange(1, bits + 1))
    return source.getrandbits(bits)


def memory_of(source: random.Random) -> bytearray:
    memory = bytearray(source.randbytes(oracle.WINDOW_SIZE))
    if source.random() < 0.2:
        fill = source.choice((0, 0xFF, 0x80))
        start = source.randrange(oracle.WINDOW_SIZE)
        memory[start : start + 200] = bytes([fill]) * len(memory[start : start + 200])
    return memory


def target_of(source: random.Random, form: Form) -> int:
    """Where the operand shall be: anywhere, often across the page boundary in the middle."""
    if source.random() < 0.25:
        target = oracle.WINDOW + oracle.WINDOW_SIZE // 2 - source.randrange(0, 65)
    else:
        target = oracle.WINDOW + source.randrange(128, oracle.WINDOW_SIZE - 128)
    if form.kind in ("aligned", "line") and source.random() < 0.9:
        target &= ~63
    if form.kind == "pair":
        target &= ~15
    return target


class Sample:
    """A case for the oracle and the emulator, and what of the outcome is defined."""

    def __init__(self, encoding: Encoding, source: random.Random, fixed_target: int) -> None:
        form = self.form = encoding.form
        self.encoding = encoding
        bits, size = encoding.bits, encoding.size
        mask = M64 if bits == 64 else M32
        general = list(_REGISTERS.unpack(source.randbytes(128)))
        for _ in range(6):
            general[source.getrandbits(4)] = number(source)
        if bits != 64:
            general = [value & mask for value in general]
        self.flags = 0x202 | number(source, 12) & (STATUS | (DF if form.kind == "string" else 0))
        memory = memory_of(source)
        if form.kind == "string":
            self._string(general, memory, source, encoding)
        else:
            target = target_of(source, form)
            if encoding.base < 0 and encoding.index < 0:
                target = fixed_target
            if encoding.locked:
                target &= ~(size - 1)  # Linux slows down who locks across cache lines
            if form.kind in ("stack", "transfer"):
                general[RSP] = oracle.WINDOW + source.randrange(64, oracle.WINDOW_SIZE - 64)
            elif form.kind == "divide" and source.random() < 0.7:
                general[0] = number(source) & mask
                general[2] = number(source, size * 8 - 3) if source.random() < 0.5 else 0
            if form.kind == "line":
                general[encoding.reg] = (oracle.WINDOW + source.randrange(64, oracle.WINDOW_SIZE - 128)) & ~63
            if form.kind in ("bit", "transfer", "compare", "pair"):
                self._special(general, memory, encoding, source, target)
            encoding.aim(general, target)
        self.general = general
        self.memory = bytes(memory)
        self.vectors = source.randbytes(32 * 64) if form.vector else b""

    def _string(
        self, general: list[int], memory: bytearray, source: random.Random, encoding: Encoding
    ) -> None:
        size = encoding.size
        for register in (6, 7):
            general[register] = oracle.WINDOW + source.randrange(300, oracle.WINDOW_SIZE - 300)
        if source.random() < 0.3:
            general[7] = general[6] + source.choice((0, size, -size, 1))
        if self.form.prefix:
            general[1] = source.choice((0, 1, 2, 3, source.randrange(30)))
        if encoding.bits == 64 and encoding.mask == M32:
            general[1] = max(
                general[1], 1
            )  # what happens to the upper half of RCX at zero differs between processors
            for register in (1, 6, 7) if self.form.prefix else (6, 7):
                general[register] |= source.getrandbits(32) << 32
        if source.random() < 0.5:  # something for CMPS and SCAS to find
            memory[200:-200] = bytes([general[0] & 0xFF]) * (oracle.WINDOW_SIZE - 400)
            memory[source.randrange(200, oracle.WINDOW_SIZE - 200)] ^= 0xFF
            general[0] = int.from_bytes(bytes([general[0] & 0xFF]) * (encoding.bits // 8), "little")

    def _special(
        self, general: list[int], memory: bytearray, encoding: Encoding, source: random.Random, target: int
    ) -> None:
        size, kind = encoding.size, self.form.kind
        at = target - oracle.WINDOW
        if kind == "bit" and encoding.rm < 0 and self.form.digit is None:
            reach = 100 * 8 if size == 2 else 120 * 8
            offset = source.randrange(-reach, reach)
            mask = (1 << size * 8) - 1
            general[encoding.reg] = general[encoding.reg] & ~mask | offset & mask
        elif kind == "transfer":
            leave = oracle.LEAVE if encoding.bits == 64 else oracle.LEAVE_32
            for near in range(at - 8, at + 9, 1):
                if near % 8 == at % 8:
                    memory[near : near + 8] = leave.to_bytes(8, "little")
        elif kind == "compare" and source.random() < 0.5:
            value = int.from_bytes(memory[at : at + size], "little")
            general[0] = general[0] & ~((1 << size * 8) - 1) | value
        elif kind == "pair" and source.random() < 0.5:
            mask = (1 << size * 8) - 1
            general[0] = general[0] & ~mask | int.from_bytes(memory[at : at + size], "little")
            general[2] = general[2] & ~mask | int.from_bytes(memory[at + size : at + 2 * size], "little")


def undefined_flags(sample: Sample) -> int:
    """Flags that the manuals leave open."""
    encoding, kind = sample.encoding, sample.form.kind
    if "shift" in kind:
        count = encoding.immediate if "imm" in kind else 1 if "1" in kind else sample.general[1]
        count &= 63 if encoding.size == 8 else 31
        if not count:
            return 0
        shifts = "double" in kind or (sample.form.digit or 0) >= 4
        undefined = (AF if shifts else 0) | (OF if count != 1 else 0)
        return undefined | (CF if shifts and count >= encoding.size * 8 else 0)
    decoded = decoder.load().Decoder(encoding.bits, encoding.code).decode()
    return sum(flag for bit, flag in _UNDEFINED if decoded.rflags_undefined & bit)


def samples(form: Form, bits: int, count: int) -> list[Sample]:
    source = random.Random(f"{SEED} {form.name} {bits}")
    sizes = [size for size in form.sizes if size < 8 or bits == 64]
    made: list[Sample] = []
    while sizes and len(made) < count:
        fixed_target = target_of(source, form)
        if form.lock:
            fixed_target &= ~7
        encoding = Encoding(form, source.choice(sizes), bits, source, fixed_target)
        made += [Sample(encoding, source, fixed_target) for _ in range(min(STATES, count - len(made)))]
    if form.kind == "double shift cl":  # a count beyond 16 bits leaves everything undefined
        made = [one for one in made if one.encoding.size != 2 or one.general[1] & 31 <= 16]
    return made


def model_of(sample: Sample, code: bytes, width: int) -> Model:
    model = Model(sample.memory, oracle.WINDOW, oracle.CODE, sample.flags)
    model.registers = list(sample.general)
    model.segments[5] = oracle.GS_BASE
    model.width = width
    if sample.vectors:
        model.vectors = [int.from_bytes(sample.vectors[n * 64 :][:width], "little") for n in range(32)]
    return model


def compare(sample: Sample, expected: oracle.Case, code: bytes, bits: int) -> None:
    width = expected.width or 16
    model = model_of(sample, code, width)
    trap = None
    try:
        emulate(model, code, bits)
    except Fault as fault:
        trap = fault.vector
    what = f"{sample.form.name} {bits}: {code.hex(' ')}"
    assert trap == expected.trap, what
    if trap is not None:
        assert model.state() == model_of(sample, code, width).state(), what
        return
    end = oracle.CODE + len(code)
    if sample.form.kind == "transfer":
        end = oracle.LEAVE if bits == 64 else oracle.LEAVE_32
    assert model.rip == end, what
    got, wanted, count = model.registers, expected.general, 16
    if bits != 64:
        got, wanted, count = [value & M32 for value in got[:8]], [value & M32 for value in wanted[:8]], 8
    assert got == wanted, f"{what}\n{shown(got)}\n{shown(wanted)}"
    defined = (STATUS | DF) & ~undefined_flags(sample)
    assert model.rflags & defined == expected.flags & defined, f"{what}: {model.rflags:x}, {expected.flags:x}"
    assert model.memory == expected.memory, what
    if expected.width:
        vectors = [int.from_bytes(expected.vectors[n * 64 :][:width], "little") for n in range(32)]
        if width < 64 or bits != 64:
            assert model.vectors[:count] == vectors[:count], what
        else:
            assert model.vectors == vectors, what


def shown(registers: list[int]) -> str:
    return " ".join(f"{value:x}" for value in registers)


def check(form: Form, bits: int, count: int, as_16: bool = False) -> int:
    if form.feature and not oracle.has(form.feature):
        pytest.skip(f"this processor does not know {form.name}")
    if form.vex > oracle.width() or (form.evex and oracle.width() < 64):
        pytest.skip(f"this processor does not know {form.name}")
    width = oracle.width() if form.vector else 0
    made = samples(form, bits, count)
    for sample, expected in zip(
        made,
        oracle.run(
            [
                oracle.Case(one.encoding.code, bits, one.general, one.flags, one.memory, width, one.vectors)
                for one in made
            ]
        ),
        strict=True,
    ):
        if as_16:
            compare(sample, expected, sample.encoding.in_16_bit_code(), 16)
        else:
            compare(sample, expected, sample.encoding.code, bits)
    return len(made)


def names(forms: list[Form]) -> list[str]:
    return [form.name for form in forms]


@pytest.mark.parametrize("form", INTEGER_FORMS, ids=names(INTEGER_FORMS))
def test_integer_form_is_executed_as_the_processor_does(form: Form) -> None:
    assert check(form, 64, CASES)


@pytest.mark.parametrize("form", MOVING_FORMS, ids=names(MOVING_FORMS))
def test_moving_form_is_executed_as_the_processor_does(form: Form) -> None:
    assert check(form, 64, CASES)


@pytest.mark.parametrize("form", VECTOR_FORMS, ids=names(VECTOR_FORMS))
def test_vector_form_is_executed_as_the_processor_does(form: Form) -> None:
    assert check(form, 64, CASES // 4)


NARROW_FORMS = [form for form in INTEGER_FORMS + MOVING_FORMS if min(form.sizes) < 8 and not form.only_64]
NARROW_VECTORS = [form for form in VECTOR_FORMS if min(form.sizes) < 8 and not form.only_64]
#: Without those whose operand has the same size in 16-bit code, and CALL, which stores its own end.
FORMS_16 = [
    form
    for form in NARROW_FORMS
    if not form.vex and form.name not in ("movnti", "movdiri", "movdir64b", "call")
]


@pytest.mark.parametrize("form", NARROW_FORMS + NARROW_VECTORS, ids=names(NARROW_FORMS + NARROW_VECTORS))
def test_form_is_executed_in_32_bit_code_as_the_processor_does(form: Form) -> None:
    assert check(form, 32, CASES // 4)


@pytest.mark.parametrize("form", FORMS_16, ids=names(FORMS_16))
def test_form_is_executed_in_16_bit_code_as_the_processor_does(form: Form) -> None:
    """The processor runs it as 32-bit code, the emulator with the prefixes turned round as 16-bit code."""
    assert check(form, 32, CASES // 8, as_16=True)


@pytest.mark.parametrize(
    "code",
    ["8f 44 24 08", "66 8f 44 24 08", "8f 04 24", "41 8f 04 24", "ff 74 24 f0", "ff 34 24", "66 ff 74 24 10"],
)
def test_stack_pointer_is_the_base_of_a_stack_operand(code: str) -> None:
    """POP computes its operand's address after it has moved the stack pointer, PUSH before."""
    for seed in range(20):
        source = random.Random(seed)
        general = [number(source) for _ in range(16)]
        general[RSP] = general[12] = oracle.WINDOW + source.randrange(100, 900)
        case = oracle.Case(bytes.fromhex(code), 64, general, 0x202, source.randbytes(oracle.WINDOW_SIZE))
        (expected,) = oracle.run([case])
        model = Model(case.memory, oracle.WINDOW, oracle.CODE, case.flags)
        model.registers = list(general)
        emulate(model, case.code, 64)
        assert model.registers == expected.general
        assert model.memory == expected.memory


@pytest.mark.parametrize(
    "code", ["48 0f bc 07", "0f bd 07", "66 0f bc 07", "f3 0f bc 07", "66 f3 0f bd 07", "f3 0f b8 07"]
)
def test_scan_of_zero(code: str) -> None:
    general = [0x1234_5678] * 16
    general[7] = oracle.WINDOW + 64
    for flags in (0x202, 0x202 | STATUS):
        case = oracle.Case(bytes.fromhex(code), 64, general, flags, bytes(oracle.WINDOW_SIZE))
        (expected,) = oracle.run([case])
        model = Model(case.memory, oracle.WINDOW, oracle.CODE, flags)
        model.registers = list(general)
        emulate(model, case.code, 64)
        assert model.registers == expected.general
        assert model.rflags & (ZF | CF) == expected.flags & (ZF | CF) or "f3" not in code
        assert model.rflags & ZF == expected.flags & ZF
