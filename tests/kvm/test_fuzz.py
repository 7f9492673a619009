# SPDX-License-Identifier: Apache-2.0
"""A hostile root: random hypercalls and MSR accesses from ring 0 of two processors at once; all of them are answered.

Seeded by ROOTVISOR_FUZZ_SEED; ROOTVISOR_FUZZ_CALLS is how many (default 20,000). What ends a partition (sleep state 5,
RESET, CRASH_CTL) is left out here and has tests of its own in test_ending.py.
"""

from __future__ import annotations

import gc
import os
import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from rootvisor.hypervisor.calls import load_children
from rootvisor.hypervisor.hypercall_abi import PAGE_CODE
from rootvisor.hypervisor.hypercall_table import REP, TABLE, VARIABLE
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import msrs, status
from tests.kvm import guest as g
from tests.kvm.guest import Guest

CALLS = int(os.environ.get("ROOTVISOR_FUZZ_CALLS", "20000"))
SEED = int(os.environ.get("ROOTVISOR_FUZZ_SEED", "20261122"))
VPS = 2
BATCH = 2500
#: Growth of this process that is noise: arenas, counters, the remapping table filling up.
MEMORY_LIMIT = 8 << 20

#: The copy of the call page that the guest calls; inputs that no output can hit; RAM for everything else.
ENTRY, SLOTS, SCRATCH = 0x8F0000, g.INPUT, (g.SPARE, g.OWNED)
SLOT_SIZE, SLOT_COUNT = 512, 512
#: They move pages, so their values stay away from the agent's memory.
PAGE_MSRS = (msrs.HYPERCALL, msrs.REFERENCE_TSC, msrs.VP_ASSIST_PAGE, msrs.SIMP, msrs.SIEFP, msrs.SIRBP)
#: Taken for deposited, so that the guest cannot give away what its agent needs.
AGENT_PAGES = frozenset(range(SCRATCH[0] >> 12))
DEVICES = (1 << 62 | 0x10, 1 << 62 | 0x18, 2 << 62)
KNOWN_STATUS = frozenset(status.NAMES)
RESULT = struct.Struct("<II7Q")
NUMBERS = (
    0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 0x30, 47, 63, 64, 0xEF, 0xFF, 0x100, 0xFFF, 0x1000, 0xFFFF, 0x10001, 0x10002,
    0x90007, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, 1 << 40, 1 << 52, 1 << 63, hv.SELF, *DEVICES, 0xFEE00010, 0xFEE00030,
)  # fmt: skip


