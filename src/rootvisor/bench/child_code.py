# SPDX-License-Identifier: Apache-2.0
"""The guest that the bench of children runs in a child partition and on bare KVM, as machine code.

64-bit code with page tables of its own (2 MiB pages, the first GiB one to one), interrupts by the local APIC in x2APIC
mode. A mark (a byte to MARK_PORT) opens each kind of event, the next mark closes it.
"""

from __future__ import annotations

import struct

IMAGE_BYTES = 0x10000
"""What lies in the first pages of the guest's memory; the rest of RAM_BYTES is empty."""

RAM_BYTES = 2 << 20
FRESH_GPA = 0x1000_0000
"""Memory that nobody has touched when the guest gets there; FRESH_BYTES of it."""

FRESH_BYTES = 256 << 20
MMIO_GPA = 0x2000_0000
"""Nothing is mapped there."""

DOORBELL_GPA = 0x2000_1000
SEEN_GPA = 0x8000
"""Where the VMM counts the doorbells it has seen (u64)."""

TAKEN_GPA = 0x8008
"""Where the guest counts the interrupts it has taken (u64)."""

PAGE_TABLE = 0x1000
ENTRY = 0x4000
GDT = 0x5000
STACK = 0x7F00
_IDT = 0x6000
_IDT_POINTER = 0x5100
_GDT_POINTER = 0x5110
_HANDLER = 0x4800

VECTOR = 0x40
MARK_PORT = 0xE4
DATA_PORT = 0xE8

KINDS = ("port", "port_hypercall", "mmio", "doorbell", "irqfd", "fault_in")
"""Mark n opens the events of `KINDS[n]`. `port_hypercall` are the same writes to a port; there the VMM sets RIP with a
hypercall, and not in the register page."""

END_MARK = len(KINDS)

_CODE_SELECTOR = 8


def _loop(count: int, body: bytes) -> bytes:
    """`count` turns; R14 counts down."""
    body += b"\x49\xff\xce"  # dec r14
    return b"\x41\xbe" + struct.pack("<I", count) + body + b"\x0f\x85" + struct.pack("<i", -len(body) - 6)


def _mark(value: int) -> bytes:
    return b"\xb0" + bytes([value]) + b"\xe6" + bytes([MARK_PORT])


def _number(value: int) -> bytes:
    return struct.pack("<I", value)


def program(count: int) -> bytes:
    """The code at ENTRY; the first instructions are mark 0."""
    mmio_and_doorbell = (
        b"\xbb" + _number(MMIO_GPA)  # mov ebx, MMIO_GPA
        + b"\xbe" + _number(DOORBELL_GPA)  # mov esi, DOORBELL_GPA
        + b"\xbf" + _number(SEEN_GPA)  # mov edi, SEEN_GPA
        + b"\x45\x31\xff"  # xor r15d, r15d
    )  # fmt: skip
    ring = (
        b"\x49\xff\xc7"  # inc r15
        + b"\x89\x06"  # mov [rsi], eax
        + b"\xf3\x90"  # pause
        + b"\x4c\x39\x3f"  # cmp [rdi], r15
        + b"\x72\xf9"  # jb to the pause
    )
    x2apic = (
        b"\x0f\x01\x14\x25" + _number(_GDT_POINTER)  # lgdt
        + b"\x0f\x01\x1c\x25" + _number(_IDT_POINTER)  # lidt
        + b"\xb9" + _number(0x1B) + b"\x0f\x32\x0d" + _number(0xC00) + b"\x0f\x30"  # APIC_BASE |= EN, EXTD
        + b"\xb9" + _number(0x80F) + b"\xb8" + _number(0x1FF) + b"\x31\xd2\x0f\x30"  # SVR: enabled
    )  # fmt: skip
    taken = b"\x48\x81\x3c\x25" + _number(TAKEN_GPA) + _number(count)  # cmp qword [TAKEN_GPA], count
    # cli; all taken? then on; sti; hlt; again
    wait = b"\xfa" + taken + b"\x73\x04" + b"\xfb\xf4"
    wait += b"\xeb" + struct.pack("b", -len(wait) - 2)
    touch = _loop(
        FRESH_BYTES >> 12,
        b"\x88\x03"  # mov [rbx], al
        + b"\x48\x81\xc3" + _number(4096),  # add rbx, 4096
    )  # fmt: skip
    return (
        _mark(0) + _loop(count, b"\xe6" + bytes([DATA_PORT]))
        + _mark(1) + _loop(count, b"\xe6" + bytes([DATA_PORT]))
        + mmio_and_doorbell
        + _mark(2) + _loop(count, b"\x89\x03")  # mov [rbx], eax
        + _mark(3) + _loop(count, ring)
        + x2apic
        + _mark(4) + wait
        + b"\xbb" + _number(FRESH_GPA)
        + _mark(5) + touch
        + _mark(END_MARK) + b"\xfa\xf4\xeb\xfc"
    )  # fmt: skip


def idle_program() -> bytes:
    """The code of a guest that does nothing: one mark, then HLT with interrupts off."""
    return _mark(0) + b"\xfa\xf4\xeb\xfc"


def _handler() -> bytes:
    """The interrupt: count it, end it."""
    return (
        b"\x50\x51\x52"  # push rax, rcx, rdx
        + b"\x48\xff\x04\x25" + _number(TAKEN_GPA)  # inc qword [TAKEN_GPA]
        + b"\xb9" + _number(0x80B) + b"\x31\xc0\x31\xd2\x0f\x30"  # EOI
        + b"\x5a\x59\x58\x48\xcf"  # pop; iretq
    )  # fmt: skip


def image(code: bytes) -> bytes:
    """The first IMAGE_BYTES of the guest's memory, with `code` at ENTRY."""
    memory = bytearray(IMAGE_BYTES)
    put = struct.pack_into
    put("<Q", memory, PAGE_TABLE, PAGE_TABLE + 0x1003)
    put("<Q", memory, PAGE_TABLE + 0x1000, PAGE_TABLE + 0x2003)
    for number in range(512):
        put("<Q", memory, PAGE_TABLE + 0x2000 + number * 8, number << 21 | 0x83)
    memory[ENTRY : ENTRY + len(code)] = code
    handler = _handler()
    memory[_HANDLER : _HANDLER + len(handler)] = handler
    # null, 64-bit code, data
    put("<3Q", memory, GDT, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
    put("<HQ", memory, _GDT_POINTER, 3 * 8 - 1, GDT)
    put("<HHBBHI", memory, _IDT + VECTOR * 16, _HANDLER & 0xFFFF, _CODE_SELECTOR, 0, 0x8E, _HANDLER >> 16, 0)
    put("<HQ", memory, _IDT_POINTER, (VECTOR + 1) * 16 - 1, _IDT)
    return bytes(memory)
