# SPDX-License-Identifier: Apache-2.0
"""vhost-net and vhost-vsock of a real kernel, behind our devices; the driver is the one of the unit tests.

Nothing of this needs KVM, but the machine on which these tests run has a kernel whose modules we know.
"""

from __future__ import annotations

import marshal
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rootvisor.kernels import cache_dir
from rootvisor.virtio.net import F_MRG_RXBUF
from rootvisor.virtio.net_tap import VHOST_DEVICE, VhostTapNet, tap_net
from rootvisor.virtio.registers import F_EVENT_IDX, F_VERSION_1, STATUS_NEEDS_RESET
from rootvisor.virtio.vhost_kernel import VhostKernelError, open_vhost
from rootvisor.virtio.vsock import Vsock, open_vhost_vsock
from tests.unit.virtio.guest_side import Guest, wait_until
from tests.unit.virtio.net_side import MAC, PEER, NetDriver, frame
from tests.unit.virtio.test_net_tap import Interface, ours
from tests.unit.virtio.test_state import Moved

PLAIN = F_VERSION_1 | F_MRG_RXBUF
SIZES = (256, 256, 16)
CID = 77
HOST_CID = 2
_HEADER = struct.Struct("<QQIIIHHIII")  # struct virtio_vsock_hdr
_STREAM = 1
_REQUEST, _RESPONSE, _SHUTDOWN, _DATA = 1, 2, 4, 5


@pytest.fixture(scope="module", autouse=True)
def _modules() -> None:
    """Load what the kernel has as modules: from its own folder, or from our cache of kernels."""
    folders = [Path("/"), *(cache_dir() / "kernels").glob("*")]
    for folder in folders:
        if (folder / "lib/modules" / os.uname().release).exists():
            for module in ("tun", "af_packet", "vhost_net", "vhost_vsock"):
                subprocess.run(["modprobe", "-d", str(folder), module], check=False, capture_output=True)
    if not os.path.exists(VHOST_DEVICE):
        pytest.skip("this kernel has no vhost")


@pytest.fixture
def interface() -> Iterator[Interface]:
    interface = Interface()
    yield interface
    interface.socket.close()


@pytest.mark.parametrize(
    "features", [PLAIN, PLAIN | F_EVENT_IDX, F_VERSION_1], ids=["split", "event", "no-merge"]
)
def test_kernel_moves_packets_both_ways(interface: Interface, features: int) -> None:
    device = tap_net(interface.fd, MAC)
    assert isinstance(device, VhostTapNet)
    guest = Guest(device)
    driver = NetDriver(guest, features, buffer_bytes=2048)
    driver.offer(200)
    for size in (46, 100, 1500):
        driver.send(frame(bytes([size & 0xFF]) * size), cut=(12,))
        assert interface.socket.recv(2000) == frame(bytes([size & 0xFF]) * size)
    driver.sent(3)
    poll = select.poll()
    poll.register(guest.vectors[1].fd, select.POLLIN)
    assert poll.poll(5000)
    back = [frame(bytes([n]) * size, MAC, PEER) for n, size in enumerate((46, 700, 1500))]
    for one in back:
        interface.socket.send(one)
    assert ours(driver, 3) == back
    guest.close()


def test_network_is_saved_and_goes_on(interface: Interface) -> None:
    guest = Guest(tap_net(os.dup(interface.fd), MAC))
    driver = NetDriver(guest, PLAIN)
    driver.offer(100)
    for round_ in range(3):
        driver.send(frame(bytes([round_]) * 100))
        assert interface.socket.recv(2000) == frame(bytes([round_]) * 100)
        driver.sent(1)
        interface.socket.send(frame(bytes([round_]) * 200, MAC, PEER))
        assert ours(driver, 1) == [frame(bytes([round_]) * 200, MAC, PEER)]
        guest.function.pause()
        driver.send(frame(b"late" * 20))
        state = marshal.loads(marshal.dumps(guest.function.save()))
        guest.function.close()
        moved = Moved(guest, tap_net(os.dup(interface.fd), MAC), state)
        guest.memory.close()
        moved.function.resume()
        driver.guest = guest = moved
        assert interface.socket.recv(2000) == frame(b"late" * 20)
        driver.sent(1)
    guest.close()
    os.close(interface.fd)


