# SPDX-License-Identifier: Apache-2.0
"""Network devices on a real tap interface; vhost-net by its ioctls, with the kernel's own in tests/kvm."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from rootvisor.virtio import net
from rootvisor.virtio.net import F_CSUM, F_MRG_RXBUF, HEADER_BYTES
from rootvisor.virtio.net_tap import TapNet, VhostTapNet
from rootvisor.virtio.registers import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_RING_PACKED,
    F_VERSION_1,
    STATUS_NEEDS_RESET,
)
from rootvisor.virtio.tap import Tap, TapError, open_tap
from tests.unit.virtio.fake_vhost import FakeVhost
from tests.unit.virtio.guest_side import Guest
from tests.unit.virtio.net_side import ETHERTYPE, MAC, PEER, NetDriver, frame

PLAIN = F_VERSION_1 | F_MRG_RXBUF
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1


class Interface:
    """A new tap interface, up, and a packet socket on the host's side of it."""

    def __init__(self) -> None:
        try:
            self.fd = open_tap()
        except TapError as error:
            pytest.skip(str(error))
        tap = Tap(self.fd)
        self.name = tap.name
        control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with control:
            request = struct.pack("<16sH22x", self.name.encode(), 0)
            flags = struct.unpack_from("<16sH", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("<16sH22x", self.name.encode(), flags | _IFF_UP))
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
        self.socket.bind((self.name, ETHERTYPE))
        self.socket.settimeout(10)


@pytest.fixture
def interface() -> Iterator[Interface]:
    interface = Interface()
    yield interface
    interface.socket.close()


def ours(driver: NetDriver, count: int) -> list[bytes]:
    """Frames of the test; the host has some of its own to send."""
    frames: list[bytes] = []
    deadline = time.monotonic() + 10
    while len(frames) < count:
        assert time.monotonic() < deadline
        frames += [one for one in driver.received() if one[12:14] == ETHERTYPE.to_bytes(2, "big")]
        select.select((), (), (), 0.001)
    return frames


@pytest.mark.parametrize(
    "features",
    [PLAIN, PLAIN | F_RING_PACKED | F_EVENT_IDX, F_VERSION_1],
    ids=["split", "packed", "no-merge"],
)
def test_frames_pass_both_ways(interface: Interface, features: int) -> None:
    guest = Guest(TapNet(interface.fd, MAC))
    driver = NetDriver(guest, features, buffer_bytes=600 if features & F_MRG_RXBUF else 1600)
    driver.offer(200)
    sent = [frame(bytes([n]) * size) for n, size in enumerate((46, 100, 1500))]
    for one in sent:
        driver.send(one, cut=(12, 30))
        assert interface.socket.recv(2000) == one
    driver.sent(3)
    back = [frame(bytes([n]) * size, MAC, PEER) for n, size in enumerate((46, 700, 1500))]
    for one in back:
        interface.socket.send(one)
    assert ours(driver, 3) == back
    guest.close()
    assert interface.name not in [name for _, name in socket.if_nameindex()]


def test_checksum_and_segments_are_finished_by_the_host(interface: Interface) -> None:
    """What the driver leaves undone arrives done where it must be: a TSO packet of 4000 bytes is taken."""
    guest = Guest(TapNet(interface.fd, MAC))
    features = PLAIN | F_CSUM | net.F_HOST_TSO4
    assert guest.offered() & features == features
    driver = NetDriver(guest, features)
    payload = bytes(4000)
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 1, 5 << 4, 0x10, 1000, 0, 0)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40 + len(payload), 1, 0, 64, 6, 0, b"\n\0\0\1", b"\n\0\0\2")
    packet = PEER + MAC + b"\x08\x00" + ip + tcp + payload
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    listener.bind((interface.name, 0x0800))
    listener.settimeout(10)
    header = struct.pack("<BBHHHHH", 1, 1, 54, 1000, 34, 16, 0)
    driver.send(packet, header=header)
    driver.sent(1)
    received = listener.recv(70000)
    assert received[14:18] == ip[:4] and received[54:] == payload
    listener.close()
    guest.close()


