# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

import pytest

from rootvisor.boot.errors import KernelImageError
from rootvisor.boot.kernel import BZIMAGE, ELF, load_kernel, probe_kernel

MIB = 1 << 20
PREFERRED = 16 * MIB


def make_bzimage(
    *,
    protocol: int = 0x20F,
    xloadflags: int = 1,
    payload: bytes = b"\x90" * 0x1000,
    init_size: int = 4 * MIB,
    preferred: int = PREFERRED,
) -> bytes:
    setup_sects = 3
    image = bytearray((setup_sects + 1) * 512)
    image[0x1F1] = setup_sects
    struct.pack_into("<I", image, 0x1F4, -(-len(payload) // 16))
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x200:0x202] = b"\xeb\x6a"
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, protocol)
    struct.pack_into("<H", image, 0x20E, 0x300)
    image[0x500:0x520] = b"6.12.1-test (someone@host) #1\0\0\0"
    image[0x211] = 1
    struct.pack_into("<IIB", image, 0x22C, 0x7FFFFFFF, 0x200000, 1)
    struct.pack_into("<HI", image, 0x236, xloadflags, 2047)
    struct.pack_into("<QI", image, 0x258, preferred, init_size)
    return bytes(image) + payload


def make_elf(
    *,
    segments: list[tuple[int, int, bytes, int]] | None = None,
    entry: int = PREFERRED + 0x10,
    bits: int = 2,
    machine: int = 62,
    kind: int = 2,
    extra_type: int | None = None,
    note: bytes = b"",
) -> bytes:
    """Segments are (vaddr, paddr, content, memory size)."""
    segments = segments or [(0xFFFFFFFF81000000, PREFERRED, b"\xf4" * 64, 0x2000)]
    count = len(segments) + (extra_type is not None) + bool(note)
    offset = 0x1000
    table = b""
    body = bytearray()
    for vaddr, paddr, content, size in segments:
        table += struct.pack("<IIQQQQQQ", 1, 5, offset + len(body), vaddr, paddr, len(content), size, 0x1000)
        body += content
    if extra_type is not None:
        table += struct.pack("<IIQQQQQQ", extra_type, 4, 0, 0, 0, 0, 0, 1)
    if note:
        table += struct.pack("<IIQQQQQQ", 4, 4, offset + len(body), 0, 0, len(note), len(note), 4)
        body += note
    head = b"\x7fELF" + bytes((bits, 1, 1, 0)) + bytes(8)
    head += struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, 56, count, 0, 0, 0)
    return (head + table).ljust(offset, b"\0") + bytes(body)


@pytest.fixture
def ram() -> memoryview:
    return memoryview(mmap.mmap(-1, 64 * MIB))


