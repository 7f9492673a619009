# SPDX-License-Identifier: Apache-2.0
"""Synthetic timers: four per VP, one-shot or periodic, by message or straight to the local APIC (TLFS "Timers").

Deadlines are in the partition's reference time. One thread per partition waits for the next of them, and reads the
clock of a processor of its own that never runs (:class:`GuestClock`), because a running VP cannot be asked; so no timer
is early. Expiries of a periodic timer that were missed are skipped, and the phase is kept.
"""

from __future__ import annotations

from _thread import allocate_lock, start_new_thread
from heapq import heapify, heappop, heappush
from time import CLOCK_MONOTONIC_RAW, clock_gettime_ns

from ..kvm import tsc_offset
from ..kvm.abi import MSR_TSC
from ..tlfs import messages, privileges
from .errors import GeneralProtection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from typing import Protocol

    from ..kvm.system import Kvm
    from ..kvm.vcpu import Vcpu
    from .partition import Partition
    from .vp import VirtualProcessor

    class Clock(Protocol):
        """A partition's reference time."""

        def now(self) -> int:
            """100 ns units; any thread, at any moment."""

        def close(self) -> None:
            """Frees what it needs."""

    class WatchedVp(Protocol):
        """A VP for which the timers' thread looks whether something can go on."""

        def look(self) -> bool:
            """Lets it go on; whether to look again. No lock is held."""


#: HV_X64_MSR_STIMERx_CONFIG
ENABLE, PERIODIC, LAZY, AUTO_ENABLE, DIRECT = 1, 2, 4, 8, 1 << 12
_VECTOR_SHIFT, _SINT_SHIFT = 4, 16
_VALID = 0xF_1FFF
TIMER_COUNT = 4
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_TICKS_PER_SECOND = 10_000_000
#: Periodic timers with shorter periods expire this often at most, or a guest could keep a processor of the host busy.
_SHORTEST = 5_000
#: The longest sleep: nobody's deadline is looked at less often.
_LOOK_S = 60.0
#: The thread sleeps this much less than it has to (100 ns units), and the rest in small steps: clocks differ a little.
_EARLY = 200
#: So much of what has passed by the host's clock has passed for the guest, whatever the two clocks differ by.
_CERTAIN_PER_MILLE = 990
#: It sleeps this long at least.
_LEAST = 100
#: VPs that wait for something are looked at so often, and after the first looks so seldom.
_SOON_S, _SELDOM_S, _OFTEN = 0.001, 0.016, 50
#: Entries of timers that were stopped or set anew stay in the queue until they are due, but not more than these.
_HEAP_LIMIT = 4096


class IdleProcessor:
    """A processor that never runs, so that its TSC can be read at any moment, by any thread."""

    __slots__ = ("_offset", "_vcpu", "_vm")

    def __init__(self, kvm: Kvm, model: Vcpu) -> None:
        """Its TSC is that of ``model``, which is not in KVM_RUN."""
        self._vm = kvm.create_vm()
        try:
            self._vcpu = self._vm.create_vcpu(0)
            offset = tsc_offset.get(model)
            if offset is None or not tsc_offset.set(self._vcpu, offset):
                offset = None
                self._vcpu.set_msr(MSR_TSC, model.get_msr(MSR_TSC))
        except BaseException:
            self._vm.close()
            raise
        self._offset = offset or 0

    def tsc(self) -> int:
        """That TSC."""
        return self._vcpu.get_msr(MSR_TSC)

    def host_tsc(self) -> int:
        """The host's TSC, as :func:`.child_time.host_tsc` has it."""
        return self._vcpu.get_msr(MSR_TSC) - self._offset & _MASK64

    def close(self) -> None:
        """Frees the machine."""
        self._vm.close()


class GuestClock:
    """The reference time of a partition whose processors' TSC nobody moves."""

    __slots__ = ("_partition", "_processor")

    def __init__(self, partition: Partition, first: Vcpu) -> None:
        """``first`` is the processor of VP 0, which is not in the guest."""
        self._partition = partition
        self._processor = IdleProcessor(partition.hypervisor.kvm, first)

    def now(self) -> int:
        """100 ns units since creation."""
        return self._partition.reference_time.at(self._processor.tsc())

    def close(self) -> None:
        """Frees the machine."""
        self._processor.close()


