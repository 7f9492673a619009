# SPDX-License-Identifier: Apache-2.0
"""A hostile ordinary partition: random MSR accesses and hypercalls from ring 0 and ring 3 of two VPs at once. Every
answer is held against a model of its class: fault or not, and which statuses a code may give.

Seeded by ROOTVISOR_FUZZ_SEED; ROOTVISOR_GUEST_ACCESSES is how many (default 20,000). What ends a partition on purpose
(RESET) is left out, and what makes the test's own agent lose its memory.
"""

from __future__ import annotations

import gc
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Callable

import pytest

from rootvisor.hypervisor import calls
from rootvisor.hypervisor.guest_partition import GUEST_PRIVILEGES
from rootvisor.hypervisor.hypercall_abi import PAGE_CODE
from rootvisor.hypervisor.hypercall_table import GUEST_TABLE, REP, REP_VARIABLE, TABLE, VARIABLE
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import msrs, status
from tests.kvm import guest as g
from tests.kvm.ordinary import CALL_PAGE, Ordinary
from tests.kvm.test_fuzz import run_at_once

ACCESSES = int(os.environ.get("ROOTVISOR_GUEST_ACCESSES", "20000"))
SEED = int(os.environ.get("ROOTVISOR_FUZZ_SEED", "20261127"))
VPS, BATCH = 2, 1000
MEMORY_LIMIT = 8 << 20
#: Pages that the guest may lose to overlays, and operands that nothing overlays.
OVERLAYS, OPERANDS, OPERAND_PAGES = 0xB00000, 0xC00000, 64
ENTRY, USER_RDMSR, USER_WRMSR = g.SPARE, g.SPARE + 0x40, g.SPARE + 0x50
#: MSRs that move a page of the hypervisor's.
PAGES = (msrs.SIMP, msrs.SIEFP, msrs.SIRBP, msrs.VP_ASSIST_PAGE, msrs.REFERENCE_TSC)
TIMERS = range(msrs.STIMER0_CONFIG, msrs.STIMER0_CONFIG + 8)
READABLE = frozenset(
    (
        *range(msrs.GUEST_OS_ID, msrs.RESET + 1), msrs.VP_RUNTIME, *range(msrs.TIME_REF_COUNT, msrs.APIC_FREQUENCY + 1),
        msrs.ICR, msrs.TPR, msrs.VP_ASSIST_PAGE, *range(msrs.SCONTROL, msrs.SIRBP + 1),
        *range(msrs.SINT0, msrs.SINT15 + 1), *TIMERS, *range(msrs.CRASH_P0, msrs.CRASH_CTL + 1),
    )
)  # fmt: skip
READ_ONLY = frozenset(
    (
        msrs.VP_INDEX,
        msrs.VP_RUNTIME,
        msrs.TIME_REF_COUNT,
        msrs.TSC_FREQUENCY,
        msrs.APIC_FREQUENCY,
        msrs.SVERSION,
    )
)
#: They sleep, reset, take the call page away or stop the agent's interrupts from coming: not written, or not read.
LEFT_ALONE = frozenset((msrs.GUEST_IDLE, msrs.GUEST_OS_ID, msrs.HYPERCALL, msrs.TSC_INVARIANT_CONTROL))


def write_faults(index: int, value: int) -> bool | None:
    """Whether a write raises #GP; None where the state decides."""
    if index in READ_ONLY or (index not in READABLE and index != msrs.EOI):
        return True
    if index == msrs.EOI:
        return value >> 32 != 0
    if index == msrs.TPR:
        return value >> 8 != 0
    if index == msrs.RESET:
        return bool(value & ~1)
    if msrs.SINT0 <= index <= msrs.SINT15:
        return not value & msrs.SINT_MASKED and value & 0xFF < 16
    return None if index == msrs.ICR else False


