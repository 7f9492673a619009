# SPDX-License-Identifier: Apache-2.0
"""The network device on a stream socket: frames both ways, back pressure, a peer that ends or talks nonsense."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator

import pytest

from rootvisor.pci import registers as pci
from rootvisor.virtio.net import F_GUEST_CSUM, F_MRG_RXBUF, F_STATUS, HEADER_BYTES
from rootvisor.virtio.net_stream import PasstNet
from rootvisor.virtio.registers import F_EVENT_IDX, F_RING_PACKED, F_VERSION_1, STATUS_NEEDS_RESET
from tests.unit.virtio.guest_side import Guest, wait_until
from tests.unit.virtio.net_side import MAC, NetDriver, frame

PLAIN = F_VERSION_1 | F_MRG_RXBUF
VARIANTS = pytest.mark.parametrize(
    "features",
    [PLAIN, PLAIN | F_EVENT_IDX, PLAIN | F_RING_PACKED, PLAIN | F_RING_PACKED | F_EVENT_IDX, F_VERSION_1],
    ids=["split", "split-event", "packed", "packed-event", "no-merge"],
)


class Wire:
    """The other end of the socket."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(10)
        self.device = PasstNet(theirs.detach(), MAC)
        self.guest = Guest(self.device)
        self.reasons: list[str] = []
        self.device.on_failure = self.reasons.append

    def put(self, data: bytes) -> None:
        self.socket.sendall(len(data).to_bytes(4, "big") + data)

    def get(self) -> bytes:
        length = int.from_bytes(self.read(4), "big")
        return self.read(length)

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            assert part
            data += part
        return data


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.guest.close()
    wire.socket.close()


@VARIANTS
def test_frames_of_all_sizes_arrive_whole(wire: Wire, features: int) -> None:
    driver = NetDriver(wire.guest, features, buffer_bytes=2048 if features & F_MRG_RXBUF else 66000)
    many = bool(features & F_MRG_RXBUF)
    frames = [
        frame(random.Random(size).randbytes(size)) for size in (1, 46, 1000, 2022, 2023, 4000, 9000, 65520)
    ]
    driver.offer(60 if many else 10)
    for one in frames:
        wire.put(one)
    assert driver.receive(len(frames)) == frames
    assert not driver.received()


@VARIANTS
def test_frames_of_all_sizes_are_sent_whole(wire: Wire, features: int) -> None:
    driver = NetDriver(wire.guest, features)
    frames = [frame(random.Random(size).randbytes(size)) for size in (0, 46, 1486, 30000, 65520)]
    for number, one in enumerate(frames):
        driver.send(one, cut=((), (12,), (5, 20), (12, 26, 1000), (40, 41))[number] if len(one) > 40 else ())
    for one in frames:
        assert wire.get() == one
    driver.sent(len(frames))


def test_frames_cut_anywhere_by_the_socket_arrive_whole(wire: Wire) -> None:
    driver = NetDriver(wire.guest, PLAIN, buffer_bytes=512)
    driver.offer(200)
    frames = [frame(bytes([n]) * (50 * n)) for n in range(1, 30)]
    stream = b"".join(len(one).to_bytes(4, "big") + one for one in frames)
    rng = random.Random(4)
    received: list[bytes] = []
    while stream:
        count = rng.choice((1, 2, 3, 5, 100, 3000))
        wire.socket.sendall(stream[:count])
        stream = stream[count:]
        received += driver.received()
    received += driver.receive(len(frames) - len(received))
    assert received == frames


def test_frame_waits_until_there_is_room(wire: Wire) -> None:
    driver = NetDriver(wire.guest, PLAIN)
    driver.offer(2)
    wire.put(frame(b"a" * 5000))
    wire.put(frame(b"b" * 50))
    wait_until(lambda: wire.device.counters[0].kicks >= 1)
    assert not driver.received()
    driver.offer(2)
    assert driver.receive(2) == [frame(b"a" * 5000), frame(b"b" * 50)]


def test_frame_larger_than_the_whole_ring_is_dropped(wire: Wire) -> None:
    driver = NetDriver(wire.guest, PLAIN, size=4)
    driver.offer(4)
    wire.put(frame(b"x" * 20000))
    wire.put(frame(b"y" * 100))
    assert driver.receive(1) == [frame(b"y" * 100)]


def test_frame_larger_than_a_buffer_is_dropped_without_merging(wire: Wire) -> None:
    driver = NetDriver(wire.guest, F_VERSION_1, buffer_bytes=1526)
    driver.offer(4)
    wire.put(frame(b"x" * 1600))
    wire.put(frame(b"y" * 100))
    assert driver.receive(1) == [frame(b"y" * 100)]


def test_received_checksums_count_as_verified(wire: Wire) -> None:
    driver = NetDriver(wire.guest, PLAIN | F_GUEST_CSUM)
    driver.offer(1)
    wire.put(frame(b"x" * 50))
    driver.receive(1)
    assert driver.headers == [b"\2" + bytes(9) + b"\1\0"]


