# SPDX-License-Identifier: Apache-2.0
"""Devices are paused, saved, and go on in another process' place: a fresh device on a copy of the guest's memory."""

from __future__ import annotations

import fcntl
import marshal
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rootvisor.pci import registers as pci
from rootvisor.virtio import net, vsock
from rootvisor.virtio import vhost_user as vu
from rootvisor.virtio.balloon import F_STATS_VQ, Balloon
from rootvisor.virtio.block import Block
from rootvisor.virtio.console import F_MULTIPORT, Console, Port
from rootvisor.virtio.device import RING_FEATURES, VirtioDevice
from rootvisor.virtio.disk_image import DiskImage
from rootvisor.virtio.net_stream import PasstNet
from rootvisor.virtio.registers import (
    F_EVENT_IDX,
    F_RING_PACKED,
    F_VERSION_1,
    STATUS_DRIVER_OK,
    STATUS_NEEDS_RESET,
)
from rootvisor.virtio.rng import Rng
from rootvisor.virtio.vhost import VhostError
from rootvisor.virtio.vhost_user import VhostUserDevice
from rootvisor.virtio.vsock import Vsock
from tests.unit.virtio.fake_vhost import FakeVhost
from tests.unit.virtio.guest_side import RAM_BASE, RAM_BYTES, Guest, Platform, wait_until
from tests.unit.virtio.net_side import MAC, NetDriver, frame
from tests.unit.virtio.test_vhost_user_block import Disk, real
from tests.unit.virtio.vhost_user_backend import Backend

FORMATS = pytest.mark.parametrize(
    "features",
    [F_VERSION_1, F_VERSION_1 | F_EVENT_IDX, F_VERSION_1 | F_RING_PACKED | F_EVENT_IDX],
    ids=["split", "split-event", "packed-event"],
)


class Moved(Guest):
    """The driver of `guest`, and its memory, in front of a new device with the saved state."""

    def __init__(self, guest: Guest, device: VirtioDevice, state: dict[str, Any]) -> None:
        super().__init__(device, Platform())
        self.root.reset()
        self.memory.view(RAM_BASE, RAM_BYTES)[:] = guest.memory.view(RAM_BASE, RAM_BYTES)
        self.memory._free = guest.memory._free
        self.rings = guest.rings
        for ring in self.rings.values():
            ring.memory = self.memory
        self.function.restore(state)
        self.bar = self.function.bar_address(self.function.bars[0])
        self.vectors = dict(enumerate(self.platform.vectors))


def move(guest: Guest, device: VirtioDevice) -> Moved:
    """Snapshot and restore; the state survives its file form."""
    guest.function.pause()
    state = marshal.loads(marshal.dumps(guest.function.save()))
    moved = Moved(guest, device, state)
    guest.close()
    moved.function.resume()
    return moved


def fill(guest: Guest) -> bytes:
    room = guest.memory.allocate(64)
    return guest.memory.read(room, guest.request(0, [(room, 64, True)]))


@FORMATS
def test_rings_go_on_where_they_were(features: int) -> None:
    guest = Guest(Rng())
    guest.start(features, [8])
    for count in range(1, 30):
        assert len(fill(guest)) == 64
        if count % 5 == 0:
            guest = move(guest, Rng())
    assert guest.status & STATUS_DRIVER_OK
    guest.write(20, 1, 0)
    guest.start(features, [8])
    assert len(fill(guest)) == 64
    guest.close()


def test_registers_interrupts_and_configuration_space_are_the_same() -> None:
    guest = Guest(Rng())
    guest.start(F_VERSION_1, [8])
    guest.write(0, 4, 1)
    guest.write(8, 4, 1)
    guest.write(22, 2, 5)
    guest.config_write(pci.INTERRUPT_LINE, 1, 0x55)

    def look(guest: Guest) -> list[int]:
        registers = [guest.read(offset, 4) for offset in range(0, 0x40, 4)]
        table = [guest.read(0x2000 + offset, 4) for offset in range(0, 32, 4)]
        return registers + table + [guest.config_read(offset, 4) for offset in range(0, 256, 4)]

    seen = look(guest)
    moved = move(guest, Rng())
    assert look(moved) == seen
    assert moved.platform.vectors[0].calls[:1] == [("program", 0xFEE00000, 0x40)]
    assert not any(vector.masked for vector in moved.platform.vectors)
    assert moved.platform.ioeventfds.keys() == {moved.bar + 0x1000}
    moved.close()


def test_request_made_while_paused_is_served_after(features: int = F_VERSION_1) -> None:
    guest = Guest(Rng())
    guest.start(features, [8])
    guest.function.pause()
    ring = guest.rings[0]
    ring.add([(guest.memory.allocate(16), 16, True)])
    guest.kick(0)
    wait_until(lambda: guest.device.counters[0].kicks >= 2)
    assert not ring.used()
    guest.function.resume()
    wait_until(lambda: bool(ring.used()))
    guest.close()


