# SPDX-License-Identifier: Apache-2.0
"""A processor's thread: what it answers, how it stops, and that no message of a guest's takes it down."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from random import Random

import pytest

from rootvisor.bus.address_space import GuestMemory, MemoryRegion, MmioSpace, PortSpace
from rootvisor.chips.ioapic import IoApic
from rootvisor.mshv import MshvError, RegisterPage
from rootvisor.tlfs import intercepts as types
from rootvisor.tlfs import registers, translation
from rootvisor.vmm.processor import Processor
from tests.unit.vmm.fake_partition import FakeVp, message

RAM = 1 << 20
DEVICE = 0xC000_0000
LONG_MODE = {"cs_attributes": 1 << 13, "state": types.STATE_EFER_LMA | types.STATE_CR0_PE}
GVA_VALID = types.MEMORY_GVA_VALID | types.MEMORY_GVA_GPA_VALID


class Registers:
    """A device that records."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.value = 0x1122334455667788

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return self.value & (1 << size * 8) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        assert 0 <= value < 1 << size * 8
        self.seen.append((offset, size, value))


class Machine:
    def __init__(self) -> None:
        self.vp = FakeVp()
        self.port, self.device = Registers(), Registers()
        ports, mmio = PortSpace(), MmioSpace()
        ports.add(0x3F8, 8, self.port)
        mmio.add(DEVICE, 0x1000, self.device)
        self.ram = memoryview(bytearray(RAM))
        memory = GuestMemory((MemoryRegion(0, RAM, self.ram, -1, 0),))
        self.delivered: list[int] = []
        self.io_apic = IoApic(lambda _to, _logical, _mode, vector, _level: self.delivered.append(vector))
        self.problems: list[str] = []
        self.resets: list[str] = []
        self.processor = Processor(
            self.vp, ports, mmio, memory, self.io_apic, self.problems.append, self.resets.append  # type: ignore[arg-type]
        )  # fmt: skip

    @property
    def page(self) -> RegisterPage:
        return self.vp.register_page

    def run(self, *messages: bytes) -> None:
        """Until all are answered, or the processor has ended."""
        self.vp.idle.clear()
        self.vp.script += messages
        self.processor.start()
        deadline = time.monotonic() + 30
        while not (self.vp.idle.wait(0.005) or self.problems or self.resets):
            assert time.monotonic() < deadline, "the processor hangs"
        self.processor.stop()


@pytest.fixture
def machine() -> Iterator[Machine]:
    yield Machine()


def test_out_reaches_the_port_and_the_instruction_is_over(machine: Machine) -> None:
    machine.run(
        message(types.X64_IO_PORT_INTERCEPT, port=0x3F9, info=1, access=1, rax=0xABCD12, rip=0x1000, length=2)
    )
    assert machine.port.seen == [(1, 1, 0x12)]
    assert machine.page.rip == 0x1002


@pytest.mark.parametrize(
    ("size", "rax"),
    [(1, 0xFFFF_FFFF_FFFF_FF88), (2, 0xFFFF_FFFF_FFFF_7788), (4, 0x5566_7788)],
)
def test_in_changes_as_much_of_rax_as_the_processor_would(machine: Machine, size: int, rax: int) -> None:
    machine.run(
        message(types.X64_IO_PORT_INTERCEPT, port=0x3F8, info=size, rax=(1 << 64) - 1, rip=0x10, length=1)
    )
    assert machine.page.rax == rax
    assert machine.page.dirty & registers.DIRTY_GENERAL and machine.page.rip == 0x11


def test_port_where_nobody_is_reads_as_ones(machine: Machine) -> None:
    machine.run(message(types.X64_IO_PORT_INTERCEPT, port=0x80, info=1, rax=0, length=1))
    assert machine.page.rax == 0xFF


def test_mov_to_device_memory_is_carried_out(machine: Machine) -> None:
    machine.page.set_general(0, 0xCAFE_BABE)
    machine.page.set_general(3, 0xFFFF_8000_0000_0010)
    machine.run(
        message(types.UNMAPPED_GPA, **LONG_MODE, rip=0x2000, access=1, info=GVA_VALID, gva=0xFFFF_8000_0000_0010,
                gpa=DEVICE + 0x10, count=2, code=b"\x89\x03")
    )  # fmt: skip
    assert machine.device.seen == [(0x10, 4, 0xCAFE_BABE)]
    assert machine.page.rip == 0x2002


