# SPDX-License-Identifier: Apache-2.0
"""The cost of an exit: the same guest on the same machine, answered by our VP loop and by a loop in C."""

from __future__ import annotations

import ctypes
import os
from statistics import median
from time import perf_counter_ns

from rootvisor.bench.probe import END, KINDS, MARK_PORT
from rootvisor.hypervisor.hypercall_abi import PORT as HYPERCALL_PORT
from rootvisor.hypervisor.hypervisor import Hypervisor
from rootvisor.kvm.selftest import run_guest
from rootvisor.kvm.system import Kvm
from rootvisor.machine.computer import Computer

_MEMORY_BYTES = 128 << 20
_DEADLINE_S = 120.0


class BenchError(Exception):
    """A measurement failed; one line."""


class _Marks:
    """The device behind the mark port: notes when which mark came, ends the partition at the last."""

    def __init__(self, computer: Computer) -> None:
        self._partition = computer.partition
        self.times: dict[int, int] = {}

    def read(self, _offset: int, _size: int) -> int:
        """Nothing to read."""
        return 0xFF

    def write(self, _offset: int, _size: int, value: int) -> None:
        """A mark."""
        self.times[value] = perf_counter_ns()
        if value == END:
            self._partition.end("poweroff", "the probe is done")


class _Probe:
    """One machine with the probe loaded."""

    def __init__(self, image: str) -> None:
        kvm = Kvm()
        _problem, xsave = run_guest(kvm)
        self.hypervisor = Hypervisor(kvm)
        self.computer = Computer(self.hypervisor, _MEMORY_BYTES, 1, None)
        self.marks = _Marks(self.computer)
        self.computer.partition.ports.add(MARK_PORT, 1, self.marks)
        self.computer.load(image, [], "", xsave)

    def close(self) -> None:
        """Take the machine apart."""
        self.hypervisor.close()
        self.computer.close()


def measure(image: str, library: str, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Nanoseconds per exit by kind, ours and C's (medians over the rounds, taken in turn), and their ratio.

    `image` is `probe.elf_image(count)` in a file, `library` the compiled exit_loop.c. Raises `BenchError`.
    """
    ours: dict[str, list[float]] = {kind: [] for kind in KINDS}
    theirs: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for run, results in ((_run_ours, ours), (_run_c, theirs)):
            times = run(image, library)
            for number, kind in enumerate(KINDS):
                results[kind].append((times[2 * number + 1] - times[2 * number]) / count)
    table = {}
    for kind in KINDS:
        rootvisor_ns, c_ns = median(ours[kind]), median(theirs[kind])
        table[kind] = {
            "rootvisor_ns": round(rootvisor_ns),
            "c_ns": round(c_ns),
            "ratio": round(rootvisor_ns / c_ns, 3),
        }
    return table


def _run_ours(image: str, _library: str) -> dict[int, int]:
    import select
    import signal
    import sys

    signal.signal(signal.SIGUSR1, lambda *_: None)  # interrupts KVM_RUN, as in machine.main
    sys.setswitchinterval(1e-4)
    probe = _Probe(image)
    try:
        partition = probe.computer.partition
        partition.start()
        waiting = select.poll()
        waiting.register(partition.ended_fd, select.POLLIN)
        waiting.poll(_DEADLINE_S * 1000)
        partition.stop()
        if END not in probe.marks.times:
            raise BenchError(
                f"the probe did not end: {partition.ended or 'out of time'} {partition.detail}".strip()
            )
        return probe.marks.times
    finally:
        probe.close()


def _run_c(image: str, library: str) -> dict[int, int]:
    loop = ctypes.CDLL(library).exit_loop
    probe = _Probe(image)
    try:
        vcpu = probe.computer.partition.vps[0].vcpu
        run = (ctypes.c_char * len(vcpu.u8)).from_buffer(vcpu.u8)
        times = (ctypes.c_longlong * 256)()
        why = ctypes.c_int()
        failed = loop(
            vcpu.fd, ctypes.byref(run), MARK_PORT, HYPERCALL_PORT, END, ctypes.byref(times), ctypes.byref(why)
        )
        del run
        if failed:
            reason = os.strerror(-why.value) if why.value < 0 else f"exit reason {why.value}"
            raise BenchError(f"the C loop stopped: {reason}")
        return dict(enumerate(times))
    finally:
        probe.close()