class Fuzzer:
    """Makes records for one VP and judges their results."""

    def __init__(self, guest: Ordinary, vp: int, seed: int) -> None:
        self.guest = guest
        self.vp = vp
        self.random = random.Random(seed)
        calls.load_children()
        self.table = {**TABLE.calls, **GUEST_TABLE.calls}
        #: what a flush or an interrupt may do to the agent's own VPs is asked for elsewhere
        del self.table[hv.SWITCH_VIRTUAL_ADDRESS_SPACE]
        self.codes = sorted(self.table)
        self.seen: Counter[str] = Counter()

    def number(self) -> int:
        dice = self.random
        if dice.random() < 0.5:
            return dice.choice(
                (0, 1, 2, 3, 0x10, 0xFF, 0xFFF, 0x1000, 0xFFFFFFFF, 1 << 40, 1 << 63, hv.SELF, 0x8000_0010)
            )
        return dice.getrandbits(dice.choice((4, 16, 32, 64)))

    def operand(self) -> int:
        dice = self.random
        page = OPERANDS + dice.randrange(OPERAND_PAGES) * 4096
        if dice.random() < 0.2:
            page = dice.choice(
                (g.RAM, 0xC0000000, 0xFEE00000, 1 << 40, (1 << 64) - 4096, CALL_PAGE, OVERLAYS)
            )
        return page + (dice.randrange(0, 4096, 8) if dice.random() < 0.6 else dice.choice((0, 1, 4095)))

    def hypercall(self) -> bytes:
        dice = self.random
        code = dice.choice(self.codes) if dice.random() < 0.8 else dice.getrandbits(16)
        while code == hv.SWITCH_VIRTUAL_ADDRESS_SPACE:
            code = dice.getrandbits(16)
        call = self.table.get(code)
        variable = count = start = reserved = 0
        if call is not None and call.kind in (REP, REP_VARIABLE):
            count = dice.choice((1, 2, 11, dice.getrandbits(12)))
            start = dice.choice((0, 0, 0, 1, count))
        if call is not None and call.kind in (VARIABLE, REP_VARIABLE):
            variable = dice.choice((0, 1, 2, dice.getrandbits(10)))
        if dice.random() < 0.05:
            reserved = 1 << dice.randrange(27, 64)
        fast = dice.random() < 0.3
        word = (
            g.control(code, fast=fast, variable=variable, count=count & 0xFFF, start=start & 0xFFF) | reserved
        )
        kind = g.RING3 if dice.random() < 0.1 else g.HYPERCALL
        first, second = (self.number(), self.number()) if fast else (self.operand(), self.operand())
        return g.RECORD.pack(
            kind, 0, word, first & hv.SELF, second & hv.SELF, 0, 0, 0, 0, dice.randbytes(96), ENTRY, 0, 0
        )

    def msr(self) -> bytes:
        dice = self.random
        roll = dice.random()
        if roll < 0.6:
            index = dice.choice(tuple(sorted(READABLE)))
        elif roll < 0.9:
            index = msrs.FIRST + dice.randrange(0x200)
        else:
            index = msrs.FIRST + dice.randrange(0x2000)
        if index in LEFT_ALONE:
            index = msrs.VP_INDEX
        value = 0
        kind = g.RDMSR
        if dice.random() < 0.1:  # from ring 3
            target = dice.choice((USER_RDMSR, USER_WRMSR))
            return g.RECORD.pack(
                g.RING3, 0, index, 0, 0, self.number() & hv.SELF, 0, 0, 0, bytes(96), target, 0, 0
            )
        if dice.random() < 0.5:
            kind, value = g.WRMSR, self.number()
            if index in PAGES:
                value = dice.choice(
                    (OVERLAYS + 4096 * dice.randrange(16), 0x8000_0000, 1 << 45)
                ) | dice.randrange(2)
            elif index == msrs.RESET and value == 1:
                value = 2
            elif index == msrs.ICR:  # fixed, to a VP: an INIT would stop the test's own
                value &= 0x01000000_000000FF
            elif (
                msrs.SINT0 <= index <= msrs.SINT15
            ):  # vectors of exceptions and of the agent's own are not for this
                value = value & ~0xFF | dice.choice((3, 0x20, 0x60, 0xFE))
            elif index in TIMERS and not index & 1:
                value = value & ~0xFF0 | 0x60 << 4
        return g.RECORD.pack(kind, 0, index, 0, 0, value & hv.SELF, 0, 0, 0, bytes(96), 0, 0, 0)

    def round(self, count: int) -> None:
        dice = self.random
        if self.vp == 0:
            for page in range(OPERAND_PAGES):
                at = OPERANDS + page * 4096
                words = [self.number() & hv.SELF for _ in range(64)]
                self.guest.ram[at : at + 512] = struct.pack("<64Q", *words)
        records = [self.hypercall() if dice.random() < 0.6 else self.msr() for _ in range(count)]
        results = self.guest.run_packed(b"".join(records), self.vp)
        for index, record in enumerate(records):
            self.judge(record, results[index * g.RECORD.size : (index + 1) * g.RECORD.size])

    def judge(self, record: bytes, result: bytes) -> None:
        kind, _, word, first, second, value, *rest = g.RECORD.unpack(record)
        target = rest[4]
        _, fault, _, _, _, rax, *_ = g.RECORD.unpack(result)
        what = f"kind {kind} {word:#x} {first:#x} {second:#x} {value:#x} -> fault {fault:#x} RAX {rax:#x}"
        if kind == g.RDMSR:
            assert fault == (0 if word in READABLE else g.GP), what
        elif kind == g.WRMSR:
            expected = write_faults(word, value)
            assert fault in (0, g.GP), what
            assert expected is None or bool(fault) == expected, what
        elif kind == g.RING3:
            assert fault == g.GP or (fault == g.UD and target == ENTRY), what
        else:
            self.judge_call(word, fault, rax, what)
            return
        self.seen["#GP" if fault == g.GP else "#UD" if fault else "MSR"] += 1

    def judge_call(self, word: int, fault: int, rax: int, what: str) -> None:
        code = word & 0xFFFF
        if fault:
            assert fault == g.UD, what
            assert code in (hv.VTL_CALL, hv.VTL_RETURN), what
            self.seen["#UD"] += 1
            return
        answer, reps, count = rax & 0xFFFF, rax >> 32 & 0xFFF, word >> 32 & 0xFFF
        assert answer in status.NAMES, what
        assert not rax & 0xFFFF_F000_FFFF_0000, what
        assert reps <= count, what
        call = self.table.get(code)
        if call is None:
            assert answer == status.INVALID_HYPERCALL_CODE, what
        elif call.privilege & ~GUEST_PRIVILEGES:
            assert answer == status.ACCESS_DENIED, what
        elif word & hv.CONTROL_RESERVED:
            assert answer == status.INVALID_HYPERCALL_INPUT, what
        self.seen[status.status_name(answer)] += 1