def test_instruction_that_the_message_does_not_have_is_read_from_memory(machine: Machine) -> None:
    machine.ram[0x3000:0x3002] = b"\x8b\x03"
    machine.page.set_general(3, 0x7000)
    machine.run(message(types.UNMAPPED_GPA, **LONG_MODE, rip=0x3000, info=GVA_VALID, gva=0x7000, gpa=DEVICE))
    assert machine.device.seen == [(0, 4)] and machine.page.rax == 0x55667788


def test_single_step_after_an_emulated_instruction_traps(machine: Machine) -> None:
    machine.page.rflags = 1 << 8
    machine.page.set_general(3, 0x7000)
    machine.run(
        message(types.UNMAPPED_GPA, **LONG_MODE, info=GVA_VALID, gva=0x7000, gpa=DEVICE, count=2, code=b"\x8b\x03")
    )  # fmt: skip
    ((name, event),) = machine.vp.set
    assert name == "pending_event0" and event >> 16 & 0xFFFF == 1


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(translation.PAGE_NOT_PRESENT, 2), (translation.PRIVILEGE_VIOLATION, 3)],
)
def test_operand_that_the_guest_may_not_touch_is_its_page_fault(
    machine: Machine, outcome: int, code: int
) -> None:
    # movsd from device memory to a page that is not there
    machine.vp.pages = lambda page, _flags: (outcome, 0)
    machine.page.set_general(6, 0x7000)
    machine.page.set_general(7, 0x9000)
    machine.run(
        message(types.UNMAPPED_GPA, **LONG_MODE, rip=0x50, info=GVA_VALID, gva=0x7000, gpa=DEVICE, count=1,
                code=b"\xa5")
    )  # fmt: skip
    ((_name, event),) = machine.vp.set
    assert event >> 16 & 0xFFFF == 14 and event >> 32 & 0xFFFF_FFFF == code and event >> 64 == 0x9000
    assert machine.problems == []


def test_fetch_from_where_no_memory_is_ends_the_guest_with_a_line(machine: Machine) -> None:
    machine.run(message(types.UNMAPPED_GPA, access=types.ACCESS_EXECUTE, gpa=DEVICE))
    assert (
        len(machine.problems) == 1 and "\n" not in machine.problems[0] and hex(DEVICE) in machine.problems[0]
    )


def test_eoi_reaches_the_io_apic(machine: Machine) -> None:
    machine.io_apic.write(0, 4, 0x10)
    machine.io_apic.write(0x10, 4, 1 << 15 | 0x41)
    machine.io_apic.set_pin(0, 1)
    assert machine.delivered == [0x41]
    machine.run(message(types.X64_APIC_EOI, vector=0x41))
    assert machine.delivered == [0x41, 0x41]  # the line is still asserted


def test_triple_fault_resets(machine: Machine) -> None:
    machine.run(message(types.UNRECOVERABLE_EXCEPTION))
    assert (
        machine.resets == [machine.resets[0]]
        and "triple fault" in machine.resets[0]
        and machine.problems == []
    )


@pytest.mark.parametrize("kind", [types.INVALID_VP_REGISTER_VALUE, 0, 0x8001_FFFF, 1])
def test_message_that_ends_the_guest_gives_one_line(machine: Machine, kind: int) -> None:
    machine.run(message(kind))
    assert len(machine.problems) == 1 and "\n" not in machine.problems[0]


def test_defect_of_a_device_ends_the_guest_and_not_the_vmm(machine: Machine) -> None:
    def broken(_offset: int, _size: int) -> int:
        raise ZeroDivisionError("a defect")

    machine.port.read = broken  # type: ignore[method-assign, assignment]
    machine.run(message(types.X64_IO_PORT_INTERCEPT, port=0x3F8, info=1))
    assert machine.problems == ["virtual processor 0: internal error: ZeroDivisionError: a defect"]