def test_sender_waits_for_a_full_socket(wire: Wire) -> None:
    """More than the socket holds: everything arrives, in order."""
    driver = NetDriver(wire.guest, PLAIN)
    frames = [frame(random.Random(n).randbytes(60000 + n)) for n in range(40)]
    places = [wire.guest.memory.place(bytes(HEADER_BYTES) + one) for one in frames]
    for n in range(250):
        wire.guest.rings[1].add([(places[n % 40], HEADER_BYTES + len(frames[n % 40]), False)])
    wire.guest.kick(1)
    wait_until(lambda: bool(wire.device._send_rest))
    for n in range(250):
        assert wire.get() == frames[n % 40]
    driver.sent(250)


def test_pause_in_a_full_socket_sends_each_frame_once(wire: Wire) -> None:
    driver = NetDriver(wire.guest, PLAIN)
    gpa = wire.guest.memory.place(bytes(12) + frame(b"z" * 65000))
    ring = wire.guest.rings[1]
    for _ in range(256):
        ring.add([(gpa, 65026, False)])
    driver.guest.kick(1)
    wait_until(lambda: bool(wire.device._send_rest))
    wire.guest.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    assert not wire.device._send_rest and wire.device._backlog
    wire.guest.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
    for _ in range(256):
        assert wire.get() == frame(b"z" * 65000)
    driver.sent(256)


def test_reset_within_a_frame_keeps_the_stream_in_step(wire: Wire) -> None:
    driver = NetDriver(wire.guest, PLAIN)
    driver.offer(4)
    wire.socket.sendall((1000).to_bytes(4, "big") + b"q" * 500)
    wait_until(lambda: bool(wire.device._frame_rest))
    wire.guest.write(20, 1, 0)
    wire.guest.memory._free = wire.guest.memory.regions[0].gpa
    driver = NetDriver(wire.guest, PLAIN)
    driver.offer(4)
    wire.socket.sendall(b"q" * 500)
    wire.put(frame(b"fresh" * 10))
    assert driver.receive(1) == [frame(b"fresh" * 10)]


def test_end_of_the_peer_takes_the_link_down(wire: Wire) -> None:
    driver = NetDriver(wire.guest, PLAIN | F_STATUS)
    wire.socket.close()
    wait_until(lambda: bool(wire.reasons))
    assert wire.reasons == ["net: passt has ended"]
    assert wire.guest.read(0x106, 2) == 0 and wire.guest.vectors[0].count == 1
    assert not wire.guest.status & STATUS_NEEDS_RESET
    driver.send(frame(b"into the void"))
    driver.sent(1)


@pytest.mark.parametrize("length", [0, 70000, 0xFFFFFFFF])
def test_frame_of_impossible_length_takes_the_link_down(wire: Wire, length: int) -> None:
    driver = NetDriver(wire.guest, PLAIN | F_STATUS)
    driver.offer(64)
    wire.socket.sendall(length.to_bytes(4, "big") + bytes(100))
    wait_until(lambda: bool(wire.reasons))
    assert wire.reasons == [f"net: passt sends a frame of {length} bytes"]
    assert wire.guest.read(0x106, 2) == 0


def _short(driver: NetDriver) -> None:
    driver.send(b"", header=bytes(5))


def _header_only(driver: NetDriver) -> None:
    driver.send(b"")


def _huge(driver: NetDriver) -> None:
    driver.send(bytes(80000))


@pytest.mark.parametrize("send", [_short, _header_only, _huge])
def test_no_frame_is_taken_and_dropped(wire: Wire, send: Callable[[NetDriver], None]) -> None:
    driver = NetDriver(wire.guest, PLAIN)
    send(driver)
    driver.sent(1)
    driver.send(frame(b"good" * 20))
    assert wire.get() == frame(b"good" * 20)


def test_malformed_request_behind_a_frame_does_not_stop_the_wire_for_good(wire: Wire) -> None:
    driver = NetDriver(wire.guest, PLAIN)
    good = wire.guest.memory.place(bytes(HEADER_BYTES) + frame(b"first" * 10))
    ring = wire.guest.rings[1]
    ring.add([(good, HEADER_BYTES + 64, False)])
    ring.add([(0, 64, False)])
    wire.guest.kick(1)
    wait_until(lambda: bool(wire.guest.status & STATUS_NEEDS_RESET))
    wire.guest.write(20, 1, 0)
    driver = NetDriver(wire.guest, PLAIN)
    driver.send(frame(b"second" * 10))
    assert [wire.get(), wire.get()] == [frame(b"first" * 10), frame(b"second" * 10)]


def test_receive_buffer_without_room_for_a_header_needs_reset(wire: Wire) -> None:
    driver = NetDriver(wire.guest, PLAIN, buffer_bytes=HEADER_BYTES - 1)
    driver.offer(1)
    wire.put(frame(b"x" * 50))
    wait_until(lambda: bool(wire.guest.status & STATUS_NEEDS_RESET))
    assert wire.reasons == ["net: queue 0: a receive buffer of 11 bytes"]


def test_descriptor_that_is_no_socket_is_value_error() -> None:
    with open("/dev/null") as null, pytest.raises(ValueError, match="not a socket"):
        PasstNet(null.fileno(), MAC)
