# SPDX-License-Identifier: Apache-2.0
"""Life of child partitions by hypercalls: every status of the calls in every state."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable

import pytest

from rootvisor.hypervisor import vp_registers
from rootvisor.hypervisor.child_overlay import OverlayPages
from rootvisor.hypervisor.child_vp import ChildVp
from rootvisor.kvm.errors import KvmError
from rootvisor.kvm.vm import Vm
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import intercepts, messages, registers, status
from rootvisor.tlfs import partition_properties as tlfs
from tests.kvm import guest as g
from tests.kvm.command import descriptors
from tests.kvm.guest import Guest
from tests.kvm.parent import CHILD_RAM, FLAGS, Child, Parent

OUT_80 = b"\xe6\x80"  # out 0x80, al
SPIN = b"\xeb\xfe"


@pytest.fixture
def parent(guest: Guest) -> Parent:
    return Parent(guest)


def resources() -> tuple[int, int]:
    """File descriptors and threads of this process; what only the garbage collector still knows is gone."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count() + len(os.listdir("/proc/self/task"))


def comes_back_to(before: tuple[int, int]) -> bool:
    """Whether the process has no more than before; threads take a moment to end, also those of an earlier test."""
    deadline = time.monotonic() + 10
    while any(now > then for now, then in zip(resources(), before, strict=True)):
        if time.monotonic() > deadline:
            links = sorted(descriptors(os.getpid()))
            pytest.fail(f"{before} has become {resources()}: {threading.enumerate()}, {links}")
        time.sleep(0.01)
    return True


