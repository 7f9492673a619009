# SPDX-License-Identifier: Apache-2.0
"""Synthetic timers that KVM's own serve for a while, where KVM has some (``arch/x86/kvm/hyperv.c``: ``stimer_start``).

A one-shot timer in direct mode whose deadline is near is the kind that an operating system has its clock events from.
KVM raises its interrupt without a thread of ours, so it comes as late as KVM's own would. KVM has no part in anything
else: registers, periodic timers, messages and deadlines far away are :mod:`.synthetic_timers`'s.

KVM counts in a reference time of its own. Ours is read first and KVM's after it, and a little is added for what their
rates may differ by, so that no timer is early.
"""

from __future__ import annotations

from struct import pack, pack_into

from ..kvm import abi
from ..tlfs import msrs
from .synthetic_timers import AUTO_ENABLE, DIRECT, ENABLE, PERIODIC, SyntheticTimer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .synthetic_timers import TimerQueue
    from .vp import VirtualProcessor

#: Deadlines up to a second ahead (100 ns units).
_NEAR = 10_000_000
#: The two clocks differ by less than one part in 2 ** 13, and by the rounding of both.
_RATE_SHIFT, _ROUNDING = 13, 2
_VECTOR_BITS = 0xFF0
#: struct kvm_msrs of two: where their values lie
_COUNT_AT, _CONFIG_AT = 16, 32


class KvmTimer(SyntheticTimer):
    """Timer ``index`` of a VP whose processor has KVM's SynIC on.

    All but the queue's part happens while the VP is not in KVM_RUN. While ``_armed`` is set KVM has the timer; whether
    it has expired since is asked where somebody wants to know.
    """

    __slots__ = ("_armed", "_config_msr", "_registers", "_vcpu")

    def __init__(self, vp: VirtualProcessor, index: int, queue: TimerQueue) -> None:
        super().__init__(vp, index, queue)
        self._vcpu = vp.vcpu
        self._config_msr = msrs.STIMER0_CONFIG + 2 * index
        self._armed = False
        #: COUNT and CONFIG, for KVM_SET_MSRS: from the host's side COUNT enables nothing, so it comes first
        self._registers = bytearray(
            pack("<IIIIQIIQ", 2, 0, self._config_msr + 1, 0, 0, self._config_msr, 0, 0)
        )

    def read_config(self) -> int:
        """CONFIG."""
        with self._queue.lock:
            self._look()
            return self.config

    def leave_kvm(self) -> None:
        """The VP will sleep outside of KVM_RUN, where KVM's timers raise nothing."""
        with self._queue.lock:
            self._look()
            if self._armed:
                self._armed = False
                self._vcpu.set_msr(self._config_msr, 0)
                self.turn += 1
                self._queue.add(self)

    def _cancel(self) -> None:
        if not self.config & AUTO_ENABLE:
            self._look()  # one that has expired stays off; the others come on with their COUNT anyway
        super()._cancel()

    def _look(self) -> None:
        if self._armed and not self._vcpu.get_msr(self._config_msr) & ENABLE:
            self._armed = False
            self.config &= ~ENABLE

    def _begin(self, due: int = 0) -> None:
        armed, self._armed = self._armed, False
        super()._begin(due)
        if armed and not self._armed:
            self._vcpu.set_msr(self._config_msr, 0)

    def _wait(self, now: int) -> None:
        ahead = self.deadline - now
        if self.config & (PERIODIC | DIRECT) != DIRECT or ahead > _NEAR:
            super()._wait(now)
            return
        vcpu = self._vcpu
        registers = self._registers
        pack_into("<Q", registers, _CONFIG_AT, ENABLE | DIRECT | self.config & _VECTOR_BITS)
        self._armed = True
        ahead += (ahead >> _RATE_SHIFT) + _ROUNDING
        pack_into("<Q", registers, _COUNT_AT, vcpu.get_msr(msrs.TIME_REF_COUNT) + ahead)
        vcpu.ioctl(abi.KVM_SET_MSRS, registers)
