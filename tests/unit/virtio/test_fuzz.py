# SPDX-License-Identifier: Apache-2.0
"""Whatever a driver writes, a device survives: it serves, or asks for a reset and works again after it.

Seeded; ROOTVISOR_FUZZ sets the number of cases per device (default 1000). Memory beside the guest's is checked when the
guest is closed (`guest_side.Memory`).
"""

from __future__ import annotations

import copy
import marshal
import os
import random
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rootvisor.pci import registers as pci
from rootvisor.virtio.balloon import Balloon
from rootvisor.virtio.block import Block
from rootvisor.virtio.console import Console, Port
from rootvisor.virtio.device import VirtioDevice
from rootvisor.virtio.disk_image import DiskImage
from rootvisor.virtio.net import F_MRG_RXBUF
from rootvisor.virtio.net_stream import PasstNet
from rootvisor.virtio.net_tap import TapNet, VhostTapNet
from rootvisor.virtio.net_vhost_user import VhostUserNet
from rootvisor.virtio.registers import F_RING_PACKED, F_VERSION_1, NO_VECTOR, STATUS_NEEDS_RESET
from rootvisor.virtio.rng import Rng
from rootvisor.virtio.tap import TapError, open_tap
from rootvisor.virtio.vhost_user import VhostUserError
from rootvisor.virtio.vsock import Vsock
from tests.unit.virtio.fake_vhost import FakeVhost
from tests.unit.virtio.guest_side import RAM_BASE, RAM_BYTES, Guest, wait_until
from tests.unit.virtio.net_side import MAC, frame
from tests.unit.virtio.test_vhost_user_block import Disk, real
from tests.unit.virtio.vhost_user_backend import Backend

CASES = int(os.environ.get("ROOTVISOR_FUZZ", "1000"))
LONG = CASES >= 100_000
# The rings of every device fit in here, and some of their buffers.
_HOSTILE_BYTES = 0x2000
_BAR_BYTES = 0x4000
NUMBERS = (0, 1, 2, 7, 8, 15, 16, 64, 127, 128, 255, 256, 511, 512, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)

Cleanup = list[Callable[[], None]]


class Place:
    """What devices are made of, and what goes when the test is over."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.monkeypatch = monkeypatch
        self.cleanup: Cleanup = []


class Peer:
    """The other end of a network's socket: takes every frame, and sends some."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.fd = theirs.detach()
        self.socket.setblocking(False)
        self.stopping = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        rng = random.Random(9)
        pending = b""
        while not self.stopping:
            if not pending:
                one = frame(rng.randbytes(rng.choice((1, 50, 1486, 9000))))
                pending = len(one).to_bytes(4, "big") + one
            ready, room, _ = select.select([self.socket], [self.socket], [], 0.01)
            try:
                if ready and not self.socket.recv(1 << 20):
                    return
                if room:
                    pending = pending[self.socket.send(pending) :]
            except BlockingIOError:
                pass
            except OSError:
                return

    def close(self) -> None:
        self.stopping = True
        self.thread.join(10)
        self.socket.close()


def make_rng(place: Place) -> VirtioDevice:
    return Rng()


def make_block(place: Place) -> VirtioDevice:
    path = place.path / "disk"
    path.write_bytes(bytes(1 << 20))
    return Block(DiskImage(str(path)))