class TimerQueue:
    """The timers of a partition that are on, by deadline, and the thread that waits for them."""

    __slots__ = (
        "_clock",
        "_expiring",
        "_finished",
        "_heap",
        "_held",
        "_known",
        "_number",
        "_partition",
        "_since",
        "_starting",
        "_stopping",
        "_wake",
        "_watched",
        "lock",
    )

    def __init__(self, partition: Partition, clock: Clock) -> None:
        self._partition = partition
        self._clock = clock
        #: the thread itself sets timers anew
        self._expiring = False
        #: held while a timer changes
        self.lock = allocate_lock()
        #: (deadline, a number that makes entries differ, the timer, its turn)
        self._heap: list[tuple[int, int, SyntheticTimer, int]] = []
        self._number = 0
        self._wake = allocate_lock()
        self._wake.acquire()
        self._stopping = False
        self._starting = allocate_lock()
        self._finished: LockType | None = None
        #: VPs for which somebody has to look whether they can go on, and how often that has been done
        self._watched: dict[WatchedVp, int] = {}
        #: time stands still
        self._held = False
        #: a reading of the clock, and the host's time right after it (0: none that is worth anything)
        self._known = self._since = 0

    def now(self) -> int:
        """Reference time."""
        return self._clock.now()

    def add(self, timer: SyntheticTimer) -> None:
        """The timer's deadline is waited for. The caller holds :attr:`lock`."""
        self._number += 1
        if len(self._heap) >= _HEAP_LIMIT:
            self._heap[:] = [entry for entry in self._heap if entry[3] == entry[2].turn]
            heapify(self._heap)
        heappush(self._heap, (timer.deadline, self._number, timer, timer.turn))
        if not self._start() and not self._expiring and self._heap[0][1] == self._number:
            self._poke()

    def hold(self) -> None:
        """Nothing expires from now on: the clock stands still."""
        with self.lock:
            self._held = True

    def go_on(self) -> None:
        """The clock goes on, or was set."""
        with self.lock:
            self._held = False
            self._since = 0
        self._poke()

    def retry(self, vp: VirtualProcessor) -> None:
        """Messages of the VP that wait get their slots, if those are free; one of them may be a timer's."""
        with self.lock:
            if not vp.stopping and not self._held:
                vp.synic.end_of_message()

    def forget(self, vp: VirtualProcessor) -> None:
        """The VP is going: its timers are off, and nobody looks at it any more. Its thread has ended."""
        for timer in vp.timers:
            timer.reset()
        self._watched.pop(vp, None)  # type: ignore[call-overload]

    def watch(self, vp: WatchedVp) -> None:
        """The thread calls ``vp.look`` now and then, from now on until it says no."""
        self._watched[vp] = 0
        if not self._start() and not self._expiring:
            self._poke()

    def _start(self) -> bool:
        """Starts the thread, the first time."""
        with self._starting:
            if self._finished is not None:
                return False
            finished = allocate_lock()
            finished.acquire()
            self._finished = finished
        start_new_thread(self._thread, ())
        return True

    def _poke(self) -> None:
        try:
            self._wake.release()
        except RuntimeError:
            pass  # it is awake already

    def _thread(self) -> None:
        finished = self._finished
        assert finished is not None
        heap = self._heap
        clock = self._clock
        try:
            while not self._stopping:
                timeout = _LOOK_S
                with self.lock:
                    # To read the clock is an ioctl on a processor, in the way of an interrupt that is late already.
                    # After a short sleep the host's clock tells as well that the deadline has passed.
                    now = (
                        self._known
                        + (clock_gettime_ns(CLOCK_MONOTONIC_RAW) - self._since)
                        * _CERTAIN_PER_MILLE
                        // 100_000
                    )
                    if not self._since or not heap or heap[0][0] > now:
                        now = clock.now()
                    due: list[SyntheticTimer] = []
                    while heap and (heap[0][0] <= now or heap[0][3] != heap[0][2].turn) and not self._held:
                        _deadline, _number, timer, turn = heappop(heap)
                        if turn == timer.turn:  # else stopped, or set anew
                            due.append(timer)
                    self._expiring = True
                    for timer in due:
                        timer.expire(now)
                    self._expiring = False
                    if heap and not self._held:
                        self._known = clock.now() if due else now
                        self._since = clock_gettime_ns(CLOCK_MONOTONIC_RAW)
                        timeout = max(heap[0][0] - self._known - _EARLY, _LEAST) / _TICKS_PER_SECOND
                    else:
                        self._since = 0
                # Without the lock, however many are due: VPs wait for it.
                if self._watched:
                    timeout = min(timeout, self._look())
                self._wake.acquire(timeout=min(timeout, _LOOK_S))
        except Exception as error:  # a defect of ours: the run ends with it
            self._partition.end_with_defect(error)
        finally:
            finished.release()

    def _look(self) -> float:
        """Looks at the VPs; seconds to the next time."""
        pause = _SELDOM_S
        for vp, looks in list(self._watched.items()):
            if not vp.look():
                self._watched.pop(vp, None)
                if vp.look():  # something came in between
                    self._watched.setdefault(vp, 0)
            else:
                self._watched[vp] = looks + 1
            if looks < _OFTEN:
                pause = _SOON_S
        return pause

    def stop(self) -> None:
        """Ends the thread; the VPs have stopped."""
        self._stopping = True
        self._poke()
        if self._finished is not None:
            self._finished.acquire()
            self._finished.release()
        self._clock.close()


