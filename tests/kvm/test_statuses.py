# SPDX-License-Identifier: Apache-2.0
"""Every status that a call about children is said to give, provoked. What a call's docstring names must be here, and
every status of the contract's table that can come at all must come from some call.
"""

from __future__ import annotations

import inspect
import re
import struct
from collections.abc import Callable, Iterator

import pytest

from rootvisor.hypervisor import calls
from rootvisor.hypervisor.hypercall_table import REP, SIMPLE, TABLE, VARIABLE
from rootvisor.kvm.errors import KvmError
from rootvisor.tlfs import gpa as gpa_flags
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import intercepts, ports, registers, status, vp_state
from rootvisor.tlfs import partition_properties as properties
from tests.kvm import guest as g
from tests.kvm.guest import Guest
from tests.kvm.parent import FLAGS, POOL, Child, Parent

calls.load()
calls.load_children()

#: Calls about children, or that a root makes because of them.
CALLS = tuple(
    code for code in sorted(TABLE.calls)
    if code >= hv.CREATE_PARTITION and code not in (
        hv.SET_SYSTEM_PROPERTY, hv.ADD_LOGICAL_PROCESSOR, hv.GET_SYSTEM_PROPERTY, hv.MAP_DEVICE_INTERRUPT,
        hv.UNMAP_DEVICE_INTERRUPT, hv.RETARGET_DEVICE_INTERRUPT, hv.ENTER_SLEEP_STATE, hv.NOTIFY_PARTITION_EVENT,
        hv.GET_VP_INDEX_FROM_APIC_ID, hv.GET_PARTITION_ID,
    )
)  # fmt: skip
#: Statuses of the contract (section 0) that no call here gives, and why.
NEVER = {
    status.INSUFFICIENT_BUFFERS: "no call has buffers of its own",
    status.NOT_ACKNOWLEDGED: "a full slot is OBJECT_IN_USE",
    status.OPERATION_FAILED: "a refusal has its own status",
    status.INSUFFICIENT_ROOT_MEMORY: "only pages that are handed back visibly are asked for, one by one",
    status.INSUFFICIENT_CONTIGUOUS_MEMORY: "the same",
    status.INSUFFICIENT_CONTIGUOUS_ROOT_MEMORY: "the same",
    status.TIME_OUT: "calls wait as long as it takes",
    status.CALL_PENDING: "SET_PARTITION_PROPERTY is synchronous (contract 2.6)",
    status.VTL_ALREADY_ENABLED: "there are no VTLs",
}
CONTRACT = (
    0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0A, 0x0B, 0x0D, 0x0E, 0x11, 0x12, 0x13, 0x14, 0x15, 0x1D, 0x20,
    0x41, 0x50, 0x71, 0x73, 0x75, 0x78, 0x79, 0x83, 0x86,
)  # fmt: skip


class Stage:
    """A root with a child in every state, and a VP that runs."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.parent = Parent(guest)
        self.created = self.parent.create()
        self.child = self.parent.initialized(2)
        self.finalized = self.parent.initialized()
        assert self.finalized.finalize() == 0
        self.nobody = Child(self.parent, 1 << 40)
        self.root = Child(self.parent, 1)
        self.child.load(b"\xeb\xfe")
        self.child.resume(0)

    def call(self, code: int, data: bytes, count: int = 0, variable: int = 0) -> int:
        return self.guest.call(code, data, count=count, variable=variable, output=256).status

    def give(self, partition_id: int, *pages: int) -> int:
        return self.parent.deposit_pages(partition_id, list(pages))

    def without_room(self, method: str, action: Callable[[], int]) -> int:
        """The host's KVM refuses ``method`` of Kvm or Vm."""
        owner = self.guest.hypervisor.kvm if method == "create_vm" else None
        kind = type(owner) if owner is not None else type(self.guest.partition.vm)
        kept = getattr(kind, method)

        def refuse(*_: object) -> None:
            raise KvmError("no room")

        setattr(kind, method, refuse)
        try:
            return action()
        finally:
            setattr(kind, method, kept)


