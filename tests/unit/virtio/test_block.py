# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rootvisor.virtio import block
from rootvisor.virtio.block import Block
from rootvisor.virtio.disk_image import DiskError, DiskImage
from rootvisor.virtio.registers import F_RING_PACKED, F_VERSION_1, STATUS_NEEDS_RESET
from tests.unit.virtio.guest_side import Buffer, Guest, wait_until

SECTORS = 64
ALL = F_VERSION_1 | block.F_FLUSH | block.F_DISCARD | block.F_WRITE_ZEROES


class Disk:
    """A guest with one disk whose sector n is filled with byte n."""

    def __init__(self, path: Path, *, features: int = ALL, readonly: bool = False) -> None:
        self.path = path
        path.write_bytes(b"".join(bytes([n]) * 512 for n in range(SECTORS)))
        self.image = DiskImage(str(path), readonly=readonly)
        self.guest = Guest(Block(self.image, identity="serial"))
        self.guest.start(features, [128])
        self.used = 0

    def request(self, kind: int, sector: int, data: Sequence[Buffer] = ()) -> int:
        """Send a request; returns its status."""
        memory = self.guest.memory
        header = memory.place(struct.pack("<IIQ", kind, 0, sector))
        status = memory.place(b"\xff")
        self.used = self.guest.request(0, [(header, 16, False), *data, (status, 1, True)])
        return memory.read(status, 1)[0]

    def ranges(self, kind: int, *ranges: tuple[int, int, int]) -> int:
        data = b"".join(struct.pack("<QII", *item) for item in ranges)
        return self.request(kind, 0, [(self.guest.memory.place(data), len(data), False)] if data else [])

    def sector(self, number: int) -> bytes:
        return self.path.read_bytes()[512 * number : 512 * number + 512]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.guest.close()


def test_config_tells_capacity_and_limits(disk: Disk) -> None:
    assert disk.guest.read(0x100, 8) == SECTORS
    assert disk.guest.read(0x100 + 12, 4) == 126
    assert disk.guest.read(0x100 + 20, 4) == 512
    assert disk.guest.read(0x100 + 36, 4) == 1 << 22
    assert disk.guest.read(0x100 + 48, 4) == 1 << 16
    assert disk.guest.read(0x100 + 56, 1) == 1
    assert len(disk.guest.device.config) == 60


def test_read_scatters_into_buffers(disk: Disk) -> None:
    one, two = disk.guest.memory.allocate(256), disk.guest.memory.allocate(768)
    assert disk.request(block.T_IN, 3, [(one, 256, True), (two, 768, True)]) == block.S_OK
    assert disk.used == 1025
    assert disk.guest.memory.read(one, 256) == b"\3" * 256
    assert disk.guest.memory.read(two, 768) == b"\3" * 256 + b"\4" * 512


def test_write_gathers_from_buffers(disk: Disk) -> None:
    one, two = disk.guest.memory.place(b"a" * 100), disk.guest.memory.place(b"b" * 412)
    assert disk.request(block.T_OUT, 5, [(one, 100, False), (two, 412, False)]) == block.S_OK
    assert disk.used == 1
    assert disk.sector(5) == b"a" * 100 + b"b" * 412
    assert disk.sector(6) == b"\6" * 512


def test_any_layout_of_buffers_works(disk: Disk) -> None:
    """A header cut in two, data right behind it, status at the end of the data buffer."""
    memory = disk.guest.memory
    whole = memory.place(struct.pack("<IIQ", block.T_OUT, 0, 9) + b"z" * 512)
    status = memory.place(b"\xff")
    disk.guest.request(0, [(whole, 10, False), (whole + 10, 518, False), (status, 1, True)])
    assert memory.read(status, 1) == b"\0" and disk.sector(9) == b"z" * 512
    header = memory.place(struct.pack("<IIQ", block.T_IN, 0, 9))
    room = memory.allocate(513)
    assert disk.guest.request(0, [(header, 16, False), (room, 513, True)]) == 513
    assert memory.read(room, 513) == b"z" * 512 + b"\0"


@pytest.mark.parametrize("kind", [block.T_IN, block.T_OUT])
@pytest.mark.parametrize(
    ("sector", "length"),
    [(SECTORS, 512), (SECTORS - 1, 1024), ((1 << 64) - 1, 512), (1 << 55, 512), (0, 100)],
)
def test_outside_the_disk_or_part_of_a_sector_is_ioerr(
    disk: Disk, kind: int, sector: int, length: int
) -> None:
    before = disk.path.read_bytes()
    room = disk.guest.memory.allocate(1024)
    assert disk.request(kind, sector, [(room, length, kind == block.T_IN)]) == block.S_IOERR
    assert disk.path.read_bytes() == before


def test_unknown_request_is_unsupp(disk: Disk) -> None:
    assert disk.request(99, 0) == block.S_UNSUPP


def test_short_header_is_ioerr(disk: Disk) -> None:
    memory = disk.guest.memory
    status = memory.place(b"\xff")
    disk.guest.request(0, [(memory.allocate(8), 8, False), (status, 1, True)])
    assert memory.read(status, 1)[0] == block.S_IOERR


def test_no_room_for_a_status_needs_reset(disk: Disk) -> None:
    disk.guest.rings[0].add([(disk.guest.memory.place(bytes(16)), 16, False)])
    disk.guest.kick(0)
    wait_until(lambda: bool(disk.guest.status & STATUS_NEEDS_RESET))


def test_get_id_gives_the_identity(disk: Disk) -> None:
    room = disk.guest.memory.allocate(20)
    assert disk.request(block.T_GET_ID, 0, [(room, 20, True)]) == block.S_OK
    assert disk.guest.memory.read(room, 20) == b"serial".ljust(20, b"\0")


