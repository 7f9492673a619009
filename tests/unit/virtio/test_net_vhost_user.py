# SPDX-License-Identifier: Apache-2.0
"""The network device of a vhost-user backend, against a backend in the test that records what it is sent."""

from __future__ import annotations

import socket

import pytest

from rootvisor.virtio import net
from rootvisor.virtio import vhost_user as vu
from rootvisor.virtio.net_vhost_user import VhostUserNet
from rootvisor.virtio.registers import F_EVENT_IDX, F_VERSION_1
from tests.unit.virtio.guest_side import Guest
from tests.unit.virtio.net_side import MAC
from tests.unit.virtio.vhost_user_backend import Backend


def test_offer_is_what_backend_and_device_know() -> None:
    backend = Backend(features=F_VERSION_1 | F_EVENT_IDX | net.F_MRG_RXBUF | net.F_CSUM | 1 << 17 | 1 << 26)
    guest = Guest(VhostUserNet(backend.fd, MAC, mtu=65520))
    own = net.F_MAC | net.F_STATUS | net.F_MTU
    assert guest.offered() == F_VERSION_1 | F_EVENT_IDX | net.F_MRG_RXBUF | net.F_CSUM | own
    assert guest.config_read(0, 4) == 0x1041 << 16 | 0x1AF4
    guest.close()
    backend.close()


def test_features_of_ours_are_not_told_to_the_backend() -> None:
    backend = Backend(features=F_VERSION_1 | net.F_MRG_RXBUF | vu.F_PROTOCOL_FEATURES)
    guest = Guest(VhostUserNet(backend.fd, MAC))
    guest.start(F_VERSION_1 | net.F_MRG_RXBUF | net.F_MAC | net.F_STATUS, (256, 256))
    told = F_VERSION_1 | net.F_MRG_RXBUF | vu.F_PROTOCOL_FEATURES
    assert [payload for request, payload, _ in backend.log if request == vu.SET_FEATURES] == [
        told.to_bytes(8, "little")
    ]
    guest.close()
    backend.close()


def test_wrong_mac_is_value_error_and_hangs_up() -> None:
    backend = Backend()
    with pytest.raises(ValueError, match="MAC address"):
        VhostUserNet(backend.fd, b"\1" * 6)
    backend.thread.join(10)
    assert not backend.thread.is_alive()
    with pytest.raises(OSError):
        socket.socket(fileno=backend.fd)
    backend.close()