@pytest.fixture(scope="module")
def stage(usable_kvm: None) -> Iterator[Stage]:
    with Guest() as guest:
        guest.enable_hypercalls()
        yield Stage(guest)
        assert guest.partition.defect is None


def head(child: Child, vp: int = 0, tail: bytes = b"") -> bytes:
    return struct.pack("<QI4x", child.id, vp) + tail


def registers_input(child: Child, vp: int, *names: int) -> bytes:
    return hv.VP_REGISTERS_INPUT.pack(child.id, vp, 0, bytes(3)) + struct.pack(f"<{len(names)}I", *names)


def set_input(child: Child, vp: int, name: int, value: int) -> bytes:
    return hv.VP_REGISTERS_INPUT.pack(child.id, vp, 0, bytes(3)) + struct.pack("<I12xQQ", name, value, 0)


def prop(child: Child, code: int) -> bytes:
    return hv.GET_PARTITION_PROPERTY_INPUT.pack(child.id, code)


def set_prop(child: Child, code: int, value: int = 0) -> bytes:
    return hv.SET_PARTITION_PROPERTY_INPUT.pack(child.id, code, value)


def mapping(child: Child, gfn: int, flags: int, *pages: int) -> bytes:
    return gpa_flags.MAP_GPA_PAGES_INPUT.pack(child.id, gfn, flags) + struct.pack(f"<{len(pages)}Q", *pages)


def state(child: Child, vp: int, kind: int, page: int) -> bytes:
    return vp_state.VP_STATE_INPUT.pack(child.id, vp, 0, 0, 0, kind, 0, 0, 0) + struct.pack("<Q", page)


def interrupt(child: Child, vector: int = 0x40, vtl: int = 0) -> bytes:
    return ports.ASSERT_VIRTUAL_INTERRUPT_INPUT.pack(child.id, 0, 0, 0, vector, vtl)


def port(owner: int, port_id: int, child: int, vtl: int = 0, sint: int = 5) -> bytes:
    info = ports.MESSAGE_PORT.pack(sint, ports.ANY_VP, 0)
    return ports.CREATE_PORT_INPUT.pack(owner, port_id, vtl, 0, child, ports.PORT_DOORBELL, info, 0)


def connection(child: int, number: int, owner: int, port_id: int, reserved: bytes = bytes(3)) -> bytes:
    return ports.CONNECT_PORT_INPUT.pack(
        child,
        number,
        0,
        reserved,
        owner,
        port_id,
        ports.PORT_DOORBELL,
        0x80000000,
        0,
        ports.DOORBELL_ANY_VALUE,
        0,
    )


def statistics(kind: int, identity: bytes = b"", area: int = 0) -> bytes:
    return hv.MAP_STATS_PAGE_INPUT.pack(kind, identity.ljust(15, b"\0") + bytes((area,)))


def install(child: Child, kind: int, mask: int = 4, parameter: int = 0) -> bytes:
    return intercepts.INSTALL_INTERCEPT_INPUT.pack(child.id, mask, kind, parameter)


def cpuid(child: Child, vp: int = 0, kind: int = 2) -> bytes:
    return struct.pack("<QIIIIBB2x8I", child.id, vp, kind, 7, 0, 0, 0, *(0,) * 8)


Provoke = Callable[[Stage], int]
#: (call, status) -> what provokes it
CASES: dict[tuple[int, int], Provoke] = {}


def case(
    code: int, wanted: int, count: int = 0, variable: int = 0
) -> Callable[[Callable[[Stage], bytes]], None]:
    """The function gives the input of ``code``."""

    def register(function: Callable[[Stage], bytes]) -> None:
        CASES[code, wanted] = lambda stage: stage.call(code, function(stage), count, variable)

    return register


def done(code: int, wanted: int, function: Provoke) -> None:
    CASES[code, wanted] = function


BAD, STATE = status.INVALID_PARAMETER, status.INVALID_PARTITION_STATE
NO_PARTITION, NO_VP = status.INVALID_PARTITION_ID, status.INVALID_VP_INDEX
RUNS = status.INVALID_VP_STATE

