# SPDX-License-Identifier: Apache-2.0
"""Synthetic timers of an ordinary partition (contract/guest-interface 1.7 and 2.5)."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from rootvisor.hypervisor.guest_partition import GUEST_FEATURES
from rootvisor.hypervisor.synthetic_timers import AUTO_ENABLE, DIRECT, ENABLE, LAZY, PERIODIC
from rootvisor.tlfs import msrs, privileges
from tests.kvm import guest as g
from tests.kvm.ordinary import Ordinary, WithoutKvmsSynic, pages

row = pytest.mark.row

SINT, VECTOR = 2, 0xF1
DIRECT_VECTOR = 0xF3
MS = 10_000
CONFIG, COUNT = msrs.STIMER0_CONFIG, msrs.STIMER0_CONFIG + 1
FOREVER = (1 << 63) - 1
TURNS = 100_000_000
#: Turns in which an expiry that is due comes: counted while the VP runs, so that a busy machine does not shorten them,
#: and over before the record is given up.
SOON = 4_000_000
#: Expiries of one-shot timers that are counted, over all timers of two VPs.
EXPIRIES = int(os.environ.get("ROOTVISOR_GUEST_EXPIRIES", "2000"))


#: KVM's own timers serve some of ours, where it has any; here are tests of those with both.
both = pytest.mark.parametrize("ordinary", [Ordinary, WithoutKvmsSynic], indirect=True)


@pytest.fixture
def ordinary(usable_kvm: None, request: pytest.FixtureRequest) -> Iterator[Ordinary]:
    with getattr(request, "param", Ordinary)(vps=2) as made:
        made.start_vp(1)
        for vp in (0, 1):
            made.enable_synic(vp)
            made.wrmsr(msrs.SINT0 + SINT, VECTOR, vp)
        yield made
        assert made.partition.defect is None


def by_message(flags: int = 0) -> int:
    return flags | SINT << 16


def direct(flags: int = 0, vector: int = DIRECT_VECTOR) -> int:
    return flags | DIRECT | vector << 4


def now(guest: Ordinary, vp: int = 0) -> int:
    return guest.rdmsr(msrs.TIME_REF_COUNT, vp)


def arrived(guest: Ordinary, vp: int = 0) -> tuple[int, int, int]:
    """The message in the slot: timer, expiration, delivery."""
    kind, size, _flags, sender, payload = guest.slot(SINT, vp)
    assert (kind, size, sender) == (0x80000010, 24, 0)
    timer, expiration, delivery = struct.unpack_from("<I4xQQ", payload)
    return timer, expiration, delivery


@row("TMR-01", "TMR-06", "REF-07", "MSR-20", "MSR-21", "PRV-03")
@pytest.mark.parametrize("vp", [0, 1])
def test_one_shot_comes_not_before_its_time_and_is_off_then(ordinary: Ordinary, vp: int) -> None:
    deadline = now(ordinary, vp) + 300 * MS
    ops = [
        g.Op(g.WRMSR, rcx=COUNT, rax=deadline),
        g.Op(g.WRMSR, rcx=CONFIG, rax=by_message(ENABLE)),
        g.Op(g.RDMSR, rcx=CONFIG),
        g.Op(g.RDMSR, rcx=msrs.TIME_REF_COUNT),
    ]
    ordinary.run(ops, vp)
    assert ops[2].rax == by_message(ENABLE) or ops[3].rax >= deadline
    assert ordinary.take(VECTOR, vp, turns=TURNS) == 1
    assert now(ordinary, vp) >= deadline
    timer, expiration, delivery = arrived(ordinary, vp)
    assert (timer, expiration) == (0, deadline)
    assert deadline <= delivery <= now(ordinary, vp)
    assert ordinary.rdmsr(CONFIG, vp) == by_message()
    assert ordinary.rdmsr(COUNT, vp) == deadline


@row("TMR-01")
def test_one_shot_in_the_past_expires_at_once(ordinary: Ordinary) -> None:
    ordinary.wrmsr(COUNT, 1)
    ordinary.wrmsr(CONFIG, by_message(ENABLE))
    assert arrived(ordinary)[:2] == (0, 1)
    assert ordinary.take(VECTOR) == 1


@row("TMR-02")
def test_periodic_goes_on_until_it_is_stopped_and_keeps_its_phase(ordinary: Ordinary) -> None:
    ordinary.wrmsr(COUNT, 5 * MS)
    ordinary.wrmsr(CONFIG, by_message(ENABLE | PERIODIC))
    expirations = []
    for number in range(1, 6):
        assert ordinary.take(VECTOR, count=number, turns=TURNS) == number
        expirations.append(arrived(ordinary)[1])
        ordinary.free_slot(SINT)
        ordinary.wrmsr(msrs.EOM, 0)
    gaps = [later - earlier for earlier, later in pairwise(expirations)]
    assert all(gap and gap % (5 * MS) == 0 for gap in gaps)
    assert ordinary.rdmsr(CONFIG) & ENABLE
    ordinary.wrmsr(CONFIG, 0)
    taken = ordinary.interrupts(VECTOR)
    assert ordinary.take(VECTOR, count=taken + 2, turns=3_000_000) <= taken + 1


@row("TMR-03")
@pytest.mark.parametrize("flags", [0, PERIODIC])
def test_auto_enable_starts_with_the_count(ordinary: Ordinary, flags: int) -> None:
    ordinary.wrmsr(CONFIG, by_message(AUTO_ENABLE | flags))
    assert not ordinary.rdmsr(CONFIG) & ENABLE
    ordinary.wrmsr(COUNT, 2 * MS if flags else now(ordinary) + 2 * MS)
    assert ordinary.take(VECTOR, turns=TURNS) == 1
    assert bool(ordinary.rdmsr(CONFIG) & ENABLE) == bool(flags)


@row("TMR-04")
@both
def test_count_zero_stops_and_enable_waits_for_a_count(ordinary: Ordinary) -> None:
    ordinary.wrmsr(CONFIG, direct(ENABLE | AUTO_ENABLE))
    assert ordinary.rdmsr(CONFIG) & ENABLE, "kept, though nothing can expire"
    assert ordinary.take(DIRECT_VECTOR, turns=2000) == 0
    ordinary.wrmsr(COUNT, FOREVER)
    assert ordinary.rdmsr(CONFIG) & ENABLE
    ordinary.wrmsr(COUNT, 0)
    assert not ordinary.rdmsr(CONFIG) & ENABLE
    ordinary.wrmsr(CONFIG, direct(ENABLE))
    ordinary.wrmsr(COUNT, now(ordinary) + MS)
    assert ordinary.take(DIRECT_VECTOR, turns=TURNS) == 1


@row("TMR-05")
def test_periodic_that_nobody_takes_does_not_burst(ordinary: Ordinary) -> None:
    """Lazy or not: what was missed is skipped."""
    ordinary.wrmsr(COUNT, MS)
    ordinary.wrmsr(CONFIG, by_message(ENABLE | PERIODIC | LAZY))
    time.sleep(0.1)
    assert ordinary.take(VECTOR) == 1
    ordinary.wrmsr(CONFIG, 0)
    ordinary.free_slot(SINT)
    ordinary.wrmsr(msrs.EOM, 0)
    assert ordinary.take(VECTOR, count=3, turns=2000) <= 2


@row("TMR-07")
def test_busy_slot_keeps_the_timer_on_until_its_message_is_delivered(ordinary: Ordinary) -> None:
    slot = ordinary.partition.vps[0].synic
    slot.post_message(SINT, 5, 0, b"")
    ordinary.wrmsr(COUNT, 1)
    ordinary.wrmsr(CONFIG, by_message(ENABLE))
    assert ordinary.slot(SINT)[:3] == (5, 0, 1)
    assert ordinary.rdmsr(CONFIG) & ENABLE
    ordinary.free_slot(SINT)
    ordinary.wrmsr(msrs.EOM, 0)
    assert arrived(ordinary)[:2] == (0, 1)
    assert not ordinary.rdmsr(CONFIG) & ENABLE


@row("TMR-07", "SYN-09")
def test_every_timer_has_a_buffer_of_its_own(ordinary: Ordinary) -> None:
    synic = ordinary.partition.vps[0].synic
    for number in range(17):
        synic.post_message(SINT, 100 + number, 0, b"")
    for timer in range(4):
        ordinary.wrmsr(COUNT + 2 * timer, 1)
        ordinary.wrmsr(CONFIG + 2 * timer, by_message(ENABLE))
    kinds = []
    for _ in range(21):
        kinds.append(ordinary.slot(SINT)[0])
        ordinary.free_slot(SINT)
        ordinary.wrmsr(msrs.EOM, 0)
    assert kinds == [100 + number for number in range(17)] + [0x80000010] * 4


@row("TMR-07")
def test_timer_that_expires_while_the_synic_is_off_is_delivered_when_it_comes_on(ordinary: Ordinary) -> None:
    ordinary.wrmsr(msrs.SCONTROL, 0)
    ordinary.wrmsr(COUNT, 1)
    ordinary.wrmsr(CONFIG, by_message(ENABLE))
    assert ordinary.slot(SINT)[0] == 0
    assert ordinary.rdmsr(CONFIG) & ENABLE
    ordinary.wrmsr(msrs.SCONTROL, 1)
    assert arrived(ordinary)[0] == 0


@row("TMR-01", "TMR-08")
@both
def test_direct_mode_is_never_early_and_off_afterwards(ordinary: Ordinary) -> None:
    ordinary.wrmsr(CONFIG, direct(AUTO_ENABLE))
    for number in range(1, 101):
        deadline = now(ordinary) + (2 + number % 7) * MS * (10 if number == 50 else 1)
        ops = [
            g.Op(g.WRMSR, rcx=COUNT, rax=deadline),
            g.Op(g.RDMSR, rcx=CONFIG),
            g.Op(g.RDMSR, rcx=msrs.TIME_REF_COUNT),
            g.Op(g.AWAIT, rcx=DIRECT_VECTOR, rdx=number, rbx=TURNS),
            g.Op(g.RDMSR, rcx=msrs.TIME_REF_COUNT),
            g.Op(g.RDMSR, rcx=CONFIG),
            g.Op(g.RDMSR, rcx=COUNT),
        ]
        ordinary.run(ops)
        assert ops[1].rax & ENABLE or ops[2].rax >= deadline, number
        assert ops[3].rax == number
        assert ops[4].rax >= deadline, f"{number}: {deadline - ops[4].rax} early"
        assert ops[5].rax == direct(AUTO_ENABLE)
        assert ops[6].rax == deadline


@row("TMR-08", "TMR-10")
@both
def test_a_timer_that_changes_its_kind_leaves_nothing_of_the_other(ordinary: Ordinary) -> None:
    """Direct and near, then periodic, by message, far away, off: what was armed before does not come."""
    for config, count in (
        (direct(ENABLE | PERIODIC, 0x71), 3 * MS),
        (by_message(ENABLE), FOREVER),
        (direct(ENABLE, 0x71), FOREVER),
        (direct(), 1),
        (direct(ENABLE), 0),
    ):
        ordinary.wrmsr(CONFIG, 0)
        before = ordinary.interrupts(DIRECT_VECTOR)
        ops = [
            g.Op(g.WRMSR, rcx=COUNT, rax=now(ordinary) + 200 * MS),
            g.Op(g.WRMSR, rcx=CONFIG, rax=direct(ENABLE)),
            g.Op(g.WRMSR, rcx=CONFIG, rax=config),
            g.Op(g.WRMSR, rcx=COUNT, rax=count),
            g.Op(g.RDMSR, rcx=msrs.TIME_REF_COUNT),
        ]
        ordinary.run(ops)
        end = ops[4].rax + 250 * MS
        while now(ordinary) < end:
            ordinary.take(0x70, turns=1000)
        assert ordinary.interrupts(DIRECT_VECTOR) == before, (hex(config), count)
    assert ordinary.interrupts(0x71) >= 2, "the periodic one"


@row("TMR-01", "TMR-04")
@both
def test_one_shot_that_has_expired_stays_off_with_a_new_count(ordinary: Ordinary) -> None:
    ordinary.wrmsr(COUNT, now(ordinary) + 5 * MS)
    ordinary.wrmsr(CONFIG, direct(ENABLE))
    assert ordinary.take(DIRECT_VECTOR, turns=TURNS) == 1
    ordinary.wrmsr(COUNT, now(ordinary) + 5 * MS)
    assert ordinary.rdmsr(CONFIG) == direct()
    assert ordinary.take(DIRECT_VECTOR, count=2, turns=SOON) == 1


@row("SYN-18")
@both
def test_init_stops_a_direct_timer(ordinary: Ordinary) -> None:
    ordinary.run(
        [
            g.Op(g.WRMSR, rcx=COUNT, rax=now(ordinary, 1) + 900 * MS),
            g.Op(g.WRMSR, rcx=CONFIG, rax=direct(ENABLE)),
        ],
        1,
    )
    assert ordinary.rdmsr(CONFIG, 1) & ENABLE
    ordinary.start_vp(1)
    assert ordinary.rdmsr(CONFIG, 1) == ordinary.rdmsr(COUNT, 1) == 0
    assert ordinary.take(DIRECT_VECTOR, 1, turns=SOON) == 0


@row("TMR-08", "MSR-24")
@both
def test_a_direct_timer_ends_the_idling_of_its_vp(ordinary: Ordinary) -> None:
    deadline = now(ordinary) + 20 * MS
    ops = [
        g.Op(g.WRMSR, rcx=COUNT, rax=deadline),
        g.Op(g.WRMSR, rcx=CONFIG, rax=direct(ENABLE)),
        g.Op(g.RDMSR, rcx=msrs.GUEST_IDLE),
        g.Op(g.RDMSR, rcx=msrs.TIME_REF_COUNT),
    ]
    ordinary.run(ops)
    assert ops[3].rax >= deadline
    assert ordinary.take(DIRECT_VECTOR) == 1


@row("TMR-08", "MSR-20")
@both
def test_direct_mode_interrupts_without_a_message(ordinary: Ordinary) -> None:
    ordinary.wrmsr(COUNT, now(ordinary) + MS)
    ordinary.wrmsr(CONFIG, direct(ENABLE))
    assert ordinary.take(DIRECT_VECTOR, turns=TURNS) == 1
    assert not ordinary.rdmsr(CONFIG) & ENABLE
    assert all(ordinary.slot(sint)[0] == 0 for sint in range(4))
    ordinary.wrmsr(COUNT, MS)
    ordinary.wrmsr(CONFIG, direct(ENABLE | PERIODIC))
    assert ordinary.take(DIRECT_VECTOR, count=4, turns=TURNS) >= 4
    ordinary.wrmsr(CONFIG, 0)


@row("TMR-08", "MSR-20")
def test_direct_mode_faults_where_it_is_not_offered(usable_kvm: None) -> None:
    with Ordinary(features=GUEST_FEATURES & ~privileges.FEATURE_DIRECT_TIMERS) as guest:
        assert guest.wrmsr_fault(CONFIG, direct()) == g.GP
        assert guest.rdmsr(CONFIG) == 0
        guest.wrmsr(CONFIG, by_message())


@row("TMR-09")
def test_enable_without_a_sint_drops(ordinary: Ordinary) -> None:
    ordinary.wrmsr(COUNT, 1)
    ordinary.wrmsr(CONFIG, ENABLE | PERIODIC)
    assert ordinary.rdmsr(CONFIG) == PERIODIC
    ordinary.wrmsr(CONFIG, AUTO_ENABLE)
    ordinary.wrmsr(COUNT, 1)
    assert ordinary.rdmsr(CONFIG) == AUTO_ENABLE
    assert ordinary.slot(0)[0] == 0


@row("TMR-10")
@both
def test_setting_a_timer_anew_leaves_one(ordinary: Ordinary) -> None:
    ordinary.wrmsr(CONFIG, direct(ENABLE | AUTO_ENABLE))
    deadline = now(ordinary) + 500 * MS
    ordinary.run([g.Op(g.WRMSR, rcx=COUNT, rax=deadline + n) for n in range(5)])
    assert ordinary.take(DIRECT_VECTOR, turns=TURNS) == 1
    assert ordinary.take(DIRECT_VECTOR, count=2, turns=5_000_000) == 1


@row("TMR-10", "TMR-07")
def test_a_message_that_waits_goes_with_its_timer(ordinary: Ordinary) -> None:
    ordinary.partition.vps[0].synic.post_message(SINT, 5, 0, b"")
    ordinary.wrmsr(COUNT, 1)
    ordinary.wrmsr(CONFIG, by_message(ENABLE))
    ordinary.wrmsr(CONFIG, 0)
    ordinary.free_slot(SINT)
    ordinary.wrmsr(msrs.EOM, 0)
    assert ordinary.slot(SINT)[0] == 0


@row("TMR-11", "MSR-20", "MSR-21")
@both
def test_four_timers_are_independent(ordinary: Ordinary) -> None:
    start = now(ordinary)
    for timer in range(4):
        ordinary.wrmsr(COUNT + 2 * timer, FOREVER if timer == 2 else start + (10 + timer) * MS)
        ordinary.wrmsr(CONFIG + 2 * timer, direct(ENABLE, 0x61 + timer * 0x10))
    ordinary.wrmsr(CONFIG + 2 * 2, direct())
    for timer in (0, 1, 3):
        assert ordinary.take(0x61 + timer * 0x10, turns=TURNS) == 1
    assert ordinary.interrupts(0x81) == 0
    counts = [ordinary.rdmsr(COUNT + 2 * timer) for timer in range(4)]
    assert counts == [start + 10 * MS, start + 11 * MS, FOREVER, start + 13 * MS]


@row("TMR-12")
@both
@pytest.mark.parametrize("flags", [0, PERIODIC])
def test_the_largest_count_does_not_expire(ordinary: Ordinary, flags: int) -> None:
    ordinary.wrmsr(COUNT, (1 << 64) - 1)
    ordinary.wrmsr(CONFIG, direct(ENABLE | flags))
    assert ordinary.take(DIRECT_VECTOR, turns=100_000) == 0
    assert ordinary.rdmsr(CONFIG) & ENABLE


@row("MSR-20")
def test_reserved_bits_are_not_stored(ordinary: Ordinary) -> None:
    ordinary.wrmsr(CONFIG, (1 << 64) - 1 & ~ENABLE)
    assert ordinary.rdmsr(CONFIG) == 0xF_1FFE


@row("TMR-05")
def test_a_period_of_one_tick_leaves_the_host_alone(ordinary: Ordinary) -> None:
    """As much as an expiry every 500 us comes of it."""
    ordinary.wrmsr(COUNT, 1)
    ordinary.wrmsr(CONFIG, direct(ENABLE | PERIODIC))
    start = now(ordinary)
    time.sleep(0.1)
    ordinary.wrmsr(CONFIG, 0)
    elapsed = now(ordinary) - start
    assert ordinary.partition.vps[0].interrupts <= elapsed // 5000 + 2


@row("TMR-10")
def test_timers_set_again_and_again_leave_nothing_behind(ordinary: Ordinary) -> None:
    ordinary.wrmsr(CONFIG, direct(ENABLE | AUTO_ENABLE))
    for _ in range(3):
        ordinary.run([g.Op(g.WRMSR, rcx=COUNT, rax=FOREVER - n) for n in range(3000)])
    assert len(ordinary.partition.timers._heap) <= 4096


@row("TMR-05", "TMR-11")
def test_eight_timers_of_the_shortest_period_let_their_vps_go_on(ordinary: Ordinary) -> None:
    for vp in (0, 1):
        for timer in range(4):
            ordinary.wrmsr(COUNT + 2 * timer, 1, vp)
            ordinary.wrmsr(CONFIG + 2 * timer, direct(ENABLE | PERIODIC), vp)
    for vp in (0, 1):
        for timer in range(4):
            ordinary.wrmsr(CONFIG + 2 * timer, 0, vp)
    assert ordinary.rdmsr(CONFIG) == 0


class Counting:
    """One-shot timers of one VP, one after the other: 0 and 1 in direct mode, 2 by message. Deadlines lie a little
    ahead, or, when the VP has fallen behind, in the past."""

    STEP, PER_BATCH = 400, 600

    def __init__(self, guest: Ordinary, vp: int) -> None:
        self.guest, self.vp = guest, vp
        self.taken = {DIRECT_VECTOR: 0, DIRECT_VECTOR + 1: 0, VECTOR: 0}
        self.slot = pages(vp)[0] + SINT * 256
        self.done = 0
        setup = [
            g.Op(g.WRMSR, rcx=CONFIG, rax=direct(AUTO_ENABLE)),
            g.Op(g.WRMSR, rcx=CONFIG + 2, rax=direct(AUTO_ENABLE, DIRECT_VECTOR + 1)),
            g.Op(g.WRMSR, rcx=CONFIG + 4, rax=by_message(AUTO_ENABLE)),
        ]
        guest.run(setup, vp)

    def batch(self) -> None:
        deadline = now(self.guest, self.vp)
        checks = []
        ops = []
        for number in range(self.PER_BATCH):
            deadline += self.STEP
            timer = number % 3
            vector = (DIRECT_VECTOR, DIRECT_VECTOR + 1, VECTOR)[timer]
            self.taken[vector] += 1
            ops.append(g.Op(g.WRMSR, rcx=COUNT + 2 * timer, rax=deadline))
            ops.append(g.Op(g.AWAIT, rcx=vector, rdx=self.taken[vector], rbx=SOON))
            checks.append((ops[-1], self.taken[vector]))
            if timer == 2:
                ops += [g.Op(g.LOAD, rcx=self.slot + 24), g.Op(g.STORE, rcx=self.slot, rax=0)]
                checks.append((ops[-2], deadline))
        self.guest.run(ops, self.vp)
        for number, (op, expected) in enumerate(checks):
            assert (op.fault, op.rax) == (0, expected), self.story(number, op, expected)
        self.done += self.PER_BATCH

    def story(self, number: int, op: g.Op, expected: int) -> str:
        """What is known of the expiry that is missing, or one too many."""
        taken = {vector: self.guest.interrupts(vector, self.vp) for vector in self.taken}
        timers = [
            (timer.config, timer.count, timer.deadline, timer.waiting)
            for timer in self.guest.partition.vps[self.vp].timers[:3]
        ]
        return (
            f"VP {self.vp}, {self.done} before this batch, check {number}: {op.rax} instead of {expected}; "
            f"taken {taken} of {self.taken}; timers (config, count, deadline, waiting) {timers}"
        )

    def finish(self, total: int) -> None:
        while self.done < total:
            self.batch()
        self.guest.take(0x70, self.vp, count=1, turns=100_000)
        assert {vector: self.guest.interrupts(vector, self.vp) for vector in self.taken} == self.taken


@pytest.mark.timeout(14400)
@row("TMR-01", "TMR-11")
@both
def test_no_expiry_is_lost_or_doubled(ordinary: Ordinary, capsys: pytest.CaptureFixture[str]) -> None:
    counting = [Counting(ordinary, vp) for vp in (0, 1)]
    failures: list[BaseException] = []

    def work(one: Counting) -> None:
        try:
            one.finish(EXPIRIES // 2)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(one,)) for one in counting]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    with capsys.disabled():
        print(f"\n{sum(one.done for one in counting)} expiries in {time.monotonic() - started:.1f} s")
