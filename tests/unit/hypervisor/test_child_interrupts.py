# SPDX-License-Identifier: Apache-2.0
"""Interrupt messages that ASSERT_VIRTUAL_INTERRUPT comes to, and what VP threads do before they enter the guest."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rootvisor.hypervisor.child_interrupts import ChildInterrupts
from rootvisor.hypervisor.errors import HvError
from rootvisor.kvm import abi
from rootvisor.tlfs import ports as tlfs
from rootvisor.tlfs import status


class Vm:
    def __init__(self) -> None:
        self.messages: list[tuple[int, int, int]] = []
        self.routes: list[tuple[int, tuple[int, int]]] = []
        self.reserved = 0

    def signal_msi(self, message: bytearray) -> bool:
        low, high, data, flags = struct.unpack_from("<4I", message)
        assert flags == 0
        self.messages.append((low, high, data))
        return True

    def set_msi_route(self, gsi: int, message: tuple[int, int]) -> None:
        self.routes.append((gsi, message))

    def create_split_irqchip(self, reserved: int) -> None:
        self.reserved = reserved


class Vcpu:
    def __init__(self) -> None:
        self.u8 = memoryview(bytearray(64))
        self.page = bytearray(1024)
        self.taken: list[int] = []
        self.busy = False
        self.kicks = 0

    def lapic(self) -> bytearray:
        return self.page

    def interrupt(self, vector: int) -> bool:
        if not self.busy:
            self.taken.append(vector)
        return not self.busy

    def kick(self) -> None:
        self.kicks += 1


class Synic:
    def __init__(self) -> None:
        self.notify_sints = 0

    def take_deliverable(self) -> int:
        return 0


class Reset:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


class Made:
    def __init__(self, vps: int = 2) -> None:
        self.vm = Vm()
        self.vps: list[Any] = [
            SimpleNamespace(
                index=index,
                apic_id=index,
                interrupts=0,
                vcpu=Vcpu(),
                synic=Synic(),
                running=False,
                reset_synthetic=Reset(),
            )
            for index in range(vps)
        ]
        child: Any = SimpleNamespace(
            vm=self.vm, vps=self.vps, hypervisor=SimpleNamespace(root_scheduler=None)
        )
        self.interrupts = ChildInterrupts(child)

    def post(self, kind: int, vector: int = 0x40, destination: int = 0, control: int = 0) -> None:
        self.interrupts.assert_interrupt(kind, control, destination, vector)

    def lvt(self, pin: int, value: int, vp: int = 0) -> None:
        at = (0x350, 0x360)[pin]
        self.vps[vp].vcpu.page[at : at + 4] = value.to_bytes(4, "little")


@pytest.fixture
def made() -> Made:
    return Made()


def refused(action: Callable[[], None]) -> int:
    with pytest.raises(HvError) as error:
        action()
    return error.value.status


@pytest.mark.parametrize(
    ("kind", "vector", "destination", "control", "message"),
    [
        (tlfs.INTERRUPT_FIXED, 0x40, 3, 0, (0xFEE03000, 0, 0x4040)),
        (tlfs.INTERRUPT_FIXED, 0x40, 0xFF, 0, (0xFEEFF000, 0, 0x4040)),
        (tlfs.INTERRUPT_FIXED, 0x40, 0x12345, 0, (0xFEE45000, 0x12300, 0x4040)),
        (tlfs.INTERRUPT_FIXED, 0x40, 3, tlfs.INTERRUPT_LOGICAL, (0xFEE03004, 0, 0x4040)),
        (tlfs.INTERRUPT_FIXED, 0x40, 3, tlfs.INTERRUPT_LEVEL, (0xFEE03000, 0, 0x4040)),  # as an edge
        (tlfs.INTERRUPT_FIXED, 0x40, 3, 1 << 30, (0xFEE03000, 0, 0x4040)),
        (tlfs.INTERRUPT_LOWEST_PRIORITY, 0x40, 3, tlfs.INTERRUPT_LOGICAL, (0xFEE03004, 0, 0x4140)),
        (tlfs.INTERRUPT_NMI, 0, 1, 0, (0xFEE01000, 0, 0x4400)),
        (tlfs.INTERRUPT_NMI, 0, 1, tlfs.INTERRUPT_LEVEL, (0xFEE01000, 0, 0x4400)),
        (tlfs.INTERRUPT_INIT, 0, 1, 0, (0xFEE01000, 0, 0x4500)),
        (tlfs.INTERRUPT_SIPI, 0x9F, 1, 0, (0xFEE01000, 0, 0x469F)),
    ],
)
def test_message(
    made: Made, kind: int, vector: int, destination: int, control: int, message: tuple[int, int, int]
) -> None:
    made.post(kind, vector, destination, control)
    made.post(kind, vector, destination, control)
    assert made.vm.messages == [message] * 2


def test_destination_beyond_32_bits_is_nobody(made: Made) -> None:
    made.post(tlfs.INTERRUPT_FIXED, destination=1 << 32)
    assert not made.vm.messages


def test_many_different_interrupts_do_not_pile_up(made: Made) -> None:
    for destination in range(5000):
        made.post(tlfs.INTERRUPT_FIXED, destination=destination)
    assert len(made.interrupts._messages) <= 1024
    assert len(made.vm.messages) == 5000


def test_interrupts_are_counted_for_their_vp(made: Made) -> None:
    made.post(tlfs.INTERRUPT_FIXED, destination=1)
    made.post(tlfs.INTERRUPT_FIXED, destination=1, control=tlfs.INTERRUPT_LOGICAL)
    assert [vp.interrupts for vp in made.vps] == [0, 1]
    assert made.interrupts.asserted == 2


@pytest.mark.parametrize(
    ("kind", "vector"),
    [
        (tlfs.INTERRUPT_FIXED, 15),
        (tlfs.INTERRUPT_LOWEST_PRIORITY, 0),
        (tlfs.INTERRUPT_FIXED, 256),
        (tlfs.INTERRUPT_NMI, 1 << 31),
        (tlfs.INTERRUPT_SMI, 0x40),
        (tlfs.INTERRUPT_REMOTE_READ, 0x40),
        (10, 0x40),
    ],
)
def test_what_does_not_exist(made: Made, kind: int, vector: int) -> None:
    assert refused(lambda: made.post(kind, vector)) == status.INVALID_PARAMETER
    assert not made.vm.messages


def test_level_vector_has_one_route_within_the_reserved_pins(made: Made) -> None:
    made.interrupts.create_irqchip()
    for _ in range(3):
        made.post(tlfs.INTERRUPT_FIXED, 16, control=tlfs.INTERRUPT_LEVEL)
        made.post(tlfs.INTERRUPT_FIXED, 255, control=tlfs.INTERRUPT_LEVEL)
    assert made.vm.routes == [(0, (0xFEEFF000, 0x8010)), (239, (0xFEEFF000, 0x80FF))]
    assert 239 < made.vm.reserved < 256


def test_eoi_is_told_for_vectors_last_asserted_as_level(made: Made) -> None:
    def tell(vector: int) -> bytes | None:
        return made.interrupts.ioapic_eoi(made.vps[1], vector)

    assert tell(0x40) is None
    made.post(tlfs.INTERRUPT_FIXED, 0x40, control=tlfs.INTERRUPT_LEVEL)
    assert tell(0x40) == struct.pack("<II", 1, 0x40)
    made.post(tlfs.INTERRUPT_FIXED, 0x40)
    assert tell(0x40) is None


def test_init_resets_the_registers_of_whom_it_is_for(made: Made) -> None:
    made.post(tlfs.INTERRUPT_INIT, 0, destination=1)
    assert [vp.reset_synthetic.count for vp in made.vps] == [0, 1]
    made.post(tlfs.INTERRUPT_INIT, 0, destination=0xFF)
    assert [vp.reset_synthetic.count for vp in made.vps] == [1, 2]


# --- ExtINT and LINT ----------------------------------------------------------------------------------------------
def test_extint_waits_for_the_window(made: Made) -> None:
    vp = made.vps[1]
    made.post(tlfs.INTERRUPT_EXTINT, 0x28, destination=1)
    assert (made.interrupts.pending, vp.vcpu.kicks, made.vm.messages) == (True, 1, [])
    made.interrupts.before_entry(vp)
    assert (vp.vcpu.taken, vp.vcpu.u8[abi.RUN_REQUEST_INTERRUPT_WINDOW]) == ([], 1)
    made.interrupts.before_entry(made.vps[0])
    assert made.vps[0].vcpu.u8[abi.RUN_REQUEST_INTERRUPT_WINDOW] == 0
    assert made.interrupts.pending
    vp.vcpu.u8[abi.RUN_READY_FOR_INTERRUPT] = 1
    vp.vcpu.busy = True  # KVM still has the one before
    made.interrupts.before_entry(vp)
    assert made.interrupts.pending
    vp.vcpu.busy = False
    made.interrupts.before_entry(vp)
    assert (vp.vcpu.taken, vp.vcpu.u8[abi.RUN_REQUEST_INTERRUPT_WINDOW]) == ([0x28], 0)
    assert not made.interrupts.pending


def test_cleared_extint_closes_the_window(made: Made) -> None:
    vp = made.vps[0]
    made.post(tlfs.INTERRUPT_EXTINT, 0)
    made.interrupts.before_entry(vp)
    made.interrupts.clear_extint()
    vp.vcpu.u8[abi.RUN_READY_FOR_INTERRUPT] = 1
    made.interrupts.before_entry(vp)
    assert (vp.vcpu.taken, vp.vcpu.u8[abi.RUN_REQUEST_INTERRUPT_WINDOW]) == ([], 0)
    assert not made.interrupts.pending


@pytest.mark.parametrize("kind", [tlfs.INTERRUPT_EXTINT, tlfs.INTERRUPT_LINT0, tlfs.INTERRUPT_LINT1])
def test_pin_of_no_vp(made: Made, kind: int) -> None:
    assert refused(lambda: made.post(kind, destination=9)) == status.INVALID_PARAMETER
    assert not made.interrupts.pending


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (0x0004A, (0xFEE01000, 0, 0x404A)),
        (0x1004A, None),
        (0x00400, (0xFEE01000, 0, 0x4400)),
        (0x00500, (0xFEE01000, 0, 0x4500)),
        (0x00200, None),
    ],
)
@pytest.mark.parametrize("pin", [0, 1])
def test_lint_entry(made: Made, pin: int, entry: int, message: tuple[int, int, int] | None) -> None:
    made.lvt(pin, entry, 1)
    made.post(tlfs.INTERRUPT_LINT0 + pin, 0x28, destination=1)
    made.interrupts.before_entry(made.vps[1])
    assert made.vm.messages == ([message] if message else [])
    assert not made.interrupts.pending


def test_lint_as_extint_takes_the_vector_of_the_call(made: Made) -> None:
    made.lvt(0, 0x700)
    made.vps[0].vcpu.u8[abi.RUN_READY_FOR_INTERRUPT] = 1
    made.post(tlfs.INTERRUPT_LINT0, 0x2C)
    made.interrupts.before_entry(made.vps[0])
    assert made.vps[0].vcpu.taken == [0x2C]


def test_pin_raised_often_before_an_entry_counts_once(made: Made) -> None:
    made.lvt(1, 0x400)
    for _ in range(100):
        made.post(tlfs.INTERRUPT_LINT1)
    made.interrupts.before_entry(made.vps[0])
    assert len(made.vm.messages) == 1


def test_pins_of_another_vp_stay(made: Made) -> None:
    made.lvt(1, 0x400, 1)
    made.post(tlfs.INTERRUPT_LINT1, destination=1)
    made.interrupts.before_entry(made.vps[0])
    assert made.interrupts.pending
    made.interrupts.before_entry(made.vps[1])
    assert len(made.vm.messages) == 1
