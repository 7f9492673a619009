# SPDX-License-Identifier: Apache-2.0
"""A small AML encoder: just the terms that a fixed description of the computer needs.

Every function returns encoded bytes; terms nest by concatenation. Source: ACPI 6.5, chapter 20 (ACPI Machine
Language) and 6.4 (resource data types).
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

RETURN_ARG3: Final = b"\xa4\x6b"
"""Method body that returns its fourth argument as it came."""

LOCAL0: Final = b"\x60"
LOCAL1: Final = b"\x61"

_NAME_OP = b"\x08"
_BUFFER_OP = b"\x11"
_PACKAGE_OP = b"\x12"
_METHOD_OP = b"\x14"
_SCOPE_OP = b"\x10"
_DEVICE_OP = b"\x5b\x82"
_END_TAG = b"\x79\x00"  # a zero checksum byte means "not checked" (6.4.2.9)

_RESOURCE_MEMORY, _RESOURCE_IO, _RESOURCE_BUS = 0, 1, 2
# General flags of an address space descriptor: minimum and maximum fixed, producer, positive decode.
_FIXED = 0x0C


def pkg_length(content: bytes) -> bytes:
    """PkgLength in front of ``content``; the length counts itself (20.2.4)."""
    size = len(content) + 1
    if size < 0x40:
        return bytes((size,))
    for extra in (1, 2, 3):
        size = len(content) + 1 + extra
        if size < 1 << (4 + 8 * extra):
            return bytes((extra << 6 | size & 0xF,)) + (size >> 4).to_bytes(extra, "little")
    raise ValueError(f"an AML package of {len(content)} bytes is too long")


def integer(value: int) -> bytes:
    """Integer constant in its shortest form (20.2.3)."""
    if value in (0, 1):
        return bytes((value,))
    for prefix, size in ((b"\x0a", 1), (b"\x0b", 2), (b"\x0c", 4), (b"\x0e", 8)):
        if value < 1 << (8 * size):
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} does not fit an AML integer")


def string(text: str) -> bytes:
    """ASCII string constant."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A seven-character EISA identifier such as ``PNP0A08`` as the compressed integer of 19.3.4."""
    first, second, third = (ord(letter) - 0x40 for letter in text[:3])
    value = first << 26 | second << 21 | third << 16 | int(text[3:], 16)
    return b"\x0c" + value.to_bytes(4, "big")


def buffer(content: bytes) -> bytes:
    """Buffer constant."""
    body = integer(len(content)) + content
    return _BUFFER_OP + pkg_length(body) + body


def package(*elements: bytes) -> bytes:
    """Package of encoded elements."""
    body = bytes((len(elements),)) + b"".join(elements)
    return _PACKAGE_OP + pkg_length(body) + body


def name(segment: str, value: bytes) -> bytes:
    """Name(segment, value); ``segment`` is a four-character name, ``\\`` in front makes it absolute."""
    return _NAME_OP + segment.encode("ascii") + value


def scope(path: str, *terms: bytes) -> bytes:
    """Scope(path) around ``terms``; a single segment, ``\\`` in front makes it absolute."""
    body = path.encode("ascii") + b"".join(terms)
    return _SCOPE_OP + pkg_length(body) + body


def device(segment: str, *terms: bytes) -> bytes:
    """Device(segment) around ``terms``."""
    body = segment.encode("ascii") + b"".join(terms)
    return _DEVICE_OP + pkg_length(body) + body


def method(segment: str, arguments: int, body: bytes) -> bytes:
    """Method(segment, arguments, NotSerialized)."""
    content = segment.encode("ascii") + bytes((arguments,)) + body
    return _METHOD_OP + pkg_length(content) + content


def path(*segments: str) -> bytes:
    """An absolute name of two or more segments; alone, it calls a method without arguments (20.2.2, 20.2.5.4)."""
    prefix = b"\x2e" if len(segments) == 2 else b"\x2f" + bytes((len(segments),))
    return b"\\" + prefix + "".join(segments).encode("ascii")


def io_region(segment: str, port: int, length: int) -> bytes:
    """OperationRegion(segment, SystemIO, port, length)."""
    return b"\x5b\x80" + segment.encode("ascii") + b"\x01" + integer(port) + integer(length)


def dword_fields(region: str, *segments: str) -> bytes:
    """Field(region, DWordAcc, NoLock, WriteAsZeros) with 32-bit fields one behind the other."""
    body = region.encode("ascii") + b"\x43" + b"".join(one.encode("ascii") + b"\x20" for one in segments)
    return b"\x5b\x81" + pkg_length(body) + body


def store(source: bytes, target: bytes) -> bytes:
    """Store(source, target)."""
    return b"\x70" + source + target


def both(first: bytes, second: bytes) -> bytes:
    """And(first, second)."""
    return b"\x7b" + first + second + b"\0"


def when(condition: bytes, terms: bytes) -> bytes:
    """If (condition) { terms }."""
    body = condition + terms
    return b"\xa0" + pkg_length(body) + body


def notify(segment: str, value: int) -> bytes:
    """Notify(segment, value)."""
    return b"\x86" + segment.encode("ascii") + integer(value)


def resource_template(*items: bytes) -> bytes:
    """ResourceTemplate: a buffer of resource descriptors with its end tag."""
    return buffer(b"".join(items) + _END_TAG)


def io(base: int, length: int) -> bytes:
    """IO(Decode16): fixed ports (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def irq(line: int) -> bytes:
    """IRQNoFlags: an edge-triggered, active-high ISA interrupt (6.4.2.1)."""
    return struct.pack("<BH", 0x22, 1 << line)


def bus_range(first: int, last: int) -> bytes:
    """WordBusNumber: buses behind a host bridge (6.4.3.5.3)."""
    return _word(_RESOURCE_BUS, 0, first, last)


def io_window(base: int, length: int) -> bytes:
    """WordIO: ports that a host bridge decodes for its bus (6.4.3.5.3), the entire range."""
    return _word(_RESOURCE_IO, 3, base, base + length - 1)


def memory32_window(base: int, length: int) -> bytes:
    """DWordMemory: non-cacheable, read-write addresses of a host bridge (6.4.3.5.2)."""
    content = struct.pack("<BBBIIIII", _RESOURCE_MEMORY, _FIXED, 1, 0, base, base + length - 1, 0, length)
    return b"\x87" + struct.pack("<H", len(content)) + content


def memory64_window(base: int, length: int) -> bytes:
    """QWordMemory: as :func:`memory32_window`, anywhere in the address space (6.4.3.5.1)."""
    content = struct.pack("<BBBQQQQQ", _RESOURCE_MEMORY, _FIXED, 1, 0, base, base + length - 1, 0, length)
    return b"\x8a" + struct.pack("<H", len(content)) + content


def memory32_fixed(base: int, length: int) -> bytes:
    """Memory32Fixed: a read-write range that the device itself uses (6.4.3.4)."""
    return b"\x86" + struct.pack("<HBII", 9, 1, base, length)


def _word(kind: int, type_flags: int, first: int, last: int) -> bytes:
    content = struct.pack("<BBBHHHHH", kind, _FIXED, type_flags, 0, first, last, 0, last - first + 1)
    return b"\x88" + struct.pack("<H", len(content)) + content
