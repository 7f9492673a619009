# SPDX-License-Identifier: Apache-2.0
"""Guest code, written as assembly next to the test that runs it; assembled on the host, loaded in the root."""

from __future__ import annotations

import marshal

#: Where 64-bit code is linked and loaded.
BASE = 0x40000
#: Where code of real mode lies: page 8, the vector of a SIPI.
REAL_BASE = 0x8000

DONE_PORT = 0xD0
"""``done``: the guest has finished."""
SAY_PORT = 0xE0
"""``say REG32``: a value for the test. ``set MSR`` writes RAX to an MSR, ``get MSR`` reads it, with RCX and RDX."""

PRELUDE = f"""
    .macro done
    outb %al, ${DONE_PORT:#x}
    hlt
    .endm
    .macro say value
    pushq %rax
    movq \\value, %rax
    outl %eax, ${SAY_PORT:#x}
    popq %rax
    .endm
    .macro set msr
    movl \\msr, %ecx
    movq %rax, %rdx
    shrq $32, %rdx
    wrmsr
    .endm
    .macro get msr
    movl \\msr, %ecx
    rdmsr
    shlq $32, %rdx
    orq %rdx, %rax
    .endm
"""
"""Macros of all pieces."""

ALL: list[Code] = []
"""Every piece of code of the modules imported so far."""
_images: dict[str, bytes] = {}


class Code:
    """A piece of guest code. ``bits`` 64 or 16; it is linked to ``base``."""

    def __init__(self, text: str, bits: int = 64, base: int | None = None) -> None:
        self.text = text
        self.bits = bits
        self.base = base if base is not None else BASE if bits == 64 else REAL_BASE
        ALL.append(self)

    def key(self) -> str:
        """What names the image in the file."""
        return f"{self.bits}:{self.base}:{self.text}"

    @property
    def image(self) -> bytes:
        """The machine code (in the root partition, after :func:`load`)."""
        return _images[self.key()]


def load(path: str) -> None:
    """Reads what the host assembled."""
    with open(path, "rb") as file:
        _images.update(marshal.load(file))