def test_driver_that_takes_no_offload_is_given_none(interface: Interface) -> None:
    device = TapNet(interface.fd, MAC)
    guest = Guest(device)
    guest.start(PLAIN, (256, 256))
    assert device._largest == HEADER_BYTES + 1518
    guest.start(PLAIN | net.F_GUEST_CSUM | net.F_GUEST_TSO4, (256, 256))
    assert device._largest == HEADER_BYTES + net.MAX_FRAME
    guest.close()


def test_frame_too_large_for_a_buffer_is_dropped(interface: Interface) -> None:
    guest = Guest(TapNet(interface.fd, MAC))
    driver = NetDriver(guest, F_VERSION_1, buffer_bytes=200)
    driver.offer(20)
    interface.socket.send(frame(b"x" * 1000, MAC, PEER))
    interface.socket.send(frame(b"y" * 100, MAC, PEER))
    assert ours(driver, 1) == [frame(b"y" * 100, MAC, PEER)]
    guest.close()


def test_rubbish_from_the_driver_is_taken_and_dropped(interface: Interface) -> None:
    guest = Guest(TapNet(interface.fd, MAC))
    driver = NetDriver(guest, PLAIN)
    driver.send(b"", header=bytes(3))
    driver.send(b"x" * 60, header=b"\xff" * 12)
    driver.send(bytes(100000))
    driver.sent(3)
    driver.send(frame(b"good" * 20))
    assert interface.socket.recv(2000) == frame(b"good" * 20)
    guest.close()


@pytest.fixture
def vhost(monkeypatch: pytest.MonkeyPatch) -> FakeVhost:
    return FakeVhost(monkeypatch, F_MRG_RXBUF)


def test_vhost_offers_what_tap_and_kernel_have(interface: Interface, vhost: FakeVhost) -> None:
    guest = Guest(VhostTapNet(interface.fd, vhost.fd, MAC, mtu=1400))
    rings = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
    own = net.F_MAC | net.F_STATUS | net.F_MTU
    offloads = net.GUEST_OFFLOADS | net.HOST_OFFLOADS
    assert guest.offered() == rings | own | offloads | F_MRG_RXBUF
    guest.start(PLAIN | F_CSUM | net.F_MAC, (256, 256))
    assert vhost.driver_features == PLAIN
    assert vhost.backends == {0: interface.fd, 1: interface.fd}
    guest.write(20, 1, 0)
    assert vhost.backends == {0: -1, 1: -1}
    guest.close()


def test_vhost_that_refuses_the_interface_needs_reset(interface: Interface, vhost: FakeVhost) -> None:
    guest = Guest(VhostTapNet(interface.fd, vhost.fd, MAC))
    reasons: list[str] = []
    guest.device.on_failure = reasons.append
    vhost.refuse["NET_SET_BACKEND"] = errno.EBADFD
    guest.start(PLAIN, (256, 256))
    assert reasons == ["net: vhost-net: VHOST_NET_SET_BACKEND: File descriptor in bad state"]
    assert guest.status & STATUS_NEEDS_RESET
    guest.close()


def test_tap_name_that_cannot_be_is_one_clear_line() -> None:
    for name in ("x" * 16, "a/b", "a\0b"):
        with pytest.raises(TapError, match="not the name of an interface"):
            open_tap(name)


def test_descriptor_that_is_no_tap_is_one_clear_line() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(TapError, match="not a tap interface"):
        Tap(fd)
    os.close(fd)


def test_interface_of_another_kind_names_the_mend() -> None:
    try:
        os.close(open_tap())
    except TapError as error:
        pytest.skip(str(error))
    with pytest.raises(TapError, match="delete it or choose another name"):
        open_tap("lo")
