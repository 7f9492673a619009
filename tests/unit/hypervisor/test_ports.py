# SPDX-License-Identifier: Apache-2.0
"""Ports and connections: what may be created and connected, what a post does, what an end leaves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from rootvisor.hypervisor.errors import HvError
from rootvisor.hypervisor.ports import PORT_LIMIT
from rootvisor.hypervisor.synic import QUEUE_LIMIT
from rootvisor.tlfs import ports as tlfs
from rootvisor.tlfs import status

from .root_model import Child, RootModel, RootVp


class Made:
    def __init__(self) -> None:
        self.model = RootModel(2)
        self.root = self.model.root
        self.ports = self.model.ports
        self.child = self.model.child(2)
        self.sibling = self.model.child(3)

    def message(
        self, port_id: int = 1, sint: int = 2, vp: int = tlfs.ANY_VP, owner: Any = None, reserved: int = 0
    ) -> None:
        info = tlfs.MESSAGE_PORT.pack(sint, vp, reserved)
        self.ports.create(owner or self.root, port_id, self.child, tlfs.PORT_MESSAGE, info)  # type: ignore[arg-type]

    def event(
        self, port_id: int = 1, sint: int = 2, base: int = 0, count: int = 16, reserved: int = 0
    ) -> None:
        info = tlfs.EVENT_PORT.pack(sint, tlfs.ANY_VP, base, count, reserved)
        self.ports.create(self.root, port_id, self.child, tlfs.PORT_EVENT, info)  # type: ignore[arg-type]

    def connect(
        self, kind: int = tlfs.PORT_MESSAGE, connection_id: int = 4, port_id: int = 1, child: Child | None = None,
        gpa: int = 0, value: int = 0, flags: int = 0, owner: Any = None,
    ) -> None:  # fmt: skip
        self.ports.connect(
            child or self.child,  # type: ignore[arg-type]
            connection_id, owner or self.root, port_id, kind, gpa, value, flags,
        )  # fmt: skip

    def disconnect(self, doorbell: bool) -> None:
        self.ports.disconnect(self.child, 4, doorbell)  # type: ignore[arg-type]

    def post(self, connection_id: int = 4, kind: int = 1, payload: bytes = b"x") -> None:
        self.ports.post_message(self.child, connection_id, kind, payload, self.model.vps[0])  # type: ignore[arg-type]

    def signal(self, connection_id: int = 4, flag: int = 0) -> None:
        self.ports.signal_event(self.child, connection_id, flag, self.model.vps[0])  # type: ignore[arg-type]

    def open_sint(self, vp: int = 0, sint: int = 2) -> RootVp:
        self.model.vps[vp].synic.write_sint(sint, 0x40)
        return self.model.vps[vp]


@pytest.fixture
def made() -> Made:
    return Made()


def refused(action: Callable[[], None]) -> int:
    with pytest.raises(HvError) as error:
        action()
    return error.value.status


# --- CREATE_PORT ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("port_id", [0, 1 << 24, 0xFFFFFFFF])
def test_create_reserved_port_id(made: Made, port_id: int) -> None:
    assert refused(lambda: made.message(port_id)) == status.INVALID_PORT_ID


def test_create_port_id_in_use(made: Made) -> None:
    made.message(1)
    assert refused(lambda: made.event(1)) == status.INVALID_PORT_ID
    made.ports.delete(made.root, 1)
    made.event(1)


def test_create_same_id_in_another_partition(made: Made) -> None:
    made.message(1)
    made.message(1, owner=made.sibling)


@pytest.mark.parametrize("kind", [0, tlfs.PORT_MONITOR, 5, 0xFFFFFFFF])
def test_create_unknown_type(made: Made, kind: int) -> None:
    info = tlfs.MESSAGE_PORT.pack(2, tlfs.ANY_VP, 0)
    create = made.ports.create
    assert refused(lambda: create(made.root, 1, made.child, kind, info)) == status.INVALID_PARAMETER  # type: ignore[arg-type]


def test_create_bad_sint_or_reserved_field(made: Made) -> None:
    for action in (
        lambda: made.message(sint=16),
        lambda: made.message(reserved=1),
        lambda: made.event(reserved=1),
        lambda: made.event(count=0),
        lambda: made.event(base=2047, count=2),
        lambda: made.message(sint=0),  # slot 0 of the root is the hypervisor's
    ):
        assert refused(action) == status.INVALID_PARAMETER
    made.event(base=2047, count=1)


def test_create_for_a_root_vp_that_does_not_exist(made: Made) -> None:
    assert refused(lambda: made.message(vp=2)) == status.INVALID_VP_INDEX


def test_create_doorbell_in_a_child(made: Made) -> None:
    info = tlfs.MESSAGE_PORT.pack(5, tlfs.ANY_VP, 0)
    create = made.ports.create
    assert (
        refused(lambda: create(made.sibling, 1, made.child, tlfs.PORT_DOORBELL, info))  # type: ignore[arg-type]
        == status.INVALID_PARAMETER
    )


def test_create_more_ports_than_the_limit(made: Made) -> None:
    for number in range(1, PORT_LIMIT + 1):
        made.message(number)
    assert refused(lambda: made.message(PORT_LIMIT + 1)) == status.NO_RESOURCES


# --- CONNECT_PORT, DISCONNECT_PORT, DELETE_PORT ---------------------------------------------------------------
def test_connect_without_port(made: Made) -> None:
    assert refused(made.connect) == status.INVALID_PORT_ID


def test_connect_from_another_partition_than_the_ports(made: Made) -> None:
    made.message()
    assert refused(lambda: made.connect(child=made.sibling)) == status.ACCESS_DENIED


def test_connect_another_type(made: Made) -> None:
    made.message()
    for kind in (tlfs.PORT_EVENT, tlfs.PORT_DOORBELL, 0):
        assert refused(lambda kind=kind: made.connect(kind)) == status.INVALID_PARAMETER  # type: ignore[misc]


def test_connection_id_reserved_or_in_use(made: Made) -> None:
    made.message()
    assert refused(lambda: made.connect(connection_id=1 << 24)) == status.INVALID_CONNECTION_ID
    made.connect()
    assert refused(made.connect) == status.INVALID_CONNECTION_ID
    made.model.port(2, made.child)
    made.connect(tlfs.PORT_DOORBELL, port_id=2)  # doorbells have ids of their own
    assert refused(lambda: made.connect(tlfs.PORT_DOORBELL, port_id=2, gpa=8)) == status.INVALID_CONNECTION_ID


def test_disconnect_and_delete_of_nothing(made: Made) -> None:
    for doorbell in (False, True):
        with pytest.raises(HvError) as caught:
            made.ports.disconnect(made.child, 4, doorbell)  # type: ignore[arg-type]
        assert caught.value.status == status.INVALID_CONNECTION_ID
    assert refused(lambda: made.ports.delete(made.root, 1)) == status.INVALID_PORT_ID
    made.message()
    made.connect()
    assert refused(partial(made.disconnect, doorbell=True)) == status.INVALID_CONNECTION_ID
    made.disconnect(doorbell=False)
    assert refused(made.post) == status.INVALID_CONNECTION_ID


# --- POST_MESSAGE ---------------------------------------------------------------------------------------------
def test_post_reaches_the_sint_with_the_ports_id(made: Made) -> None:
    vp = made.open_sint()
    made.message(0x123456)
    made.connect(port_id=0x123456)
    made.post(payload=b"hello")
    slot = vp.pages[0].memory[512:768]
    assert slot[:16].hex() == "01000000050000005634120000000000"
    assert bytes(slot[16:21]) == b"hello"
    assert made.root.vm.raised == [(0, 0x40)]


def test_post_without_connection_or_port(made: Made) -> None:
    assert refused(made.post) == status.INVALID_CONNECTION_ID
    made.message()
    made.connect()
    made.ports.delete(made.root, 1)
    assert refused(made.post) == status.INVALID_PORT_ID


@pytest.mark.parametrize("kind", [0, 1 << 31, 0xFFFFFFFF])
def test_post_reserved_message_type(made: Made, kind: int) -> None:
    made.message()
    made.connect()
    assert refused(lambda: made.post(kind=kind)) == status.INVALID_PARAMETER


def test_post_to_an_event_port_and_signal_to_a_message_port(made: Made) -> None:
    made.message(1)
    made.event(2)
    made.connect(connection_id=1)
    made.connect(tlfs.PORT_EVENT, connection_id=2, port_id=2)
    assert refused(lambda: made.post(2)) == status.INVALID_PARAMETER
    assert refused(lambda: made.signal(1)) == status.INVALID_PARAMETER


def test_post_to_any_vp_takes_one_whose_synic_is_on(made: Made) -> None:
    made.model.module_unload(made.model.vps[0])
    vp = made.open_sint(1)
    made.message()
    made.connect()
    made.post()
    assert vp.pages[0].memory[512] == 1
    made.model.module_unload(made.model.vps[1])
    assert refused(made.post) == status.INVALID_SYNIC_STATE


def test_post_queues_up_to_the_limit(made: Made) -> None:
    made.open_sint()
    made.message()
    made.connect()
    for _ in range(QUEUE_LIMIT + 1):
        made.post()
    assert refused(made.post) == status.INSUFFICIENT_BUFFERS


def test_post_to_a_child_vp_that_does_not_exist(made: Made) -> None:
    made.message(vp=7, owner=made.sibling)
    made.connect(owner=made.sibling)
    assert refused(made.post) == status.INVALID_VP_INDEX


# --- SIGNAL_EVENT ---------------------------------------------------------------------------------------------
def test_signal_sets_the_flag_once(made: Made) -> None:
    vp = made.open_sint()
    made.event(base=100, count=8)
    made.connect(tlfs.PORT_EVENT)
    real = memoryview(bytearray(4096))
    vp.pages[1].view = real  # type: ignore[assignment]
    made.signal(flag=3)
    made.signal(flag=3)
    assert real[512 + 103 // 8] == 1 << 103 % 8
    assert made.root.vm.raised == [(0, 0x40)]


def test_signal_flag_beyond_the_port(made: Made) -> None:
    made.open_sint()
    made.event(count=8)
    made.connect(tlfs.PORT_EVENT)
    assert refused(lambda: made.signal(flag=8)) == status.INVALID_PARAMETER


def test_signal_masked_sint(made: Made) -> None:
    made.event()
    made.connect(tlfs.PORT_EVENT)
    assert refused(made.signal) == status.INVALID_SYNIC_STATE


# --- the end of a partition -----------------------------------------------------------------------------------
def test_removed_partition_leaves_nothing(made: Made) -> None:
    made.message(1)
    made.message(2, owner=made.child)
    bell = made.model.port(3, made.child)
    made.connect()
    made.connect(tlfs.PORT_DOORBELL, port_id=3, gpa=0x1000)
    other = made.model.port(9, made.sibling)
    made.ports.remove_partition(2)
    assert not bell.alive
    assert not made.child.doorbells.by_gpa
    assert refused(made.post) == status.INVALID_CONNECTION_ID
    for owner, port_id in ((made.root, 1), (made.child, 2), (made.root, 3)):
        assert refused(lambda o=owner, p=port_id: made.ports.delete(o, p)) == status.INVALID_PORT_ID  # type: ignore[misc]
    assert other.alive
    assert made.ports.root_port(9) is other


def test_removed_partition_that_is_gone_already(made: Made) -> None:
    made.model.port(3, made.child)
    made.connect(tlfs.PORT_DOORBELL, port_id=3, gpa=0x1000)
    del made.model.partitions[2]
    made.ports.remove_partition(2)
    assert made.ports.root_port(3) is None
