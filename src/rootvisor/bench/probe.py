# SPDX-License-Identifier: Apache-2.0
"""A guest without a kernel: 64-bit code that makes exits of one kind after the other, and marks where each begins.

It is an ELF image, so that the machine loads it as it loads Linux. Marks are bytes written to `MARK_PORT`: 2n before
the loop of kind n, 2n + 1 behind it, `END` at the end.
"""

from __future__ import annotations

import struct

from rootvisor.hypervisor.hypercall_abi import PORT as HYPERCALL_PORT
from rootvisor.tlfs import hypercalls, msrs

MARK_PORT = 0xF4
"""Port for marks; nothing of the board is there."""

_SILENT_PORT = 0xED
_LOAD_GPA = 0x1000000
_OUTPUT_GPA = _LOAD_GPA + 0x10000
_OPEN_SOURCE_OS_ID = 0x81000000

KINDS = ("io", "msr", "hypercall")
"""What is measured: OUT to a port, RDMSR of a synthetic MSR, GET_PARTITION_ID with its output in memory."""

END = 0xFF


def _mov_ecx(value: int) -> bytes:
    return b"\xb9" + struct.pack("<I", value)


def _mark(value: int) -> bytes:
    return bytes((0xB0, value, 0xE6, MARK_PORT))  # mov al, value; out MARK_PORT, al


def _loop(count: int, body: bytes) -> bytes:
    # mov r15d, count; body; dec r15d; jnz body
    distance = len(body) + 3 + 2
    return (
        b"\x41\xbf"
        + struct.pack("<I", count)
        + body
        + b"\x41\xff\xcf"
        + b"\x75"
        + struct.pack("<b", -distance)
    )


def _body(kind: str) -> bytes:
    if kind == "io":
        return bytes((0xE6, _SILENT_PORT))  # out port, al
    if kind == "msr":
        return _mov_ecx(msrs.VP_INDEX) + b"\x0f\x32"  # rdmsr
    # mov ecx, code; xor edx, edx; mov r8d, output; out port, eax
    output = b"\x41\xb8" + struct.pack("<I", _OUTPUT_GPA)
    return _mov_ecx(hypercalls.GET_PARTITION_ID) + b"\x31\xd2" + output + bytes((0xE7, HYPERCALL_PORT))


def code(count: int) -> bytes:
    """The guest's instructions: `count` exits of every kind."""
    # A guest must say what it is before it may make hypercalls: wrmsr GUEST_OS_ID.
    text = (
        _mov_ecx(msrs.GUEST_OS_ID)
        + b"\x31\xc0"
        + b"\xba"
        + struct.pack("<I", _OPEN_SOURCE_OS_ID)
        + b"\x0f\x30"
    )
    for number, kind in enumerate(KINDS):
        # a few before the mark: what a kind's first exits build stays out of the account
        text += _loop(20, _body(kind)) + _mark(2 * number) + _loop(count, _body(kind)) + _mark(2 * number + 1)
    return text + _mark(END) + b"\xf4\xeb\xfd"  # hlt; jmp to it


def elf_image(count: int) -> bytes:
    """An ELF file that `boot.kernel` accepts: one segment of code, and zeroed memory behind it."""
    text = code(count)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, _LOAD_GPA, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 1, 7, 4096, _LOAD_GPA, _LOAD_GPA, len(text), 0x20000, 4096)
    return (header + segment).ljust(4096, b"\0") + text