def test_request_whose_kick_was_lost_is_served_by_the_restored_device() -> None:
    guest = Guest(Rng())
    guest.start(F_VERSION_1, [8])
    guest.function.pause()
    guest.rings[0].add([(guest.memory.allocate(16), 16, True)])
    moved = move(guest, Rng())
    wait_until(lambda: bool(moved.rings[0].used()))
    assert moved.vectors[1].count
    moved.close()


def test_interrupt_that_waits_for_its_unmask_still_does() -> None:
    guest = Guest(Rng())
    guest.start(F_VERSION_1, [8])
    guest.write(0x2010 + 12, 4, 1)
    fill(guest)
    assert guest.read(0x3000, 8) == 2
    moved = move(guest, Rng())
    assert moved.read(0x3000, 8) == 2
    before = len(moved.platform.vectors)
    moved.write(0x2010 + 12, 4, 0)
    assert [vector.count for vector in moved.platform.vectors[before:]] == [1]
    moved.close()


def test_device_without_a_driver_moves_too() -> None:
    guest = Guest(Rng())
    moved = move(guest, Rng())
    moved.start(F_VERSION_1, [8])
    assert len(fill(moved)) == 64
    moved.close()


def test_queue_enabled_before_driver_ok_is_served_after() -> None:
    guest = Guest(Rng())
    assert guest.negotiate(F_VERSION_1)
    guest.enable_msix()
    guest.set_queue(0, 8)
    moved = move(guest, Rng())
    moved.write(20, 1, 15)
    assert len(fill(moved)) == 64
    moved.close()


def test_device_that_needs_reset_still_does() -> None:
    guest = Guest(Rng())
    guest.start(F_VERSION_1, [8])
    guest.rings[0].add([(0, 64, True)])
    guest.kick(0)
    wait_until(lambda: bool(guest.status & STATUS_NEEDS_RESET))
    moved = move(guest, Rng())
    assert moved.status & STATUS_NEEDS_RESET and not moved.device.active
    moved.write(20, 1, 0)
    moved.start(F_VERSION_1, [8])
    assert len(fill(moved)) == 64
    moved.close()


def test_disk_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    image = DiskImage(str(path))
    guest = Guest(Block(image))
    guest.start(RING_FEATURES & ~F_RING_PACKED, [128])
    sectors = [bytes([number + 1]) * 512 for number in range(40)]
    for number, sector in enumerate(sectors):
        header = guest.memory.place(struct.pack("<IIQ", 1, 0, number))
        data, status = guest.memory.place(sector), guest.memory.place(b"\xff")
        guest.request(0, [(header, 16, False), (data, 512, False), (status, 1, True)])
        assert guest.memory.read(status, 1) == b"\0"
        if number % 10 == 9:
            fcntl.flock(image.fd, fcntl.LOCK_UN)  # the old device is closed when the new one is there
            image = DiskImage(str(path))
            guest = move(guest, Block(image))
    guest.close()
    assert path.read_bytes()[: 40 * 512] == b"".join(sectors)


class Streams:
    """Pipes behind two console ports."""

    def __init__(self) -> None:
        self.input, self.output = os.pipe(), os.pipe()

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += os.read(self.output[0], count - len(data))
        return data

    def device(self) -> Console:
        return Console([Port("", None, None, True), Port("data", self.input[0], self.output[1])])

    def close(self) -> None:
        for fd in (*self.input, *self.output):
            os.close(fd)


@pytest.fixture
def streams() -> Iterator[Streams]:
    streams = Streams()
    yield streams
    streams.close()


def test_console_ports_stay_open_and_output_is_not_lost(streams: Streams) -> None:
    guest = Guest(streams.device())
    guest.start(F_VERSION_1 | F_MULTIPORT, [64, 64, 32, 32, 64, 64])

    def control(port: int, event: int, value: int) -> None:
        message = guest.memory.place(struct.pack("<IHH", port, event, value))
        guest.request(3, [(message, 8, False)])

    for message in ((0, 0, 1), (1, 3, 1), (1, 6, 1)):
        control(*message)
    # More than the pipe takes: the rest waits in the device.
    text = random.Random(7).randbytes(200_000)
    place = guest.memory.place(text)
    guest.rings[5].add([(place, len(text), False)])
    guest.kick(5)
    device = guest.device
    assert isinstance(device, Console)
    wait_until(lambda: bool(device.ports[1]._held_rest))
    more = b"and what the guest wrote after the restore"
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(streams.read(len(text) + len(more))), daemon=True)
    reader.start()
    guest = move(guest, streams.device())
    assert guest.rings[5].used()
    guest.request(5, [(guest.memory.place(more), len(more), False)])
    reader.join(10)
    assert read == [text + more]
    os.write(streams.input[1], b"for the guest")
    room = guest.memory.allocate(64)
    assert guest.request(4, [(room, 64, True)]) == 13
    guest.close()


