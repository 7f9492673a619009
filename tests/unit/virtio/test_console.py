# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from rootvisor.virtio.console import F_MULTIPORT, F_SIZE, Console, Port
from rootvisor.virtio.registers import F_EVENT_IDX, F_RING_PACKED, F_VERSION_1, STATUS_NEEDS_RESET
from tests.unit.virtio.guest_side import Guest, wait_until

READY, ADD, PORT_READY, CONSOLE, RESIZE, OPEN, NAME = 0, 1, 3, 4, 5, 6, 7


class Pipe:
    """A pipe of which the test holds one end and the device the other."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self._open = {self.reader, self.writer}

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes; a test that hangs here fails by its time-out."""
        data = b""
        while len(data) < count:
            part = os.read(self.reader, count - len(data))
            if not part:
                break
            data += part
        return data

    def close(self, *fds: int) -> None:
        """Close one end or what is open still; never a number that somebody else may have got since."""
        for fd in fds or tuple(self._open):
            self._open.remove(fd)
            os.close(fd)


class Setup:
    """A console on port 0, an input port 1 and an output port 2, and a driver for them."""

    def __init__(
        self,
        features: int = F_VERSION_1 | F_MULTIPORT | F_SIZE,
        *,
        rows_first: bool = False,
        alone: bool = False,
    ) -> None:
        self.screen, self.keys, self.source, self.sink = Pipe(), Pipe(), Pipe(), Pipe()
        self.events: list[str] = []
        self.ports = [Port("", self.keys.reader, self.screen.writer, True)]
        if not alone:
            self.ports += [
                Port("stdin", self.source.reader, None, on_close=self._note("stdin closed")),
                Port(
                    "stdout",
                    None,
                    self.sink.writer,
                    on_close=self._note("stdout closed"),
                    on_output_lost=self._note("stdout lost"),
                ),
            ]
        self.console = Console(self.ports, (80, 25), rows_first=rows_first)
        # The device has its own duplicates: an end closed here is closed for good.
        self.screen.close(self.screen.writer)
        self.keys.close(self.keys.reader)
        if not alone:
            self.source.close(self.source.reader)
            self.sink.close(self.sink.writer)
        self.guest = Guest(self.console)
        self.messages: list[tuple[int, int, int, bytes]] = []
        self._rooms: dict[int, int] = {}
        self.guest.start(features, self.console.queue_sizes)
        if features & F_MULTIPORT:
            self.post_control_buffers(16)

    def _note(self, event: str) -> Callable[[], None]:
        return lambda: self.events.append(event)

    def post_control_buffers(self, count: int) -> None:
        for _ in range(count):
            room = self.guest.memory.allocate(64)
            self._rooms[self.guest.rings[2].add([(room, 64, True)])] = room
        self.guest.kick(2)

    def control(self, port: int, event: int, value: int) -> None:
        data = self.guest.memory.place(struct.pack("<IHH", port, event, value))
        self.guest.request(3, [(data, 8, False)])

    def collect(self) -> list[tuple[int, int, int, bytes]]:
        for head, length in self.guest.rings[2].used():
            data = self.guest.memory.read(self._rooms[head], length)
            self.messages.append((*struct.unpack_from("<IHH", data), data[8:]))
        return self.messages

    def expect(self, *messages: tuple[int, int, int, bytes]) -> None:
        """These messages and no others have come since the last call."""
        wait_until(lambda: len(self.collect()) >= len(messages))
        assert self.messages == list(messages)
        self.messages.clear()

    def introduce(self) -> None:
        self.control(0, READY, 1)
        self.expect(*[(port, ADD, 0, b"") for port in range(3)])
        for port in range(3):
            self.control(port, PORT_READY, 1)
        self.expect(
            (0, CONSOLE, 1, b""),
            (0, RESIZE, 0, struct.pack("<HH", 80, 25)),
            (0, OPEN, 1, b""),
            (1, OPEN, 1, b""),
            (1, NAME, 1, b"stdin"),
            (2, OPEN, 1, b""),
            (2, NAME, 1, b"stdout"),
        )
        for port in range(3):
            self.control(port, OPEN, 1)

    def give_input_buffers(self, queue: int, count: int, size: int = 4096) -> list[int]:
        rooms = [self.guest.memory.allocate(size) for _ in range(count)]
        for room in rooms:
            self.guest.rings[queue].add([(room, size, True)])
        self.guest.kick(queue)
        return rooms

    def received(self, queue: int, rooms: list[int]) -> Callable[[int], bytes]:
        """Collects what came into `rooms`, in order, until so many bytes are there."""
        data = bytearray()

        def until(count: int) -> bytes:
            def enough() -> bool:
                for _, length in self.guest.rings[queue].used():
                    data.extend(self.guest.memory.read(rooms.pop(0), length))
                return len(data) >= count

            wait_until(enough)
            return bytes(data)

        return until

    def close(self) -> None:
        self.guest.close()
        for pipe in (self.screen, self.keys, self.source, self.sink):
            pipe.close()