def write(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    return str(path)


def test_bzimage_payload_loads_at_its_preferred_address(tmp_path: Path, ram: memoryview) -> None:
    payload = bytes(range(256)) * 16
    image = make_bzimage(payload=payload)
    loaded = load_kernel(write(tmp_path, image), ram)
    assert loaded.kind == BZIMAGE
    assert loaded.rip == PREFERRED + 0x200
    assert (loaded.low_gpa, loaded.end_gpa) == (PREFERRED, PREFERRED + 4 * MIB)
    assert bytes(ram[PREFERRED : PREFERRED + len(payload)]) == payload
    assert loaded.setup_header == image[0x1F1 : 0x202 + 0x6A]


def test_probe_bzimage_tells_version_and_protocol(tmp_path: Path) -> None:
    facts = probe_kernel(write(tmp_path, make_bzimage()))
    assert (facts.kind, facts.version, facts.protocol) == (BZIMAGE, "6.12.1-test", 0x20F)


def test_bzimage_low_preferred_address_is_raised_to_1_mib(tmp_path: Path, ram: memoryview) -> None:
    assert load_kernel(write(tmp_path, make_bzimage(preferred=0)), ram).rip == MIB + 0x200


def test_elf_segments_load_at_their_physical_addresses(tmp_path: Path, ram: memoryview) -> None:
    segments = [
        (0xFFFFFFFF81000000, PREFERRED, b"text" * 16, 0x40),
        (0xFFFFFFFF82000000, PREFERRED + MIB, b"data", 0x5000),
    ]
    loaded = load_kernel(write(tmp_path, make_elf(segments=segments)), ram)
    assert (loaded.kind, loaded.rip, loaded.setup_header) == (ELF, PREFERRED + 0x10, None)
    assert bytes(ram[PREFERRED : PREFERRED + 8]) == b"texttext"
    assert bytes(ram[PREFERRED + MIB : PREFERRED + MIB + 8]) == b"data\0\0\0\0"
    assert (loaded.low_gpa, loaded.end_gpa) == (PREFERRED, PREFERRED + MIB + 0x5000)


def test_elf_virtual_entry_becomes_physical(tmp_path: Path, ram: memoryview) -> None:
    loaded = load_kernel(write(tmp_path, make_elf(entry=0xFFFFFFFF81000020)), ram)
    assert loaded.rip == PREFERRED + 0x20


def test_elf_pvh_note_is_found(tmp_path: Path) -> None:
    other = struct.pack("<III4s8s", 4, 5, 3, b"GNU\0", b"abcde")
    pvh = struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", 0x1234560)
    assert probe_kernel(write(tmp_path, make_elf(note=other + pvh))).pvh_entry == 0x1234560


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"#!/bin/sh\n" * 1000, "is not a kernel"),
        (b"\x7fELF", "truncated"),
        (make_bzimage(xloadflags=0), "32-bit"),
        (make_bzimage(protocol=0x204), "protocol 2.04 is too old"),
        (make_bzimage()[:-100], "truncated"),
        (make_bzimage()[:0x400], "truncated"),
        (make_elf(bits=1, machine=3), "32-bit"),
        (make_elf(machine=183), "another processor"),
        (make_elf(kind=1), "not a kernel"),
        (make_elf(kind=3, extra_type=3), "not a kernel"),
        (make_elf(extra_type=7), "not a kernel"),
        (make_elf(entry=0x42), "not a kernel"),
        (make_elf()[:-1], "truncated"),
        (make_elf()[:100], "truncated"),
        (make_elf(segments=[(0, 0x1000, b"x" * 64, 64)], entry=0x1000), "below 1 MiB"),
    ],
)
def test_bad_image_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(KernelImageError) as caught:
        probe_kernel(path)
    assert words in str(caught.value)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_directory_and_pipe_are_one_line(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, words in [
        (tmp_path / "none", "no such kernel"),
        (tmp_path, "is a directory"),
        (pipe, "not a regular file"),
    ]:
        with pytest.raises(KernelImageError, match=words):
            probe_kernel(str(path))
    with pytest.raises(KernelImageError, match="null"):
        probe_kernel("a\0b")


def test_too_little_memory_names_both_sizes(tmp_path: Path, ram: memoryview) -> None:
    with pytest.raises(KernelImageError, match="up to 20 MiB and does not fit in 8 MiB"):
        load_kernel(write(tmp_path, make_bzimage()), ram[: 8 * MIB])


def test_every_prefix_and_bit_flip_is_answered(tmp_path: Path, ram: memoryview) -> None:
    for image in (make_bzimage(), make_elf(note=struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", 1))):
        interesting = list(range(0x40)) + list(range(0x40, 0xF0, 3)) + list(range(0x1F0, 0x270))
        for position in interesting:
            for bit in (0x01, 0x80, 0xFF):
                changed = bytearray(image)
                changed[position] ^= bit
                path = write(tmp_path, bytes(changed))
                try:
                    loaded = load_kernel(path, ram)
                except KernelImageError:
                    continue
                assert loaded.end_gpa <= len(ram)
