# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rootvisor.boot.errors import KernelImageError
from rootvisor.boot.memory_map import MIB, MemoryMap
from rootvisor.boot.multiboot import INFORMATION, MAGIC, is_multiboot, load_multiboot

RAM = 8 * MIB


def header(flags: int = 0, *addresses: int) -> bytes:
    return struct.pack(f"<III{len(addresses)}I", MAGIC, flags, -(MAGIC + flags) & 0xFFFFFFFF, *addresses)


def elf(code: bytes, gpa: int = 4 * MIB, memory: int = 0x2000, in_file: int | None = None) -> bytes:
    size = len(code) if in_file is None else in_file
    return (
        b"\x7fELF\1\1\1" + bytes(9)
        + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, gpa + 12, 52, 0, 0, 52, 32, 1, 0, 0, 0)
        + struct.pack("<IIIIIIII", 1, 84, 0, gpa, size, memory, 7, 4)
        + code
    )  # fmt: skip


@pytest.fixture
def ram() -> memoryview:
    return memoryview(bytearray(RAM))


def load(
    path: Path, ram: memoryview, modules: tuple[bytes, ...] = (), words: str = "k a b"
) -> tuple[int, int]:
    entry = load_multiboot(ram, MemoryMap(RAM, 40), kernel=str(path), modules=modules, command_line=words)
    return entry.rip, entry.ebx


def text(ram: memoryview, gpa: int) -> bytes:
    return bytes(ram[gpa : gpa + 200]).split(b"\0")[0]


def test_elf32_goes_to_its_addresses_and_finds_its_information(tmp_path: Path, ram: memoryview) -> None:
    kernel = tmp_path / "test.flat"
    code = header() + b"code"
    kernel.write_bytes(elf(code))
    assert is_multiboot(str(kernel))
    rip, ebx = load(kernel, ram, (b"NR_CPUS=2\n",))
    assert (rip, ebx) == (4 * MIB + 12, INFORMATION)
    assert bytes(ram[4 * MIB : 4 * MIB + len(code)]) == code
    flags, lower, upper, _boot, command_line, count, module = struct.unpack_from("<7I", ram, ebx)
    assert flags & 0x4D == 0x4D, "memory, command line, modules, map"
    assert (lower, upper) == (0x9FC00 >> 10, (RAM - MIB) >> 10)
    assert text(ram, command_line) == b"k a b"
    start, end = struct.unpack_from("<II", ram, module)
    assert count == 1
    assert bytes(ram[start:end]).startswith(b"NR_CPUS=2\n")
    length, at = struct.unpack_from("<II", ram, ebx + 44)
    entries = [struct.unpack_from("<IQQI", ram, at + offset) for offset in range(0, length, 24)]
    assert (20, MIB, RAM - MIB, 1) in entries


def test_flat_image_goes_where_its_header_says(tmp_path: Path, ram: memoryview) -> None:
    kernel = tmp_path / "flat"
    kernel.write_bytes(header(1 << 16, 2 * MIB, 2 * MIB, 0, 2 * MIB + 0x5000, 2 * MIB + 32) + b"\xf4")
    assert is_multiboot(str(kernel))
    assert load(kernel, ram)[0] == 2 * MIB + 32
    assert ram[2 * MIB + 32] == 0xF4


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(elf(header(), memory=RAM), id="too large"),
        pytest.param(elf(header(), gpa=0x1000), id="low memory"),
        pytest.param(elf(header(), in_file=0x1000), id="cut off"),
        pytest.param(elf(header())[:60], id="no program header"),
        pytest.param(elf(header(8)), id="unknown required flag"),
        pytest.param(header() + b"raw", id="neither ELF nor addresses"),
        pytest.param(header(1 << 16, 0, 0, 0, 0, 0), id="flat in low memory"),
    ],
)
def test_image_that_does_not_fit_is_refused(tmp_path: Path, ram: memoryview, image: bytes) -> None:
    kernel = tmp_path / "bad"
    kernel.write_bytes(image)
    with pytest.raises(KernelImageError):
        load(kernel, ram)


@pytest.mark.parametrize("content", [b"", b"\x7fELF\2" + header(), b"no header at all", header()[:8]])
def test_other_files_are_not_multiboot(tmp_path: Path, content: bytes) -> None:
    other = tmp_path / "other"
    other.write_bytes(content)
    assert not is_multiboot(str(other))
    assert not is_multiboot(str(tmp_path / "absent"))