done(hv.CREATE_PARTITION, BAD, lambda s: s.parent.try_create(FLAGS & ~properties.FLAG_EXO)[0])
done(
    hv.CREATE_PARTITION,
    status.PROCESSOR_FEATURE_NOT_SUPPORTED,
    lambda s: s.parent.try_create(FLAGS & ~properties.FLAG_LAPIC)[0],
)
done(hv.CREATE_PARTITION, status.FEATURE_UNAVAILABLE, lambda s: s.parent.try_create(isolation=1)[0])
done(
    hv.CREATE_PARTITION,
    status.NO_RESOURCES,
    lambda s: s.without_room("create_vm", lambda: s.parent.try_create()[0]),
)
done(hv.INITIALIZE_PARTITION, STATE, lambda s: s.child.initialize())
done(hv.INITIALIZE_PARTITION, NO_PARTITION, lambda s: s.root.initialize())
done(hv.FINALIZE_PARTITION, STATE, lambda s: s.created.finalize())
done(hv.FINALIZE_PARTITION, NO_PARTITION, lambda s: s.nobody.finalize())
done(hv.DELETE_PARTITION, STATE, lambda s: s.child.delete())
done(hv.DELETE_PARTITION, NO_PARTITION, lambda s: s.nobody.delete())
case(hv.GET_PARTITION_PROPERTY, status.UNKNOWN_PROPERTY)(lambda s: prop(s.child, 0x12345))
case(hv.GET_PARTITION_PROPERTY, STATE)(lambda s: prop(s.finalized, properties.TIME_FREEZE))
case(hv.GET_PARTITION_PROPERTY, NO_PARTITION)(lambda s: prop(s.nobody, properties.TIME_FREEZE))
case(hv.SET_PARTITION_PROPERTY, STATE)(lambda s: set_prop(s.child, properties.SYNTHETIC_PROC_FEATURES))
case(hv.SET_PARTITION_PROPERTY, status.ACCESS_DENIED)(
    lambda s: set_prop(s.child, properties.PROCESSOR_FEATURES0)
)
case(hv.SET_PARTITION_PROPERTY, status.PROPERTY_VALUE_OUT_OF_RANGE)(
    lambda s: set_prop(s.child, properties.TIME_FREEZE, 2)
)
case(hv.SET_PARTITION_PROPERTY, status.UNKNOWN_PROPERTY)(lambda s: set_prop(s.child, 0x12345))
case(hv.SET_PARTITION_PROPERTY, NO_PARTITION)(lambda s: set_prop(s.nobody, properties.TIME_FREEZE))
case(hv.SET_PARTITION_PROPERTY, status.OPERATION_DENIED)(lambda s: set_prop(s.root, properties.TIME_FREEZE))
done(hv.DEPOSIT_MEMORY, BAD, lambda s: s.give(s.child.id, g.OWNED >> 12))
done(hv.DEPOSIT_MEMORY, NO_PARTITION, lambda s: s.give(s.nobody.id, POOL[0]))
case(hv.DEPOSIT_MEMORY, status.INVALID_HYPERCALL_INPUT)(lambda s: struct.pack("<Q", s.child.id))
done(hv.WITHDRAW_MEMORY, status.NO_RESOURCES, lambda s: s.parent.withdraw(s.created.id, 5)[0])
done(hv.WITHDRAW_MEMORY, NO_PARTITION, lambda s: s.parent.withdraw(s.nobody.id, 5)[0])
case(hv.MAP_GPA_PAGES, BAD, count=1)(lambda s: mapping(s.child, 0, 0, POOL[0]))
case(hv.MAP_GPA_PAGES, STATE, count=1)(lambda s: mapping(s.created, 0, 1, POOL[0]))
case(hv.MAP_GPA_PAGES, NO_PARTITION, count=1)(lambda s: mapping(s.nobody, 0, 1, POOL[0]))