@FORMATS
def test_network_goes_on_with_another_backend(features: int) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    guest = Guest(PasstNet(theirs.detach(), MAC))
    driver = NetDriver(guest, features | net.F_MRG_RXBUF | net.F_STATUS)
    driver.offer(20)
    ours.sendall((60).to_bytes(4, "big") + frame(b"a" * 46))
    assert driver.receive(1) == [frame(b"a" * 46)]
    ours.sendall((6000).to_bytes(4, "big") + bytes(3000))
    device = guest.device
    assert isinstance(device, PasstNet)
    wait_until(lambda: bool(device._frame_rest))
    second, other = socket.socketpair()
    second.settimeout(10)
    driver.guest = guest = move(guest, PasstNet(other.detach(), MAC))
    driver.send(frame(b"b" * 50))
    assert second.recv(100) == (64).to_bytes(4, "big") + frame(b"b" * 50)
    second.sendall((5014).to_bytes(4, "big") + frame(b"c" * 5000))
    assert driver.receive(1) == [frame(b"c" * 5000)]
    guest.close()
    ours.close()
    second.close()


def test_link_that_is_down_stays_down() -> None:
    ours, theirs = socket.socketpair()
    device = PasstNet(theirs.detach(), MAC)
    guest = Guest(device)
    device.set_link(False)
    other, fresh = socket.socketpair()
    moved = move(guest, PasstNet(fresh.detach(), MAC))
    assert moved.read(0x106, 2) == 0
    moved.close()
    ours.close()
    other.close()