@pytest.fixture
def setup() -> Iterator[Setup]:
    setup = Setup()
    setup.introduce()
    yield setup
    setup.close()


def test_single_console_offers_no_multiport() -> None:
    setup = Setup(F_VERSION_1 | F_SIZE, alone=True)
    assert not setup.guest.offered() & F_MULTIPORT
    assert len(setup.console.queue_sizes) == 2
    assert struct.unpack("<HHI", setup.guest.read(0x100, 8).to_bytes(8, "little")) == (80, 25, 1)
    data = setup.guest.memory.place(b"hello")
    setup.guest.request(1, [(data, 5, False)])
    assert setup.screen.read(5) == b"hello"
    rooms = setup.give_input_buffers(0, 2)
    os.write(setup.keys.writer, b"keys")
    assert setup.received(0, rooms)(4) == b"keys"
    interrupts = setup.guest.vectors[0].count
    setup.console.resize(100, 40)
    wait_until(lambda: setup.guest.vectors[0].count == interrupts + 1)
    assert setup.guest.read(0x100, 4) == 40 << 16 | 100
    assert setup.guest.read(21, 1) == 1
    setup.close()


def test_driver_without_multiport_gets_port_0() -> None:
    setup = Setup(F_VERSION_1)
    data = setup.guest.memory.place(b"hello")
    setup.guest.request(1, [(data, 5, False)])
    assert setup.screen.read(5) == b"hello"
    setup.close()


def test_resize_reaches_the_console_port(setup: Setup) -> None:
    setup.console.resize(132, 50)
    setup.expect((0, RESIZE, 0, struct.pack("<HH", 132, 50)))


def test_resize_in_the_order_of_older_linux() -> None:
    setup = Setup(rows_first=True)
    setup.control(0, READY, 1)
    setup.control(0, PORT_READY, 1)
    wait_until(lambda: (0, RESIZE, 0, struct.pack("<HH", 25, 80)) in setup.collect())
    setup.close()


def test_input_waits_until_the_guest_opens_the_port() -> None:
    setup = Setup()
    os.write(setup.source.writer, b"early")
    rooms = setup.give_input_buffers(4, 4)
    setup.control(0, READY, 1)
    assert not setup.guest.rings[4].used()
    setup.control(1, PORT_READY, 1)
    setup.control(1, OPEN, 1)
    assert setup.received(4, rooms)(5) == b"early"
    setup.close()


def test_end_of_input_closes_the_port_after_its_data(setup: Setup) -> None:
    rooms = setup.give_input_buffers(4, 2)
    os.write(setup.source.writer, b"last words")
    setup.source.close(setup.source.writer)
    assert setup.received(4, rooms)(10) == b"last words"
    setup.expect((1, OPEN, 0, b""))
    assert setup.ports[1].input_ended


def test_end_of_console_input_is_not_told(setup: Setup) -> None:
    setup.give_input_buffers(0, 2)
    setup.keys.close(setup.keys.writer)
    wait_until(lambda: setup.ports[0].input_ended)
    data = setup.guest.memory.place(b"still here")
    setup.guest.request(1, [(data, 10, False)])
    assert setup.screen.read(10) == b"still here"
    setup.expect()


def test_guest_close_is_told_after_its_output(setup: Setup) -> None:
    ring = setup.guest.rings[7]
    size = 1 << 16
    for _ in range(4):
        ring.add([(setup.guest.memory.allocate(size), size, False)])
    setup.guest.kick(7)
    wait_until(lambda: bool(ring.used()) or setup.console.counters[7].kicks >= 2)
    setup.control(2, OPEN, 0)
    assert not setup.events
    assert len(setup.sink.read(4 * size)) == 4 * size
    wait_until(lambda: setup.events == ["stdout closed"])


def test_output_held_at_reset_is_not_lost(setup: Setup) -> None:
    ring = setup.guest.rings[7]
    size = 1 << 16
    for value in range(8):
        room = setup.guest.memory.place(bytes([value]) * size)
        ring.add([(room, size, False)])
    setup.guest.kick(7)
    wait_until(lambda: setup.console.counters[7].kicks >= 2)
    setup.guest.write(20, 1, 0)
    reader = threading.Thread(target=setup.guest.function.close)
    reader.start()
    assert setup.sink.read(8 * size) == b"".join(bytes([value]) * size for value in range(8))
    reader.join()


