# SPDX-License-Identifier: Apache-2.0
"""Forms of instructions with an operand in memory: what the emulator claims to know; random encodings of them, and
registers that make such an encoding point where a test wants it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .oracle import CODE, GS_BASE

RSP, RBP = 4, 5
M64, M32 = (1 << 64) - 1, (1 << 32) - 1
#: Sizes: 1 has an opcode of its own, one below that of the wider ones.
ALL, WIDE = (1, 2, 4, 8), (2, 4, 8)


_SHAPES = ("base", "base", "base8", "base32", "index", "index8", "index32", "scaled", "absolute", "rip")


@dataclass(frozen=True)
class Form:
    """One opcode. ``digit`` is ModRM.reg where it selects the operation, else a register is there.

    ``byte``: the opcode for one byte is ``opcode``, that for more is one higher. ``immediate`` is the number of bytes,
    -1 for as many as the operand up to 4. ``kind`` tells the generator of registers what matters; ``space``: "", "0f",
    "0f38", "0f3a"; ``prefix`` is a mandatory one; ``vex``: 0 none, else the vector's bytes, with ``evex`` in EVEX;
    ``wide`` sets VEX.W. ``register``: the form with a register instead of memory exists and is emulated.
    """

    name: str
    opcode: int
    sizes: tuple[int, ...] = (4,)
    digit: int | None = None
    byte: bool = False
    immediate: int = 0
    kind: str = ""
    space: str = ""
    prefix: int = 0
    vex: int = 0
    evex: bool = False
    wide: bool = False
    register: bool = True
    lock: bool = False
    only_64: bool = False
    feature: str = ""
    vector: bool = False
    two_operands: bool = False


def _integer_forms() -> list[Form]:
    forms = []
    for number, name in enumerate(("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")):
        lock = name != "cmp"
        forms += [
            Form(f"{name} m,r", number * 8, ALL, byte=True, lock=lock),
            Form(f"{name} r,m", number * 8 + 2, ALL, byte=True),
            Form(f"{name} m,imm", 0x80, ALL, number, byte=True, immediate=-1, lock=lock),
            Form(f"{name} m,imm8", 0x83, WIDE, number, immediate=1, lock=lock),
        ]
    forms += [
        Form("test m,r", 0x84, ALL, byte=True),
        Form("test m,imm", 0xF6, ALL, 0, byte=True, immediate=-1),
        Form("not", 0xF6, ALL, 2, byte=True, lock=True),
        Form("neg", 0xF6, ALL, 3, byte=True, lock=True),
        Form("mul", 0xF6, ALL, 4, byte=True),
        Form("imul m", 0xF6, ALL, 5, byte=True),
        Form("div", 0xF6, ALL, 6, byte=True, kind="divide"),
        Form("idiv", 0xF6, ALL, 7, byte=True, kind="divide"),
        Form("inc", 0xFE, ALL, 0, byte=True, lock=True),
        Form("dec", 0xFE, ALL, 1, byte=True, lock=True),
        Form("imul r,m", 0xAF, WIDE, space="0f"),
        Form("imul r,m,imm8", 0x6B, WIDE, immediate=1),
        Form("imul r,m,imm", 0x69, WIDE, immediate=-1),
        Form("shld imm", 0xA4, WIDE, immediate=1, space="0f", kind="double shift imm"),
        Form("shld cl", 0xA5, WIDE, space="0f", kind="double shift cl"),
        Form("shrd imm", 0xAC, WIDE, immediate=1, space="0f", kind="double shift imm"),
        Form("shrd cl", 0xAD, WIDE, space="0f", kind="double shift cl"),
    ]
    for digit, name in enumerate(("rol", "ror", "rcl", "rcr", "shl", "shr", "sal", "sar")):
        forms += [
            Form(f"{name} imm", 0xC0, ALL, digit, byte=True, immediate=1, kind="shift imm"),
            Form(f"{name} 1", 0xD0, ALL, digit, byte=True, kind="shift 1"),
            Form(f"{name} cl", 0xD2, ALL, digit, byte=True, kind="shift cl"),
        ]
    for digit, name in ((4, "bt"), (5, "bts"), (6, "btr"), (7, "btc")):
        lock = name != "bt"
        forms += [
            Form(f"{name} m,r", 0x83 | digit << 3, WIDE, space="0f", kind="bit", lock=lock),
            Form(f"{name} m,imm", 0xBA, WIDE, digit, immediate=1, space="0f", lock=lock),
        ]
    forms += [
        Form("bsf", 0xBC, WIDE, space="0f"),
        Form("bsr", 0xBD, WIDE, space="0f"),
        Form("tzcnt", 0xBC, WIDE, space="0f", prefix=0xF3, feature="bmi2"),
        Form("lzcnt", 0xBD, WIDE, space="0f", prefix=0xF3, feature="bmi2"),
        Form("popcnt", 0xB8, WIDE, space="0f", prefix=0xF3),
        Form("shlx", 0xF7, (4, 8), space="0f38", prefix=0x66, vex=16, feature="bmi2"),
        Form("shrx", 0xF7, (4, 8), space="0f38", prefix=0xF2, vex=16, feature="bmi2"),
        Form("sarx", 0xF7, (4, 8), space="0f38", prefix=0xF3, vex=16, feature="bmi2"),
        Form(
            "rorx",
            0xF0,
            (4, 8),
            space="0f3a",
            prefix=0xF2,
            vex=16,
            immediate=1,
            feature="bmi2",
            two_operands=True,
        ),
        Form("andn", 0xF2, (4, 8), space="0f38", vex=16, feature="bmi2"),
        Form("mulx", 0xF6, (4, 8), space="0f38", prefix=0xF2, vex=16, feature="bmi2"),
    ]
    return forms


def _moving_forms() -> list[Form]:
    forms = [
        Form("mov m,r", 0x88, ALL, byte=True),
        Form("mov r,m", 0x8A, ALL, byte=True),
        Form("mov m,imm", 0xC6, ALL, 0, byte=True, immediate=-1),
        Form("mov al,moffs", 0xA0, ALL, byte=True, kind="moffs"),
        Form("mov moffs,al", 0xA2, ALL, byte=True, kind="moffs"),
        Form("movzx r,m8", 0xB6, WIDE, space="0f"),
        Form("movzx r,m16", 0xB7, WIDE, space="0f"),
        Form("movsx r,m8", 0xBE, WIDE, space="0f"),
        Form("movsx r,m16", 0xBF, WIDE, space="0f"),
        Form("movsxd", 0x63, WIDE, only_64=True),
        Form("movnti", 0xC3, (4, 8), space="0f", register=False),
        Form("movbe r,m", 0xF0, WIDE, space="0f38", register=False, feature="movbe"),
        Form("movbe m,r", 0xF1, WIDE, space="0f38", register=False, feature="movbe"),
        Form("movdiri", 0xF9, (4, 8), space="0f38", register=False, feature="movdiri"),
        Form(
            "movdir64b",
            0xF8,
            (4,),
            space="0f38",
            prefix=0x66,
            register=False,
            feature="movdir64b",
            kind="line",
        ),
        Form("xlatb", 0xD7, (1,), kind="table"),
        Form("xchg", 0x86, ALL, byte=True, lock=True),
        Form("xadd", 0xC0, ALL, byte=True, space="0f", lock=True),
        Form("cmpxchg", 0xB0, ALL, byte=True, space="0f", lock=True, kind="compare"),
        Form("cmpxchg8b", 0xC7, (4,), 1, space="0f", lock=True, kind="pair", register=False),
        Form("cmpxchg16b", 0xC7, (8,), 1, space="0f", lock=True, kind="pair", register=False),
        Form("push", 0xFF, (4,), 6, kind="stack", register=False),
        Form("push 16", 0xFF, (2,), 6, kind="stack", register=False),
        Form("pop", 0x8F, (4,), 0, kind="stack", register=False),
        Form("pop 16", 0x8F, (2,), 0, kind="stack", register=False),
        Form("call", 0xFF, (4,), 2, kind="transfer", register=False),
        Form("jmp", 0xFF, (4,), 4, kind="transfer", register=False),
        Form("prefetcht0", 0x18, (4,), 1, space="0f", register=False),
        Form("prefetchw", 0x0D, (4,), 1, space="0f", register=False),
        Form("nop m", 0x1F, (4,), 0, space="0f", register=False),
        Form("clflush", 0xAE, (4,), 7, space="0f", register=False),
    ]
    for number in range(16):
        forms += [
            Form(f"cmov{number:x}", 0x40 + number, WIDE, space="0f"),
            Form(f"set{number:x}", 0x90 + number, (4,), 0, space="0f", kind="set"),
        ]
    for opcode, name in ((0xA4, "movs"), (0xA6, "cmps"), (0xAA, "stos"), (0xAC, "lods"), (0xAE, "scas")):
        forms += [
            Form(name, opcode, ALL, byte=True, kind="string"),
            Form(f"rep {name}", opcode, ALL, byte=True, kind="string", prefix=0xF3),
            Form(f"repne {name}", opcode, ALL, byte=True, kind="string", prefix=0xF2),
        ]
    return forms


#: name, opcode, prefix, whether the operand is aligned; with VEX and 256 bits, with EVEX
_VECTOR_MOVES = (
    ("movups load", 0x10, 0, False), ("movups store", 0x11, 0, False),
    ("movupd load", 0x10, 0x66, False), ("movupd store", 0x11, 0x66, False),
    ("movaps load", 0x28, 0, True), ("movaps store", 0x29, 0, True),
    ("movapd load", 0x28, 0x66, True), ("movapd store", 0x29, 0x66, True),
    ("movdqa load", 0x6F, 0x66, True), ("movdqa store", 0x7F, 0x66, True),
    ("movdqu load", 0x6F, 0xF3, False), ("movdqu store", 0x7F, 0xF3, False),
    ("movntps", 0x2B, 0, True), ("movntpd", 0x2B, 0x66, True), ("movntdq", 0xE7, 0x66, True),
)  # fmt: skip
_VECTOR_OPERATIONS = (
    ("pand", 0xDB, 0x66), ("andps", 0x54, 0), ("andpd", 0x54, 0x66), ("pandn", 0xDF, 0x66), ("andnps", 0x55, 0),
    ("andnpd", 0x55, 0x66), ("por", 0xEB, 0x66), ("orps", 0x56, 0), ("orpd", 0x56, 0x66), ("pxor", 0xEF, 0x66),
    ("xorps", 0x57, 0), ("xorpd", 0x57, 0x66), ("pcmpeqb", 0x74, 0x66), ("pcmpeqw", 0x75, 0x66),
    ("pcmpeqd", 0x76, 0x66), ("pminub", 0xDA, 0x66), ("pmaxub", 0xDE, 0x66),
)  # fmt: skip


def _vector_forms() -> list[Form]:
    def form(name: str, opcode: int, prefix: int, **more: object) -> Form:
        values: dict[str, object] = {"space": "0f", "register": False, "vector": True, **more}
        return Form(name, opcode, prefix=prefix, **values)  # type: ignore[arg-type]

    forms = []
    for name, opcode, prefix, aligned in _VECTOR_MOVES:
        kind = "aligned" if aligned else ""
        forms.append(form(name, opcode, prefix, kind=kind))
        forms += [
            form(f"v{name} {bytes_}", opcode, prefix, kind=kind, vex=bytes_, two_operands=True)
            for bytes_ in (16, 32)
        ]
        packed_double = prefix == 0x66 and opcode not in (0x6F, 0x7F, 0xE7)
        wides = (packed_double,) if opcode in (0x10, 0x11, 0x28, 0x29, 0x2B, 0xE7) else (False, True)
        forms += [
            form(f"v{name} {bytes_} evex{wide:d}", opcode, prefix, kind=kind, vex=bytes_, evex=True, wide=wide,
                 two_operands=True)
            for bytes_ in (16, 32, 64)
            for wide in wides
        ]  # fmt: skip
    for bytes_ in (16, 32, 64):
        for opcode in (0x6F, 0x7F):
            for wide in (False, True):
                name = f"vmovdqu{8 << wide} {opcode:x} {bytes_} evex"
                forms.append(form(name, opcode, 0xF2, vex=bytes_, evex=True, wide=wide, two_operands=True))
    for name, opcode, prefix in (
        ("movd load", 0x6E, 0x66), ("movd store", 0x7E, 0x66), ("movq load", 0x7E, 0xF3),
        ("movq store", 0xD6, 0x66), ("movss load", 0x10, 0xF3), ("movss store", 0x11, 0xF3),
        ("movsd load", 0x10, 0xF2), ("movsd store", 0x11, 0xF2), ("movlps store", 0x13, 0),
        ("movlpd store", 0x13, 0x66), ("movhps store", 0x17, 0), ("movhpd store", 0x17, 0x66),
    ):  # fmt: skip
        forms.append(form(name, opcode, prefix))
        forms.append(form(f"v{name}", opcode, prefix, vex=16, two_operands=True))
    for name, opcode in (("movd8 load", 0x6E), ("movd8 store", 0x7E)):
        forms.append(form(name, opcode, 0x66, sizes=(8,)))
        forms.append(form(f"v{name}", opcode, 0x66, vex=16, wide=True, two_operands=True, only_64=True))
    for name, opcode, prefix in (
        ("movlps load", 0x12, 0), ("movlpd load", 0x12, 0x66), ("movhps load", 0x16, 0), ("movhpd load", 0x16, 0x66),
    ):  # fmt: skip
        forms.append(form(name, opcode, prefix))
        forms.append(form(f"v{name}", opcode, prefix, vex=16))
    forms.append(form("lddqu", 0xF0, 0xF2))
    forms.append(form("vlddqu", 0xF0, 0xF2, vex=32, two_operands=True))
    forms.append(form("movntdqa", 0x2A, 0x66, space="0f38", kind="aligned"))
    forms += [
        form(f"vmovntdqa {n}", 0x2A, 0x66, space="0f38", kind="aligned", vex=n, two_operands=True)
        for n in (16, 32)
    ]
    forms.append(
        form("vmovntdqa 64", 0x2A, 0x66, space="0f38", kind="aligned", vex=64, evex=True, two_operands=True)
    )
    for opcode in (0x78, 0x79, 0x58, 0x59, 0x18):
        forms += [
            form(f"vbroadcast {opcode:x} {n}", opcode, 0x66, space="0f38", vex=n, two_operands=True)
            for n in (16, 32)
        ]
    for opcode in (0x19, 0x1A, 0x5A):
        forms.append(form(f"vbroadcast {opcode:x} 32", opcode, 0x66, space="0f38", vex=32, two_operands=True))
    for opcode, wide in ((0x78, False), (0x79, False), (0x58, False), (0x59, True), (0x18, False)):
        forms.append(
            form(
                f"vbroadcast {opcode:x} 64",
                opcode,
                0x66,
                space="0f38",
                vex=64,
                evex=True,
                wide=wide,
                two_operands=True,
            )
        )
    forms += [
        form("pinsrw", 0xC4, 0x66, immediate=1),
        form("vpinsrw", 0xC4, 0x66, immediate=1, vex=16),
        form("pinsrb", 0x20, 0x66, immediate=1, space="0f3a"),
        form("pinsrd", 0x22, 0x66, immediate=1, space="0f3a", sizes=(4, 8)),
        form("vpinsrd", 0x22, 0x66, immediate=1, space="0f3a", vex=16),
        form("vinsertf128", 0x18, 0x66, immediate=1, space="0f3a", vex=32),
        form("vinserti128", 0x38, 0x66, immediate=1, space="0f3a", vex=32),
        form("pextrb", 0x14, 0x66, immediate=1, space="0f3a"),
        form("pextrw", 0x15, 0x66, immediate=1, space="0f3a"),
        form("pextrd", 0x16, 0x66, immediate=1, space="0f3a", sizes=(4, 8)),
        form("vpextrd", 0x16, 0x66, immediate=1, space="0f3a", vex=16, two_operands=True),
        form("vextractf128", 0x19, 0x66, immediate=1, space="0f3a", vex=32, two_operands=True),
        form("vextracti128", 0x39, 0x66, immediate=1, space="0f3a", vex=32, two_operands=True),
    ]
    for name, opcode, prefix in _VECTOR_OPERATIONS:
        forms.append(form(name, opcode, prefix, kind="aligned"))
        forms += [form(f"v{name} {n}", opcode, prefix, vex=n) for n in (16, 32)]
    return forms


INTEGER_FORMS = _integer_forms()
MOVING_FORMS = _moving_forms()
VECTOR_FORMS = _vector_forms()


class Encoding:
    """``code`` for ``bits``, and where its operand is.

    ``reg`` is ModRM.reg (a register unless the form has a digit), ``rm`` a register operand or -1.
    """

    def __init__(self, form: Form, size: int, bits: int, source: random.Random, target: int) -> None:
        self.form = form
        self.size = size
        self.bits = bits
        self.base = self.index = self.rm = -1
        self.scale = 1
        self.displacement = 0
        self.mask = M64 if bits == 64 else M32
        self.segment_base = 0
        self.immediate = 0
        self._source = source
        self.reg = 0
        self.code = self._encode(target)

    def _encode(self, target: int) -> bytes:
        form, source = self.form, self._source
        prefixes = bytearray()
        if form.lock and source.random() < 0.3:
            prefixes.append(0xF0)
        self.locked = bool(prefixes) or form.name == "xchg"
        if self.bits == 64 and source.random() < 0.1 and form.kind not in ("string", "moffs"):
            prefixes.append(0x65)
            self.segment_base = GS_BASE
        if self.bits == 64 and source.random() < 0.15:
            prefixes.append(0x67)
            self.mask = M32
        if self.size == 2:
            prefixes.append(0x66)
        if form.prefix and not form.vex:
            prefixes.append(form.prefix)
        source.shuffle(prefixes)
        opcode = form.opcode + (form.byte and self.size > 1)
        if form.kind == "string":
            rex = bytes([0x48]) if self.size == 8 else b""
            return bytes(prefixes) + rex + bytes([opcode])
        if form.kind == "table":
            self.base, self.index = 3, -2
            return bytes(prefixes) + bytes([opcode])
        if form.kind == "moffs":
            rex = bytes([0x48]) if self.size == 8 else b""
            self.displacement = target
            return (
                bytes(prefixes)
                + rex
                + bytes([opcode])
                + target.to_bytes(8 if self.mask == M64 else 4, "little")
            )
        count = 32 if form.evex and self.bits == 64 else 16 if self.bits == 64 else 8
        self.reg = source.randrange(count) if form.digit is None else form.digit
        general = 16 if self.bits == 64 else 8
        if form.register and 0xF0 not in prefixes and source.random() < 0.15:
            self.rm = source.randrange(general)
        modrm, rest, ripless = self._modrm(target, general)
        self.other = 0
        if form.vex and not form.two_operands:
            self.other = source.randrange(general)
        rex_x = self.index >> 3 if self.index >= 0 else 0
        rex_b = (self.rm if self.rm >= 0 else self.base if self.base >= 0 else 0) >> 3
        immediate = self._immediate()
        if form.evex:
            head = self._evex(rex_x, rex_b)
        elif form.vex:
            head = self._vex(rex_x, rex_b)
        else:
            extension = (self.size == 8) << 3 | self.reg >> 3 << 2 | rex_x << 1 | rex_b
            use_rex = self.bits == 64 and (extension or source.random() < 0.2)
            head = bytes([0x40 | extension]) if use_rex else b""
            head += {"": b"", "0f": b"\x0f", "0f38": b"\x0f\x38", "0f3a": b"\x0f\x3a"}[form.space]
        start = bytes(prefixes) + head + bytes([opcode, modrm])
        if ripless is not None:  # RIP-relative
            length = len(start) + 4 + len(immediate)
            rest = (ripless - CODE - length & M32).to_bytes(4, "little")
        return start + rest + immediate

    def _modrm(self, target: int, general: int) -> tuple[int, bytes, int | None]:
        source, field = self._source, (self.reg & 7) << 3
        if self.rm >= 0:
            return 0xC0 | field | self.rm & 7, b"", None
        shape = source.choice(_SHAPES)
        if self.form.evex and shape.endswith("8"):
            shape = shape[:-1] + "32"  # EVEX scales short displacements: the decoder's business
        if shape == "scaled" and (self.locked or self.form.kind == "transfer"):
            shape = "index"  # which can be aimed exactly
        if shape == "rip":
            if self.bits != 64:
                shape = "absolute"
            else:
                self.displacement = target - self.segment_base & self.mask
                return field | 5, b"", self.displacement
        if shape == "absolute":
            self.displacement = target - self.segment_base & self.mask
            absolute = self.displacement.to_bytes(4, "little")
            if self.bits != 64:
                return field | 5, absolute, None
            return field | 4, b"\x25" + absolute, None
        mode = 0
        disp = b""
        taken = self._taken()
        self.base = source.choice([n for n in range(general) if n not in taken])
        if shape.endswith("8"):
            mode, self.displacement = 0x40, source.randrange(-128, 128)
            disp = (self.displacement & 0xFF).to_bytes(1, "little")
        elif shape.endswith("32"):
            mode, self.displacement = 0x80, source.randrange(-(1 << 31), 1 << 31)
            disp = (self.displacement & M32).to_bytes(4, "little")
        elif self.base & 7 == RBP and shape != "scaled":
            mode, disp = 0x40, b"\0"
        if shape.startswith("base") and self.base & 7 != RSP:
            return mode | field | self.base & 7, disp, None
        if shape.startswith("base"):
            return mode | field | 4, bytes([0x24]) + disp, None
        self.index = source.choice([n for n in range(general) if n not in (RSP, self.base, *taken)])
        shift = source.randrange(4)
        self.scale = 1 << shift
        sib = shift << 6 | (self.index & 7) << 3
        if shape == "scaled":
            self.base = -1
            self.displacement = source.randrange(-(1 << 30), 1 << 30) & ~7
            return field | 4, bytes([sib | 5]) + (self.displacement & M32).to_bytes(4, "little"), None
        return mode | field | 4, bytes([sib | self.base & 7]) + disp, None

    def _taken(self) -> tuple[int, ...]:
        """Registers whose value a test chooses, so that they cannot be part of the address."""
        kind = self.form.kind
        if kind in ("line", "bit") and self.form.digit is None:
            return (self.reg,)
        return {"stack": (RSP,), "transfer": (RSP,), "compare": (0,), "pair": (0, 1, 2, 3)}.get(kind, ())

    def _immediate(self) -> bytes:
        length = min(self.size, 4) if self.form.immediate < 0 else self.form.immediate
        self.immediate = self._source.getrandbits(8 * length) if length else 0
        if self.form.kind == "double shift imm" and self.size == 2:
            self.immediate %= 17
        return self.immediate.to_bytes(length, "little")

    def _pp(self) -> int:
        return {0: 0, 0x66: 1, 0xF3: 2, 0xF2: 3}[self.form.prefix]

    def _vex(self, x: int, b: int) -> bytes:
        form = self.form
        space = {"0f": 1, "0f38": 2, "0f3a": 3}[form.space]
        first = (~(self.reg >> 3) & 1) << 7 | (~x & 1) << 6 | (~b & 1) << 5 | space
        wide = form.wide or self.size == 8
        second = wide << 7 | (~self.other & 15) << 3 | (form.vex == 32) << 2 | self._pp()
        return bytes([0xC4, first, second])

    def _evex(self, x: int, b: int) -> bytes:
        form = self.form
        space = {"0f": 1, "0f38": 2, "0f3a": 3}[form.space]
        first = (
            (~(self.reg >> 3) & 1) << 7 | (~x & 1) << 6 | (~b & 1) << 5 | (~(self.reg >> 4) & 1) << 4 | space
        )
        second = form.wide << 7 | (~self.other & 15) << 3 | 4 | self._pp()
        third = {16: 0, 32: 1, 64: 2}[form.vex] << 5 | 8
        return bytes([0x62, first, second, third])

    def in_16_bit_code(self) -> bytes:
        """The same instruction for 16-bit code: the prefixes of operand and address size mean the opposite there."""
        count = 0
        while self.code[count] in (0x66, 0x67, 0xF0, 0xF2, 0xF3):
            count += 1
        prefixes = self.code[:count]
        size = prefixes.replace(b"\x66", b"") if 0x66 in prefixes else b"\x66" + prefixes
        return b"\x67" + size + self.code[count:]

    def aim(self, registers: list[int], target: int) -> None:
        """Sets base and index so that the operand is at ``target``, or within 7 bytes below it."""
        if self.rm >= 0:
            return
        offset = target - self.segment_base - self.displacement
        if self.index == -2:  # XLATB
            registers[self.base] = self._upper(offset - (registers[0] & 0xFF))
        elif self.base >= 0:
            if self.index >= 0:
                offset -= registers[self.index] * self.scale
            registers[self.base] = self._upper(offset)
        elif self.index >= 0:
            registers[self.index] = self._upper((offset & self.mask) // self.scale)

    def _upper(self, value: int) -> int:
        """With 32-bit addresses the upper half does not matter."""
        value &= self.mask
        if self.mask == M32 and self.bits == 64:
            value |= self._source.getrandbits(32) << 32
        return value