def _no_room_for_pieces(stage: Stage) -> int:
    """vm.max_map_count: the reservation refuses one more piece."""
    memory = stage.guest.hypervisor.partitions[stage.child.id].memory
    reservation = memory._reservation  # type: ignore[attr-defined]
    kept = type(reservation).map_file

    def refuse(*_: object) -> None:
        raise OSError(12, "no room")

    type(reservation).map_file = refuse
    try:
        return stage.call(hv.MAP_GPA_PAGES, mapping(stage.child, 0x1000, 3, POOL[-1]), count=1)
    finally:
        type(reservation).map_file = kept


done(hv.MAP_GPA_PAGES, status.NO_RESOURCES, _no_room_for_pieces)
case(hv.UNMAP_GPA_PAGES, BAD, count=1)(lambda s: gpa_flags.UNMAP_GPA_PAGES_INPUT.pack(s.child.id, 0, 0x10))
case(hv.UNMAP_GPA_PAGES, STATE, count=1)(lambda s: gpa_flags.UNMAP_GPA_PAGES_INPUT.pack(s.created.id, 0, 0))
case(hv.UNMAP_GPA_PAGES, NO_PARTITION, count=1)(
    lambda s: gpa_flags.UNMAP_GPA_PAGES_INPUT.pack(s.nobody.id, 0, 0)
)
case(hv.INSTALL_INTERCEPT, STATE)(lambda s: install(s.created, intercepts.TYPE_CPUID))
case(hv.INSTALL_INTERCEPT, BAD)(lambda s: install(s.child, 0x77))
case(hv.INSTALL_INTERCEPT, status.FEATURE_UNAVAILABLE)(
    lambda s: install(s.child, intercepts.TYPE_APIC_INIT_SIPI)
)
case(hv.INSTALL_INTERCEPT, NO_PARTITION)(lambda s: install(s.nobody, intercepts.TYPE_CPUID))


def _too_many_msrs(stage: Stage) -> int:
    for number in range(13):
        assert (
            stage.call(
                hv.INSTALL_INTERCEPT, install(stage.child, intercepts.TYPE_MSR_INDEX, 3, 0x400 + number)
            )
            == 0
        )
    return stage.call(hv.INSTALL_INTERCEPT, install(stage.child, intercepts.TYPE_MSR_INDEX, 3, 0x500))


done(hv.INSTALL_INTERCEPT, status.NO_RESOURCES, _too_many_msrs)
done(hv.CREATE_VP, NO_VP, lambda s: s.child.create_vp(0))
done(hv.CREATE_VP, STATE, lambda s: s.created.create_vp(0))
done(hv.CREATE_VP, NO_PARTITION, lambda s: s.nobody.create_vp(0))
done(
    hv.CREATE_VP, status.NO_RESOURCES, lambda s: s.without_room("create_vcpu", lambda: s.child.create_vp(77))
)
done(hv.CREATE_VP, status.INVALID_LP_INDEX, lambda s: _announce(s))


def _announce(stage: Stage) -> int:
    """The root's second VP, on an LP that nobody has added."""
    with Guest(vps=2) as guest:
        guest.enable_hypercalls()
        return guest.call(hv.CREATE_VP, hv.CREATE_VP_INPUT.pack(hv.SELF, 1, 0, 0, 0, 1)).status


