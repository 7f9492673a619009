# SPDX-License-Identifier: Apache-2.0
"""The programs that the bench runs in guests, as machine code: a first user space, and loops of exits.

Bytes instead of a compiler: both programs are a few instructions, and a machine without gcc can still measure boots.
"""

from __future__ import annotations

import struct

from rootvisor.boot.cpio import CpioWriter
from rootvisor.hypervisor.hypercall_abi import PAGE_CODE

MARKER = b"rv:up"
"""What the first user space prints; `quiet` kernels print nothing like it. Short, because a byte on the serial port
is an exit."""

_INIT_BASE = 0x400000
_ELF_HEADERS = 64 + 56

RAM = 0x200000
"""Bytes of memory of the exit loop's machine, at GPA 0."""

HYPERCALL_GPA = 0x100000
"""Where the hypercall page of the exit loop's machine lies."""

ENTRY = 0x4000
STACK = 0x7F00
PAGE_TABLE = 0x1000
_OUTPUT = 0x6000

MARK_PORT = 0xE4
DATA_PORT = 0xE8
_MSR_VP_INDEX = 0x40000002
_CALL_GET_PARTITION_ID = 0x46

KINDS = ("io", "msr", "hypercall")
"""What the loop measures between two marks, in this order; mark `len(KINDS)` ends a round, END_MARK everything."""

END_MARK = 0xFF


def init_program() -> bytes:
    """A static ELF program: write the marker to standard output, wait until it is out, power off."""
    text = MARKER + b"\n"
    number = struct.pack
    drain_and_off = (
        # ioctl(1, TCSBRK, 1) is tcdrain: a serial port's queue would be lost with the power
        b"\xb8" + number("<I", 16) + b"\xbf" + number("<I", 1) + b"\xbe" + number("<I", 0x5409)
        + b"\xba" + number("<I", 1) + b"\x0f\x05"
        # reboot(LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF)
        + b"\xb8" + number("<I", 169) + b"\xbf" + number("<I", 0xFEE1DEAD) + b"\xbe" + number("<I", 672274793)
        + b"\xba" + number("<I", 0x4321FEDC) + b"\x0f\x05"
        + b"\xeb\xfe"
    )  # fmt: skip
    # write(1, text, len(text)); the text lies behind the code
    after_lea = b"\xba" + number("<I", len(text)) + b"\x0f\x05" + drain_and_off
    code = b"\xb8" + number("<I", 1) + b"\xbf" + number("<I", 1)
    code += b"\x48\x8d\x35" + number("<i", len(after_lea)) + after_lea + text
    size = _ELF_HEADERS + len(code)
    entry = _INIT_BASE + _ELF_HEADERS
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + number("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = number("<IIQQQQQQ", 1, 5, 0, _INIT_BASE, _INIT_BASE, size, size, 0x1000)
    return header + segment + code


def initramfs() -> bytes:
    """The archive around `init_program`, the same for both sides."""
    archive = CpioWriter()
    archive.character_device("/dev/console", 5, 1)
    archive.directory("/root")
    archive.file("/init", init_program(), 0o755)
    return archive.finish()


def exit_loop(rounds: int, count: int) -> bytes:
    """64-bit code: `rounds` times, `count` exits of each kind with a mark before each kind and one at the end."""

    def mark(value: int) -> bytes:
        return b"\xb0" + bytes([value]) + b"\xe6" + bytes([MARK_PORT])  # mov al, value; out MARK_PORT, al

    def loop(body: bytes) -> bytes:
        body += b"\x41\xff\xce"  # dec r14d
        return b"\x41\xbe" + struct.pack("<I", count) + body + b"\x75" + struct.pack("b", -len(body) - 2)

    call = (
        b"\xb9" + struct.pack("<I", _CALL_GET_PARTITION_ID)  # mov ecx, control word
        + b"\x31\xd2"  # xor edx, edx
        + b"\x41\xb8" + struct.pack("<I", _OUTPUT)  # mov r8d, GPA of the output
        + b"\xff\xd3"  # call rbx
    )  # fmt: skip
    body = mark(0) + loop(b"\xe6" + bytes([DATA_PORT]))
    body += mark(1) + b"\xb9" + struct.pack("<I", _MSR_VP_INDEX) + loop(b"\x0f\x32")
    body += mark(2) + loop(call)
    body += mark(3) + b"\x41\xff\xcf"  # dec r15d
    start = b"\xbb" + struct.pack("<I", HYPERCALL_GPA) + b"\x41\xbf" + struct.pack("<I", rounds)
    again = b"\x0f\x85" + struct.pack("<i", -len(body) - 6)
    return start + body + again + mark(END_MARK) + b"\xeb\xfe"


def exit_image(rounds: int, count: int) -> bytes:
    """The whole memory of the exit loop's machine: page tables (2 MiB, one to one), code, hypercall page."""
    image = bytearray(RAM)
    struct.pack_into("<Q", image, PAGE_TABLE, PAGE_TABLE + 0x1003)
    struct.pack_into("<Q", image, PAGE_TABLE + 0x1000, PAGE_TABLE + 0x2003)
    struct.pack_into("<Q", image, PAGE_TABLE + 0x2000, 0x83)
    code = exit_loop(rounds, count)
    image[ENTRY : ENTRY + len(code)] = code
    image[HYPERCALL_GPA : HYPERCALL_GPA + len(PAGE_CODE)] = PAGE_CODE
    return bytes(image)