def test_reader_gone_drops_output_and_tells(setup: Setup) -> None:
    setup.sink.close(setup.sink.reader)
    data = setup.guest.memory.place(b"nobody")
    for _ in range(3):
        setup.guest.request(7, [(data, 6, False)])
    assert setup.events == ["stdout lost"]


def test_stuck_terminal_does_not_hold_the_console(setup: Setup) -> None:
    room = setup.guest.memory.place(b"x" * (1 << 16))
    for _ in range(8):
        setup.guest.request(1, [(room, 1 << 16, False)])
    assert setup.screen.read(8 << 16) == b"x" * (8 << 16)


@pytest.mark.parametrize("features", [0, F_RING_PACKED, F_EVENT_IDX, F_RING_PACKED | F_EVENT_IDX])
def test_megabytes_pass_through_unharmed_in_both_directions(features: int) -> None:
    setup = Setup(F_VERSION_1 | F_MULTIPORT | F_SIZE | features)
    setup.introduce()
    total = 8 << 20
    payload = os.urandom(1 << 20) * 8
    feeder = threading.Thread(target=_write_all, args=(setup.source.writer, payload))
    sunk = bytearray()
    drain = threading.Thread(target=lambda: sunk.extend(setup.sink.read(total)))
    feeder.start()
    drain.start()
    memory, source, sink = setup.guest.memory, setup.guest.rings[4], setup.guest.rings[7]
    rooms = {source.add([(room, 4096, True)]): room for room in (memory.allocate(4096) for _ in range(64))}
    setup.guest.kick(4)
    moved, queued = 0, 0
    outgoing: dict[int, int] = {}

    def echo() -> bool:
        """Send what came in out again, from the same buffer, then reuse it."""
        nonlocal moved, queued
        for head, _ in sink.used():
            room = outgoing.pop(head)
            rooms[source.add([(room, 4096, True)])] = room
            setup.guest.kick(4)
        for head, length in source.used():
            room = rooms.pop(head)
            outgoing[sink.add([(room, length, False)])] = room
            moved += length
            setup.guest.kick(7)
        return moved == total and not outgoing

    wait_until(echo, 60)
    feeder.join()
    drain.join()
    assert sunk == payload
    assert setup.console.counters[4].bytes == setup.console.counters[7].bytes == total
    setup.close()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def test_hostile_control_messages_are_ignored(setup: Setup) -> None:
    for message in (
        (99, PORT_READY, 1),
        (0xFFFFFFFF, OPEN, 1),
        (0, 77, 1),
        (0, READY, 1),
        (2, ADD, 1),
        (1, PORT_READY, 0),
    ):
        setup.control(*message)
    setup.guest.request(3, [(setup.guest.memory.allocate(8), 3, False)])
    setup.expect()
    assert not setup.guest.status & STATUS_NEEDS_RESET


def test_flood_of_unread_answers_needs_reset() -> None:
    setup = Setup()
    setup.control(0, READY, 1)
    data = setup.guest.memory.place(struct.pack("<IHH", 1, PORT_READY, 1))
    ring = setup.guest.rings[3]
    for _ in range(3000):
        if setup.guest.status & STATUS_NEEDS_RESET:
            break
        ring.add([(data, 8, False)])
        setup.guest.kick(3)
        wait_until(lambda: bool(ring.used()) or bool(setup.guest.status & STATUS_NEEDS_RESET))
    assert setup.guest.status & STATUS_NEEDS_RESET
    setup.close()


def test_closed_descriptors_are_like_none() -> None:
    pipe = Pipe()
    pipe.close()
    port = Port("x", pipe.reader, pipe.writer)
    assert not port.input_ended
    guest = Guest(Console([port]))
    guest.start(F_VERSION_1, guest.device.queue_sizes)
    guest.request(1, [(guest.memory.place(b"x"), 1, False)])
    guest.close()


def test_no_ports_is_value_error() -> None:
    with pytest.raises(ValueError, match="1 to 31 ports"):
        Console([])


def test_malformed_input_ring_met_when_input_comes_is_the_drivers_fault() -> None:
    reader, writer = os.pipe()
    guest = Guest(Console([Port("", reader, None, True)]))
    reasons: list[str] = []
    guest.device.on_failure = reasons.append
    guest.start(F_VERSION_1, [64, 64])
    guest.rings[0].add([(0, 64, True)])
    guest.kick(0)
    os.write(writer, b"x")
    wait_until(lambda: bool(reasons))
    assert reasons[0].startswith("console: queue 0: ")
    guest.close()
    os.close(reader)
    os.close(writer)
