# SPDX-License-Identifier: Apache-2.0
"""A kernel in a computer's RAM with what it finds there."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rootvisor.boot import memory_map
from rootvisor.boot.acpi import AcpiConfig
from rootvisor.boot.errors import BootError
from rootvisor.boot.linux import load_linux
from rootvisor.boot.memory_map import MemoryMap

ACPI = AcpiConfig(apic_ids=[0], serial=None)


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    """An ELF-64 kernel of one instruction at 1 MiB."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 2, 62, 1, 0x100000, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0x1000, 0x100000, 0x100000, 1, 1, 0x1000)
    path = tmp_path / "vmlinux"
    path.write_bytes((header + segment).ljust(0x1000, b"\0") + b"\xf4")
    return str(path)


def test_kernel_ramdisk_tables_and_command_line_are_where_the_zero_page_says(kernel: str) -> None:
    layout = MemoryMap(64 << 20, 40)
    low = memoryview(bytearray(layout.low))
    entry = load_linux(
        low, layout, kernel=kernel, initrds=[b"one", b"two"], command_line="console=hvc0 x", acpi=ACPI
    )
    assert low[0x100000] == 0xF4 and entry.rip == 0x100000 and entry.rsi == memory_map.ZERO_PAGE
    zero = bytes(low[entry.rsi : entry.rsi + 4096])
    (command_line,) = struct.unpack_from("<I", zero, 0x228)
    assert bytes(low[command_line : command_line + 15]) == b"console=hvc0 x\0"
    at, size = struct.unpack_from("<II", zero, 0x218)
    assert (
        bytes(low[at : at + 3]) == b"one" and b"two" in bytes(low[at : at + size]) and at + size <= layout.low
    )
    (rsdp,) = struct.unpack_from("<Q", zero, 0x70)
    assert bytes(low[rsdp : rsdp + 8]) == b"RSD PTR "
    assert zero[0x1E8] == len(layout.e820())


def test_memory_above_4_gib_is_told(kernel: str) -> None:
    layout = MemoryMap(6 << 30, 40)
    low = memoryview(bytearray(64 << 20))
    entry = load_linux(low, layout, kernel=kernel, initrds=[], command_line="", acpi=ACPI)
    zero = bytes(low[entry.rsi : entry.rsi + 4096])
    entries = [struct.unpack_from("<QQI", zero, 0x2D0 + 20 * n) for n in range(zero[0x1E8])]
    assert (memory_map.HIGH_RAM_START, (6 << 30) - layout.low, 1) in entries


@pytest.mark.parametrize("content", [b"", b"MZ" + bytes(2000), bytes(5000), b"\x7fELF" + bytes(2000)])
def test_file_that_is_no_kernel_is_a_boot_error_of_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    layout = MemoryMap(64 << 20, 40)
    with pytest.raises(BootError) as raised:
        load_linux(
            memoryview(bytearray(layout.low)),
            layout,
            kernel=str(path),
            initrds=[],
            command_line="",
            acpi=ACPI,
        )
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_ramdisk_that_does_not_fit_is_a_boot_error(kernel: str) -> None:
    layout = MemoryMap(64 << 20, 40)
    with pytest.raises(BootError):
        load_linux(
            memoryview(bytearray(layout.low)),
            layout,
            kernel=kernel,
            initrds=[bytes(64 << 20)],
            command_line="",
            acpi=ACPI,
        )


def test_missing_kernel_is_a_boot_error(tmp_path: Path) -> None:
    layout = MemoryMap(64 << 20, 40)
    with pytest.raises(BootError, match="nowhere"):
        load_linux(
            memoryview(bytearray(layout.low)),
            layout,
            kernel=str(tmp_path / "nowhere"),
            initrds=[],
            command_line="",
            acpi=ACPI,
        )
