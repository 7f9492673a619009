# SPDX-License-Identifier: Apache-2.0
"""Interrupts that end by themselves without KVM's help: when the processor gets one, and when it does not."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from rootvisor.hypervisor.auto_eoi import AutoEoi
from rootvisor.hypervisor.init_watch import InitWatch
from rootvisor.kvm import abi


class Processor:
    def __init__(self) -> None:
        self.state = abi.MP_STATE_RUNNABLE
        self.registers = bytearray(1024)
        struct.pack_into("<I", self.registers, 0xF0, 0x1FF)
        self.rflags = 0x202
        self.pending = bytearray(64)
        self.taken: list[int] = []
        self.msrs: dict[int, int] = {}

    def finish_exit(self) -> None:
        pass

    def mp_state(self) -> int:
        return self.state

    def set_mp_state(self, state: int) -> None:
        self.state = state

    def lapic(self) -> bytearray:
        return self.registers

    def events(self) -> bytearray:
        return bytearray(self.pending)

    def set_events(self, events: bytearray) -> None:
        assert events[abi.EVENTS_INTERRUPT_INJECTED] == 1
        self.taken.append(events[abi.EVENTS_INTERRUPT_NR])

    def get_regs(self) -> tuple[int, ...]:
        return (*(0,) * 17, self.rflags)

    def set_msr(self, index: int, value: int) -> bool:
        self.msrs[index] = value
        return True

    def try_msr(self, index: int) -> int | None:
        return self.msrs.get(index)


@pytest.fixture
def processor() -> Processor:
    return Processor()


def waiting(processor: Any, *vectors: int) -> AutoEoi:
    made = AutoEoi(processor)
    for vector in vectors:
        made.add(vector)
    made.deliver()
    return made


def test_deliver_gives_the_highest_and_keeps_the_rest(processor: Processor) -> None:
    made = waiting(processor, 0x31, 0x52)
    assert (processor.taken, made.pending) == ([0x52], 1 << 0x31)


def test_deliver_wakes_a_processor_that_has_halted(processor: Processor) -> None:
    processor.state = abi.MP_STATE_HALTED
    waiting(processor, 0x31)
    assert (processor.taken, processor.state) == ([0x31], abi.MP_STATE_RUNNABLE)


@pytest.mark.parametrize("reason", ["interrupts off", "shadow", "exception", "priority", "request"])
def test_deliver_waits_while_the_processor_cannot_take_it(processor: Processor, reason: str) -> None:
    if reason == "interrupts off":
        processor.rflags = 2
    elif reason == "priority":
        struct.pack_into("<I", processor.registers, 0xA0, 0x30)
    elif reason == "request":
        struct.pack_into("<I", processor.registers, 0x200 + 16, 1 << 0x12)  # vector 0x32, which KVM has
    else:
        processor.pending[abi.EVENTS_SHADOW if reason == "shadow" else abi.EVENTS_EXCEPTION_INJECTED] = 1
    assert waiting(processor, 0x31).pending == 1 << 0x31
    assert processor.taken == []


@pytest.mark.parametrize("state", [abi.MP_STATE_INIT_RECEIVED, abi.MP_STATE_UNINITIALIZED])
def test_deliver_drops_what_comes_for_a_processor_that_waits_for_its_start(
    processor: Processor, state: int
) -> None:
    processor.state = state
    assert waiting(processor, 0x31).pending == 0
    assert processor.taken == []


def test_deliver_drops_what_comes_for_a_local_apic_that_is_off(processor: Processor) -> None:
    struct.pack_into("<I", processor.registers, 0xF0, 0xFF)
    assert waiting(processor, 0x31).pending == 0


def test_init_is_told_once(processor: Any) -> None:
    watch = InitWatch(processor)
    assert not watch.happened()
    processor.msrs[abi.MSR_KVM_ASYNC_PF_INT] = 0
    assert [watch.happened(), watch.happened()] == [True, False]
