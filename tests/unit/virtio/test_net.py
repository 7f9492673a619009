# SPDX-License-Identifier: Apache-2.0
"""What all network devices share: configuration, features, link."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from rootvisor.virtio import net
from rootvisor.virtio.net_stream import PasstNet
from rootvisor.virtio.registers import F_VERSION_1
from tests.unit.virtio.guest_side import Guest
from tests.unit.virtio.net_side import MAC


@pytest.fixture
def guest() -> Iterator[Guest]:
    ours, theirs = socket.socketpair()
    guest = Guest(PasstNet(theirs.detach(), MAC, mtu=9000))
    yield guest
    guest.close()
    ours.close()


def test_config_tells_address_link_and_mtu(guest: Guest) -> None:
    assert bytes(guest.read(0x100 + n, 1) for n in range(6)) == MAC
    assert (guest.read(0x106, 2), guest.read(0x108, 2), guest.read(0x10A, 2)) == (1, 1, 9000)
    assert guest.offered() & (net.F_MAC | net.F_STATUS | net.F_MTU) == net.F_MAC | net.F_STATUS | net.F_MTU
    assert guest.config_read(0, 4) == 0x1041 << 16 | 0x1AF4
    assert guest.config_read(9, 3) == 0x020000


def test_link_change_interrupts_the_driver(guest: Guest) -> None:
    guest.start(F_VERSION_1 | net.F_STATUS, (256, 256))
    device = guest.device
    assert isinstance(device, PasstNet)
    device.set_link(False)
    assert guest.read(0x106, 2) == 0 and guest.vectors[0].count == 1
    device.set_link(False)
    assert guest.vectors[0].count == 1
    device.set_link(True)
    assert guest.read(0x106, 2) == 1 and guest.vectors[0].count == 2


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (net.F_GUEST_TSO4, False),
        (net.F_GUEST_TSO4 | net.F_GUEST_CSUM, True),
        (net.F_HOST_TSO6, False),
        (net.F_HOST_TSO6 | net.F_CSUM, True),
        (net.F_HOST_ECN | net.F_CSUM, False),
        (net.F_GUEST_ECN | net.F_GUEST_TSO6 | net.F_GUEST_CSUM, True),
    ],
)
def test_offload_without_its_base_is_refused(guest: Guest, features: int, accepted: bool) -> None:
    guest.device.features |= net.GUEST_OFFLOADS | net.HOST_OFFLOADS
    assert guest.negotiate(F_VERSION_1 | features) == accepted


@pytest.mark.parametrize("mtu", [0, 67, 65536])
def test_mtu_that_cannot_be_is_value_error(mtu: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ValueError, match="68 to 65535"):
        PasstNet(os.dup(theirs.fileno()), MAC, mtu=mtu)