def test_balloon_knows_its_size_and_goes_on(tmp_path: Path) -> None:
    given: list[tuple[int, int]] = []

    def make() -> Balloon:
        return Balloon(4096, lambda gpa, size: given.append((gpa, size)))

    guest = Guest(make())
    guest.start(F_VERSION_1 | F_STATS_VQ, [128] * 4)
    place = guest.memory.place(struct.pack("<HQ", 4, 7))
    head = guest.rings[2].add([(place, 10, False)])
    guest.kick(2)
    device = guest.device
    assert isinstance(device, Balloon)
    wait_until(lambda: bool(device.statistics))
    device.resize(9 * 4096)
    guest.write(0x104, 4, 5)
    moved = move(guest, make())
    fresh = moved.device
    assert isinstance(fresh, Balloon)
    assert (fresh.size, fresh.actual) == (9 * 4096, 5 * 4096)
    wait_until(lambda: fresh.statistics == {"free_memory": 7})
    fresh.request_statistics()
    assert moved.rings[2].used() == [(head, 0)]
    data = moved.memory.place(struct.pack("<I", RAM_BASE // 4096))
    moved.request(0, [(data, 4, False)])
    assert given == [(RAM_BASE, 4096)]
    moved.close()


def test_vsock_goes_on_and_tells_that_connections_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = FakeVhost(monkeypatch, vsock.F_SEQPACKET)
    guest = Guest(Vsock(3, first.fd))
    guest.start(F_VERSION_1, (256, 256, 16))
    event = guest.memory.place(b"\xff" * 8)
    head = guest.rings[2].add([(event, 8, True)])
    first.rings[0]["base"], first.rings[1]["base"] = 17, 19
    guest.function.pause()
    assert not first.serving
    state = marshal.loads(marshal.dumps(guest.function.save()))
    second = FakeVhost(monkeypatch, vsock.F_SEQPACKET)
    moved = Moved(guest, Vsock(3, second.fd), state)
    assert "VSOCK_SET_RUNNING" not in second.log
    moved.function.resume()
    assert second.serving
    assert (second.rings[0]["base"], second.rings[1]["base"]) == (17, 19)
    assert os.eventfd_read(second.rings[0]["kick"]) == 1
    wait_until(lambda: moved.rings[2].used() == [(head, 4)])
    assert moved.memory.read(event, 4) == bytes(4)
    moved.close()
    monkeypatch.undo()
    guest.close()


def test_vhost_user_ring_goes_on_from_its_base() -> None:
    first, second = Backend(), Backend()
    guest = Guest(VhostUserDevice("test", first.fd, (8, 16), features=1))
    guest.start(F_VERSION_1 | 1, (8, 16))
    guest.function.pause()
    assert vu.GET_VRING_BASE in first.requests()
    state = marshal.loads(marshal.dumps(guest.function.save()))
    moved = Moved(guest, VhostUserDevice("test", second.fd, (8, 16), features=1), state)
    assert vu.SET_MEM_TABLE not in second.requests()
    moved.function.resume()
    for index in (0, 1):
        base = (vu.SET_VRING_BASE, struct.pack("<II", index, 42 + index), 0)
        assert base in second.log
        assert os.eventfd_read(second.fds[vu.SET_VRING_KICK, index]) == 1
    assert moved.vectors[1].count == 2
    guest.close()
    moved.close()
    first.close()
    second.close()


def test_backend_that_lacks_a_feature_in_use_is_refused() -> None:
    first, second = Backend(), Backend(features=F_VERSION_1 | vu.F_PROTOCOL_FEATURES)
    guest = Guest(VhostUserDevice("test", first.fd, (8, 16), features=1))
    guest.start(F_VERSION_1 | 1, (8, 16))
    guest.function.pause()
    fresh = VhostUserDevice("test", second.fd, (8, 16), features=1)
    with pytest.raises(ValueError, match="test lacks features that the guest uses: 0x1"):
        Moved(guest, fresh, guest.function.save())
    fresh.close()
    guest.close()
    first.close()
    second.close()


class Stuck(VhostUserDevice):
    drains = True


def test_request_that_does_not_end_fails_the_pause_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rootvisor.virtio.vhost._DRAIN_SECONDS", 0.05)
    backend = Backend()
    guest = Guest(Stuck("test", backend.fd, (8, 16)))
    guest.start(F_VERSION_1, (8, 16))
    guest.rings[0].add([(guest.memory.allocate(8), 8, True)])
    with pytest.raises(VhostError, match="requests are under way"):
        guest.function.pause()
    assert vu.GET_VRING_BASE not in backend.requests()
    guest.close()
    backend.close()


@real
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_disk_of_the_daemon_goes_on_with_another_daemon(tmp_path: Path, image_format: str) -> None:
    disk = Disk(tmp_path / "disk", image_format)
    for number in range(10):
        assert disk.write(number, bytes([100 + number]) * 512) == 0
    disk.guest.function.pause()
    state = marshal.loads(marshal.dumps(disk.guest.function.save()))
    old = disk.guest
    old.function.close()
    disk.served.close()
    second = Disk.again(disk)
    second.guest = Moved(old, second.device, state)
    second.guest.function.resume()
    for number in range(10):
        assert second.read(number) == bytes([100 + number]) * 512
    assert second.write(11, b"n" * 512) == 0
    assert second.content()[11 * 512 : 12 * 512] == b"n" * 512


def saved_rng() -> dict[str, Any]:
    guest = Guest(Rng())
    guest.start(F_VERSION_1, [8])
    guest.function.pause()
    state: dict[str, Any] = marshal.loads(marshal.dumps(guest.function.save()))
    guest.close()
    return state


def _other_device(state: dict[str, Any]) -> None:
    state["virtio"]["type"] = 3


def _no_queues(state: dict[str, Any]) -> None:
    del state["virtio"]["queues"]


def _more_queues(state: dict[str, Any]) -> None:
    state["virtio"]["queues"] *= 2


def _queue_elsewhere(state: dict[str, Any]) -> None:
    state["virtio"]["queues"][0][1] = 1 << 60


def _queue_too_large(state: dict[str, Any]) -> None:
    state["virtio"]["queues"][0][0] = 1 << 20


def _no_position(state: dict[str, Any]) -> None:
    state["virtio"]["queues"][0][6] = [1, 2]


def _text(state: dict[str, Any]) -> None:
    state["virtio"]["features"] = "all"


def _no_table(state: dict[str, Any]) -> None:
    state["msix"] = {"table": b"", "pending": 0}


def _no_config(state: dict[str, Any]) -> None:
    state["config"] = None


def _nothing(state: dict[str, Any]) -> None:
    state.clear()


@pytest.mark.parametrize(
    "damage",
    [
        _other_device,
        _no_queues,
        _more_queues,
        _queue_elsewhere,
        _queue_too_large,
        _no_position,
        _text,
        _no_table,
        _no_config,
        _nothing,
    ],
)
def test_damaged_state_is_one_clear_error_and_no_half_restored_device(
    damage: Callable[[dict[str, Any]], None],
) -> None:
    state = saved_rng()
    damage(state)
    guest = Guest(Rng())
    with pytest.raises(ValueError) as caught:
        guest.function.restore(state)
    assert "\n" not in str(caught.value)
    guest.function.resume()
    assert not guest.device.active
    guest.close()


def test_saving_a_running_device_is_a_defect() -> None:
    guest = Guest(Rng())
    with pytest.raises(RuntimeError, match="while it runs"):
        guest.function.save()
    guest.close()
