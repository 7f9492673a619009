# SPDX-License-Identifier: Apache-2.0
"""Kernels by the Multiboot specification 0.6.96 (multiboot 1): ELF-32 images, and flat ones whose header has addresses.

Bare-metal test kernels are such files, kvm-unit-tests' ``*.flat`` among them.
"""

from __future__ import annotations

import os
import struct

from . import memory_map
from .errors import KernelImageError
from .initrd import load_initrd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .memory_map import MemoryMap

MAGIC = 0x1BADB002
#: EAX at the entry.
BOOTED = 0x2BADB002
_SEARCH = 8192
_FLAG_VIDEO, _FLAG_ADDRESSES = 1 << 2, 1 << 16
#: Flags of a header that a loader may not ignore, and that there is nothing for here.
_REQUIRED = 0xFFFF & ~3
_ELF_HEADER = struct.Struct("<HHIIIIIHHHHHH")
_ELF_PROGRAM = struct.Struct("<IIIIIIII")
_PT_LOAD = 1
_MAX_PROGRAM_HEADERS = 64

#: Where the information structure lies, and behind it the memory map, the module and the texts.
INFORMATION = 0x9000
_MAP, _MODULE, _TEXT, _TEXT_END = INFORMATION + 0x80, INFORMATION + 0x400, INFORMATION + 0x500, 0x10000
_INFO_MEMORY, _INFO_COMMAND_LINE, _INFO_MODULES, _INFO_MAP, _INFO_LOADER = 1, 4, 8, 64, 512
_INFORMATION = struct.Struct("<IIIIIII16xII12xI")
_LOADER_NAME = b"rootvisor\0"

#: Flat 32-bit segments: base, limit, selector, type, present, dpl, db, s, l, g, avl.
SEGMENTS = {
    "cs": (0, 0xFFFFFFFF, 0x08, 0xB, 1, 0, 1, 1, 0, 1, 0),
    **dict.fromkeys(("ds", "es", "fs", "gs", "ss"), (0, 0xFFFFFFFF, 0x10, 0x3, 1, 0, 1, 1, 0, 1, 0)),
    "tr": (0, 0x67, 0, 0xB, 1, 0, 0, 0, 0, 0, 0),
    "ldt": (0, 0, 0, 0x2, 1, 0, 0, 0, 0, 0, 0),
}
CR0 = 0x11
"""Protection on, paging off."""


class MultibootEntry:
    """State of the boot processor: ``rip``, EBX (the information structure); EAX is :data:`BOOTED`."""

    __slots__ = ("ebx", "rip")

    def __init__(self, rip: int, ebx: int) -> None:
        self.rip = rip
        self.ebx = ebx