def make_console(place: Place) -> VirtioDevice:
    zero, null = os.open("/dev/zero", os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
    device = Console([Port("", zero, null, True), Port("in", zero, None), Port("out", None, null)], (80, 25))
    os.close(zero)
    os.close(null)
    return device


def make_balloon(place: Place) -> VirtioDevice:
    def inside(gpa: int, size: int) -> None:
        assert size > 0 and gpa >= RAM_BASE and gpa + size <= RAM_BASE + RAM_BYTES

    return Balloon(1 << 20, inside)


def make_passt(place: Place) -> VirtioDevice:
    peer = Peer()
    place.cleanup.append(peer.close)
    return PasstNet(peer.fd, MAC)


def make_tap(place: Place) -> VirtioDevice:
    try:
        return TapNet(open_tap(), MAC)
    except TapError as error:
        pytest.skip(str(error))


def make_vsock(place: Place) -> VirtioDevice:
    return Vsock(3, FakeVhost(place.monkeypatch).fd)


def make_vhost_net(place: Place) -> VirtioDevice:
    vhost = FakeVhost(place.monkeypatch, F_MRG_RXBUF)
    try:
        return VhostTapNet(open_tap(), vhost.fd, MAC)
    except TapError as error:
        pytest.skip(str(error))


def make_vhost_user_net(place: Place) -> VirtioDevice:
    backend = Backend(keep_log=False)
    place.cleanup.append(backend.close)
    return VhostUserNet(backend.fd, MAC)


# These serve all of their rings here.
OURS = {
    "rng": make_rng,
    "block": make_block,
    "console": make_console,
    "balloon": make_balloon,
    "passt": make_passt,
    "tap": make_tap,
}
ALL = {**OURS, "vsock": make_vsock, "vhost-net": make_vhost_net, "vhost-user-net": make_vhost_user_net}


def fresh_guest(make: Callable[[Place], VirtioDevice], place: Place) -> Guest:
    guest = Guest(make(place))
    guest.reasons = []  # type: ignore[attr-defined]
    guest.device.on_failure = guest.reasons.append  # type: ignore[attr-defined]
    return guest


def close(guest: Guest) -> None:
    guest.close()
    reasons: list[str] = guest.reasons  # type: ignore[attr-defined]
    assert not [reason for reason in reasons if "internal error" in reason]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    place = Place(tmp_path, monkeypatch)
    yield place
    for clean in place.cleanup:
        clean()


@pytest.fixture(params=ALL)
def guest(request: pytest.FixtureRequest, place: Place) -> Iterator[Guest]:
    guest = fresh_guest(ALL[request.param], place)
    yield guest
    close(guest)


@pytest.fixture(params=OURS)
def served(request: pytest.FixtureRequest, place: Place) -> Iterator[Guest]:
    guest = fresh_guest(OURS[request.param], place)
    yield guest
    close(guest)


def settle(guest: Guest) -> None:
    """Wait until the device has answered every kick so far, or has given up."""
    guest.device.worker.start()
    for _ in range(2):  # the kicks may come behind the first call in the same round of the loop
        done = threading.Event()
        guest.device.worker.post(done.set)
        assert done.wait(10)


def works(guest: Guest) -> None:
    """After a reset the device serves its first output queue or its only queue; or its backend is told to."""
    guest.config_write(pci.BAR_0, 8, guest.bar)
    guest.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
    guest.write(20, 1, 0)
    assert guest.status == 0
    guest.memory._free = RAM_BASE
    guest.memory.view(RAM_BASE, RAM_BYTES)[:] = bytes(RAM_BYTES)
    device = guest.device
    assert guest.negotiate(F_VERSION_1)
    second = isinstance(device, Console | PasstNet | TapNet)
    index = 1 if second else 0
    for number in range(len(device.queue_sizes)):
        guest.set_queue(number, 8, vector=NO_VECTOR)
    guest.write(20, 1, 15)
    if not device.serves(index):
        assert device.active and not guest.status & STATUS_NEEDS_RESET
        return
    header = guest.memory.place(struct.pack("<IIQ", 4, 0, 0))
    status = guest.memory.place(b"\xff")
    buffers = [(header, 16, False)]
    if not second:
        buffers.append((status, 1, True))
    guest.request(index, buffers)


def number(rng: random.Random, size: int) -> int:
    value = rng.choice(
        (
            rng.choice(NUMBERS),
            rng.getrandbits(64),
            RAM_BASE + rng.randrange(RAM_BYTES),
            1 << rng.randrange(64),
        )
    )
    return value & (1 << 8 * size) - 1


def random_access(rng: random.Random, guest: Guest) -> None:
    areas = (
        (0, 0x40),
        (0, 0x40),
        (0x80, 4),
        (0x100, 0x48),
        (0x1000, 0x40),
        (0x2000, 0x60),
        (0x3000, 0x10),
        (0, _BAR_BYTES),
    )
    start, length = rng.choice(areas)
    offset, size = start + rng.randrange(length), rng.choice((1, 2, 4, 8))
    if rng.random() < 0.4:
        assert 0 <= guest.read(offset, size) < 1 << 8 * size
    elif rng.random() < 0.1:
        guest.write(20, 1, rng.choice((0, 1, 3, 11, 15, 255)))
    else:
        guest.write(offset, size, number(rng, size))


def test_random_register_accesses(guest: Guest) -> None:
    rng = random.Random(1)
    for _ in range(CASES):
        random_access(rng, guest)
    works(guest)


def test_every_register_at_every_width(guest: Guest) -> None:
    everywhere = range(_BAR_BYTES)
    edges = (
        *range(0x90),
        *range(0xF8, 0x160),
        *range(0xFF8, 0x1010),
        *range(0x1FF8, 0x2048),
        *range(0x2FF8, 0x3010),
    )
    for offset in everywhere if LONG else edges:
        for size in (1, 2, 4, 8):
            guest.read(offset, size)
            for value in (0, 1, pci.all_ones(size)):
                guest.write(offset, size, value)
    works(guest)


def test_random_configuration_space(guest: Guest) -> None:
    """BARs that move, command bits that flip, the window into the BAR, in between registers and requests."""
    rng = random.Random(5)
    for _ in range(CASES):
        offset, size = rng.choice((rng.randrange(0x100), rng.randrange(0x1000))), rng.choice((1, 2, 4, 8))
        choice = rng.random()
        if choice < 0.3:
            assert 0 <= guest.config_read(offset, size) < 1 << 8 * size
        elif choice < 0.6:
            guest.config_write(offset, size, number(rng, size))
        elif choice < 0.7:
            guest.config_write(pci.COMMAND, 2, rng.choice((0, 2, 4, 6, 0xFFFF)))
        elif choice < 0.8:
            guest.config_write(pci.BAR_0, 4, rng.choice((guest.bar & 0xFFFFFFFF, number(rng, 4))))
            guest.config_write(pci.BAR_0 + 4, 4, rng.choice((guest.bar >> 32, number(rng, 4))))
        else:
            random_access(rng, guest)
    works(guest)


def test_random_interrupt_programming(guest: Guest) -> None:
    """A vector that is masked, or whose function is, is never raised, whatever the table holds."""
    rng = random.Random(6)
    platform = guest.platform
    msix = guest.function.msix
    assert msix is not None
    control = guest.capability(pci.CAP_MSIX) + pci.MSIX_CONTROL
    for _ in range(CASES):
        choice = rng.random()
        if choice < 0.5:
            offset, size = 0x2000 + rng.randrange(16 * msix.count + 16), rng.choice((1, 2, 4, 8))
            guest.write(offset, size, rng.choice((0, 1, number(rng, size))))
        elif choice < 0.6:
            guest.config_write(control, 2, rng.choice((0, 0x8000, 0xC000, 0xFFFF, 0x8000)))
        elif choice < 0.65:
            guest.config_write(pci.COMMAND, 2, rng.choice((2, 6, 6)))
        elif choice < 0.7:
            assert guest.read(0x3000, 8) >> msix.count == 0
        else:
            index = rng.randrange(msix.count)
            before = [vector.count for vector in platform.vectors]
            masks = [vector.masked for vector in platform.vectors]
            msix.trigger(index)
            if rng.random() < 0.1:
                msix.eventfd(index)
            for vector, count, masked in zip(platform.vectors, before, masks, strict=False):
                assert not masked or vector.count == count
    works(guest)


def random_descriptor(rng: random.Random) -> bytes:
    address = rng.choice((RAM_BASE + rng.randrange(0, RAM_BYTES, 16), number(rng, 8)))
    length = rng.choice((rng.randrange(64), rng.randrange(5000), 16 * rng.randrange(40), number(rng, 4)))
    return struct.pack(
        "<QIHH", address, length, rng.choice((rng.randrange(16), number(rng, 2))), number(rng, 2)
    )


def hostile_ring(rng: random.Random, guest: Guest, packed: bool) -> None:
    """All of the rings' and the buffers' memory random, biased to what is nearly right."""
    view = guest.memory.view(RAM_BASE, _HOSTILE_BYTES)
    for offset in range(0, _HOSTILE_BYTES, 16):
        entry = bytearray(random_descriptor(rng))
        if packed:
            struct.pack_into(
                "<H", entry, 14, rng.choice((0x80, 0x81, 0x82, 0x83, 0x84, 0x86, number(rng, 2)))
            )
        else:
            struct.pack_into(
                "<HH", entry, 12, rng.choice((0, 1, 2, 3, 4, 5, number(rng, 2))), rng.randrange(17)
            )
        view[offset : offset + 16] = entry
    if not packed:
        for ring in guest.rings.values():
            area = guest.memory.view(ring.driver, 6 + 2 * ring.size)
            heads = [rng.choice((rng.randrange(ring.size), number(rng, 2))) for _ in range(ring.size)]
            struct.pack_into(
                f"<HH{ring.size}H",
                area,
                0,
                rng.getrandbits(1),
                rng.choice((ring.size, 1, number(rng, 2))),
                *heads,
            )


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_random_rings(served: Guest, packed: bool) -> None:
    guest = served
    rng = random.Random(2)
    base = F_VERSION_1 | (F_RING_PACKED if packed else 0)
    failed = 0
    for _ in range(max(1, CASES // 30)):
        features = base | (guest.offered() & ~F_RING_PACKED & (rng.getrandbits(64) | 1 << 28))
        guest.write(20, 1, 0)
        guest.memory._free = RAM_BASE
        if not guest.negotiate(features):  # offloads without what they build upon
            assert guest.negotiate(base | 1 << 28)
        for index, _ in enumerate(guest.device.queue_sizes):
            guest.set_queue(index, 16, vector=rng.choice((0, 1, 0xFFFF)), packed=packed)
        hostile_ring(rng, guest, packed)
        guest.write(20, 1, 15)
        for index, _ in enumerate(guest.device.queue_sizes):
            guest.kick(index)
        settle(guest)
        failed += bool(guest.status & STATUS_NEEDS_RESET)
    assert failed
    works(guest)


def test_random_requests_in_sound_rings(served: Guest) -> None:
    """Chains are well formed here, so the fuzz reaches the device behind the rings."""
    guest = served
    rng = random.Random(3)
    for _ in range(max(1, CASES // 50)):
        guest.write(20, 1, 0)
        guest.memory._free = RAM_BASE
        packed = rng.random() < 0.5
        features = guest.offered() & ~F_RING_PACKED | (F_RING_PACKED if packed else 0)
        assert guest.negotiate(features)
        for index, _ in enumerate(guest.device.queue_sizes):
            guest.set_queue(index, 8, vector=0xFFFF, packed=packed, event_idx=True)
        guest.write(20, 1, 15)
        for _ in range(40):
            index = rng.randrange(len(guest.device.queue_sizes))
            ring = guest.rings[index]
            buffers = []
            for writes in (False, True):
                for _ in range(rng.randrange(4)):
                    kind, sector = (
                        rng.choice((0, 1, 4, 8, 11, 13, number(rng, 4))),
                        rng.choice((0, 2047, number(rng, 8))),
                    )
                    content = rng.choice(
                        (
                            struct.pack("<IIQ", kind, 0, sector),
                            rng.randbytes(rng.choice((1, 8, 12, 16, 512, 2048))),
                        )
                    )
                    buffers.append((guest.memory.place(content), len(content), writes))
            if buffers:
                try:
                    ring.add(buffers, indirect=True)
                except IndexError:  # the device waits with what it has: the ring is full
                    continue
                guest.kick(index)
                ring.used()
            if rng.random() < 0.05:
                guest.function.pause()
                marshal.dumps(guest.function.save())
                guest.function.resume()
        settle(guest)
    works(guest)


def leaves(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of plain data."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from leaves(node[key])


def test_random_states(request: pytest.FixtureRequest, place: Place) -> None:
    """A saved state that somebody has tampered with is refused with one line, or leads to a device that survives."""
    rng = random.Random(8)
    refused = 0
    for make in (make_rng, make_block, make_console, make_balloon):
        guest = fresh_guest(make, place)
        guest.start(guest.offered() & ~F_RING_PACKED, [8] * len(guest.device.queue_sizes))
        guest.function.pause()
        state = marshal.loads(marshal.dumps(guest.function.save()))
        close(guest)
        for _ in range(max(20, CASES // 100)):
            damaged = copy.deepcopy(state)
            for _ in range(rng.randrange(1, 4)):
                container, key = rng.choice(list(leaves(damaged)))
                container[key] = rng.choice(
                    (None, -1, 1 << 70, "text", b"bytes", [], {}, number(rng, 8), rng.choice(NUMBERS))
                )
            guest = fresh_guest(make, place)
            try:
                guest.function.restore(damaged)
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
            guest.function.resume()
            settle(guest)
            works(guest)
            close(guest)
    assert refused


@real
def test_random_rings_of_the_disk_daemon(tmp_path: Path) -> None:
    """The daemon, not we, reads these rings: it serves, hangs up, or stays silent, and touches nothing outside."""
    rng = random.Random(7)
    disk = Disk(tmp_path / "disk", "raw")
    for _ in range(max(20, CASES // 50)):
        guest = disk.guest
        guest.write(20, 1, 0)
        guest.memory._free = RAM_BASE
        assert guest.negotiate(F_VERSION_1 | guest.offered() & 1 << 28)
        guest.set_queue(0, 16)
        hostile_ring(rng, guest, False)
        guest.write(20, 1, 15)
        guest.kick(0)
        # Its answer to a question of ours comes behind what it did with the ring.
        try:
            disk.device.connection.query(1)
        except VhostUserError:
            wait_until(lambda: bool(guest.status & STATUS_NEEDS_RESET))  # noqa: B023
            assert disk.reasons and "internal error" not in disk.reasons[0]
            disk.close()
            disk = Disk(tmp_path / "disk", "raw")
    disk.close()