class SyntheticTimer:
    """Timer ``index`` of a VP: CONFIG and COUNT. ``turn`` changes whenever the timer is stopped or set."""

    __slots__ = ("_queue", "_vp", "config", "count", "deadline", "expired", "index", "turn", "waiting")

    def __init__(self, vp: VirtualProcessor, index: int, queue: TimerQueue) -> None:
        self._vp = vp
        self._queue = queue
        self.index = index
        self.config = 0
        self.count = 0
        self.deadline = 0
        #: the deadline that its message tells of
        self.expired = 0
        self.turn = 0
        #: its message waits for a free slot
        self.waiting = False

    @property
    def sint(self) -> int:
        """The SINT of its messages."""
        return self.config >> _SINT_SHIFT & 0xF

    def read_config(self) -> int:
        """CONFIG."""
        return self.config

    def leave_kvm(self) -> None:
        """The VP will sleep outside of KVM_RUN."""

    def write_config(self, value: int) -> None:
        """CONFIG. GeneralProtection: direct mode that is not offered. Reserved bits are not stored."""
        if value & DIRECT and not self._vp.partition.features & privileges.FEATURE_DIRECT_TIMERS:
            raise GeneralProtection
        with self._queue.lock:
            self._cancel()
            self.config = value & _VALID
            if not self._can_run():
                self.config &= ~ENABLE
            self._begin()

    def state(self) -> tuple[int, int, int, int, int]:
        """(message waits, CONFIG, COUNT, when a periodic timer expires next, deadline that the message tells of)."""
        with self._queue.lock:
            due = self.deadline if self.config & PERIODIC and self.config & ENABLE and self.count else 0
            return int(self.waiting), self.config, self.count, due, self.expired if self.waiting else 0

    def set_state(self, waits: int, config: int, count: int, due: int, expired: int) -> None:
        """What :meth:`state` gave, for a VP that is about to run. Direct mode that is not offered is off."""
        with self._queue.lock:
            self._cancel()
            self.config = config & _VALID
            self.count = count
            if config & DIRECT and not self._vp.partition.features & privileges.FEATURE_DIRECT_TIMERS:
                self.config &= ~(DIRECT | ENABLE)
            if not self._can_run():
                self.config &= ~ENABLE
            if waits & 1:
                self.waiting = True
                self.expired = expired
                self._vp.synic.post_timer(self)
                if not self.config & PERIODIC:
                    return
            self._begin(due)

    def write_count(self, value: int) -> None:
        """COUNT: 0 stops the timer; with AUTO_ENABLE another value starts it."""
        with self._queue.lock:
            self._cancel()
            self.count = value
            if not value:
                self.config &= ~ENABLE
            elif self.config & AUTO_ENABLE and self._can_run():
                self.config |= ENABLE
            self._begin()

    def _can_run(self) -> bool:
        """A timer without a SINT for its messages cannot be enabled."""
        return bool(self.config & DIRECT) or self.sint != 0

    def _cancel(self) -> None:
        self.turn += 1
        if self.waiting:
            self.waiting = False
            self._vp.synic.withdraw_timer(self)

    def _begin(self, due: int = 0) -> None:
        if not self.config & ENABLE or not self.count:
            return
        now = self._queue.now()
        if self.config & PERIODIC:
            self.deadline = due or min(now + self.count, _MASK64)
        else:
            self.deadline = self.count
            if self.deadline <= now:
                self.expire(now)
                return
        self._wait(now)

    def _wait(self, now: int) -> None:
        """The deadline is ahead."""
        self._queue.add(self)

    def expire(self, now: int) -> None:
        """The deadline has come. The caller holds the queue's lock."""
        if self.config & DIRECT:
            if not self.config & PERIODIC:
                self.config &= ~ENABLE  # first: its handler may look at once
            self._vp.interrupt(self.config >> _VECTOR_SHIFT & 0xFF)
        elif not self.waiting:
            self.waiting = True
            self.expired = self.deadline
            self._vp.synic.post_timer(self)
        if self.config & PERIODIC and self.config & ENABLE:
            since = now if self.count >= _SHORTEST else now + _SHORTEST
            missed = max(since - self.deadline, 0) // self.count
            self.deadline = min(self.deadline + (missed + 1) * self.count, _MASK64)
            self._queue.add(self)

    def message(self) -> bytes:
        """The message, about to be placed: its time of delivery is now, and a one-shot timer is off."""
        self.waiting = False
        if not self.config & PERIODIC:
            self.config &= ~ENABLE
        payload = messages.TIMER_PAYLOAD.pack(self.index, self.expired, self._queue.now())
        return messages.MESSAGE_HEADER.pack(messages.TIMER_EXPIRED, len(payload), 0, 0) + payload

    def reset(self) -> None:
        """INIT: off, both registers 0."""
        with self._queue.lock:
            self._cancel()
            self.config = self.count = 0
            self._begin()


def timers_of(
    vp: VirtualProcessor, queue: TimerQueue, kind: type[SyntheticTimer] = SyntheticTimer
) -> tuple[SyntheticTimer, ...]:
    """The timers of a VP."""
    return tuple(kind(vp, index, queue) for index in range(TIMER_COUNT))