def test_error_of_the_driver_ends_the_guest(machine: Machine) -> None:
    def refuse() -> None:
        raise MshvError("MSHV_RUN_VP", 5)

    machine.vp.script.append(refuse)
    machine.run()
    assert len(machine.problems) == 1 and "MSHV_RUN_VP" in machine.problems[0]


def test_paused_processor_answers_nothing_until_it_is_resumed(machine: Machine) -> None:
    one = message(types.X64_IO_PORT_INTERCEPT, port=0x3F8, info=1, access=1, rax=5, length=1)
    machine.processor.start()
    assert machine.vp.idle.wait(30)
    for _ in range(20):
        machine.processor.ask_to_pause()
        machine.processor.await_pause()
        seen = len(machine.port.seen)
        machine.vp.script.append(one)
        machine.vp.idle.clear()
        assert not machine.vp.idle.wait(0.002) and len(machine.port.seen) == seen
        machine.processor.resume()
        assert machine.vp.idle.wait(30) and len(machine.port.seen) == seen + 1
    machine.processor.stop()


@pytest.mark.parametrize("state", ["new", "running", "paused", "failed"])
def test_stop_ends_the_thread_in_every_state(machine: Machine, state: str) -> None:
    before = threading.active_count()
    if state != "new":
        if state == "failed":
            machine.vp.script.append(message(types.INVALID_VP_REGISTER_VALUE))
        machine.processor.start()
        deadline = time.monotonic() + 30
        while not (machine.vp.idle.is_set() or machine.problems):
            assert time.monotonic() < deadline
        if state == "paused":
            machine.processor.ask_to_pause()
            machine.processor.await_pause()
    started = time.monotonic()
    machine.processor.stop()
    assert time.monotonic() - started < 10 and threading.active_count() == before


def test_pause_of_a_processor_that_has_failed_does_not_wait(machine: Machine) -> None:
    machine.vp.script.append(message(types.INVALID_VP_REGISTER_VALUE))
    machine.processor.start()
    deadline = time.monotonic() + 30
    while not machine.problems:
        assert time.monotonic() < deadline
    machine.processor.ask_to_pause()
    machine.processor.await_pause()
    machine.processor.resume()
    machine.processor.stop()


CASES = int(os.environ.get("ROOTVISOR_FUZZ", "3000"))


def test_random_messages_are_answered_or_end_the_guest_with_a_line() -> None:
    random = Random(17)
    kinds = [types.X64_IO_PORT_INTERCEPT, types.UNMAPPED_GPA, types.GPA_INTERCEPT, types.X64_APIC_EOI]
    outcomes = [
        translation.SUCCESS, translation.PAGE_NOT_PRESENT, translation.PRIVILEGE_VIOLATION, translation.GPA_UNMAPPED,
        translation.INTERCEPT, 99,
    ]  # fmt: skip
    for case in range(CASES // 10):
        machine = Machine()
        machine.vp.pages = lambda page, _flags: (
            random.choice(outcomes),
            random.choice((page, random.getrandbits(52))),
        )
        machine.ram[:4096] = random.randbytes(4096)
        script = []
        for _ in range(10):
            data = bytearray(random.randbytes(256))
            kind = random.choice(kinds) if random.random() < 0.98 else random.getrandbits(32)
            data[0:4] = kind.to_bytes(4, "little")
            if kind == types.X64_IO_PORT_INTERCEPT:
                data[58] = random.choice((1, 2, 4)) | random.choice(
                    (0, 0, types.IO_STRING, types.IO_STRING | types.IO_REP)
                )
            if random.random() < 0.7:
                data[21] = random.randrange(2)
                data[72:80] = (DEVICE + random.randrange(0x1010)).to_bytes(8, "little")
            script.append(bytes(data))

        def scramble(machine: Machine = machine) -> None:
            for number in range(16):
                machine.page.set_general(number, random.choice((random.getrandbits(64), DEVICE, 3, 0)))

        machine.vp.script += [step for one in script for step in (scramble, one)]
        machine.run()
        assert len(machine.problems) <= 1, (case, machine.problems)
        for line in machine.problems:
            assert "\n" not in line and "internal error" not in line, (
                case,
                line,
                [one.hex() for one in script],
            )
