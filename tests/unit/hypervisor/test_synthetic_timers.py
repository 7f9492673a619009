# SPDX-License-Identifier: Apache-2.0
"""Synthetic timers by a clock that the test sets: holding, going on, state, and the end of their thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rootvisor.hypervisor.synic import Synic
from rootvisor.hypervisor.synthetic_timers import (
    AUTO_ENABLE,
    DIRECT,
    ENABLE,
    PERIODIC,
    TimerQueue,
    timers_of,
)
from rootvisor.tlfs import privileges

from .parked_vp import Page

VECTOR = 0x50
BY_DIRECT = DIRECT | VECTOR << 4
BY_MESSAGE = 2 << 16


class Clock:
    def __init__(self) -> None:
        self.time = 1_000_000
        self.closed = False

    def now(self) -> int:
        return self.time

    def close(self) -> None:
        self.closed = True


class Made:
    def __init__(self) -> None:
        self.defects: list[BaseException] = []
        self.clock = Clock()
        partition: Any = SimpleNamespace(
            features=privileges.FEATURE_DIRECT_TIMERS, end_with_defect=self.defects.append
        )
        self.queue = TimerQueue(partition, self.clock)
        self.interrupts: list[int] = []
        self.synic = Synic(Page(), Page(), Page(), self.interrupts.append)  # type: ignore[arg-type]
        self.vp: Any = SimpleNamespace(
            partition=partition, synic=self.synic, interrupt=self.interrupts.append, timers=(), stopping=False
        )
        self.vp.timers = timers_of(self.vp, self.queue)  # type: ignore[arg-type]
        self.timer = self.vp.timers[0]

    def come(self, count: int) -> None:
        """Waits for so many interrupts."""
        await_that(lambda: len(self.interrupts) >= count)

    def looked(self) -> None:
        """The thread has looked at what is due now: a timer of another VP that is due at once has expired."""
        other: Any = SimpleNamespace(
            partition=self.vp.partition, interrupt=probes.append, synic=self.synic, timers=()
        )
        probes.clear()
        timer = timers_of(other, self.queue)[0]
        timer.write_config(AUTO_ENABLE | BY_DIRECT)
        timer.write_count(self.clock.time + 1)
        self.clock.time += 1
        self.queue.go_on()
        await_that(lambda: bool(probes))


probes: list[int] = []


def await_that(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def made() -> Iterator[Made]:
    before = threading.active_count()
    one = Made()
    yield one
    one.queue.stop()
    assert one.defects == []
    assert one.clock.closed
    assert threading.active_count() == before


def test_held_queue_expires_nothing_and_goes_on_afterwards(made: Made) -> None:
    made.timer.write_config(AUTO_ENABLE | BY_DIRECT)
    made.queue.hold()
    made.timer.write_count(made.clock.time + 100)
    made.clock.time += 200
    assert made.timer.state()[1] & ENABLE
    assert made.interrupts == []
    made.queue.go_on()
    made.come(1)
    assert made.interrupts == [VECTOR]
    assert not made.timer.state()[1] & ENABLE


def test_vp_that_was_forgotten_has_no_expiry(made: Made) -> None:
    made.timer.write_count(1000)
    made.timer.write_config(ENABLE | PERIODIC | BY_DIRECT)
    made.queue.forget(made.vp)
    made.clock.time += 5000
    made.queue.go_on()
    made.looked()
    assert made.interrupts == []


@pytest.mark.parametrize(
    "state",
    [
        (0, AUTO_ENABLE | ENABLE | BY_DIRECT, 1 << 40, 0, 0),
        (0, ENABLE | PERIODIC | BY_DIRECT, 100_000_000, 77_000_000, 0),
        (1, ENABLE | BY_MESSAGE, 5, 0, 5),
        (1, ENABLE | PERIODIC | BY_MESSAGE, 100_000_000, 77_000_000, 9),
        (0, BY_MESSAGE, 3, 0, 0),
    ],
)
def test_state_comes_back_as_it_was_set(made: Made, state: tuple[int, int, int, int, int]) -> None:
    made.timer.set_state(*state)
    assert made.timer.state() == state
    assert made.interrupts == []


def test_deadline_that_has_passed_meanwhile_expires_with_the_state(made: Made) -> None:
    made.timer.set_state(0, ENABLE | BY_DIRECT, made.clock.time - 5, 0, 0)
    assert made.interrupts == [VECTOR]
    assert made.timer.state()[1] == BY_DIRECT


def test_periodic_timer_keeps_its_phase_over_its_state(made: Made) -> None:
    made.timer.set_state(0, ENABLE | PERIODIC | BY_DIRECT, 100_000, made.clock.time - 30_000, 0)
    made.come(1)
    await_that(lambda: made.timer.state()[3] == 1_000_000 - 30_000 + 100_000)
    assert made.interrupts == [VECTOR]


def test_direct_mode_that_is_not_offered_is_off_in_a_state(made: Made) -> None:
    made.vp.partition.features = 0
    made.timer.set_state(0, ENABLE | BY_DIRECT, 1, 0, 0)
    assert made.interrupts == []
    assert not made.timer.state()[1] & (ENABLE | DIRECT)