def reservations() -> int:
    """Mappings of a GiB and more without access."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        found = 0
        for line in maps:
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            found += last - first >= 1 << 30 and " ---p " in line
        return found


# --- creation ---------------------------------------------------------------------------------------------------------
def test_ids_are_neither_special_nor_used_again(parent: Parent) -> None:
    seen = {0, 1, hv.SELF}
    for _ in range(4):
        child = parent.create()
        assert child.id not in seen
        seen.add(child.id)
        assert child.delete() == 0


@pytest.mark.parametrize(
    ("flags", "isolation", "wanted"),
    [
        (FLAGS & ~tlfs.FLAG_EXO, 0, status.INVALID_PARAMETER),
        (FLAGS & ~tlfs.FLAG_INTERCEPT_MESSAGE_PAGE, 0, status.INVALID_PARAMETER),
        (FLAGS | 1 << 40, 0, status.INVALID_PARAMETER),
        (FLAGS & ~tlfs.FLAG_LAPIC, 0, status.PROCESSOR_FEATURE_NOT_SUPPORTED),
        (FLAGS, 2, status.FEATURE_UNAVAILABLE),
        (FLAGS | tlfs.FLAG_SMT | tlfs.FLAG_NESTED, 0, status.SUCCESS),
        (FLAGS & ~tlfs.FLAG_X2APIC & ~tlfs.FLAG_GPA_SUPER_PAGES, 0, status.SUCCESS),
    ],
)
def test_creation_flags(parent: Parent, flags: int, isolation: int, wanted: int) -> None:
    before = resources()
    assert parent.try_create(flags, isolation=isolation)[0] == wanted
    if wanted:
        assert comes_back_to(before)
        assert len(parent.guest.hypervisor.partitions) == 1


def test_disabled_features_are_not_enabled(parent: Parent) -> None:
    everything = [
        parent.get(hv.SELF, code)[1] for code in (tlfs.PROCESSOR_FEATURES0, tlfs.PROCESSOR_FEATURES1)
    ]
    child = parent.create(disabled=(everything[0] & 0xFF, hv.SELF, 0))
    assert parent.get(child.id, tlfs.PROCESSOR_FEATURES0) == (0, everything[0] & ~0xFF)
    assert parent.get(child.id, tlfs.PROCESSOR_FEATURES1) == (0, 0)


# --- states -----------------------------------------------------------------------------------------------------------
def answers(child: Child) -> dict[str, int]:
    """What each call that needs a state answers; none of them succeeds in a way that changes the state."""
    parent = child.parent
    return {
        "create_vp": child.create_vp(300),
        "delete_vp": child.delete_vp(7),
        "map": child.map(1 << 50, [1]),
        "early property": parent.set(child.id, tlfs.SYNTHETIC_PROC_FEATURES, 0),
        "privileges": parent.set(child.id, tlfs.PRIVILEGE_FLAGS, 0),
        "late property": parent.set(child.id, tlfs.UNIMPLEMENTED_MSR_ACTION, 1),
        "get": parent.get(child.id, tlfs.PROCESSOR_FEATURES0)[0],
        "registers": child.try_registers(0, registers.RIP)[0],
    }


def test_every_call_in_every_state(parent: Parent) -> None:
    state, parameter, index = (
        status.INVALID_PARTITION_STATE,
        status.INVALID_PARAMETER,
        status.INVALID_VP_INDEX,
    )
    child = parent.create()
    assert answers(child) == {
        "create_vp": state, "delete_vp": state, "map": state, "early property": 0, "privileges": status.ACCESS_DENIED,
        "late property": 0, "get": 0, "registers": index,
    }  # fmt: skip
    assert child.finalize() == state
    assert child.initialize() == 0
    assert child.initialize() == state
    assert child.delete() == state
    assert answers(child) == {
        "create_vp": index, "delete_vp": index, "map": parameter, "early property": state, "privileges": state,
        "late property": 0, "get": 0, "registers": index,
    }  # fmt: skip
    assert child.finalize() == 0
    assert child.finalize() == state
    assert child.initialize() == state
    assert answers(child) == {
        "create_vp": state, "delete_vp": state, "map": state, "early property": state, "privileges": state,
        "late property": state, "get": state, "registers": index,
    }  # fmt: skip
    assert child.delete() == 0
    gone = status.INVALID_PARTITION_ID
    assert set(answers(child).values()) == {gone}
    assert {child.initialize(), child.finalize(), child.delete(), child.deposit(1), child.withdraw()[0]} == {
        gone
    }


@pytest.mark.parametrize("partition", [0, 1, 99, hv.SELF])
def test_life_cycle_calls_name_a_child(parent: Parent, partition: int) -> None:
    child = Child(parent, partition)
    for call in (child.initialize, child.finalize, child.delete):
        assert call() == status.INVALID_PARTITION_ID


# --- VPs --------------------------------------------------------------------------------------------------------------
def test_vps_in_any_order(parent: Parent) -> None:
    child = parent.initialized()
    for index in (5, 0, 255, 1):
        assert child.create_vp(index) == 0
        assert child.create_vp(index) == status.INVALID_VP_INDEX
    assert child.create_vp(256) == status.INVALID_VP_INDEX
    assert [vp.index for vp in parent.guest.hypervisor.partitions[child.id].vps] == [0, 1, 5, 255]
    for index in (0, 5, 255):
        assert child.register(index, registers.EXPLICIT_SUSPEND) == 1
        assert child.register(index, registers.INTERCEPT_SUSPEND) == 0
        assert child.register(index, registers.RIP) == 0xFFF0
    assert child.try_registers(2, registers.RIP)[0] == status.INVALID_VP_INDEX


def test_a_deleted_vp_comes_back_as_new(parent: Parent) -> None:
    child = parent.initialized(vps=2)
    child.load(OUT_80)
    assert child.run()[0] == intercepts.X64_IO_PORT_INTERCEPT
    used = len(parent.guest.hypervisor.partitions[child.id].deposits.used)
    for _ in range(300):  # as many as there are overlay pages
        assert child.delete_vp(0) == 0
        assert child.create_vp(0) == 0
    assert len(parent.guest.hypervisor.partitions[child.id].deposits.used) == used - 2
    assert child.register(0, registers.RIP) == 0xFFF0
    assert child.delete_vp(7) == status.INVALID_VP_INDEX
    child.map_state_pages(0)
    child.enter(0)
    assert child.run()[0] == intercepts.X64_IO_PORT_INTERCEPT


def test_delete_of_a_running_vp(parent: Parent) -> None:
    child = parent.initialized(vps=1)
    child.load(SPIN)
    child.resume()
    assert child.delete_vp(0) == 0
    assert child.create_vp(0) == 0
    assert child.finalize() == 0


# --- the end ----------------------------------------------------------------------------------------------------------
def test_finalize_frees_all_of_the_host(parent: Parent) -> None:
    parent.initialized(vps=1).finalize()  # imports, and what is made once
    before, reserved = resources(), reservations()
    for _ in range(3):
        child = parent.initialized(vps=3)
        child.load(SPIN)
        child.resume()
        assert child.finalize() == 0
        while child.withdraw()[0] == 0:
            pass
        assert child.delete() == 0
    assert comes_back_to(before)
    assert reservations() == reserved


def test_finalize_of_running_vps(guest2: Guest) -> None:
    parent = Parent(guest2)
    child = parent.initialized(vps=4)
    child.load(SPIN)
    for index in range(4):
        child.enter(index)
        assert child.set_registers(index, (registers.INTERNAL_ACTIVITY_STATE, 0)) == 0
        child.resume(index, vp=index % 2)
    assert child.finalize(vp=1) == 0


def test_finalize_waits_until_the_last_message_was_taken(guest2: Guest) -> None:
    """Contract T3: the slot of the other root VP holds a message; FINALIZE does not return before it is taken."""
    parent = Parent(guest2)
    child = parent.initialized(vps=1)
    child.load(OUT_80)
    child.resume(vp=1)
    slot = parent.slot(1)
    while not any(slot[:4]):
        pass
    done: list[int] = []
    caller = threading.Thread(target=lambda: done.append(child.finalize(vp=0)))
    caller.start()
    caller.join(0.5)
    assert not done
    slot[:4] = bytes(4)
    caller.join(5)
    assert done == [0]


def test_finalize_drops_queued_messages(parent: Parent) -> None:
    child, other = parent.initialized(vps=2), parent.initialized(vps=1)
    other.load(OUT_80)
    child.load(OUT_80)
    child.enter(1)
    child.set_registers(1, (registers.INTERNAL_ACTIVITY_STATE, 0))
    other.resume()
    hypervisor = parent.guest.hypervisor
    while not any(parent.slot()[:4]):
        pass
    for index in range(2):
        child.resume(index)
    while not all(vp.intercept_suspend for vp in hypervisor.children()[0].vps):
        pass
    assert child.finalize() == 0
    assert parent.take_message()[:2] == (messages.OPAQUE_INTERCEPT, other.id)
    assert not any(parent.slot()[:4])


def test_delete_without_initialize(parent: Parent) -> None:
    before = resources()
    child = parent.create()
    assert child.deposit(5) == 0
    assert len(child.withdraw(3)[1]) == 3
    assert child.delete() == 0
    assert comes_back_to(before)
    # two pages are lost, and nobody gets them again
    assert parent.guest.hypervisor.lost == {page for page, owner in parent.given.items() if owner == child.id}
    parent.check_accounts()
    assert parent.deposit_pages(1, sorted(parent.guest.hypervisor.lost)[:1]) == status.INVALID_PARAMETER


def test_the_root_ends_with_children_running() -> None:
    before = resources()
    with Guest() as guest:
        guest.enable_hypercalls()
        parent = Parent(guest)
        for _ in range(2):
            child = parent.initialized(vps=2)
            child.load(SPIN)
            child.resume()
    del child, parent, guest  # their views of the memory keep its mapping, and with it a descriptor
    assert comes_back_to(before)
    assert threading.active_count() == 1


# --- deposits ---------------------------------------------------------------------------------------------------------
def test_pools_are_apart(parent: Parent) -> None:
    one, two = parent.create(), parent.create()
    assert one.deposit(600) == 0
    assert two.deposit(3) == 0
    assert parent.deposit(1, 2) == 0
    parent.check_accounts()
    result, pages = one.withdraw(512)
    assert (result, len(pages)) == (0, 512)
    result, pages = one.withdraw(512)
    assert (result, len(pages)) == (status.NO_RESOURCES, 88)
    assert one.withdraw(1) == (status.NO_RESOURCES, [])
    assert len(two.withdraw()[1]) == 3
    parent.check_accounts()


def test_deposit_is_all_or_nothing(parent: Parent) -> None:
    child, other = parent.initialized(vps=1), parent.create()
    child.load(SPIN)
    assert other.deposit(1) == 0
    taken = next(page for page, owner in parent.given.items() if owner == other.id)
    mapped = (CHILD_RAM >> 12) + 7
    fresh = parent.free[-3:]
    for bad in (taken, mapped, g.OWNED >> 12, g.RAM >> 12, 1 << 40, hv.SELF, fresh[0]):
        for pages in ([*fresh, bad], [bad, *fresh]):
            assert parent.deposit_pages(child.id, pages) == status.INVALID_PARAMETER, f"{bad:#x}"
    parent.check_accounts()
    assert parent.deposit_pages(child.id, fresh) == 0


def test_deposited_pages_cannot_be_mapped(parent: Parent) -> None:
    child = parent.initialized()
    deposited = next(iter(parent.given))
    assert child.map(0, [deposited]) == status.INVALID_PARAMETER
    assert child.map(0, [g.OWNED >> 12]) == status.INVALID_PARAMETER


def test_pages_in_use_are_not_withdrawn(parent: Parent) -> None:
    child = parent.initialized(vps=2, deposit=4)
    assert len(child.withdraw()[1]) == 4 + 2 * 4 - 4
    parent.check_accounts()
    for index, kind in child.state_pages:
        assert child.unmap_state_page(index, kind) == 0
    assert sorted(child.withdraw()[1]) == sorted(child.state_pages.values())
    parent.check_accounts()


def test_map_state_page_asks_for_memory(parent: Parent) -> None:
    child = parent.initialized(deposit=1)
    assert len(child.withdraw()[1]) == 1
    assert child.create_vp(0) == 0
    assert child.map_state_page(0, 1)[0] == status.INSUFFICIENT_MEMORY
    assert child.deposit(1) == 0
    assert child.map_state_page(0, 1)[0] == 0
    assert child.finalize() == 0
    assert len(child.withdraw()[1]) == 1


# --- running ----------------------------------------------------------------------------------------------------------
def test_two_children_at_once(parent: Parent) -> None:
    first, second = parent.initialized(vps=1), parent.initialized(vps=1)
    for child in (first, second):
        child.load(b"\xb0\x11" + OUT_80 + b"\xb0\x22" + OUT_80)
    kind, payload = first.run()
    assert (kind, first.port_write(payload)) == (intercepts.X64_IO_PORT_INTERCEPT, (0x80, 0x11))
    kind, payload = second.run()
    assert second.port_write(payload) == (0x80, 0x11)
    first.skip(0, payload)
    kind, payload = first.run()
    assert first.port_write(payload) == (0x80, 0x22)
    for child in (first, second):
        assert child.finalize() == 0
        assert child.delete() == 0


# --- failures on the host's side --------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [KvmError("KVM_RUN failed: no more"), ValueError("a defect")])
def test_a_failed_vp_ends_neither_the_root_nor_its_siblings(
    parent: Parent, error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    child = parent.initialized(vps=2)
    child.load(OUT_80 + SPIN)
    child.enter(1)
    child.set_registers(1, (registers.INTERNAL_ACTIVITY_STATE, 0))
    partition = parent.guest.hypervisor.children()[0]
    with monkeypatch.context() as patched:
        failures = []

        def fail(vp: ChildVp) -> int:
            failures.append(vp.index)
            raise error

        patched.setattr(ChildVp, "_port", fail)
        assert child.run(0)[0] == intercepts.UNRECOVERABLE_EXCEPTION
    assert failures == [0]
    # it is dead, but can be talked to
    for _ in range(3):
        assert child.run(0)[0] == intercepts.UNRECOVERABLE_EXCEPTION
    assert child.suspend(0) == 0
    assert child.run(0)[0] == intercepts.UNRECOVERABLE_EXCEPTION
    assert child.register(0, registers.RIP) == 0x1000
    assert child.run(1)[0] == intercepts.X64_IO_PORT_INTERCEPT
    said = capfd.readouterr().err
    assert said.startswith("rootvisor: VP 0 of partition")
    assert said.count("\n") == 1
    assert str(error) in said
    assert (partition.defect is error) == isinstance(error, ValueError)
    assert child.finalize() == 0
    assert parent.guest.partition.ended == ""


def test_a_host_without_room_for_another_machine(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    child = parent.initialized()
    before = resources()
    attempts: tuple[tuple[object, str, Exception], ...] = (
        (Vm, "create_split_irqchip", KvmError("no")),
        (Vm, "filter_msrs", OSError(12, "no")),
        (OverlayPages, "__init__", OSError(24, "no")),
    )
    for target, name, error in attempts:
        with monkeypatch.context() as patched:
            patched.setattr(target, name, failing(error))
            assert parent.try_create()[0] == status.NO_RESOURCES
    attempts = (
        (Vm, "create_vcpu", KvmError("no")),
        (vp_registers, "reset", KvmError("no")),
        (OverlayPages, "allocate", MemoryError()),
    )
    for target, name, error in attempts:
        with monkeypatch.context() as patched:
            patched.setattr(target, name, failing(error))
            assert child.create_vp(0) == status.NO_RESOURCES
    assert child.create_vp(0) == 0
    assert child.finalize() == 0
    assert child.delete() == 0
    assert resources()[0] < before[0]


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_arguments: object, **_named: object) -> None:
        raise error

    return fail