done(hv.DELETE_VP, status.OPERATION_DENIED, lambda s: s.root.delete_vp(0))
done(hv.DELETE_VP, NO_VP, lambda s: s.child.delete_vp(99))
done(hv.DELETE_VP, NO_PARTITION, lambda s: s.nobody.delete_vp(0))
done(hv.DELETE_VP, STATE, lambda s: s.finalized.delete_vp(0))
case(hv.GET_VP_REGISTERS, BAD, count=1)(lambda s: registers_input(s.child, 1, 0x12345))
case(hv.GET_VP_REGISTERS, RUNS, count=1)(lambda s: registers_input(s.child, 0, registers.RIP))
case(hv.GET_VP_REGISTERS, NO_VP, count=1)(lambda s: registers_input(s.child, 9, registers.RIP))
case(hv.GET_VP_REGISTERS, NO_PARTITION, count=1)(lambda s: registers_input(s.nobody, 0, registers.RIP))
case(hv.SET_VP_REGISTERS, BAD, count=1)(lambda s: set_input(s.child, 1, 0x12345, 0))
case(hv.SET_VP_REGISTERS, status.INVALID_REGISTER_VALUE, count=1)(
    lambda s: set_input(s.child, 1, registers.EXPLICIT_SUSPEND, 2)
)
case(hv.SET_VP_REGISTERS, RUNS, count=1)(lambda s: set_input(s.child, 0, registers.RIP, 2))
case(hv.SET_VP_REGISTERS, NO_VP, count=1)(lambda s: set_input(s.child, 9, registers.RIP, 2))
case(hv.SET_VP_REGISTERS, NO_PARTITION, count=1)(lambda s: set_input(s.nobody, 0, registers.RIP, 2))
case(hv.TRANSLATE_VIRTUAL_ADDRESS, BAD)(lambda s: registers.TRANSLATE_INPUT.pack(s.root.id, 0, 0, 0))
case(hv.TRANSLATE_VIRTUAL_ADDRESS, RUNS)(lambda s: registers.TRANSLATE_INPUT.pack(s.child.id, 0, 0, 0))
case(hv.TRANSLATE_VIRTUAL_ADDRESS, status.SUCCESS)(
    lambda s: registers.TRANSLATE_INPUT.pack(s.child.id, 1, 1, 1 << 40)
)
case(hv.TRANSLATE_VIRTUAL_ADDRESS, NO_VP)(lambda s: registers.TRANSLATE_INPUT.pack(s.child.id, 9, 0, 0))
case(hv.TRANSLATE_VIRTUAL_ADDRESS, NO_PARTITION)(
    lambda s: registers.TRANSLATE_INPUT.pack(s.nobody.id, 0, 0, 0)
)
case(hv.CLEAR_VIRTUAL_INTERRUPT, NO_PARTITION)(
    lambda s: ports.CLEAR_VIRTUAL_INTERRUPT_INPUT.pack(s.nobody.id)
)
case(hv.DELETE_PORT, status.INVALID_PORT_ID)(lambda s: ports.DELETE_PORT_INPUT.pack(1, 777))
case(hv.DELETE_PORT, NO_PARTITION)(lambda s: ports.DELETE_PORT_INPUT.pack(s.nobody.id, 777))
case(hv.DISCONNECT_PORT, status.INVALID_CONNECTION_ID)(
    lambda s: ports.DISCONNECT_PORT_INPUT.pack(s.child.id, 777, 1)
)
case(hv.DISCONNECT_PORT, BAD)(lambda s: ports.DISCONNECT_PORT_INPUT.pack(s.child.id, 777, 2))
case(hv.DISCONNECT_PORT, NO_PARTITION)(lambda s: ports.DISCONNECT_PORT_INPUT.pack(s.nobody.id, 777, 1))
case(hv.POST_MESSAGE, status.INVALID_CONNECTION_ID)(
    lambda s: struct.pack("<IIII", 99, 0, 1, 8).ljust(256, b"\0")
)
case(hv.POST_MESSAGE, BAD)(lambda s: struct.pack("<IIII", 99, 0, 1, 241).ljust(256, b"\0"))
case(hv.SIGNAL_EVENT, status.INVALID_CONNECTION_ID)(lambda s: struct.pack("<IHH", 99, 0, 0))
case(hv.MAP_STATS_PAGE, BAD)(lambda s: statistics(77))
case(hv.MAP_STATS_PAGE, status.INVALID_LP_INDEX)(lambda s: statistics(2, struct.pack("<I", 9)))
case(hv.MAP_STATS_PAGE, NO_PARTITION)(lambda s: statistics(0x10001, struct.pack("<Q", 1 << 40)))
case(hv.MAP_STATS_PAGE, NO_VP)(lambda s: statistics(0x10002, struct.pack("<QI", s.child.id, 9)))
case(hv.MAP_STATS_PAGE, status.INSUFFICIENT_MEMORY)(lambda s: statistics(1))
case(hv.UNMAP_STATS_PAGE, BAD)(lambda s: statistics(1))
case(hv.NOTIFY_PORT_RING_EMPTY, BAD)(lambda s: struct.pack("<Q", 16))
case(hv.REGISTER_INTERCEPT_RESULT, BAD)(lambda s: cpuid(s.child, kind=1))
case(hv.REGISTER_INTERCEPT_RESULT, RUNS)(lambda s: cpuid(s.child))
case(hv.REGISTER_INTERCEPT_RESULT, NO_VP)(lambda s: cpuid(s.child, 9))
case(hv.REGISTER_INTERCEPT_RESULT, NO_PARTITION)(lambda s: cpuid(s.nobody))
case(hv.ASSERT_VIRTUAL_INTERRUPT, BAD)(lambda s: interrupt(s.child, 3))
case(hv.ASSERT_VIRTUAL_INTERRUPT, STATE)(lambda s: interrupt(s.finalized))
case(hv.ASSERT_VIRTUAL_INTERRUPT, NO_PARTITION)(lambda s: interrupt(s.nobody))
case(hv.CREATE_PORT, BAD)(lambda s: port(1, 5, s.child.id, vtl=1))
case(hv.CREATE_PORT, NO_PARTITION)(lambda s: port(1, 5, s.nobody.id))
case(hv.CONNECT_PORT, BAD)(lambda s: connection(s.child.id, 5, 1, 5, b"\1\0\0"))
case(hv.CONNECT_PORT, status.INVALID_PORT_ID)(lambda s: connection(s.child.id, 5, 1, 777))
case(hv.CONNECT_PORT, NO_PARTITION)(lambda s: connection(s.nobody.id, 5, 1, 5))
case(hv.SIGNAL_EVENT_DIRECT, BAD)(lambda s: ports.SIGNAL_EVENT_DIRECT_INPUT.pack(s.child.id, 1, 1, 2, 0))
case(hv.SIGNAL_EVENT_DIRECT, NO_VP)(lambda s: ports.SIGNAL_EVENT_DIRECT_INPUT.pack(s.child.id, 9, 0, 2, 0))
case(hv.SIGNAL_EVENT_DIRECT, NO_PARTITION)(
    lambda s: ports.SIGNAL_EVENT_DIRECT_INPUT.pack(s.nobody.id, 0, 0, 2, 0)
)
case(hv.SIGNAL_EVENT_DIRECT, status.INVALID_SYNIC_STATE)(
    lambda s: ports.SIGNAL_EVENT_DIRECT_INPUT.pack(s.child.id, 1, 0, 2, 0)
)
case(hv.POST_MESSAGE_DIRECT, BAD)(
    lambda s: ports.POST_MESSAGE_DIRECT_INPUT.pack(s.child.id, 1, 1, 2, bytes(256))
)
case(hv.POST_MESSAGE_DIRECT, NO_VP)(
    lambda s: ports.POST_MESSAGE_DIRECT_INPUT.pack(s.child.id, 9, 0, 2, bytes(256))
)
case(hv.POST_MESSAGE_DIRECT, NO_PARTITION)(
    lambda s: ports.POST_MESSAGE_DIRECT_INPUT.pack(s.nobody.id, 0, 0, 2, bytes(256))
)


