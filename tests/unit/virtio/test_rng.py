# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from rootvisor.virtio.registers import F_VERSION_1
from rootvisor.virtio.rng import Rng
from tests.unit.virtio.guest_side import Guest


def test_rng_fills_scattered_buffers_and_caps_large_ones() -> None:
    guest = Guest(Rng())
    guest.start(F_VERSION_1, [8])
    one, two, large = guest.memory.allocate(100), guest.memory.allocate(200), guest.memory.allocate(1 << 20)
    assert guest.request(0, [(one, 100, True), (two, 200, True)]) == 300
    assert guest.memory.read(one, 100) != bytes(100) and guest.memory.read(two + 150, 50) != bytes(50)
    assert guest.request(0, [(large, 1 << 20, True)]) == 4096
    assert guest.memory.read(large + 4096, 64) == bytes(64)
    assert guest.request(0, [(one, 100, False)]) == 0
    guest.close()
