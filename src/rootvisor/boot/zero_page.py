# SPDX-License-Identifier: Apache-2.0
"""The Linux/x86 zero page (``struct boot_params``) and the set-up data nodes that hang from it.

Sources: kernel ``Documentation/arch/x86/zero-page.rst``, ``boot.rst`` and
``arch/x86/include/uapi/asm/bootparam.h``.
"""

from __future__ import annotations

import struct

from .errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

    from .initrd import Initrd
    from .kernel import LoadedKernel

E820_RAM: Final = 1
E820_RESERVED: Final = 2
E820_ACPI: Final = 3
E820_NVS: Final = 4

E820_MAX_ENTRIES: Final = 128
"""Entries that fit in boot_params (``E820_MAX_ENTRIES_ZEROPAGE``)."""
ZERO_PAGE_SIZE: Final = 4096
"""Bytes of ``struct boot_params``."""
COMMAND_LINE_MAX: Final = 2047
"""Bytes of command line, without the final zero, that x86 Linux keeps (``COMMAND_LINE_SIZE`` - 1)."""
SETUP_DATA_HEADER_SIZE: Final = 16
"""Bytes in front of a set-up data node's content: u64 next GPA, u32 type, u32 content length."""
SETUP_NONE: Final = 0
"""Type of a node without meaning. Linux still reserves its memory for ever, which is how a block of RAM is
kept for pages that the hypervisor owns (kernel
``arch/x86/kernel/setup.c:memblock_x86_reserve_range_setup_data``)."""

# boot_params offsets
_ACPI_RSDP_ADDR = 0x070
_EXT_RAMDISK_IMAGE = 0x0C0
_EXT_RAMDISK_SIZE = 0x0C4
_EXT_CMD_LINE_PTR = 0x0C8
_E820_ENTRIES = 0x1E8
_SETUP_HEADER = 0x1F1
_BOOT_FLAG = 0x1FE
_MAGIC = 0x202
_PROTOCOL = 0x206
_TYPE_OF_LOADER = 0x210
_LOADFLAGS = 0x211
_RAMDISK_IMAGE = 0x218
_RAMDISK_SIZE = 0x21C
_CMD_LINE_PTR = 0x228
_INITRD_ADDR_MAX = 0x22C
_KERNEL_ALIGNMENT = 0x230
_RELOCATABLE = 0x234
_XLOADFLAGS = 0x236
_CMDLINE_SIZE = 0x238
_SETUP_DATA = 0x250
_PREF_ADDRESS = 0x258
_INIT_SIZE = 0x260
_HEADER_END = 0x290  # edd_mbr_sig_buffer: a header must not run into it
_E820_TABLE = 0x2D0

_LOADER_UNDEFINED = 0xFF  # type_of_loader without a registered number
_LOADED_HIGH = 0x01
_KEEP_SEGMENTS = 0x40
_CAN_USE_HEAP = 0x80
_INITRD_ADDR_MAX_DEFAULT = 0x7FFFFFFF

_E820 = struct.Struct("<QQI")
_NODE = struct.Struct("<QII")
_MIB = 1 << 20


class CommandLineError(BootError):
    """The kernel command line is longer than the kernel keeps, or holds a zero byte."""


def initrd_limit(kernel: LoadedKernel, low_ram_end: int) -> int:
    """Highest GPA (exclusive) at which ``kernel`` finds a ramdisk, at most the end of the RAM below 4 GiB."""
    maximum = _INITRD_ADDR_MAX_DEFAULT
    if kernel.setup_header is not None:
        maximum = _header_u32(kernel.setup_header, _INITRD_ADDR_MAX) or maximum
        if _header_u16(kernel.setup_header, _XLOADFLAGS) & 0x2:  # XLF_CAN_BE_LOADED_ABOVE_4G: no limit at all
            maximum = low_ram_end
    return min(maximum + 1, low_ram_end)


def command_line_max(kernel: LoadedKernel) -> int:
    """Bytes of command line, without the final zero, that ``kernel`` keeps."""
    if kernel.setup_header is None:
        return COMMAND_LINE_MAX
    return _header_u32(kernel.setup_header, _CMDLINE_SIZE) or 255


def write_setup_data(
    ram: memoryview, gpa: int, length: int, kind: int = SETUP_NONE, next_gpa: int = 0
) -> None:
    """Write the header of a node at ``gpa`` whose content is the ``length`` bytes behind it."""
    _NODE.pack_into(ram, gpa, next_gpa, kind, length)