def test_flush_syncs_and_write_does_not(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    data = disk.guest.memory.allocate(512)
    assert disk.request(block.T_OUT, 0, [(data, 512, False)]) == block.S_OK
    assert not synced
    assert disk.request(block.T_FLUSH, 0) == block.S_OK
    assert synced == [disk.image.fd]


def test_without_flush_feature_each_write_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    disk = Disk(tmp_path / "disk", features=F_VERSION_1 | F_RING_PACKED)
    data = disk.guest.memory.allocate(512)
    assert disk.request(block.T_OUT, 0, [(data, 512, False)]) == block.S_OK
    assert len(synced) == 1
    disk.guest.close()


def test_host_error_is_ioerr(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwritev", full)
    data = disk.guest.memory.allocate(512)
    assert disk.request(block.T_OUT, 0, [(data, 512, False)]) == block.S_IOERR


def test_image_cut_short_meanwhile_is_ioerr(disk: Disk) -> None:
    os.truncate(disk.path, 5 * 512 + 100)
    room = disk.guest.memory.allocate(1024)
    assert disk.request(block.T_IN, 4, [(room, 1024, True)]) == block.S_IOERR
    assert disk.request(block.T_IN, 3, [(room, 1024, True)]) == block.S_OK


def test_short_transfers_are_continued(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def slow(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return real(fd, [buffers[0][:100]], offset)

    monkeypatch.setattr(os, "preadv", slow)
    one, two = disk.guest.memory.allocate(300), disk.guest.memory.allocate(724)
    assert disk.request(block.T_IN, 1, [(one, 300, True), (two, 724, True)]) == block.S_OK
    assert disk.guest.memory.read(one, 300) + disk.guest.memory.read(two, 724) == b"\1" * 512 + b"\2" * 512


@pytest.mark.parametrize("flags", [0, 1], ids=["keep", "unmap"])
@pytest.mark.parametrize("fallback", [False, True], ids=["ioctl", "written"])
def test_write_zeroes_zeroes_just_its_range(
    disk: Disk, flags: int, fallback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fallback:

        def refuse(*_: object) -> int:
            raise OSError(errno.EOPNOTSUPP, "not here")

        monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert disk.ranges(block.T_WRITE_ZEROES, (2, 3, flags), (10, 1, flags)) == block.S_OK
    content = disk.path.read_bytes()
    assert len(content) == 512 * SECTORS
    zero = [n for n in range(1, SECTORS) if content[512 * n : 512 * n + 512] == bytes(512)]
    assert zero == [2, 3, 4, 10]


def test_discard_keeps_neighbours_and_size(disk: Disk) -> None:
    assert disk.ranges(block.T_DISCARD, (8, 16, 0)) == block.S_OK
    assert disk.sector(7) == b"\7" * 512 and disk.sector(24) == bytes([24]) * 512
    assert disk.path.stat().st_size == 512 * SECTORS


@pytest.mark.parametrize(
    ("ranges", "status"),
    [
        ([], block.S_IOERR),
        ([(SECTORS, 1, 0)], block.S_IOERR),
        ([((1 << 64) - 1, 1, 0)], block.S_IOERR),
        ([(0, 0xFFFFFFFF, 0)], block.S_IOERR),
        ([(0, 1, 2)], block.S_UNSUPP),
        ([(0, 1, 0)] * 17, block.S_IOERR),
        ([(0, 0, 0)], block.S_OK),
    ],
)
def test_bad_ranges_change_nothing(disk: Disk, ranges: list[tuple[int, int, int]], status: int) -> None:
    before = disk.path.read_bytes()
    for kind in (block.T_DISCARD, block.T_WRITE_ZEROES):
        assert disk.ranges(kind, *ranges) == status
    assert disk.path.read_bytes() == before


def test_readonly_disk_refuses_every_change(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk", features=F_VERSION_1 | block.F_RO | block.F_FLUSH, readonly=True)
    before = disk.path.read_bytes()
    data = disk.guest.memory.place(b"x" * 512)
    assert disk.request(block.T_OUT, 0, [(data, 512, False)]) == block.S_IOERR
    assert disk.ranges(block.T_WRITE_ZEROES, (0, 1, 0)) == block.S_IOERR
    assert disk.request(block.T_FLUSH, 0) == block.S_OK
    assert disk.request(block.T_IN, 1, [(data, 512, True)]) == block.S_OK
    assert disk.path.read_bytes() == before
    disk.guest.close()


def descriptors_of(path: Path) -> int:
    """How many of this process's descriptors are of that file; those of other tests come and go."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{fd}") == str(path)
    return found


def test_image_is_written_by_one_or_read_by_many(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    writer = DiskImage(str(path))
    for readonly, text in ((False, "is in use by another machine"), (True, "is written by another machine")):
        with pytest.raises(DiskError, match=text + ".*readonly=on") as caught:
            DiskImage(str(path), readonly=readonly)
        assert "\n" not in str(caught.value)
        assert descriptors_of(path) == 1
    writer.close()
    readers = [DiskImage(str(path), readonly=True) for _ in range(3)]
    with pytest.raises(DiskError, match="is in use by another machine"):
        DiskImage(str(path))
    for reader in readers:
        reader.close()
    DiskImage(str(path)).close()


def test_unusable_image_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    for name, text in (("absent", "No such file"), ("empty", "truncate -s"), ("fifo", "neither a file")):
        with pytest.raises(DiskError, match=text) as caught:
            DiskImage(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(DiskError, match="Is a directory"):
        DiskImage(str(tmp_path))
