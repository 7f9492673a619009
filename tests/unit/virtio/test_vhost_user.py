# SPDX-License-Identifier: Apache-2.0
"""The vhost-user front end against a backend in the test that records what it is sent."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from rootvisor.pci import registers as pci
from rootvisor.virtio import vhost_user as vu
from rootvisor.virtio.registers import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    STATUS_NEEDS_RESET,
)
from rootvisor.virtio.vhost_user import VhostUserDevice, VhostUserError
from tests.unit.virtio.guest_side import CANARY_BYTES, RAM_BASE, RAM_BYTES, Guest, wait_until
from tests.unit.virtio.vhost_user_backend import Backend


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend()
    yield backend
    backend.close()


def guest_of(backend: Backend) -> Guest:
    return Guest(VhostUserDevice("test", backend.fd, (8, 16), features=1, backend="testd"))


def test_handshake_offers_what_both_know(backend: Backend) -> None:
    guest = guest_of(backend)
    assert guest.offered() == F_VERSION_1 | F_INDIRECT_DESC | 1
    assert backend.requests() == [
        vu.GET_FEATURES,
        vu.GET_PROTOCOL_FEATURES,
        vu.SET_PROTOCOL_FEATURES,
        vu.SET_OWNER,
    ]
    guest.close()


def test_activation_shares_memory_rings_and_eventfds(backend: Backend) -> None:
    guest = guest_of(backend)
    guest.start(F_VERSION_1 | 1, (8, 16))
    log = backend.log[4:]
    assert [entry[0] for entry in log] == [
        vu.SET_FEATURES,
        vu.SET_MEM_TABLE,
        *[
            vu.SET_VRING_NUM,
            vu.SET_VRING_BASE,
            vu.SET_VRING_ADDR,
            vu.SET_VRING_CALL,
            vu.SET_VRING_KICK,
            vu.SET_VRING_ENABLE,
        ]
        * 2,
    ]
    assert log[0][1] == struct.pack("<Q", F_VERSION_1 | 1 | vu.F_PROTOCOL_FEATURES)
    assert (
        log[1][1] == struct.pack("<I4xQQQQ", 1, RAM_BASE, RAM_BYTES, RAM_BASE, CANARY_BYTES)
        and log[1][2] == 1
    )
    ring = guest.rings[1]
    assert log[8][1] == struct.pack("<II", 1, 16)
    assert log[10][1] == struct.pack("<IIQQQQ", 1, 0, ring.desc, ring.device, ring.driver, 0)
    guest.kick(1)
    assert os.eventfd_read(backend.fds[vu.SET_VRING_KICK, 1]) == 1
    os.eventfd_write(backend.fds[vu.SET_VRING_CALL, 1], 1)
    assert os.eventfd_read(guest.vectors[1].fd) == 1
    guest.close()


def test_reset_stops_the_rings_and_they_start_from_zero_again(backend: Backend) -> None:
    guest = guest_of(backend)
    guest.start(F_VERSION_1, (8, 16))
    backend.log.clear()
    guest.write(20, 1, 0)
    assert backend.requests() == [vu.SET_VRING_ENABLE, vu.GET_VRING_BASE] * 2
    backend.log.clear()
    guest.start(F_VERSION_1, (8, 16))
    assert (vu.SET_VRING_BASE, struct.pack("<II", 1, 0), 0) in backend.log
    guest.close()


def test_bus_master_off_pauses_and_on_resumes_where_it_was(backend: Backend) -> None:
    guest = guest_of(backend)
    guest.start(F_VERSION_1, (8, 16))
    backend.log.clear()
    guest.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    assert vu.GET_VRING_BASE in backend.requests()
    guest.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
    assert (vu.SET_VRING_BASE, struct.pack("<II", 1, 43), 0) in backend.log
    guest.close()


def test_backend_without_protocol_features_is_served_plainly() -> None:
    backend = Backend(features=F_VERSION_1 | F_EVENT_IDX)
    guest = guest_of(backend)
    guest.start(F_VERSION_1 | F_EVENT_IDX, (8, 16))
    guest.write(20, 1, 0)
    guest.close()
    backend.thread.join()
    assert vu.SET_VRING_ENABLE not in backend.requests()
    assert backend.requests()[:2] == [vu.GET_FEATURES, vu.SET_OWNER]
    backend.close()


def test_backend_death_needs_reset_and_is_reported(backend: Backend) -> None:
    guest = guest_of(backend)
    reasons: list[str] = []
    guest.device.on_failure = reasons.append
    guest.start(F_VERSION_1, (8, 16))
    backend.socket.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: bool(reasons))
    assert reasons == ["test: testd has ended"]
    assert guest.status & STATUS_NEEDS_RESET
    guest.write(20, 1, 0)
    guest.start(F_VERSION_1, (8, 16))
    assert guest.status & STATUS_NEEDS_RESET
    guest.close()


def test_refused_request_needs_reset() -> None:
    backend = Backend(refuse=vu.SET_MEM_TABLE)
    guest = guest_of(backend)
    reasons: list[str] = []
    guest.device.on_failure = reasons.append
    guest.start(F_VERSION_1, (8, 16))
    assert guest.status & STATUS_NEEDS_RESET
    assert reasons[0] == "test: testd: SET_MEM_TABLE was refused"
    guest.close()
    backend.close()


def _silent(peer: socket.socket) -> None:
    pass


def _gone(peer: socket.socket) -> None:
    peer.close()


def _wrong_request(peer: socket.socket) -> None:
    peer.send(struct.pack("<III", 77, 5, 8) + bytes(8))


def _wrong_size(peer: socket.socket) -> None:
    peer.send(struct.pack("<III", vu.GET_FEATURES, 5, 4) + bytes(4))


def _huge(peer: socket.socket) -> None:
    peer.send(struct.pack("<III", vu.GET_FEATURES, 5, 0xFFFFFFFF))


@pytest.mark.parametrize("behaviour", [_silent, _gone, _wrong_request, _wrong_size, _huge])
def test_bad_backend_is_one_clear_error(behaviour: Callable[[socket.socket], None]) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        behaviour(ours)
        connection = vu.VhostUserConnection(theirs.detach(), backend="testd", timeout=0.1)
        with pytest.raises(VhostUserError, match="testd: GET_FEATURES") as caught:
            connection.negotiate(0)
        assert "\n" not in str(caught.value)
        connection.close()


def test_descriptor_that_is_no_socket_is_an_error() -> None:
    reader, writer = os.pipe()
    with pytest.raises(VhostUserError, match="not a socket"):
        VhostUserDevice("test", reader, (8,))
    os.close(reader)
    os.close(writer)
