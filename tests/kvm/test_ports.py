# SPDX-License-Identifier: Apache-2.0
"""Ports and doorbells by hypercall: a child's writes in the root's event ring, messages over connections."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from rootvisor.tlfs import hypercalls, intercepts, messages, msrs, partition_properties, registers, status
from rootvisor.tlfs import ports as tlfs
from tests.kvm.child import CALL_PAGE, OPERANDS, RESULT, UNMAPPED, Child, Driver
from tests.kvm.guest import Guest

FEATURES = (
    partition_properties.SYNTHETIC_HYPERVISOR_PRESENT
    | 2
    | partition_properties.SYNTHETIC_HYPERCALL_MSRS
    | partition_properties.SYNTHETIC_SYNIC
    | partition_properties.SYNTHETIC_SIGNAL_EVENTS
)
BELL = UNMAPPED + 0x104


@pytest.fixture
def child(driver: Driver) -> Iterator[Child]:
    with Child(driver, features=FEATURES) as child:
        yield child


def store(child: Child, gpa: int, count: int = 1, value: int = 0, step: int = 0) -> None:
    """Starts stores of 32 bits."""
    child.start(child.store_loop, rbx=gpa, rax=value, rcx=count, rdx=step)


def finished(child: Child) -> None:
    """The piece came to its OUT: no store was told."""
    kind, payload = child.intercept()
    assert kind == intercepts.X64_IO_PORT_INTERCEPT, f"{kind:#x} {payload.hex()}"


def test_doorbell_rings_and_the_write_completes(driver: Driver, child: Child) -> None:
    driver.doorbell(child, 7, BELL)
    store(child, BELL)
    driver.wait_for(lambda: child.partition.doorbells.rung == 1)
    assert driver.doorbells() == [7]
    finished(child)
    assert driver.guest.take(0xF3) >= 1


def test_doorbell_by_value_lets_others_through(driver: Driver, child: Child) -> None:
    for queue in range(3):
        driver.doorbell(child, queue + 1, BELL, queue, 3)
    store(child, BELL, count=3, value=0, step=1)
    driver.wait_for(lambda: child.partition.doorbells.rung == 3)
    assert driver.doorbells() == [1, 2, 3]
    finished(child)
    store(child, BELL, value=3)
    kind, payload = child.intercept()
    assert kind == intercepts.UNMAPPED_GPA
    assert intercepts.MEMORY_INTERCEPT.unpack(payload)[-2] == BELL


@pytest.mark.parametrize("flags", [1, 2, 4])
def test_doorbell_of_another_size_is_not_it(driver: Driver, child: Child, flags: int) -> None:
    driver.doorbell(child, 1, BELL, flags=flags | tlfs.DOORBELL_ANY_VALUE)
    store(child, BELL)
    kind, _payload = child.intercept()
    assert kind == intercepts.UNMAPPED_GPA


def test_doorbell_in_a_page_without_access(driver: Driver, child: Child) -> None:
    """A doorbell comes before what the page itself would do."""
    data = struct.pack("<QQIxxxxQ", child.id, BELL >> 12, 0x10000, 0)
    driver.call(hypercalls.MAP_GPA_PAGES, data, count=1)
    driver.doorbell(child, 4, BELL)
    store(child, BELL, count=5)
    driver.wait_for(lambda: child.partition.doorbells.rung == 5)
    assert driver.doorbells() == [4]
    finished(child)


def test_removed_doorbell_is_an_ordinary_write(driver: Driver, child: Child) -> None:
    driver.doorbell(child, 7, BELL)
    driver.remove_doorbell(child, 7)
    store(child, BELL)
    kind, _payload = child.intercept()
    assert kind == intercepts.UNMAPPED_GPA
    driver.doorbell(child, 7, BELL)  # ids are used again at once
    child.resume()
    assert driver.doorbells() == [7]
    finished(child)


def test_doorbells_more_than_a_ring_holds(driver: Driver, child: Child) -> None:
    for number in range(80):
        driver.doorbell(child, number + 1, BELL, number, 3)
    store(child, BELL, count=80, value=0, step=1)
    driver.wait_for(lambda: child.partition.doorbells.rung == 80)
    assert driver.ring()[1] == 1
    assert driver.doorbells() == list(range(1, 81))
    finished(child)


def test_doorbells_of_a_vp_that_goes_off_come_to_another(guest2: Guest) -> None:
    driver = Driver(guest2, vps=2)
    with Child(driver) as child:
        driver.doorbell(child, 3, BELL)
        store(child, BELL)
        driver.wait_for(lambda: child.partition.doorbells.rung == 1)
        driver.unload(0)
        kinds = {driver.message(1)[0] for _ in range(2)}  # the OUT after the store is told as well
        assert kinds == {messages.SYNIC_SINT_INTERCEPT, messages.OPAQUE_INTERCEPT}
        assert driver.drain(1) == [3]
        assert driver.guest.take(0xF3, 1) >= 1
        driver.load(0)


def test_ring_begins_anew_after_the_cpu_did(guest2: Guest) -> None:
    driver = Driver(guest2, vps=2)
    guest = driver.guest
    with Child(driver) as child:
        driver.doorbell(child, 3, BELL)
        for _ in range(2):
            store(child, BELL)
            assert driver.doorbells() == [3]
            finished(child)
        driver.unload(0)
        guest.wrmsr(msrs.VP_ASSIST_PAGE, guest.rdmsr(msrs.VP_ASSIST_PAGE) & ~1)
        guest.wrmsr(msrs.VP_ASSIST_PAGE, guest.rdmsr(msrs.VP_ASSIST_PAGE) | 1)
        driver.tails[0] = 0
        driver.unload(1)
        driver.load(0)
        store(child, BELL)
        assert driver.doorbells() == [3]
        finished(child)


def test_ring_goes_on_after_the_module_was_loaded_again(driver: Driver, child: Child) -> None:
    driver.doorbell(child, 3, BELL)
    store(child, BELL)
    assert driver.doorbells() == [3]
    finished(child)
    driver.unload()
    driver.load()
    store(child, BELL)
    assert driver.doorbells() == [3]
    finished(child)
    assert driver.tails[0] == 2


def test_finalized_partition_leaves_no_port(driver: Driver) -> None:
    with Child(driver) as child:
        driver.doorbell(child, 3, BELL)
        partition_id = child.id
    result = driver.guest.fast(hypercalls.DELETE_PORT, tlfs.DELETE_PORT_INPUT.pack(1, 3))
    assert result.status == status.INVALID_PORT_ID
    result = driver.guest.fast(
        hypercalls.DISCONNECT_PORT, tlfs.DISCONNECT_PORT_INPUT.pack(partition_id, 3, 1)
    )
    assert result.status == status.INVALID_PARTITION_ID


def test_calls_name_what_exists(driver: Driver, child: Child) -> None:
    info = tlfs.MESSAGE_PORT.pack(5, tlfs.ANY_VP, 0)

    def create(owner: int, port: int, vtl: int, connecting: int, kind: int = tlfs.PORT_DOORBELL) -> int:
        data = tlfs.CREATE_PORT_INPUT.pack(owner, port, vtl, 0, connecting, kind, info, 0)
        return driver.status(hypercalls.CREATE_PORT, data)

    assert create(99, 1, 0, child.id) == status.INVALID_PARTITION_ID
    assert create(1, 1, 0, 99) == status.INVALID_PARTITION_ID
    assert create(1, 1, 1, child.id) == status.INVALID_PARAMETER
    assert create(1, 0, 0, child.id) == status.INVALID_PORT_ID
    assert create(hypercalls.SELF, 1, 0, child.id) == 0
    assert create(1, 1, 0, child.id) == status.INVALID_PORT_ID
    data = tlfs.CONNECT_PORT_INPUT.pack(child.id, 1, 0, b"\0\0\1", 1, 1, 4, BELL, 0, 0, 0)
    assert driver.status(hypercalls.CONNECT_PORT, data) == status.INVALID_PARAMETER
    data = tlfs.CONNECT_PORT_INPUT.pack(child.id, 1, 0, bytes(3), 1, 2, 4, BELL, 0, 0, 0)
    assert driver.status(hypercalls.CONNECT_PORT, data) == status.INVALID_PORT_ID
    result = driver.guest.fast(hypercalls.DISCONNECT_PORT, tlfs.DISCONNECT_PORT_INPUT.pack(child.id, 1, 2))
    assert result.status == status.INVALID_PARAMETER
    result = driver.guest.fast(hypercalls.NOTIFY_PORT_RING_EMPTY, struct.pack("<Q", 16))
    assert result.status == status.INVALID_PARAMETER
    assert driver.guest.fast(hypercalls.NOTIFY_PORT_RING_EMPTY, struct.pack("<Q", 5)).status == 0


# --- the hypercalls of the child -------------------------------------------------------------------------------
def call_page(child: Child) -> None:
    child.set({registers.GUEST_OS_ID: 1 << 48, registers.HYPERCALL: CALL_PAGE | 1})


def child_call(child: Child, code: int, data: bytes = b"", fast: bool = False) -> tuple[int, bytes]:
    """The child makes a hypercall; the intercept that comes of it, which is an OUT when it is done."""
    child.memory[OPERANDS : OPERANDS + len(data)] = data
    values = {"rcx": code, "rdx": OPERANDS, "r8": 0}
    if fast:
        first, second = struct.unpack("<QQ", data.ljust(16, b"\0"))
        values = {"rcx": code | 1 << 16, "rdx": first, "r8": second}
    child.start(child.call_once, r9=CALL_PAGE, r10=RESULT, **values)
    return child.intercept()


def result(child: Child) -> int:
    return int.from_bytes(child.memory[RESULT : RESULT + 8], "little")


def test_child_has_no_connection_unless_one_was_made(driver: Driver, child: Child) -> None:
    call_page(child)
    for code, data, fast in (
        (hypercalls.POST_MESSAGE, tlfs.POST_MESSAGE_INPUT.pack(1, 1, 4, b"ding"), False),
        (hypercalls.SIGNAL_EVENT, tlfs.SIGNAL_EVENT_INPUT.pack(2, 0), False),
        (hypercalls.SIGNAL_EVENT, tlfs.SIGNAL_EVENT_INPUT.pack(2, 0), True),
    ):
        kind, _payload = child_call(child, code, data, fast)
        assert kind == intercepts.X64_IO_PORT_INTERCEPT
        assert result(child) == status.INVALID_CONNECTION_ID


def test_unknown_connection_becomes_an_intercept_if_installed(driver: Driver, child: Child) -> None:
    call_page(child)
    data = struct.pack("<QIIQ", child.id, 4, intercepts.TYPE_UNKNOWN_SYNIC_CONNECTION, 0)
    driver.call(hypercalls.INSTALL_INTERCEPT, data)
    kind, payload = child_call(child, hypercalls.SIGNAL_EVENT, tlfs.SIGNAL_EVENT_INPUT.pack(2, 0), True)
    assert kind == intercepts.HYPERCALL_INTERCEPT
    assert struct.unpack_from("<Q", payload, 56)[0] == hypercalls.SIGNAL_EVENT | 1 << 16


def test_child_posts_to_the_root(driver: Driver, child: Child) -> None:
    guest = driver.guest
    info = tlfs.MESSAGE_PORT.pack(3, 0, 0)
    driver.call(
        hypercalls.CREATE_PORT,
        tlfs.CREATE_PORT_INPUT.pack(1, 0x55, 0, 0, child.id, tlfs.PORT_MESSAGE, info, 0),
    )
    driver.call(
        hypercalls.CONNECT_PORT,
        tlfs.CONNECT_PORT_INPUT.pack(child.id, 9, 0, bytes(3), 1, 0x55, tlfs.PORT_MESSAGE, 0, 0, 0, 0),
    )
    guest.wrmsr(msrs.SINT0 + 3, 0x66)
    call_page(child)
    child_call(child, hypercalls.POST_MESSAGE, tlfs.POST_MESSAGE_INPUT.pack(9, 0x1234, 4, b"ding"))
    assert result(child) == 0
    slot = guest.partition.vps[0].synic.simp.view[3 * 256 : 4 * 256]
    assert bytes(slot[:20]) == struct.pack("<IBBxxQ", 0x1234, 4, 0, 0x55) + b"ding"
    assert guest.take(0x66) == 1
    guest.wrmsr(msrs.SINT0 + 3, msrs.SINT_MASKED)


def test_children_may_not_make_ports(driver: Driver, child: Child) -> None:
    call_page(child)
    for code in (
        hypercalls.CREATE_PORT, hypercalls.CONNECT_PORT, hypercalls.DELETE_PORT, hypercalls.DISCONNECT_PORT,
        hypercalls.ASSERT_VIRTUAL_INTERRUPT, hypercalls.CLEAR_VIRTUAL_INTERRUPT, hypercalls.SIGNAL_EVENT_DIRECT,
        hypercalls.POST_MESSAGE_DIRECT,
    ):  # fmt: skip
        child_call(child, code, bytes(280))
        assert result(child) == status.ACCESS_DENIED, hypercalls.call_name(code)