def write_zero_page(
    ram: memoryview,
    gpa: int,
    kernel: LoadedKernel,
    *,
    e820: Sequence[tuple[int, int, int]],
    cmdline: bytes,
    cmdline_gpa: int,
    initrd: Initrd | None = None,
    rsdp_gpa: int = 0,
    setup_data_gpa: int = 0,
) -> None:
    """Write boot_params at ``gpa`` and the command line at ``cmdline_gpa`` (zero-terminated) into ``ram``.

    ``e820`` lists (base, bytes, type); ``setup_data_gpa`` is the first node of a chain, or 0. Raises
    :class:`CommandLineError`.
    """
    limit = command_line_max(kernel)
    if len(cmdline) > limit:
        raise CommandLineError(
            f"the kernel command line has {len(cmdline)} bytes, the kernel keeps {limit}; shorten --append"
        )
    if b"\0" in cmdline:
        raise CommandLineError("the kernel command line holds a zero byte; check --append")
    if len(e820) > E820_MAX_ENTRIES:
        raise ValueError(f"{len(e820)} e820 entries, at most {E820_MAX_ENTRIES} fit")
    page = bytearray(ZERO_PAGE_SIZE)
    header = kernel.setup_header
    if header is not None:
        header = header[: _HEADER_END - _SETUP_HEADER]
        page[_SETUP_HEADER : _SETUP_HEADER + len(header)] = header
    else:
        _describe_elf(page, kernel)
    page[_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    # No real-mode code runs: segments are ours, and there is no heap for it.
    page[_LOADFLAGS] = (page[_LOADFLAGS] | _LOADED_HIGH | _KEEP_SEGMENTS) & ~_CAN_USE_HEAP
    _split(page, _CMD_LINE_PTR, _EXT_CMD_LINE_PTR, cmdline_gpa)
    if initrd is not None:
        _split(page, _RAMDISK_IMAGE, _EXT_RAMDISK_IMAGE, initrd.gpa)
        _split(page, _RAMDISK_SIZE, _EXT_RAMDISK_SIZE, initrd.size)
    struct.pack_into("<Q", page, _ACPI_RSDP_ADDR, rsdp_gpa)
    struct.pack_into("<Q", page, _SETUP_DATA, setup_data_gpa)
    page[_E820_ENTRIES] = len(e820)
    for index, (base, size, kind) in enumerate(e820):
        _E820.pack_into(page, _E820_TABLE + index * _E820.size, base, size, kind)
    ram[cmdline_gpa : cmdline_gpa + len(cmdline) + 1] = cmdline + b"\0"
    ram[gpa : gpa + ZERO_PAGE_SIZE] = page


def _describe_elf(page: bytearray, kernel: LoadedKernel) -> None:
    """The header that a boot loader of ELF images has to make up itself; Linux checks only the magic and
    loader."""
    page[_BOOT_FLAG : _BOOT_FLAG + 2] = b"\x55\xaa"
    page[_MAGIC : _MAGIC + 4] = b"HdrS"
    struct.pack_into("<H", page, _PROTOCOL, 0x20F)
    struct.pack_into("<I", page, _INITRD_ADDR_MAX, _INITRD_ADDR_MAX_DEFAULT)
    struct.pack_into("<I", page, _KERNEL_ALIGNMENT, 2 * _MIB)
    page[_RELOCATABLE] = 0
    struct.pack_into("<I", page, _CMDLINE_SIZE, COMMAND_LINE_MAX)
    struct.pack_into("<Q", page, _PREF_ADDRESS, kernel.low_gpa)
    struct.pack_into("<I", page, _INIT_SIZE, kernel.end_gpa - kernel.low_gpa)


def _split(page: bytearray, low: int, high: int, value: int) -> None:
    struct.pack_into("<I", page, low, value & 0xFFFFFFFF)
    struct.pack_into("<I", page, high, value >> 32)


def _header_u16(header: bytes, offset: int) -> int:
    start = offset - _SETUP_HEADER
    return int.from_bytes(header[start : start + 2], "little")


def _header_u32(header: bytes, offset: int) -> int:
    start = offset - _SETUP_HEADER
    return int.from_bytes(header[start : start + 4], "little")
