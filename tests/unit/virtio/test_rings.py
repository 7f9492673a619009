# SPDX-License-Identifier: Apache-2.0
"""Both ring formats: honest use, suppression of events, and every way a ring can be malformed."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from rootvisor.virtio.packed_ring import PackedQueue
from rootvisor.virtio.queue import Queue, QueueAddresses, QueueError
from rootvisor.virtio.registers import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, F_EVENT_IDX, F_INDIRECT_DESC
from rootvisor.virtio.split_ring import SplitQueue
from tests.unit.virtio.guest_side import RAM_BASE, RAM_BYTES, Memory, PackedDriver, SplitDriver


class Pair:
    """A driver's ring and the device's queue on it."""

    def __init__(self, packed: bool, size: int = 8, features: int = F_INDIRECT_DESC) -> None:
        self.memory = Memory()
        self.interrupts = 0
        event_idx = bool(features & F_EVENT_IDX)
        self.driver: SplitDriver | PackedDriver
        self.driver = (
            PackedDriver(self.memory, size, event_idx)
            if packed
            else SplitDriver(self.memory, size, event_idx)
        )
        addresses = QueueAddresses(size, self.driver.desc, self.driver.driver, self.driver.device)
        kind: Callable[..., Queue] = PackedQueue if packed else SplitQueue
        self.queue = kind(self.memory, 0, addresses, features, interrupt=self._interrupt)

    def _interrupt(self) -> None:
        self.interrupts += 1

    def split(self) -> SplitDriver:
        assert isinstance(self.driver, SplitDriver)
        return self.driver

    def descriptor(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        """Write an entry as hostile as wanted; on a packed ring `following` is the buffer id."""
        if isinstance(self.driver, SplitDriver):
            self.driver.set_descriptor(index, address, length, flags, following)
        else:
            struct.pack_into(
                "<QIHH",
                self.memory.view(self.driver.desc, 16 * 8),
                16 * index,
                address,
                length,
                following,
                flags | 0x80,
            )

    def offer(self) -> None:
        """Make entry 0 available."""
        if isinstance(self.driver, SplitDriver):
            self.driver.offer(0)


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_chain_arrives_in_order_with_its_bytes(packed: bool) -> None:
    pair = Pair(packed)
    one, two, room = pair.memory.place(b"abc"), pair.memory.place(b"defgh"), pair.memory.allocate(32)
    head = pair.driver.add([(one, 3, False), (two, 5, False), (room, 32, True)])
    chain = pair.queue.pop()
    assert chain is not None
    assert [bytes(view) for view in chain.readable] == [b"abc", b"defgh"]
    assert chain.read(6) == b"abcdef"
    assert (chain.readable_bytes(), chain.writable_bytes()) == (8, 32)
    pair.queue.push(chain, chain.write(b"result"))
    pair.queue.notify()
    assert pair.driver.used() == [(head, 6)]
    assert pair.memory.read(room, 6) == b"result"
    assert pair.interrupts == 1
    assert pair.queue.pop() is None


def test_indirect_table_gives_the_same(packed: bool) -> None:
    pair = Pair(packed)
    data, room = pair.memory.place(b"abc"), pair.memory.allocate(8)
    head = pair.driver.add([(data, 3, False)] * 20 + [(room, 8, True)], indirect=True)
    chain = pair.queue.pop()
    assert chain is not None
    assert chain.readable_bytes() == 60
    pair.queue.push(chain, 8)
    assert pair.driver.used() == [(head, 8)]


def test_many_rounds_wrap_around(packed: bool) -> None:
    pair = Pair(packed, size=8)
    room = pair.memory.allocate(16)
    for count in range(40_000 if not packed else 4_000):  # past the 16-bit index
        heads = [
            pair.driver.add([(room, 4, False), (room, 4, True)][: 1 + (count + i) % 2]) for i in range(3)
        ]
        chains = [pair.queue.pop() for _ in heads]
        for chain in chains:
            assert chain is not None
            pair.queue.push(chain, 0)
        assert [head for head, _ in pair.driver.used()] == heads


def test_unpop_gives_the_same_chain_again(packed: bool) -> None:
    pair = Pair(packed, size=4)
    room = pair.memory.allocate(16)
    for length in range(1, 12):
        pair.driver.add([(room, length, True), (room, 1, True)])
        pair.driver.add([(room, 1, True)])
        first, second = pair.queue.pop(), pair.queue.pop()
        assert first is not None and second is not None
        pair.queue.unpop(second)
        pair.queue.unpop(first)
        for _ in range(2):
            chain = pair.queue.pop()
            assert chain is not None
            pair.queue.push(chain, chain.writable_bytes())
        assert [used for _, used in pair.driver.used()] == [length + 1, 1]


def test_queue_looks_empty_without_dma(packed: bool) -> None:
    pair = Pair(packed)
    pair.driver.add([(pair.memory.allocate(4), 4, True)])
    pair.queue.dma = False
    assert pair.queue.pop() is None
    assert not pair.queue.listen()
    pair.queue.dma = True
    assert pair.queue.listen()
    assert pair.queue.pop() is not None


def test_driver_may_suppress_interrupts(packed: bool) -> None:
    pair = Pair(packed)
    room = pair.memory.allocate(4)
    if packed:
        struct.pack_into("<H", pair.memory.view(pair.driver.driver, 4), 2, 1)
    else:
        struct.pack_into("<H", pair.memory.view(pair.driver.driver, 2), 0, 1)
    pair.driver.add([(room, 4, True)])
    chain = pair.queue.pop()
    assert chain is not None
    pair.queue.push(chain, 0)
    pair.queue.notify()
    assert pair.interrupts == 0


def test_nothing_pushed_is_nothing_signalled(packed: bool) -> None:
    pair = Pair(packed)
    pair.queue.notify()
    assert pair.interrupts == 0


def test_event_idx_interrupts_once_per_request_for_it(packed: bool) -> None:
    pair = Pair(packed, features=F_EVENT_IDX)
    room = pair.memory.allocate(4)
    expected = 0
    for round_number in range(50):
        for _ in range(3):
            pair.driver.add([(room, 4, True)])
        pair.driver.used()  # asks to hear of the next one
        for index in range(3):
            chain = pair.queue.pop()
            assert chain is not None
            pair.queue.push(chain, 0)
            pair.queue.notify()
            expected += index == 0
            assert pair.interrupts == expected, round_number
        assert len(pair.driver.used()) == 3


def test_quiet_and_listen_set_what_the_driver_reads(packed: bool) -> None:
    pair = Pair(packed)
    offset = 2 if packed else 0
    pair.queue.quiet()
    assert pair.memory.read(pair.driver.device + offset, 1) == b"\1"
    pair.queue.listen()
    assert pair.memory.read(pair.driver.device + offset, 1) == b"\0"


def test_listen_with_event_idx_names_the_next_entry(packed: bool) -> None:
    pair = Pair(packed, features=F_EVENT_IDX)
    pair.driver.add([(pair.memory.allocate(4), 4, True)])
    assert pair.queue.pop() is not None
    assert not pair.queue.listen()
    if packed:
        assert struct.unpack("<HH", pair.memory.read(pair.driver.device, 4)) == (1 | 1 << 15, 2)
    else:
        assert struct.unpack("<H", pair.memory.read(pair.driver.device + 4 + 8 * 8, 2)) == (1,)


# Malformed rings. Each case fills entries 0.. and offers entry 0; every one must be a QueueError.

INSIDE = RAM_BASE + 0x10000


def _outside(pair: Pair) -> None:
    pair.descriptor(0, 0x1000, 16, 0)


def _crossing_the_end(pair: Pair) -> None:
    pair.descriptor(0, RAM_BASE + RAM_BYTES - 8, 16, DESC_WRITE)


def _huge(pair: Pair) -> None:
    pair.descriptor(0, INSIDE, 0xFFFFFFFF, DESC_WRITE)


def _wrapping_address(pair: Pair) -> None:
    pair.descriptor(0, (1 << 64) - 8, 64, 0)


def _write_before_read(pair: Pair) -> None:
    pair.descriptor(0, INSIDE, 4, DESC_WRITE | DESC_NEXT, 1)
    pair.descriptor(1, INSIDE, 4, 0)


def _endless(pair: Pair) -> None:
    for index in range(8):
        pair.descriptor(index, INSIDE, 4, DESC_NEXT, (index + 1) % 8)


def _indirect_empty(pair: Pair) -> None:
    pair.descriptor(0, INSIDE, 0, DESC_INDIRECT)


def _indirect_odd(pair: Pair) -> None:
    pair.descriptor(0, INSIDE, 24, DESC_INDIRECT)


def _indirect_huge(pair: Pair) -> None:
    pair.descriptor(0, INSIDE, 0xFFFFFFF0, DESC_INDIRECT)


def _indirect_outside(pair: Pair) -> None:
    pair.descriptor(0, 0, 32, DESC_INDIRECT)


def _indirect_chained(pair: Pair) -> None:
    pair.descriptor(0, INSIDE, 32, DESC_INDIRECT | DESC_NEXT, 1)


def _indirect_nested(pair: Pair) -> None:
    struct.pack_into("<QIHH", pair.memory.view(INSIDE, 16), 0, INSIDE, 16, DESC_INDIRECT, DESC_INDIRECT)
    pair.descriptor(0, INSIDE, 16, DESC_INDIRECT)


def _indirect_entry_outside(pair: Pair) -> None:
    struct.pack_into("<QIHH", pair.memory.view(INSIDE, 16), 0, 0, 16, 0, 0)
    pair.descriptor(0, INSIDE, 16, DESC_INDIRECT)


MALFORMED = [
    _outside,
    _crossing_the_end,
    _huge,
    _wrapping_address,
    _write_before_read,
    _endless,
    _indirect_empty,
    _indirect_odd,
    _indirect_huge,
    _indirect_outside,
    _indirect_chained,
    _indirect_nested,
    _indirect_entry_outside,
]


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.__name__[1:])
def test_malformed_chain_is_queue_error(packed: bool, case: Callable[[Pair], None]) -> None:
    pair = Pair(packed)
    case(pair)
    pair.offer()
    with pytest.raises(QueueError):
        pair.queue.pop()


def test_indirect_without_the_feature_is_queue_error(packed: bool) -> None:
    pair = Pair(packed, features=0)
    pair.driver.add([(INSIDE, 4, False)], indirect=True)
    with pytest.raises(QueueError, match="not negotiated"):
        pair.queue.pop()


def test_split_head_out_of_range_is_queue_error() -> None:
    pair = Pair(False)
    pair.split().offer(8)
    with pytest.raises(QueueError, match="descriptor 8 of 8"):
        pair.queue.pop()


def test_split_next_out_of_range_is_queue_error() -> None:
    pair = Pair(False)
    pair.descriptor(0, INSIDE, 4, DESC_NEXT, 0xFFFF)
    pair.offer()
    with pytest.raises(QueueError, match="descriptor 65535 of 8"):
        pair.queue.pop()


def test_split_available_index_jumping_is_queue_error() -> None:
    pair = Pair(False)
    struct.pack_into("<H", pair.memory.view(pair.driver.driver, 4), 2, 9)
    with pytest.raises(QueueError, match="jumps by 9"):
        pair.queue.pop()


def test_split_indirect_loop_is_queue_error() -> None:
    pair = Pair(False)
    for index in range(4):
        struct.pack_into(
            "<QIHH", pair.memory.view(INSIDE, 64), 16 * index, INSIDE, 4, DESC_NEXT, (index + 1) % 4
        )
    pair.descriptor(0, INSIDE, 64, DESC_INDIRECT)
    pair.offer()
    with pytest.raises(QueueError, match="loop"):
        pair.queue.pop()


@pytest.mark.parametrize("area", ["desc", "driver", "device"])
@pytest.mark.parametrize("address", [0, RAM_BASE + 1, RAM_BASE + RAM_BYTES - 2, (1 << 64) - 16])
def test_area_outside_ram_or_misaligned_is_queue_error(packed: bool, area: str, address: int) -> None:
    memory = Memory()
    addresses = QueueAddresses(8, RAM_BASE, RAM_BASE + 0x1000, RAM_BASE + 0x2000)
    setattr(addresses, area, address)
    kind: Callable[..., Queue] = PackedQueue if packed else SplitQueue
    with pytest.raises(QueueError):
        kind(memory, 0, addresses, 0)


def test_zero_length_buffers_are_no_buffers(packed: bool) -> None:
    pair = Pair(packed)
    pair.driver.add([(0, 0, False), (INSIDE, 4, False)])
    chain = pair.queue.pop()
    assert chain is not None and len(chain.readable) == 1
