# SPDX-License-Identifier: Apache-2.0
"""The file system device with a real virtiofsd: the handshake, and FUSE requests through its rings."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rootvisor.virtio.fs import Fs
from rootvisor.virtio.registers import F_VERSION_1
from rootvisor.virtio.vhost import VhostError
from tests.unit.virtio.guest_side import Guest, wait_until

FUSE_LOOKUP, FUSE_INIT, FUSE_OPEN, FUSE_READ = 1, 26, 14, 15


def find_virtiofsd() -> str | None:
    places = os.pathsep.join((os.environ.get("PATH", ""), "/usr/libexec", "/usr/lib/qemu"))
    return shutil.which("virtiofsd", path=places)


class Daemon:
    """A virtiofsd that shares `directory`, connected."""

    def __init__(self, path: str, directory: Path, place: Path) -> None:
        address = str(place / "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(1)
        is_c = b"--socket-group" in subprocess.run([path, "--help"], capture_output=True, check=False).stdout
        share = (
            ["-o", f"source={directory}", "-o", "sandbox=chroot"] if is_c else [f"--shared-dir={directory}"]
        )
        self.process = subprocess.Popen(
            [path, f"--fd={listener.fileno()}", *share],
            pass_fds=[listener.fileno()],
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        listener.close()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(address)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    path = find_virtiofsd()
    if path is None:
        pytest.skip("virtiofsd is not installed (Debian 12: qemu-system-common, later: virtiofsd)")
    if os.geteuid():
        pytest.skip("virtiofsd's sandbox needs root here")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "hello").write_text("hello from the host\n")
    daemon = Daemon(path, shared, tmp_path)
    yield daemon
    daemon.close()


class Fuse:
    """FUSE requests (linux/fuse.h) on queue 1."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.unique = 0

    def call(self, opcode: int, node: int, body: bytes, room: int) -> bytes:
        self.unique += 1
        memory = self.guest.memory
        header = struct.pack("<IIQQIIII", 40 + len(body), opcode, self.unique, node, 0, 0, 1, 0)
        request, answer, data = memory.place(header + body), memory.allocate(16), memory.allocate(room)
        self.guest.request(
            1,
            [(request, 40, False), (request + 40, len(body), False), (answer, 16, True), (data, room, True)],
        )
        length, error, unique = struct.unpack("<IiQ", memory.read(answer, 16))
        assert unique == self.unique
        assert error == 0, os.strerror(-error)
        return memory.read(data, length - 16)


def test_file_of_the_host_is_read_through_virtiofsd(daemon: Daemon) -> None:
    fs = Fs(daemon.socket.detach(), "shared")
    guest = Guest(fs)
    assert guest.read(0x100, 4).to_bytes(4, "little") == b"shar"
    assert guest.read(0x100 + 36, 4) == 1
    for _ in range(2):  # a reset in between, as by a second kernel
        guest.start(F_VERSION_1, (128, 512))
        fuse = Fuse(guest)
        version = struct.unpack_from("<II", fuse.call(FUSE_INIT, 0, struct.pack("<IIII", 7, 31, 0, 0), 256))
        assert version[0] == 7
        node = struct.unpack_from("<Q", fuse.call(FUSE_LOOKUP, 1, b"hello\0", 256))[0]
        handle = struct.unpack_from("<Q", fuse.call(FUSE_OPEN, node, struct.pack("<II", os.O_RDONLY, 0), 64))[
            0
        ]
        read = struct.pack("<QQIIQII", handle, 0, 4096, 0, 0, 0, 0)
        assert fuse.call(FUSE_READ, node, read, 4096) == b"hello from the host\n"
        poll = select.poll()
        poll.register(guest.vectors[1].fd, select.POLLIN)
        assert poll.poll(5000)
        guest.write(20, 1, 0)
    guest.close()
    wait_until(lambda: daemon.process.poll() is not None)


def test_state_is_to_be_had_before_anything_is_mounted_only(daemon: Daemon) -> None:
    guest = Guest(Fs(daemon.socket.detach(), "shared"))
    guest.start(F_VERSION_1, (128, 512))
    guest.function.pause()
    assert guest.function.save()
    guest.function.resume()
    Fuse(guest).call(FUSE_INIT, 0, struct.pack("<IIII", 7, 31, 0, 0), 256)
    guest.function.pause()
    with pytest.raises(
        VhostError, match=r"has mounted the shared folder shared, .*vm\.remove-device"
    ) as caught:
        guest.function.save()
    assert "\n" not in str(caught.value)
    guest.function.resume()
    guest.write(20, 1, 0)  # another kernel, which has mounted nothing yet
    guest.start(F_VERSION_1, (128, 512))
    guest.function.pause()
    assert guest.function.save()
    guest.close()


def test_death_of_virtiofsd_is_noticed(daemon: Daemon) -> None:
    guest = Guest(Fs(daemon.socket.detach(), "shared"))
    reasons: list[str] = []
    guest.device.on_failure = reasons.append
    guest.start(F_VERSION_1, (128, 512))
    daemon.process.kill()
    wait_until(lambda: bool(reasons))
    assert reasons == ["fs: virtiofsd has ended"]
    guest.close()


@pytest.mark.parametrize("tag", ["", "x" * 37])
def test_tag_that_does_not_fit_is_value_error(tag: str) -> None:
    with pytest.raises(ValueError, match="1 to 36 bytes"):
        Fs(-1, tag)