def test_malformed_ring_needs_reset_and_works_again(interface: Interface) -> None:
    guest = Guest(tap_net(interface.fd, MAC))
    reasons: list[str] = []
    guest.device.on_failure = reasons.append
    driver = NetDriver(guest, PLAIN)
    ring = guest.rings[1]
    ring.add([(1 << 60, 100, False)])
    guest.kick(1)
    wait_until(lambda: bool(reasons))
    assert reasons == ["net: the kernel finds a ring malformed"]
    assert guest.status & STATUS_NEEDS_RESET
    guest.write(20, 1, 0)
    driver = NetDriver(guest, PLAIN)
    driver.send(frame(b"again" * 20))
    assert interface.socket.recv(2000) == frame(b"again" * 20)
    guest.close()


class Sockets:
    """The guest's side of one connection to the host."""

    def __init__(self, guest: Guest, port: int) -> None:
        self.guest, self.port = guest, port
        self.buffers: dict[int, int] = {}
        self.offer(16)

    def offer(self, count: int) -> None:
        for _ in range(count):
            gpa = self.guest.memory.allocate(4096)
            self.buffers[self.guest.rings[0].add([(gpa, 4096, True)])] = gpa
        self.guest.kick(0)

    def send(self, operation: int, data: bytes = b"") -> None:
        header = _HEADER.pack(CID, HOST_CID, 1000, self.port, len(data), _STREAM, operation, 0, 1 << 16, 0)
        gpa = self.guest.memory.place(header + data)
        buffers = [(gpa, len(header), False)]
        if data:
            buffers.append((gpa + len(header), len(data), False))
        self.guest.request(1, buffers)

    def receive(self, operation: int) -> bytes:
        """Data of the next packet, which has this operation."""
        deadline = time.monotonic() + 10
        while True:
            for head, length in self.guest.rings[0].used():
                data = self.guest.memory.read(self.buffers[head], length)
                fields = _HEADER.unpack_from(data)
                assert fields[:4] == (HOST_CID, CID, self.port, 1000)
                if fields[6] == operation:
                    return data[_HEADER.size : _HEADER.size + fields[4]]
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_guest_and_host_talk_over_vsock_also_after_a_restore() -> None:
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, 4321))
    listener.listen(2)
    listener.settimeout(10)
    guest = Guest(Vsock(CID, open_vhost_vsock()))
    assert guest.read(0x100, 8) == CID
    guest.start(F_VERSION_1, SIZES)
    event = guest.memory.place(b"\xff" * 8)
    head = guest.rings[2].add([(event, 8, True)])
    side = Sockets(guest, 4321)
    for attempt in range(2):
        side.send(_REQUEST)
        accepted, (cid, _) = listener.accept()
        assert cid == CID
        accepted.settimeout(10)
        side.receive(_RESPONSE)
        side.send(_DATA, b"from the guest")
        assert accepted.recv(100) == b"from the guest"
        accepted.send(b"from the host")
        assert side.receive(_DATA) == b"from the host"
        if attempt == 0:
            guest.function.pause()
            state = marshal.loads(marshal.dumps(guest.function.save()))
            guest.function.close()
            moved = Moved(guest, Vsock(CID, open_vhost_vsock()), state)
            guest.memory.close()
            moved.function.resume()
            side.guest = guest = moved
            wait_until(lambda events=moved.rings[2]: events.used() == [(head, 4)])  # type: ignore[misc]
        accepted.close()
    guest.close()
    listener.close()


def test_cid_of_another_guest_is_one_clear_line() -> None:
    first = Vsock(CID, open_vhost_vsock())
    with pytest.raises(VhostKernelError, match="another guest has cid 77"):
        Vsock(CID, open_vhost_vsock())
    first.close()
    Vsock(CID, open_vhost_vsock()).close()


def test_device_that_somebody_else_owns_is_one_clear_line() -> None:
    fd = open_vhost(VHOST_DEVICE, "vhost_net")
    other = os.dup(fd)
    interface = Interface()
    device = VhostTapNet(os.dup(interface.fd), fd, MAC)
    with pytest.raises(VhostKernelError, match="VHOST_SET_OWNER: Device or resource busy"):
        VhostTapNet(os.dup(interface.fd), other, MAC)
    device.close()
    interface.socket.close()
    os.close(interface.fd)