class Fuzzer:
    """Makes records for one VP and judges their results."""

    def __init__(self, guest: Guest, vp: int, seed: int) -> None:
        self.guest = guest
        self.vp = vp
        self.random = random.Random(seed)
        load_children()
        self.codes = sorted(TABLE.calls)
        self.slot_base = SLOTS + vp * SLOT_SIZE * (SLOT_COUNT // VPS)
        self.slots: dict[int, list[int]] = {}
        self.deposited = 0
        self.seen: Counter[str] = Counter()

    # --- values ---------------------------------------------------------------------------------------------------
    def number(self) -> int:
        kind = self.random.random()
        if kind < 0.6:
            return self.random.choice(NUMBERS)
        if kind < 0.8:
            return self.gpa() >> 12
        return self.random.getrandbits(self.random.choice((8, 16, 32, 64)))

    def gpa(self) -> int:
        """Mostly RAM that nobody misses; also owned pages, holes, the APIC, the end of the address space."""
        roll = self.random.random()
        if roll < 0.6:
            page = self.random.randrange(SCRATCH[0], SCRATCH[1], 4096)
        elif roll < 0.75:
            page = g.OWNED + self.random.randrange(self.guest.owned_pages + 2) * 4096
        else:
            page = self.random.choice(
                (g.RAM, g.RAM - 4096, 0xC0000000, 0xFEC00000, 0xFEE00000, 1 << 32, 1 << 40, (1 << 64) - 4096)
            )
        roll = self.random.random()
        if roll < 0.6:
            return page
        if roll < 0.9:
            return page + self.random.randrange(0, 4096, 8)
        return page + self.random.randrange(4096)

    # --- records --------------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Fills the input slots with blocks that fit some call."""
        self.slots = {code: [] for code in self.codes}
        ram = self.guest.ram
        for index in range(SLOT_COUNT // VPS):
            at = self.slot_base + index * SLOT_SIZE
            code = self.random.choice(self.codes)
            block = bytearray(
                b"".join(
                    (self.number() & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little") for _ in range(SLOT_SIZE // 8)
                )
            )
            if self.random.random() < 0.7:
                block[0:8] = self.random.choice((hv.SELF, 1)).to_bytes(8, "little")
            if code in (hv.MAP_DEVICE_INTERRUPT, hv.UNMAP_DEVICE_INTERRUPT, hv.RETARGET_DEVICE_INTERRUPT):
                block[8:16] = self.random.choice(DEVICES).to_bytes(8, "little")
                if code == hv.MAP_DEVICE_INTERRUPT and self.random.random() < 0.7:
                    block[40:72] = struct.pack("<6IQ", 0, 0, 1, 0, self.random.randrange(256), 2, 0)
                    block[72:88] = struct.pack("<QQ", 1, self.random.randrange(4))
                elif self.random.random() < 0.7:
                    address = 0xFEE00010 | self.random.randrange(64) << 5
                    block[16:32] = struct.pack("<4I", 1, 0, address, 0)
                    block[40:56] = struct.pack("<IIQ", self.random.randrange(256), 0, 1)
            elif code in (hv.MAP_STATS_PAGE, hv.UNMAP_STATS_PAGE) and self.random.random() < 0.8:
                kind = self.random.choice((1, 2, 0x10001, 0x10002))
                block[0:24] = struct.pack("<IIQIHBB", kind, 0, 1, self.random.randrange(3), 0, 0, 0)
            elif code == hv.DEPOSIT_MEMORY and self.random.random() < 0.7:
                for element in range(8, SLOT_SIZE, 8):
                    page = self.random.randrange(SCRATCH[0] >> 12, SCRATCH[1] >> 12)
                    block[element : element + 8] = page.to_bytes(8, "little")
            elif code == hv.ENTER_SLEEP_STATE and block[0:4] == b"\5\0\0\0":
                block[0] = 4
            ram[at : at + SLOT_SIZE] = block
            self.slots[code].append(at)

    def hypercall(self) -> bytes:
        roll = self.random.random()
        code = self.random.choice(self.codes) if roll < 0.9 else self.random.getrandbits(16)
        call = TABLE.calls.get(code)
        variable = count = start = reserved = 0
        if call is not None and call.kind == REP:
            count = self.random.choice((1, 2, 3, 10, 60, self.random.getrandbits(12)))
            if self.random.random() < 0.2:
                start = self.random.choice((0, 1, count // 2, count, self.random.getrandbits(12)))
        elif call is not None and call.kind == VARIABLE:
            variable = self.random.choice((0, 1, 1, 2, 2, 3, self.random.getrandbits(10)))
        if self.random.random() < 0.05:
            reserved = 1 << self.random.randrange(16, 64)
            reserved &= ~hv.CONTROL_FAST
        fast = self.random.random() < 0.2
        word = g.control(code, fast=fast, variable=variable, count=count, start=start) | reserved
        own = self.slots.get(code)
        if fast:
            first, second = self.number() & hv.SELF, self.number() & hv.SELF
            if code == hv.ENTER_SLEEP_STATE:
                first |= 2
        else:
            if own and self.random.random() < 0.8:
                first = self.random.choice(own)
            elif code == hv.ENTER_SLEEP_STATE:
                first = 1
            else:
                first = self.gpa()
            second = self.gpa()
        xmm = self.random.randbytes(96) if fast else bytes(96)
        return g.RECORD.pack(g.HYPERCALL, 0, word, first, second, 0, 0, 0, 0, xmm, ENTRY, 0, 0)

    def msr(self) -> bytes:
        roll = self.random.random()
        if roll < 0.7:
            index = self.random.choice(tuple(msrs.NAMES))
        elif roll < 0.9:
            index = msrs.FIRST + self.random.randrange(0x200)
        else:
            index = msrs.FIRST + self.random.randrange(0x10000)
        kind = g.RDMSR
        value = 0
        if self.random.random() < 0.5:
            kind = g.WRMSR
            value = self.gpa() | self.random.getrandbits(1) if self.random.random() < 0.4 else self.number()
            if index in PAGE_MSRS:
                value = self.gpa() ^ self.random.getrandbits(2)
            elif index == msrs.RESET:
                value &= ~1
            elif index == msrs.CRASH_CTL:
                value &= ~msrs.CRASH_NOTIFY
            elif index == msrs.ICR:  # fixed interrupts: an INIT would end the test's own processor
                value &= 0xFF000000_000000FF
        return g.RECORD.pack(kind, 0, index, 0, 0, value & hv.SELF, 0, 0, 0, bytes(96), 0, 0, 0)

    # --- a round --------------------------------------------------------------------------------------------------
    def round(self, count: int) -> None:
        self.prepare()
        records = [self.hypercall() if self.random.random() < 0.7 else self.msr() for _ in range(count)]
        results = self.guest.run_packed(b"".join(records), self.vp)
        for index, record in enumerate(records):
            self.judge(record, results, index * g.RECORD.size)

    def judge(self, record: bytes, results: bytes, at: int) -> None:
        kind, _, word, first, second, *_ = RESULT.unpack_from(record)
        _, fault, _, _, _, rax, *_ = RESULT.unpack_from(results, at)
        what = f"kind {kind} {word:#x} {first:#x} {second:#x} -> fault {fault:#x} RAX {rax:#x}"
        if kind != g.HYPERCALL:
            assert fault in (0, g.GP), what
            self.seen["MSR #GP" if fault else "MSR"] += 1
            return
        assert fault in (0, g.UD), what
        if fault:
            self.seen["#UD"] += 1
            return
        code = word & 0xFFFF
        result, reps, start, count = rax & 0xFFFF, rax >> 32 & 0xFFF, word >> 48 & 0xFFF, word >> 32 & 0xFFF
        assert result in KNOWN_STATUS and not rax & 0xFFFF_F000_FFFF_0000, what
        assert reps <= count, what
        if code not in TABLE.calls:
            assert result == status.INVALID_HYPERCALL_CODE, what
        elif word & hv.CONTROL_RESERVED:
            assert result == status.INVALID_HYPERCALL_INPUT, what
        elif result == 0 and TABLE.calls[code].kind == REP:
            assert reps == count, what
        if code == hv.DEPOSIT_MEMORY and result == 0:
            self.deposited += count - start
        elif code == hv.WITHDRAW_MEMORY and reps > start:
            self.deposited -= reps - start
        self.seen[status.status_name(result)] += 1


def anonymous_memory() -> int:
    """Bytes of this process that are not guest memory."""
    gc.collect()
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


def check_accounts(guest: Guest, expected: int) -> None:
    pool = guest.partition.deposits
    used = pool.used - AGENT_PAGES
    assert pool.used >= AGENT_PAGES
    assert len(set(pool.free)) == len(pool.free)
    assert not set(pool.free) & pool.used
    assert len(pool.free) + len(used) == expected
    assert set(guest.hypervisor.statistics.pages.values()) == used
    first, last = SCRATCH[0] >> 12, g.RAM >> 12
    assert all(first <= page < last for page in (*pool.free, *used))


def run_at_once(fuzzers: list[Fuzzer], count: int) -> None:
    """A round on every VP at the same time."""
    failures: list[BaseException] = []

    def body(fuzzer: Fuzzer) -> None:
        try:
            fuzzer.round(count)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=body, args=(fuzzer,)) for fuzzer in fuzzers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.timeout(900)
def test_hostile_root_is_answered_and_harmless(
    guest2: Guest, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    guest = guest2
    guest.partition.interrupts.devices.update(DEVICES)
    guest.ram[ENTRY : ENTRY + len(PAGE_CODE)] = PAGE_CODE
    guest.partition.deposits.used |= AGENT_PAGES
    guest.hypervisor.deposited.add(AGENT_PAGES, 1, 0)
    fuzzers = [Fuzzer(guest, vp, SEED + vp) for vp in range(VPS)]
    run_at_once(fuzzers, BATCH // VPS)
    calls = BATCH // VPS * VPS
    memory, fds = anonymous_memory(), len(os.listdir("/proc/self/fd"))
    started = time.monotonic()
    while calls < CALLS:
        run_at_once(fuzzers, BATCH // VPS)
        calls += BATCH // VPS * VPS
        check_accounts(guest, sum(fuzzer.deposited for fuzzer in fuzzers))
    seconds = time.monotonic() - started
    grown = anonymous_memory() - memory
    assert guest.partition.ended == "" and guest.partition.defect is None
    assert len(os.listdir("/proc/self/fd")) == fds
    assert grown < MEMORY_LIMIT, f"{grown} bytes more after {calls} calls"
    seen = sum((fuzzer.seen for fuzzer in fuzzers), Counter())
    figures = f"{calls} calls in {seconds:.1f} s, memory {grown >> 10:+} KiB, deposits {guest.partition.deposits.total}"
    record_property("fuzz", figures)
    with capsys.disabled():
        print(f"\n{figures}; {dict(seen.most_common())}")
    # and the partition still works
    guest.ram[SCRATCH[0] : SCRATCH[0] + 8] = bytes(8)
    for vp in range(VPS):
        op = guest.one(g.HYPERCALL, vp, rcx=hv.GET_PARTITION_ID, r8=SCRATCH[0], target=ENTRY)
        assert (op.fault, op.rax) == (0, 0)
        assert guest.rdmsr(msrs.VP_INDEX, vp) == vp
    assert bytes(guest.ram[SCRATCH[0] : SCRATCH[0] + 8]) == struct.pack("<Q", guest.partition.id)
    assert seen["SUCCESS"] + seen["HV_STATUS_SUCCESS"] > calls // 50, "too few calls did anything"