def _post_twice(stage: Stage) -> int:
    values = (registers.SCONTROL, 1), (registers.SIMP, 0x5001)
    assert stage.child.set_registers(1, *values) == 0
    data = ports.POST_MESSAGE_DIRECT_INPUT.pack(
        stage.child.id, 1, 0, 2, struct.pack("<IB", 1, 8).ljust(256, b"\0")
    )
    assert stage.call(hv.POST_MESSAGE_DIRECT, data) == 0
    return stage.call(hv.POST_MESSAGE_DIRECT, data)


done(hv.POST_MESSAGE_DIRECT, status.OBJECT_IN_USE, _post_twice)
case(hv.DISPATCH_VP, status.OPERATION_DENIED)(
    lambda s: intercepts.DISPATCH_VP_INPUT.pack(s.child.id, 1, 0, 0, 0)
)
case(hv.DISPATCH_VP, NO_VP)(lambda s: intercepts.DISPATCH_VP_INPUT.pack(s.child.id, 9, 0, 0, 0))
case(hv.DISPATCH_VP, NO_PARTITION)(lambda s: intercepts.DISPATCH_VP_INPUT.pack(s.nobody.id, 0, 0, 0, 0))
#: tests/kvm/test_root_scheduler.py: it takes a root of the other kind
ELSEWHERE = {(hv.DISPATCH_VP, BAD), (hv.DISPATCH_VP, STATE), (hv.DISPATCH_VP, RUNS)}
case(hv.GET_GPA_PAGES_ACCESS_STATES, BAD, count=1)(
    lambda s: gpa_flags.GET_GPA_PAGES_ACCESS_STATES_INPUT.pack(s.child.id, 0x100, 0)
)
case(hv.GET_GPA_PAGES_ACCESS_STATES, STATE, count=1)(
    lambda s: gpa_flags.GET_GPA_PAGES_ACCESS_STATES_INPUT.pack(s.created.id, 0, 0)
)
case(hv.GET_GPA_PAGES_ACCESS_STATES, NO_PARTITION, count=1)(
    lambda s: gpa_flags.GET_GPA_PAGES_ACCESS_STATES_INPUT.pack(s.nobody.id, 0, 0)
)
done(hv.MAP_VP_STATE_PAGE, BAD, lambda s: s.child.map_state_page(0, vp_state.PAGE_GHCB)[0])
done(hv.MAP_VP_STATE_PAGE, NO_VP, lambda s: s.child.map_state_page(9, 0)[0])
done(hv.MAP_VP_STATE_PAGE, NO_PARTITION, lambda s: s.nobody.map_state_page(0, 0)[0])


