# SPDX-License-Identifier: Apache-2.0
"""Intercept messages, from bytes at the offsets that the headers give."""

from __future__ import annotations

import struct

import pytest

from rootvisor.mshv import (
    WRITE,
    ApicEoi,
    Cpuid,
    ExceptionIntercept,
    Halt,
    Hypercall,
    InterruptionDeliverable,
    InvalidRegister,
    IoPort,
    MemoryAccess,
    Message,
    Msr,
    Segment,
    SintDeliverable,
    Sipi,
    UnrecoverableException,
    UnsupportedFeature,
    messages,
)


def message(kind: int, **parts: bytes) -> bytes:
    """256 bytes with ``parts`` at ``at_OFFSET`` of the payload, behind a plausible header."""
    payload = bytearray(240)
    payload[0:40] = struct.pack("<IBBHQIHHQQ", 2, 0x53, WRITE, 0x1017, 0, 0xFFFFF, 8, 0xA09B, 0x1234, 0x246)
    for name, data in parts.items():
        at = int(name.removeprefix("at_"))
        payload[at : at + len(data)] = data
    return struct.pack("<IBBHQ", kind, 240, 0, 0, 77) + payload


def test_header_of_an_intercept() -> None:
    halt = messages.decode(message(0x80010007))
    assert isinstance(halt, Halt)
    assert (halt.vp_index, halt.instruction_length, halt.cr8, halt.access) == (2, 3, 5, WRITE)
    assert (halt.rip, halt.rflags, halt.cs) == (0x1234, 0x246, Segment(0, 0xFFFFF, 8, 0xA09B))
    assert (halt.cpl, halt.protected_mode, halt.long_mode) == (3, True, True)
    assert (halt.interruption_pending, halt.interrupt_shadow) == (False, True)


@pytest.mark.parametrize(("kind", "mapped"), [(0x80000000, False), (0x80000001, True)])
def test_memory_access(kind: int, mapped: bool) -> None:
    raw = message(
        kind,
        at_40=struct.pack("<IBBB", 6, 3, 3, 9),
        at_48=struct.pack("<QQ", 0xFFFF_8000_0000_0123, 0xD000_0123),
        at_64=b"\x88\x07\xc3\xff",
    )
    one = messages.decode(raw)
    assert isinstance(one, MemoryAccess)
    assert (one.mapped, one.gva, one.gpa) == (mapped, 0xFFFF_8000_0000_0123, 0xD000_0123)
    assert (one.instruction, one.gva_is_gpa, one.tpr_priority) == (b"\x88\x07\xc3", True, 9)


def test_memory_access_with_unknown_gva() -> None:
    one = messages.decode(message(0x80000000, at_48=b"\xff" * 8))
    assert isinstance(one, MemoryAccess)
    assert one.gva is None


def test_io_port() -> None:
    raw = message(
        0x80010000,
        at_40=struct.pack("<HBB", 0x3F8, 2 | 8 | 16, 2),
        at_48=struct.pack("<Q", 0x1122_3344_5566_7788),
        at_56=b"\x66\x6f\x00",
        at_72=struct.pack("<QIHH", 1, 2, 3, 4),
        at_88=struct.pack("<QIHH", 5, 6, 7, 8),
        at_104=struct.pack("<QQQ", 10, 11, 12),
    )
    one = messages.decode(raw)
    assert isinstance(one, IoPort)
    assert (one.port, one.size, one.string, one.rep, one.write) == (0x3F8, 2, True, True, True)
    assert (one.value, one.instruction) == (0x7788, b"\x66\x6f")
    assert (one.ds, one.es) == (Segment(1, 2, 3, 4), Segment(5, 6, 7, 8))
    assert (one.rcx, one.rsi, one.rdi) == (10, 11, 12)
    assert "port=0x3f8" in repr(one)


def test_msr() -> None:
    raw = message(
        0x80010001,
        at_40=struct.pack("<I", 0xC000_0080),
        at_48=struct.pack("<QQ", (7 << 32) | 1, (9 << 32) | 2),
    )
    one = messages.decode(raw)
    assert isinstance(one, Msr)
    assert (one.number, one.value, one.write) == (0xC000_0080, 1 << 32 | 2, True)


def test_cpuid() -> None:
    one = messages.decode(message(0x80010002, at_40=struct.pack("<8Q", *range(8))))
    assert isinstance(one, Cpuid)
    assert (one.rax, one.rcx, one.rdx, one.rbx) == (0, 1, 2, 3)
    assert one.defaults == (4, 7, 5, 6)


def test_exception() -> None:
    raw = message(0x80010003, at_40=struct.pack("<HBBIQ", 14, 1, 2, 5, 0xDEAD), at_64=b"\x90\x90\x90")
    one = messages.decode(raw)
    assert isinstance(one, ExceptionIntercept)
    assert (one.vector, one.error_code, one.parameter, one.instruction) == (14, 5, 0xDEAD, b"\x90\x90")
    assert not one.software
    other = messages.decode(message(0x80010003, at_40=struct.pack("<HBBIQ", 3, 2, 0, 5, 0)))
    assert isinstance(other, ExceptionIntercept)
    assert (other.error_code, other.software) == (None, True)


def test_hypercall() -> None:
    one = messages.decode(message(0x80000050, at_40=struct.pack("<7Q", *range(7)), at_96=b"\xab" * 96))
    assert isinstance(one, Hypercall)
    assert (one.rax, one.rbx, one.rcx, one.rdx, one.r8, one.rsi, one.rdi) == tuple(range(7))
    assert one.xmm == b"\xab" * 96


def test_messages_without_a_header() -> None:
    eoi = messages.decode(message(0x80010004, at_0=struct.pack("<II", 3, 0x41)))
    assert isinstance(eoi, ApicEoi)
    assert (eoi.vp_index, eoi.vector) == (3, 0x41)
    assert isinstance(messages.decode(message(0x80000020)), InvalidRegister)
    missing = messages.decode(message(0x80000022, at_0=struct.pack("<IIQ", 1, 2, 3)))
    assert isinstance(missing, UnsupportedFeature)
    assert (missing.code, missing.parameter) == (2, 3)


def test_other_intercepts() -> None:
    assert isinstance(messages.decode(message(0x80000021)), UnrecoverableException)
    sipi = messages.decode(message(0x80010009, at_40=struct.pack("<II", 1, 0x9A)))
    assert isinstance(sipi, Sipi)
    assert (sipi.target, sipi.vector) == (1, 0x9A)
    sint = messages.decode(message(0x80000062, at_40=struct.pack("<H", 4)))
    assert isinstance(sint, SintDeliverable)
    assert sint.sints == 4
    interrupt = messages.decode(message(0x80010008, at_40=struct.pack("<I", 2)))
    assert isinstance(interrupt, InterruptionDeliverable)
    assert interrupt.kind == 2


def test_unknown_message_is_plain() -> None:
    one = messages.decode(message(0x12345))
    assert type(one) is Message
    assert one.type == 0x12345
    assert len(one.payload) == 240


def test_decoded_message_does_not_change_with_the_buffer() -> None:
    buffer = bytearray(message(0x80010007))
    one = messages.decode(buffer)
    buffer[:] = bytes(256)
    assert isinstance(one, Halt)
    assert one.rip == 0x1234
    assert one.vp_index == 2
