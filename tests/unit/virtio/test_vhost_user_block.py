# SPDX-License-Identifier: Apache-2.0
"""The disk of another process: with qemu-storage-daemon where it is installed, and with a backend of the test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rootvisor.daemons.served import Served
from rootvisor.daemons.storage import start_storage
from rootvisor.virtio import block
from rootvisor.virtio import vhost_user as vu
from rootvisor.virtio.registers import F_VERSION_1, STATUS_NEEDS_RESET
from rootvisor.virtio.vhost_user import VhostUserError
from rootvisor.virtio.vhost_user_block import F_MQ, VhostUserBlock
from tests.unit.virtio.guest_side import Buffer, Guest, wait_until
from tests.unit.virtio.qcow2 import name_backing_file, read_qcow2, resize_qcow2, write_qcow2
from tests.unit.virtio.vhost_user_backend import Backend

SECTORS = 2048
ALL = F_VERSION_1 | block.F_FLUSH | block.F_DISCARD | block.F_WRITE_ZEROES

real = pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None,
    reason="qemu-storage-daemon is not installed (qemu-system-common)",
)


class Disk:
    """A guest with one disk behind qemu-storage-daemon, whose sector n is filled with byte n."""

    def __init__(
        self, path: Path, image_format: str, *, features: int = ALL, readonly: bool = False, queues: int = 1
    ) -> None:
        self.path, self.format, self.features = path, image_format, features
        content = b"".join(bytes([n & 0xFF]) * 512 for n in range(SECTORS))
        if image_format == "raw":
            path.write_bytes(content)
        else:
            write_qcow2(path, content)
        self._connect(readonly, queues)
        self.guest = Guest(self.device)
        self.start()

    @classmethod
    def again(cls, disk: Disk) -> Disk:
        """The same image behind another daemon; the caller gives it a guest."""
        other = cls.__new__(cls)
        other.path, other.format, other.features = disk.path, disk.format, disk.features
        other._connect(False, 1)
        return other

    @classmethod
    def behind(cls, served: Served) -> Disk:
        """A guest with the disk of a daemon that runs."""
        disk = cls.__new__(cls)
        disk.features = ALL
        disk._take(served, 1)
        disk.guest = Guest(disk.device)
        disk.start()
        return disk

    def _connect(self, readonly: bool, queues: int) -> None:
        self._take(
            start_storage(str(self.path), image_format=self.format, readonly=readonly, queues=queues), queues
        )

    def _take(self, served: Served, queues: int) -> None:
        self.served = served
        self.device = VhostUserBlock(self.served.take_socket(), queues)
        self.reasons: list[str] = []
        self.device.on_failure = self.reasons.append

    def start(self) -> None:
        self.guest.start(self.features, [256] * len(self.device.queue_sizes))

    def request(self, kind: int, sector: int, data: Sequence[Buffer] = (), queue: int = 0) -> int:
        """Send a request; returns its status."""
        memory = self.guest.memory
        header = memory.place(struct.pack("<IIQ", kind, 0, sector))
        status = memory.place(b"\xff")
        self.guest.request(queue, [(header, 16, False), *data, (status, 1, True)])
        return memory.read(status, 1)[0]

    def read(self, sector: int, length: int = 512, queue: int = 0) -> bytes:
        room = self.guest.memory.allocate(length)
        assert self.request(block.T_IN, sector, [(room, length, True)], queue) == block.S_OK
        return self.guest.memory.read(room, length)

    def write(self, sector: int, data: bytes, queue: int = 0) -> int:
        place = self.guest.memory.place(data)
        return self.request(block.T_OUT, sector, [(place, len(data), False)], queue)

    def content(self) -> bytes:
        """What the image holds, once the daemon has ended."""
        self.close()
        return self.path.read_bytes() if self.format == "raw" else read_qcow2(self.path)

    def close(self) -> None:
        if self.served.daemon.fd >= 0:
            self.guest.close()
            self.served.close()


@pytest.fixture(params=["raw", "qcow2"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk, with a comma", request.param)
    yield disk
    disk.close()


@real
def test_config_comes_from_the_daemon(disk: Disk) -> None:
    assert disk.guest.read(0x100, 8) == SECTORS
    assert disk.device.size == SECTORS * 512
    assert disk.guest.read(0x100 + 20, 4) == 512
    assert disk.guest.read(0x100 + 34, 2) == 1
    assert disk.guest.offered() & ALL == ALL
    assert not disk.device.readonly


@real
def test_what_is_written_is_read_and_in_the_image(disk: Disk) -> None:
    assert disk.read(3, 1024) == b"\3" * 512 + b"\4" * 512
    assert disk.write(5, b"a" * 1024) == block.S_OK
    assert disk.request(block.T_FLUSH, 0) == block.S_OK
    assert disk.read(4, 2048) == b"\4" * 512 + b"a" * 1024 + b"\7" * 512
    content = disk.content()
    assert content[4 * 512 : 8 * 512] == b"\4" * 512 + b"a" * 1024 + b"\7" * 512
    assert not disk.reasons


@real
def test_discard_and_zeroes_reach_the_image(disk: Disk) -> None:
    for kind in (block.T_DISCARD, block.T_WRITE_ZEROES):
        data = struct.pack("<QII", 256 if kind == block.T_DISCARD else 512, 128, 0)
        place = disk.guest.memory.place(data)
        assert disk.request(kind, 0, [(place, 16, False)]) == block.S_OK
    assert disk.read(512, 65536) == bytes(65536)
    content = disk.content()
    assert content[512 * 512 : 640 * 512] == bytes(65536)
    assert content[640 * 512 : 641 * 512] == b"\x80" * 512


@real
def test_outside_the_disk_is_an_error_and_the_daemon_goes_on(disk: Disk) -> None:
    assert disk.write(SECTORS, bytes(512)) == block.S_IOERR
    assert disk.read(1) == b"\1" * 512


@real
def test_reset_and_start_again_works(disk: Disk) -> None:
    for _ in range(3):
        assert disk.read(9) == b"\x09" * 512
        disk.guest.write(20, 1, 0)
        disk.start()
    assert disk.write(9, b"z" * 512) == block.S_OK


@real
def test_every_queue_serves(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk", "raw", features=ALL | F_MQ, queues=3)
    assert disk.guest.read(0x100 + 34, 2) == 3
    for queue in range(3):
        assert disk.write(20 + queue, bytes([queue]) * 512, queue) == block.S_OK
        assert disk.read(20 + queue, queue=2 - queue) == bytes([queue]) * 512
    disk.close()


@real
def test_image_on_a_backing_file_shows_it_and_writes_to_itself(tmp_path: Path) -> None:
    base = tmp_path / "base"
    content = b"".join(bytes([n & 0xFF]) * 512 for n in range(SECTORS))
    base.write_bytes(content)
    write_qcow2(tmp_path / "image", b"")
    resize_qcow2(tmp_path / "image", len(content))
    name_backing_file(tmp_path / "image", "base", "raw")
    disk = Disk.behind(start_storage(str(tmp_path / "image"), image_format="qcow2", backing_files=True))
    assert disk.read(7) == b"\7" * 512
    assert disk.write(7, b"n" * 512) == block.S_OK
    assert disk.read(7) == b"n" * 512
    disk.close()
    assert base.read_bytes() == content


@real
def test_readonly_disk_refuses_writes(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk", "raw", features=F_VERSION_1 | block.F_RO, readonly=True)
    assert disk.device.readonly
    assert disk.write(0, b"x" * 512) == block.S_IOERR
    assert disk.content()[:512] == bytes(512)


@real
def test_cache_is_told_by_flush_alone(disk: Disk) -> None:
    """Otherwise Linux believes what the daemon says of its cache, and flushes nothing."""
    assert disk.guest.offered() & (block.F_FLUSH | 1 << 11) == block.F_FLUSH


@real
def test_death_of_the_daemon_needs_reset_and_says_why(disk: Disk) -> None:
    os.kill(disk.served.daemon.pid, signal.SIGKILL)
    wait_until(lambda: bool(disk.reasons))
    assert disk.reasons == ["block: qemu-storage-daemon has ended"]
    assert disk.guest.status & STATUS_NEEDS_RESET
    assert disk.served.daemon.obituary() == "qemu-storage-daemon was killed by signal 9"


@real
def test_more_queues_than_the_daemon_has_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))
    served = start_storage(str(tmp_path / "disk"), queues=2)
    with pytest.raises(VhostUserError, match="serves 2 queues, not 3"):
        VhostUserBlock(served.take_socket(), 3)
    served.close()


class ConfigBackend(Backend):
    """Tells a capacity, and can change it."""

    sectors = 100

    def answer(self, request: int, payload: bytes) -> bytes | None:
        if request == vu.GET_CONFIG:
            return payload[:12] + struct.pack("<Q", self.sectors).ljust(len(payload) - 12, b"\0")
        if request == vu.GET_QUEUE_NUM:
            return struct.pack("<Q", 1)
        return super().answer(request, payload)

    def change(self, *, reply: bool) -> bytes:
        """Say so; returns the front end's answer."""
        with socket.socket(fileno=os.dup(self.fds[vu.SET_BACKEND_REQ_FD, 0])) as channel:
            channel.settimeout(10)
            channel.send(struct.pack("<III", vu.BACKEND_CONFIG_CHANGE_MSG, 1 | 8 * reply, 0))
            return channel.recv(20) if reply else b""


