# SPDX-License-Identifier: Apache-2.0
"""The ring of writes that did not exit, filled as KVM fills it."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

from rootvisor.kvm.coalesced import CoalescedWrites

_OFFSET = 4096
_PLACES = (4096 - 8) // 24


class Ring:
    def __init__(self) -> None:
        self.memory = memoryview(bytearray(2 * 4096))
        vm: Any = SimpleNamespace(
            kvm=SimpleNamespace(capability=lambda _number: 1), vcpus=[SimpleNamespace(u8=self.memory)]
        )
        self.writes = CoalescedWrites(vm)

    def heads(self) -> int:
        """Both heads, as a run loop reads them."""
        return int.from_bytes(self.memory[_OFFSET : _OFFSET + 8], "little")

    def put(self, address: int, value: int, port: bool) -> None:
        """What KVM does for a write in a zone."""
        (last,) = struct.unpack_from("<I", self.memory, _OFFSET + 4)
        struct.pack_into("<QII8s", self.memory, _OFFSET + 8 + last * 24, address, 1, port, bytes((value,)))
        struct.pack_into("<I", self.memory, _OFFSET + 4, (last + 1) % _PLACES)


def test_writes_come_in_their_order_and_by_their_kind() -> None:
    ring = Ring()
    seen: list[tuple[int, ...]] = []
    for round_ in range(3):
        for number in range(100):  # past the end of the ring
            ring.put(0x70 if number % 2 else 0xE0000010, number, bool(number % 2))
        seen.clear()
        heads = ring.writes.drain(
            lambda port, _size, value: seen.append((port, value)),
            lambda gpa, _size, value: seen.append((gpa, value)),
        )
        assert seen == [(0x70 if number % 2 else 0xE0000010, number) for number in range(100)], round_
        assert heads == ring.heads()


def test_write_of_another_processor_after_the_last_is_not_in_the_heads_that_drain_returns() -> None:
    """Who compares the heads with these later finds that there is something; the write would be overtaken otherwise."""
    ring = Ring()
    seen: list[tuple[int, ...]] = []
    ring.put(0x70, 1, True)
    heads = ring.writes.drain(lambda *write: seen.append(write), lambda *_: None)
    ring.put(0x70, 2, True)
    assert heads != ring.heads()
    assert ring.writes.drain(lambda *write: seen.append(write), lambda *_: None) == ring.heads()
    assert [value for *_, value in seen] == [1, 2]