def _state_page_from_an_empty_pool(stage: Stage) -> int:
    child = stage.parent.create()
    assert child.initialize() == 0
    assert child.create_vp(0) == 0
    return child.map_state_page(0, 0)[0]


done(hv.MAP_VP_STATE_PAGE, status.INSUFFICIENT_MEMORY, _state_page_from_an_empty_pool)
done(hv.UNMAP_VP_STATE_PAGE, BAD, lambda s: s.child.unmap_state_page(0, vp_state.PAGE_GHCB))
done(hv.UNMAP_VP_STATE_PAGE, NO_VP, lambda s: s.child.unmap_state_page(9, 0))
done(hv.UNMAP_VP_STATE_PAGE, NO_PARTITION, lambda s: s.nobody.unmap_state_page(0, 0))
case(hv.GET_VP_STATE, BAD, variable=1)(lambda s: state(s.child, 1, 0x80000077, POOL[-2]))
case(hv.GET_VP_STATE, RUNS, variable=1)(lambda s: state(s.child, 0, 0x80000000, POOL[-2]))
case(hv.GET_VP_STATE, NO_VP, variable=1)(lambda s: state(s.child, 9, 0x80000000, POOL[-2]))
case(hv.GET_VP_STATE, NO_PARTITION, variable=1)(lambda s: state(s.nobody, 0, 0x80000000, POOL[-2]))


def _impossible_lapic(stage: Stage) -> int:
    """x2APIC: another id than the VP's."""
    assert stage.child.set_registers(1, (registers.APIC_BASE, 0xFEE00C00)) == 0
    page = POOL[-2]
    stage.guest.ram[page << 12 : (page + 1) << 12] = struct.pack("<I", 55).ljust(4096, b"\0")
    return stage.call(hv.SET_VP_STATE, state(stage.child, 1, 0x80000000, page), variable=1)