PROTOCOL = vu.PROTOCOL_F_REPLY_ACK | vu.PROTOCOL_F_CONFIG | vu.PROTOCOL_F_MQ | vu.PROTOCOL_F_BACKEND_REQ


@pytest.mark.parametrize("reply", [False, True])
def test_change_of_capacity_interrupts_the_driver(reply: bool) -> None:
    backend = ConfigBackend(protocol=PROTOCOL)
    guest = Guest(VhostUserBlock(backend.fd))
    guest.start(F_VERSION_1, [256])
    assert guest.read(0x100, 8) == 100
    backend.sectors = 200
    answer = backend.change(reply=reply)
    assert answer == (struct.pack("<IIIQ", vu.BACKEND_CONFIG_CHANGE_MSG, 5, 8, 0) if reply else b"")
    wait_until(lambda: guest.vectors[0].count == 1)
    assert guest.read(0x100, 8) == 200
    assert guest.read(0x100 + 34, 2) == 1
    guest.close()
    backend.close()


def test_backend_without_configuration_is_an_error() -> None:
    backend = Backend(protocol=vu.PROTOCOL_F_REPLY_ACK)
    with pytest.raises(VhostUserError, match="does not tell its configuration"):
        VhostUserBlock(backend.fd)
    backend.close()


@pytest.mark.parametrize("queues", [0, 65])
def test_number_of_queues_that_cannot_be_is_value_error(queues: int) -> None:
    with pytest.raises(ValueError, match="1 to 64 queues"):
        VhostUserBlock(-1, queues)
