# SPDX-License-Identifier: Apache-2.0
"""HVCALL_DISPATCH_VP and the scheduler messages, by hypercall; the test is the driver's loop, step by step."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

import pytest

from rootvisor.hypervisor import root_scheduler
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import intercepts, messages, ports, registers, status
from tests.kvm.guest import Guest
from tests.kvm.parent import Child, Parent

BLOCKED, READY = intercepts.DISPATCH_STATE_BLOCKED, intercepts.DISPATCH_STATE_READY
OTHER, SUSPEND, INTERCEPT = range(3)
OUT_THEN_HALT = b"\xe6\x80\xfb\xf4\xe6\x81\xeb\xfe"  # out 0x80; sti; hlt; out 0x81; jmp $
SPIN = b"\xff\x06\x00\x20\xeb\xfa"  # inc word [0x2000]; jmp
IRET = b"\xcf"


@pytest.fixture
def parent(usable_kvm: None) -> Iterator[Parent]:
    with Guest() as guest:
        guest.hypervisor.scheduler = hv.SCHEDULER_ROOT
        guest.enable_hypercalls()
        yield Parent(guest)
        assert guest.partition.defect is None


def dispatch(child: Child, flags: int = 0, index: int = 0) -> tuple[int, int, int]:
    """Status, state, event."""
    data = intercepts.DISPATCH_VP_INPUT.pack(child.id, index, flags, 0, 0)
    answer = child.guest.call(hv.DISPATCH_VP, data, output=8)
    return answer.status, *struct.unpack("<II", answer.output)


def take_signal(child: Child, index: int = 0) -> None:
    kind, sender, payload = child.parent.take_message()
    assert (kind, sender) == (messages.SCHEDULER_VP_SIGNAL_PAIR, child.id)
    assert len(payload) == 240
    assert (payload[4], *struct.unpack_from("<Q", payload, 8)) == (1, child.id)
    assert struct.unpack_from("<I", payload, 160) == (index,)


def started(parent: Parent, code: bytes, vps: int = 1) -> Child:
    """A child whose VP 0 has had its first DISPATCH_VP, and may be dispatched."""
    child = parent.initialized(vps)
    child.load(code)
    assert dispatch(child) == (0, BLOCKED, SUSPEND)
    assert child.set_registers(0, (registers.EXPLICIT_SUSPEND, 0)) == 0
    take_signal(child)
    return child


def run(child: Child, flags: int = 0, index: int = 0) -> tuple[int, int]:
    """The driver's loop, until the answer is not READY, OTHER."""
    deadline = time.monotonic() + 20
    while (answer := dispatch(child, flags, index)) == (0, READY, OTHER):
        assert time.monotonic() < deadline
        flags = 0
    assert answer[0] == 0
    return answer[1:]


def test_intercept_comes_with_the_call_and_without_a_message(parent: Parent) -> None:
    child = started(parent, OUT_THEN_HALT)
    assert run(child) == (READY, INTERCEPT)
    assert not any(parent.slot()[:4])
    assert child.register(0, registers.INTERCEPT_SUSPEND) == 1
    assert child.register(0, registers.RIP) == 0x1000
    # not cleared: the same again
    assert dispatch(child) == (0, READY, INTERCEPT)
    assert child.register(0, registers.VP_ROOT_SIGNAL_COUNT) == 1


def test_halted_vp_blocks_until_an_interrupt_which_a_message_tells(parent: Parent) -> None:
    child = started(parent, OUT_THEN_HALT)
    child.memory(2 * 4)[:4] = struct.pack("<HH", 0x3000, 0)
    child.memory(0x3000)[:1] = IRET
    assert child.set_registers(0, (registers.RSP, 0x8000)) == 0
    assert run(child) == (READY, INTERCEPT)
    assert child.set_registers(0, (registers.RIP, 0x1002)) == 0
    assert run(child, intercepts.DISPATCH_CLEAR_INTERCEPT_SUSPEND) == (BLOCKED, OTHER)
    assert child.register(0, registers.INTERNAL_ACTIVITY_STATE) == registers.ACTIVITY_HALT_SUSPEND
    data = ports.ASSERT_VIRTUAL_INTERRUPT_INPUT.pack(child.id, ports.INTERRUPT_NMI, 0, 0, 0, 0)
    assert parent.guest.call(hv.ASSERT_VIRTUAL_INTERRUPT, data).status == 0
    take_signal(child)
    assert child.register(0, registers.VP_ROOT_SIGNAL_COUNT) == 2
    assert run(child) == (READY, INTERCEPT)
    assert child.register(0, registers.RIP) == 0x1004


def test_vp_stands_still_between_calls(parent: Parent) -> None:
    child = started(parent, SPIN)
    memory = child.memory(0x2000)

    def slices(count: bytes) -> bytes:
        """The count after as many slices as it takes to change; a busy machine may spend the first on the way in."""
        deadline = time.monotonic() + 20
        while bytes(memory[:2]) == count:
            assert time.monotonic() < deadline
            assert dispatch(child) == (0, READY, OTHER)  # its slice is over
        return bytes(memory[:2])

    count = slices(bytes(2))
    time.sleep(0.1)
    assert bytes(memory[:2]) == count
    page = child.state_pages[0, 0] << 12
    rip = struct.unpack_from("<Q", parent.guest.ram, page + registers.PAGE_RIP)[0]
    assert rip in (0x1000, 0x1004)
    assert child.register(0, registers.RIP) == rip
    slices(count)