@pytest.mark.timeout(7200)
@pytest.mark.row("HC-38", "OVL-05")
def test_hostile_guest_is_answered_by_the_model(
    usable_kvm: None, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    with Ordinary(vps=VPS) as guest:
        guest.enable_hypercalls()
        guest.start_vp(1)
        for at, code in ((ENTRY, PAGE_CODE), (USER_RDMSR, b"\x0f\x32\xc3"), (USER_WRMSR, b"\x0f\x30\xc3")):
            guest.ram[at : at + len(code)] = code
        fuzzers = [Fuzzer(guest, vp, SEED + vp) for vp in range(VPS)]
        run_at_once(fuzzers, BATCH)  # type: ignore[arg-type]
        done = BATCH * VPS
        gc.collect()
        memory, fds = resident(), len(os.listdir("/proc/self/fd"))
        started = time.monotonic()
        while done < ACCESSES:
            run_at_once(fuzzers, BATCH)  # type: ignore[arg-type]
            done += BATCH * VPS
        seconds = time.monotonic() - started
        gc.collect()
        grown = resident() - memory
        assert guest.partition.ended == ""
        assert guest.partition.defect is None
        assert len(os.listdir("/proc/self/fd")) <= fds + 1
        assert grown < MEMORY_LIMIT
        seen = sum((fuzzer.seen for fuzzer in fuzzers), Counter[str]())
        figures = f"{done} accesses in {seconds:.1f} s, memory {grown >> 10:+} KiB"
        record_property("guest-fuzz", figures)
        with capsys.disabled():
            print(f"\n{figures}; {dict(seen.most_common())}")
        for vp in range(VPS):
            assert guest.rdmsr(msrs.VP_INDEX, vp) == vp
        assert guest.call(hv.NOTIFY_LONG_SPIN_WAIT, bytes(8)).status == 0


def resident() -> int:
    """Bytes of this process that are not guest memory."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))