def is_multiboot(path: str) -> bool:
    """Whether a file is a kernel that this module loads, and no other: False also for what cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(_SEARCH)
    except (OSError, ValueError):
        return False
    if head.startswith(b"\x7fELF") and head[4:5] != b"\1":
        return False
    return head[0x202:0x206] != b"HdrS" and _header(head) is not None


def _header(head: bytes) -> tuple[int, tuple[int, ...]] | None:
    """(offset, fields) of the header in a file's first bytes."""
    for at in range(0, min(len(head), _SEARCH) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", head, at)
        if magic == MAGIC and (magic + flags + checksum) & 0xFFFFFFFF == 0:
            count = 8 if flags & _FLAG_ADDRESSES else 3
            if at + count * 4 > len(head):
                return None
            return at, struct.unpack_from(f"<{count}I", head, at)
    return None


def load_multiboot(
    low: memoryview,
    layout: MemoryMap,
    *,
    kernel: str,
    modules: Sequence[str | bytes],
    command_line: str,
) -> MultibootEntry:
    """Puts kernel, information structure and the modules (one, if there are any) into ``low``, the RAM below 4 GiB.

    Raises :class:`~.errors.BootError` for files or sizes that do not work.
    """
    try:
        with open(kernel, "rb") as file:
            image = file.read()
    except OSError as error:
        raise KernelImageError(f"{kernel}: cannot read the kernel image: {error.strerror}") from error
    found = _header(image[:_SEARCH])
    if found is None:
        raise KernelImageError(f"{kernel}: has no multiboot header")
    at, header = found
    if header[1] & _REQUIRED & ~_FLAG_VIDEO:
        raise KernelImageError(f"{kernel}: wants what this loader does not have (flags {header[1]:#x})")
    if header[1] & _FLAG_ADDRESSES:
        rip, end = _load_flat(kernel, image, low, at, header)
    elif image.startswith(b"\x7fELF\1"):
        rip, end = _load_elf(kernel, image, low)
    else:
        raise KernelImageError(f"{kernel}: is no ELF-32 file, and its multiboot header has no addresses")
    flags = _INFO_MEMORY | _INFO_COMMAND_LINE | _INFO_MAP | _INFO_LOADER
    count = 0
    text = command_line.encode() + b"\0"
    if _TEXT + len(text) + len(_LOADER_NAME) > _TEXT_END:
        raise KernelImageError("the kernel's command line is too long; shorten --append")
    low[_TEXT : _TEXT + len(text)] = text
    name = _TEXT + len(text)
    low[name : name + len(_LOADER_NAME)] = _LOADER_NAME
    if modules:
        initrd = load_initrd(modules, low, end, layout.low)
        if initrd is not None:
            struct.pack_into("<IIII", low, _MODULE, initrd.gpa, initrd.gpa + initrd.size, _TEXT, 0)
            flags |= _INFO_MODULES
            count = 1
    entries = layout.e820()
    for index, (base, size, kind) in enumerate(entries):
        struct.pack_into("<IQQI", low, _MAP + index * 24, 20, base, size, kind)
    _INFORMATION.pack_into(
        low, INFORMATION, flags, memory_map.LOW_RESERVED >> 10, layout.low - memory_map.MIB >> 10, 0, _TEXT,
        count, _MODULE if count else 0, len(entries) * 24, _MAP, name,
    )  # fmt: skip
    return MultibootEntry(rip, INFORMATION)


def _load_flat(
    kernel: str, image: bytes, low: memoryview, at: int, header: tuple[int, ...]
) -> tuple[int, int]:
    """The header says where the file goes; (entry, end)."""
    _magic, _flags, _checksum, header_gpa, load, load_end, bss_end, entry = header
    start = at - (header_gpa - load)
    size = load_end - load if load_end else len(image) - start
    end = max(bss_end, load + size)
    if start < 0 or size < 0 or start + size > len(image) or load < memory_map.MIB or end > len(low):
        raise KernelImageError(f"{kernel}: its multiboot header has addresses that do not fit")
    low[load : load + size] = image[start : start + size]
    return entry, end


def _load_elf(kernel: str, image: bytes, low: memoryview) -> tuple[int, int]:
    """(entry, end)."""
    if len(image) < 16 + _ELF_HEADER.size:
        raise KernelImageError(f"{kernel}: the ELF file is cut off")
    fields = _ELF_HEADER.unpack_from(image, 16)
    entry, table, size, count = fields[3], fields[4], fields[8], fields[9]
    if size < _ELF_PROGRAM.size or count > _MAX_PROGRAM_HEADERS or table + size * count > len(image):
        raise KernelImageError(f"{kernel}: the ELF file has no usable program headers")
    end = 0
    for index in range(count):
        kind, offset, _virtual, gpa, in_file, in_memory, _flags, _align = _ELF_PROGRAM.unpack_from(
            image, table + index * size
        )
        if kind != _PT_LOAD or not in_memory:
            continue
        if offset + in_file > len(image) or in_file > in_memory:
            raise KernelImageError(f"{kernel}: the ELF file is cut off")
        if gpa < memory_map.MIB or gpa + in_memory > len(low):
            raise KernelImageError(
                f"{kernel}: wants memory at {gpa:#x} + {in_memory:#x}, which the partition does not have"
            )
        low[gpa : gpa + in_file] = image[offset : offset + in_file]
        end = max(end, gpa + in_memory)
    if not end:
        raise KernelImageError(f"{kernel}: the ELF file has nothing to load")
    return entry, end


def name_of(path: str) -> str:
    """The first word of a kernel's command line, which is its own name."""
    return os.path.basename(path).replace(" ", "_") or "kernel"
