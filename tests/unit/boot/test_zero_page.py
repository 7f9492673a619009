# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct

import pytest

from rootvisor.boot.initrd import Initrd
from rootvisor.boot.kernel import BZIMAGE, ELF, LoadedKernel
from rootvisor.boot.zero_page import (
    E820_RAM,
    E820_RESERVED,
    CommandLineError,
    initrd_limit,
    write_setup_data,
    write_zero_page,
)

GPA, CMDLINE_GPA = 0x7000, 0x20000
MAP = [(0, 0x9FC00, E820_RAM), (0xE0000, 0x20000, E820_RESERVED), (1 << 20, 511 << 20, E820_RAM)]


def header(initrd_max: int = 0x7FFFFFFF, cmdline_max: int = 2047) -> bytes:
    page = bytearray(0x270)
    page[0x202:0x206] = b"HdrS"
    page[0x211] = 0x81
    struct.pack_into("<I", page, 0x22C, initrd_max)
    struct.pack_into("<I", page, 0x238, cmdline_max)
    return bytes(page[0x1F1:0x26C])


def kernel(setup_header: bytes | None) -> LoadedKernel:
    kind = ELF if setup_header is None else BZIMAGE
    return LoadedKernel(0x1000200, kind, setup_header, 0x1000000, 0x2000000, None)


def build(loaded: LoadedKernel) -> memoryview:
    ram = memoryview(bytearray(1 << 20))
    write_zero_page(
        ram,
        GPA,
        loaded,
        e820=MAP,
        cmdline=b"console=hvc0",
        cmdline_gpa=CMDLINE_GPA,
        initrd=Initrd(0x1_3000_0000, 0x5000),
        rsdp_gpa=0xE0000,
        setup_data_gpa=0x200000,
    )
    return ram


@pytest.mark.parametrize("setup_header", [header(), None], ids=["bzimage", "elf"])
def test_fields_that_linux_reads(setup_header: bytes | None) -> None:
    ram = build(kernel(setup_header))
    page = bytes(ram[GPA : GPA + 4096])

    def u32(offset: int) -> int:
        return int.from_bytes(page[offset : offset + 4], "little")

    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF
    assert page[0x211] & 0x81 == 0x01
    assert struct.unpack_from("<Q", page, 0x70) == (0xE0000,)
    assert (u32(0x218), u32(0xC0), u32(0x21C), u32(0xC4)) == (0x30000000, 1, 0x5000, 0)
    assert u32(0x228) == CMDLINE_GPA
    assert struct.unpack_from("<Q", page, 0x250) == (0x200000,)
    assert page[0x1E8] == 3
    assert page[0x1EF] == 0  # sentinel: not zero would make Linux clear our fields
    assert [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(3)] == MAP
    assert bytes(ram[CMDLINE_GPA : CMDLINE_GPA + 13]) == b"console=hvc0\0"


def test_long_command_line_is_refused_with_both_lengths() -> None:
    with pytest.raises(CommandLineError, match="has 11 bytes, the kernel keeps 10"):
        write_zero_page(
            memoryview(bytearray(1 << 20)),
            GPA,
            kernel(header(cmdline_max=10)),
            e820=MAP,
            cmdline=b"x" * 11,
            cmdline_gpa=CMDLINE_GPA,
        )


def test_initrd_limit_follows_header_and_memory() -> None:
    assert initrd_limit(kernel(header(initrd_max=0x37FFFFFF)), 1 << 30) == 0x38000000
    assert initrd_limit(kernel(header()), 1 << 30) == 1 << 30
    assert initrd_limit(kernel(None), 3 << 30) == 0x80000000


def test_setup_data_node_header() -> None:
    ram = memoryview(bytearray(0x4000))
    write_setup_data(ram, 0x1000, 0x2000, next_gpa=0x3000)
    assert struct.unpack_from("<QII", ram, 0x1000) == (0x3000, 0, 0x2000)
