# SPDX-License-Identifier: Apache-2.0
"""vhost-vsock against its ioctls; with the kernel's own in tests/kvm."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rootvisor.pci import registers as pci
from rootvisor.virtio import vsock
from rootvisor.virtio.registers import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, STATUS_NEEDS_RESET
from rootvisor.virtio.vhost_kernel import VhostKernelError, open_vhost
from rootvisor.virtio.vsock import Vsock
from tests.unit.virtio.fake_vhost import FakeVhost
from tests.unit.virtio.guest_side import RAM_BASE, RAM_BYTES, Guest, wait_until

SIZES = (256, 256, 16)


@pytest.fixture
def vhost(monkeypatch: pytest.MonkeyPatch) -> FakeVhost:
    return FakeVhost(monkeypatch, vsock.F_SEQPACKET)


@pytest.fixture
def guest(vhost: FakeVhost) -> Iterator[Guest]:
    guest = Guest(Vsock(3, vhost.fd))
    yield guest
    guest.close()


def running(vhost: FakeVhost) -> bool:
    return vhost.serving


def test_offer_leaves_out_what_only_the_host_may_use(vhost: FakeVhost, guest: Guest) -> None:
    assert guest.offered() == F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | vsock.F_SEQPACKET
    assert guest.read(0x100, 8) == 3 == vhost.cid
    assert guest.config_read(0, 4) == 0x1053 << 16 | 0x1AF4


def test_driver_ok_runs_both_packet_queues(vhost: FakeVhost, guest: Guest) -> None:
    guest.start(F_VERSION_1, SIZES)
    assert vhost.serving and vhost.driver_features == F_VERSION_1
    address = guest.memory.regions[0].address
    assert vhost.regions == [(RAM_BASE, RAM_BYTES, address)]
    for index in (0, 1):
        ring, driver = vhost.rings[index], guest.rings[index]
        areas = (driver.desc, driver.device, driver.driver)
        assert ring["addresses"] == tuple(address + gpa - RAM_BASE for gpa in areas)
        assert (ring["size"], ring["base"], ring["call"]) == (256, 0, guest.vectors[1].fd)
    assert 2 not in vhost.rings


def test_reset_stops_and_starts_anew_from_zero(vhost: FakeVhost, guest: Guest) -> None:
    guest.start(F_VERSION_1, SIZES)
    vhost.rings[0]["base"] = 7
    guest.write(20, 1, 0)
    assert not vhost.serving
    guest.start(F_VERSION_1, SIZES)
    assert running(vhost)
    assert vhost.rings[0]["base"] == 0


def test_bus_master_off_and_on_goes_on_where_it_was(vhost: FakeVhost, guest: Guest) -> None:
    guest.start(F_VERSION_1, SIZES)
    vhost.rings[0]["base"], vhost.rings[1]["base"] = 7, 9
    guest.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    assert not vhost.serving
    guest.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
    assert running(vhost)
    assert (vhost.rings[0]["base"], vhost.rings[1]["base"]) == (7, 9)


def test_one_queue_alone_does_not_run(vhost: FakeVhost, guest: Guest) -> None:
    assert guest.negotiate(F_VERSION_1)
    guest.set_queue(0, 256)
    guest.write(20, 1, 15)
    assert not vhost.serving and not guest.status & STATUS_NEEDS_RESET


def test_reset_after_a_restore_waits_for_a_buffer(guest: Guest) -> None:
    guest.start(F_VERSION_1, SIZES)
    device = guest.device
    assert isinstance(device, Vsock)
    device.restore({})
    room = guest.memory.place(b"\xff" * 8)
    assert guest.request(2, [(room, 8, True)]) == 4
    assert guest.memory.read(room, 4) == bytes(4)


def test_ring_that_the_kernel_finds_malformed_needs_reset(vhost: FakeVhost, guest: Guest) -> None:
    reasons: list[str] = []
    guest.device.on_failure = reasons.append
    guest.start(F_VERSION_1, SIZES)
    os.eventfd_write(vhost.rings[1]["err"], 1)
    wait_until(lambda: bool(reasons))
    assert reasons == ["vsock: the kernel finds a ring malformed"]
    assert guest.status & STATUS_NEEDS_RESET and not vhost.serving
    guest.write(20, 1, 0)
    guest.start(F_VERSION_1, SIZES)
    assert vhost.serving


def test_refused_call_needs_reset_and_leaves_nothing_running(vhost: FakeVhost, guest: Guest) -> None:
    reasons: list[str] = []
    guest.device.on_failure = reasons.append
    vhost.refuse["VSOCK_SET_RUNNING"] = errno.EFAULT
    guest.start(F_VERSION_1, SIZES)
    assert reasons == ["vsock: vhost-vsock: VHOST_VSOCK_SET_RUNNING: Bad address"]
    assert guest.status & STATUS_NEEDS_RESET and not vhost.serving
    vhost.refuse.clear()
    guest.write(20, 1, 0)
    guest.start(F_VERSION_1, SIZES)
    assert vhost.serving


def test_cid_in_use_says_so(vhost: FakeVhost) -> None:
    vhost.refuse["VSOCK_SET_GUEST_CID"] = errno.EADDRINUSE
    with pytest.raises(VhostKernelError, match="another guest has cid 7"):
        Vsock(7, vhost.fd)
    with pytest.raises(OSError):
        os.fstat(vhost.fd)


@pytest.mark.parametrize("cid", [0, 2, 0xFFFFFFFF, -1])
def test_cid_of_nobody_is_value_error(cid: int) -> None:
    with pytest.raises(ValueError, match="3 to"):
        Vsock(cid, -1)


def test_missing_device_names_the_module(tmp_path: Path) -> None:
    with pytest.raises(VhostKernelError, match="No such file or directory; modprobe vhost_vsock"):
        open_vhost(str(tmp_path / "vhost-vsock"), "vhost_vsock")