done(hv.SET_VP_STATE, status.INVALID_REGISTER_VALUE, _impossible_lapic)
case(hv.SET_VP_STATE, NO_VP, variable=1)(lambda s: state(s.child, 9, 0x80000000, POOL[-2]))
case(hv.SET_VP_STATE, NO_PARTITION, variable=1)(lambda s: state(s.nobody, 0, 0x80000000, POOL[-2]))
case(hv.SET_VP_STATE, RUNS, variable=1)(lambda s: state(s.child, 0, 0x80000000, POOL[-2]))
case(hv.GET_VP_CPUID_VALUES, RUNS, count=1)(lambda s: head(s.child, 0, bytes(32)))
case(hv.GET_VP_CPUID_VALUES, NO_VP, count=1)(lambda s: head(s.child, 9, bytes(32)))
case(hv.GET_VP_CPUID_VALUES, NO_PARTITION, count=1)(lambda s: head(s.nobody, 0, bytes(32)))
case(hv.GET_PARTITION_PROPERTY_EX, status.UNKNOWN_PROPERTY)(
    lambda s: hv.GET_PARTITION_PROPERTY_EX_INPUT.pack(1, 0x12345, 0)
)
case(hv.GET_PARTITION_PROPERTY_EX, NO_PARTITION)(
    lambda s: hv.GET_PARTITION_PROPERTY_EX_INPUT.pack(1 << 40, properties.VMM_CAPABILITIES, 0)
)


@pytest.mark.parametrize(
    ("code", "wanted"),
    CASES,
    ids=lambda value: status.NAMES.get(value) if value < 0x40 else hv.call_name(value),
)
def test_status_is_given(stage: Stage, code: int, wanted: int) -> None:
    result = CASES[code, wanted](stage)
    assert result == wanted, f"{hv.call_name(code)} gives {status.status_name(result)}"


@pytest.mark.parametrize("code", CALLS, ids=hv.call_name)
def test_input_that_no_call_has(stage: Stage, code: int) -> None:
    """What all calls have in common: control word, alignment, end of a page; and the privilege."""
    known = TABLE.calls[code]
    guest = stage.guest
    count = 1 if known.kind == REP else 0
    assert guest.call(code, count=count, reserved=1 << 44).status == status.INVALID_HYPERCALL_INPUT
    if known.kind != VARIABLE:
        assert guest.call(code, count=count, variable=3).status == status.INVALID_HYPERCALL_INPUT
    if known.kind != REP:
        assert guest.call(code, count=2).status == status.INVALID_HYPERCALL_INPUT
    if known.size:
        assert guest.call(code, count=count, input_gpa=g.INPUT + 4).status == status.INVALID_ALIGNMENT
        assert guest.call(code, count=count, input_gpa=g.RAM).status == status.INVALID_ALIGNMENT
    # A simple call that a VP has made once is not asked for its privilege again: those of a partition never change.
    if known.privilege and known.kind != SIMPLE:
        kept = guest.partition.privileges
        guest.partition.privileges = 0
        try:
            assert guest.call(code, bytes(64), count=count).status == status.ACCESS_DENIED
        finally:
            guest.partition.privileges = kept


def test_unknown_code(stage: Stage) -> None:
    assert stage.call(0x1234, bytes(8)) == status.INVALID_HYPERCALL_CODE


@pytest.mark.parametrize("code", CALLS, ids=hv.call_name)
def test_every_status_that_a_call_is_said_to_give_is_provoked(code: int) -> None:
    """By its docstring, and by what its own function raises."""
    handler = TABLE.calls[code].handler
    named = set(re.findall(r"[A-Z][A-Z_]{4,}", handler.__doc__ or ""))
    named |= set(re.findall(r"HvError\(status\.([A-Z_]+)", inspect.getsource(handler)))
    values = {value for value, name in status.NAMES.items() if name in named}
    missing = {value for value in values if (code, value) not in CASES and (code, value) not in ELSEWHERE}
    assert not missing, [status.status_name(value) for value in missing]


def test_every_status_of_the_contract_is_provoked_or_cannot_come() -> None:
    everywhere = {status.INVALID_HYPERCALL_CODE, status.INVALID_HYPERCALL_INPUT, status.INVALID_ALIGNMENT}
    provoked = {wanted for _, wanted in CASES} | everywhere | {status.ACCESS_DENIED}
    missing = [value for value in CONTRACT if value not in provoked and value not in NEVER]
    assert [hex(value) for value in missing] == []
    assert not provoked & NEVER.keys()