def test_interrupt_of_the_root_ends_the_call(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root's one-shot timer of 50 ms comes before its slice of a minute is over."""
    monkeypatch.setattr(root_scheduler, "_SLICE", 60.0)
    child = started(parent, SPIN)
    guest = parent.guest
    guest.wrmsr(0x832, 0x71)
    guest.wrmsr(0x83E, 0xB)
    before = guest.interrupts(0x71)
    guest.wrmsr(0x838, 50_000_000)
    began = time.monotonic()
    assert dispatch(child) == (0, READY, OTHER)
    assert time.monotonic() - began < 50
    guest.take(0x71, 0, before + 1)


def test_ap_blocks_until_its_sipi_and_runs(parent: Parent) -> None:
    child = started(parent, SPIN, vps=2)
    assert dispatch(child, index=1) == (0, BLOCKED, SUSPEND)
    assert child.set_registers(1, (registers.EXPLICIT_SUSPEND, 0)) == 0
    take_signal(child, 1)
    assert run(child, index=1) == (BLOCKED, OTHER)
    child.memory(0x4000)[:4] = b"\xe6\x90\xeb\xfc"
    for kind, vector in ((5, 0), (6, 4)):
        data = ports.ASSERT_VIRTUAL_INTERRUPT_INPUT.pack(child.id, kind, 0, 1, vector, 0)
        assert parent.guest.call(hv.ASSERT_VIRTUAL_INTERRUPT, data).status == 0
    take_signal(child, 1)
    assert run(child, index=1) == (READY, INTERCEPT)


def test_after_dispatch_suspend_there_are_no_messages_and_the_count_stands(parent: Parent) -> None:
    child = started(parent, OUT_THEN_HALT)
    assert run(child) == (READY, INTERCEPT)
    assert child.set_registers(0, (registers.RIP, 0x1002)) == 0
    assert run(child, intercepts.DISPATCH_CLEAR_INTERCEPT_SUSPEND) == (BLOCKED, OTHER)
    assert child.set_registers(0, (registers.DISPATCH_SUSPEND, 1)) == 0
    data = ports.ASSERT_VIRTUAL_INTERRUPT_INPUT.pack(child.id, 4, 0, 0, 0, 0)
    assert parent.guest.call(hv.ASSERT_VIRTUAL_INTERRUPT, data).status == 0
    assert dispatch(child) == (0, BLOCKED, OTHER)
    assert child.register(0, registers.VP_ROOT_SIGNAL_COUNT) == 1
    assert not any(parent.slot()[:4])
    assert child.finalize() == 0
    assert child.delete() == 0


def test_frozen_time_blocks_and_thawing_tells(parent: Parent) -> None:
    child = started(parent, SPIN)
    assert parent.set(child.id, 0x30003, 1) == 0
    assert dispatch(child) == (0, BLOCKED, OTHER)
    assert parent.set(child.id, 0x30003, 0) == 0
    take_signal(child)
    assert dispatch(child) == (0, READY, OTHER)


def test_free_slot_that_was_asked_for_wakes_a_sleeping_vp(parent: Parent) -> None:
    """Register DELIVERABILITY_NOTIFICATIONS: the message comes with the next DISPATCH_VP, which a signal asks for."""
    child = started(parent, OUT_THEN_HALT)
    assert run(child) == (READY, INTERCEPT)
    assert child.set_registers(0, (registers.RIP, 0x1002)) == 0
    assert run(child, intercepts.DISPATCH_CLEAR_INTERCEPT_SUSPEND) == (BLOCKED, OTHER)
    values = (registers.SCONTROL, 1), (registers.SIMP, 0x5001)
    assert child.set_registers(0, *values, (registers.DELIVERABILITY_NOTIFICATIONS, 1 << 50)) == 0
    take_signal(child)
    assert run(child) == (READY, INTERCEPT)


def test_bad_calls(parent: Parent) -> None:
    child = parent.create()
    assert dispatch(child)[0] == status.INVALID_VP_INDEX
    assert child.deposit(208) == 0
    assert child.initialize() == 0
    assert dispatch(child)[0] == status.INVALID_VP_INDEX
    assert child.create_vp(0) == 0
    assert dispatch(child, 2)[0] == status.INVALID_PARAMETER
    assert dispatch(Child(parent, 77))[0] == status.INVALID_PARTITION_ID
    assert dispatch(Child(parent, 1))[0] == status.INVALID_PARTITION_ID


def test_hypervisor_schedules_itself_then_there_is_no_dispatching(guest: Guest) -> None:
    child = Parent(guest).initialized(1)
    assert dispatch(child)[0] == status.OPERATION_DENIED
