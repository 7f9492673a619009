# SPDX-License-Identifier: Apache-2.0
"""A guest in a folder: memory with holes, state, and files that are none of ours."""

from __future__ import annotations

import marshal
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rootvisor.boot.memory_map import HIGH_RAM_START, MemoryMap
from rootvisor.vmm.controller import MachineError
from rootvisor.vmm.guest_ram import GuestRam
from rootvisor.vmm.snapshot import MemoryReader, read_state, write_snapshot

SIZE = 64 << 20


def ram(size: int = SIZE) -> GuestRam:
    return GuestRam(MemoryMap(size, 40))


@pytest.fixture
def written() -> Iterator[GuestRam]:
    one = ram()
    one.view[0:5] = b"start"
    one.view[20 << 20 : (20 << 20) + 6] = b"middle"
    one.view[SIZE - 3 :] = b"end"
    yield one
    one.close()


def test_memory_and_state_come_back(written: GuestRam, tmp_path: Path) -> None:
    write_snapshot(str(tmp_path), written, {"board": {"x": [1, b"2"]}})
    assert read_state(str(tmp_path))["board"] == {"x": [1, b"2"]}
    other = ram()
    MemoryReader(str(tmp_path), other).wait()
    assert bytes(other.view) == bytes(written.view)
    other.close()


def test_files_are_sparse_and_private(written: GuestRam, tmp_path: Path) -> None:
    write_snapshot(str(tmp_path), written, {})
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o77 == 0
    assert (tmp_path / "memory").stat().st_blocks * 512 < 12 << 20
    other = ram()
    MemoryReader(str(tmp_path), other).wait()
    assert os.fstat(other.fd).st_blocks * 512 < 12 << 20  # holes stay holes
    other.close()


def test_failure_leaves_neither_file(written: GuestRam, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unmarshallable"):
        write_snapshot(str(tmp_path), written, {"board": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"x", b"\xfb\0\0", bytes(100), marshal.dumps([1]), os.urandom(1000)])
def test_state_that_is_none_gives_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "state").write_bytes(data)
    with pytest.raises(MachineError) as raised:
        read_state(str(tmp_path))
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_state_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(marshal.dumps({"version": 99}))
    with pytest.raises(MachineError, match="another version"):
        read_state(str(tmp_path))


def test_memory_of_another_size_is_refused(written: GuestRam, tmp_path: Path) -> None:
    write_snapshot(str(tmp_path), written, {})
    other = ram(2 * SIZE)
    with pytest.raises(MachineError, match="bytes"):
        MemoryReader(str(tmp_path), other).wait()
    other.close()


def test_missing_files_are_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_state(str(tmp_path))
    other = ram()
    with pytest.raises(FileNotFoundError):
        MemoryReader(str(tmp_path), other).wait()
    other.close()


class Mapping:
    def __init__(self) -> None:
        self.maps: list[tuple[int, int, int]] = []

    def map(self, gpa: int, memory: object, *, offset: int, size: int) -> None:
        self.maps.append((gpa, offset, size))


def test_memory_above_4_gib_lies_behind_the_rest_in_the_file() -> None:
    layout = MemoryMap(6 << 30, 40)
    one = GuestRam(layout)
    partition = Mapping()
    one.give_to(partition)  # type: ignore[arg-type]
    assert partition.maps == [(0, 0, layout.low), (HIGH_RAM_START, layout.low, (6 << 30) - layout.low)]
    one.memory.view(HIGH_RAM_START, 4)[:] = b"high"
    assert bytes(one.view[layout.low : layout.low + 4]) == b"high" and len(one.low) == layout.low
    one.close()


def test_page_that_is_given_back_reads_as_zeros_and_costs_nothing() -> None:
    one = ram()
    one.memory.view(0x5000, 4096)[:] = b"\x55" * 4096
    before = os.fstat(one.fd).st_blocks
    one.give_back(0x5000, 4096)
    assert os.fstat(one.fd).st_blocks < before
    assert bytes(one.memory.view(0x5000, 4096)) == bytes(4096)
    one.close()


@pytest.mark.parametrize(("gpa", "size"), [(SIZE, 4096), (SIZE - 4096, 8192), (1 << 50, 4096)])
def test_giving_back_what_is_no_memory_is_refused(gpa: int, size: int) -> None:
    one = ram()
    with pytest.raises(ValueError, match="no memory"):
        one.give_back(gpa, size)
    one.close()


def test_touch_keeps_what_is_there_and_takes_every_page() -> None:
    one = ram(8 << 20)
    one.view[4096:4100] = b"here"
    one.touch()
    assert bytes(one.view[4096:4100]) == b"here" and os.fstat(one.fd).st_blocks * 512 >= 8 << 20
    one.close()
