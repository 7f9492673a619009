# SPDX-License-Identifier: Apache-2.0
"""Whatever a driver writes, a device survives: it serves, or asks for a reset and works again after it.

Seeded; ROOTVISOR_FUZZ sets the number of cases per device (default 1500).
"""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rootvisor.pci import registers as pci
from rootvisor.virtio.block import Block
from rootvisor.virtio.console import Console, Port
from rootvisor.virtio.device import VirtioDevice
from rootvisor.virtio.disk_image import DiskImage
from rootvisor.virtio.registers import F_RING_PACKED, F_VERSION_1, STATUS_NEEDS_RESET
from rootvisor.virtio.rng import Rng
from tests.unit.virtio.guest_side import RAM_BASE, RAM_BYTES, Guest

CASES = int(os.environ.get("ROOTVISOR_FUZZ", "1500"))
# The rings of every device fit in here, and some of their buffers.
_HOSTILE_BYTES = 0x2000
NUMBERS = (0, 1, 2, 7, 8, 15, 16, 64, 127, 128, 255, 256, 511, 512, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)


def make_rng(tmp_path: Path) -> VirtioDevice:
    return Rng()


def make_block(tmp_path: Path) -> VirtioDevice:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return Block(DiskImage(str(path)))


def make_console(tmp_path: Path) -> VirtioDevice:
    zero, null = os.open("/dev/zero", os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
    device = Console([Port("", zero, null, True), Port("in", zero, None), Port("out", None, null)], (80, 25))
    os.close(zero)
    os.close(null)
    return device


@pytest.fixture(params=[make_rng, make_block, make_console], ids=["rng", "block", "console"])
def guest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guest]:
    make: Callable[[Path], VirtioDevice] = request.param
    guest = Guest(make(tmp_path))
    reasons: list[str] = []
    guest.device.on_failure = reasons.append
    yield guest
    guest.close()
    assert not [reason for reason in reasons if "internal error" in reason]


def settle(guest: Guest) -> None:
    """Wait until the device has answered every kick so far, or has given up."""
    guest.device.worker.start()
    for _ in range(2):  # the kicks may come behind the first call in the same round of the loop
        done = threading.Event()
        guest.device.worker.post(done.set)
        assert done.wait(10)


def works(guest: Guest) -> None:
    """After a reset the device serves its first output queue or its only queue."""
    guest.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
    guest.config_write(pci.BAR_0, 8, guest.bar)
    guest.write(20, 1, 0)
    assert guest.status == 0
    guest.memory._free = RAM_BASE
    guest.memory.view(RAM_BASE, RAM_BYTES)[:] = bytes(RAM_BYTES)
    assert guest.negotiate(F_VERSION_1)
    index = 1 if isinstance(guest.device, Console) else 0
    guest.set_queue(index, 8, vector=0xFFFF)
    guest.write(20, 1, 15)
    header = guest.memory.place(struct.pack("<IIQ", 4, 0, 0))
    status = guest.memory.place(b"\xff")
    buffers = [(header, 16, False)]
    if not isinstance(guest.device, Console):
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


def test_random_register_accesses(guest: Guest) -> None:
    rng = random.Random(1)
    areas = (
        (0, 0x40),
        (0, 0x40),
        (0x80, 4),
        (0x100, 0x48),
        (0x1000, 0x40),
        (0x2000, 0x60),
        (0x3000, 0x10),
        (0, 0x4000),
    )
    for _ in range(CASES):
        start, length = rng.choice(areas)
        offset, size = start + rng.randrange(length), rng.choice((1, 2, 4, 8))
        if rng.random() < 0.4:
            assert 0 <= guest.read(offset, size) < 1 << 8 * size
        elif rng.random() < 0.1:
            guest.write(20, 1, rng.choice((0, 1, 3, 11, 15, 255)))
        else:
            guest.write(offset, size, number(rng, size))
    works(guest)


def test_every_register_at_every_width(guest: Guest) -> None:
    for offset in (
        *range(0x90),
        *range(0xF8, 0x160),
        *range(0xFF8, 0x1010),
        *range(0x1FF8, 0x2048),
        *range(0x2FF8, 0x3010),
    ):
        for size in (1, 2, 4, 8):
            guest.read(offset, size)
            for value in (0, 1, pci.all_ones(size)):
                guest.write(offset, size, value)
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
def test_random_rings(guest: Guest, packed: bool) -> None:
    rng = random.Random(2)
    base = F_VERSION_1 | (F_RING_PACKED if packed else 0)
    failed = 0
    for _ in range(max(1, CASES // 15)):
        features = base | (guest.offered() & ~F_RING_PACKED & (rng.getrandbits(64) | 1 << 28))
        guest.write(20, 1, 0)
        guest.memory._free = RAM_BASE
        assert guest.negotiate(features)
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


def test_random_requests_in_sound_rings(guest: Guest) -> None:
    """Chains are well formed here, so the fuzz reaches the device behind the rings."""
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
                        (struct.pack("<IIQ", kind, 0, sector), rng.randbytes(rng.choice((1, 8, 16, 512))))
                    )
                    buffers.append((guest.memory.place(content), len(content), writes))
            if buffers:
                try:
                    ring.add(buffers, indirect=True)
                except IndexError:  # the device waits with what it has: the ring is full
                    continue
                guest.kick(index)
                ring.used()
        settle(guest)
    works(guest)
