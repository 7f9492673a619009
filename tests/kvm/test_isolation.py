# SPDX-License-Identifier: Apache-2.0
"""A hostile child of the bare-metal root: it tries every GPA, every hypercall, every port, MSR and interrupt it can
reach, and gets nothing that it was not given. Canaries lie in the root, in a sibling and in the hypervisor's own pages.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from rootvisor.hypervisor import calls
from rootvisor.hypervisor.hypercall_abi import PAGE_CODE
from rootvisor.hypervisor.hypercall_table import TABLE
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import intercepts, msrs, registers, status
from rootvisor.tlfs import partition_properties as properties
from tests.kvm import guest as g
from tests.kvm.child import SIZE, STACKS, Child, Driver
from tests.kvm.guest import Guest

CODE = 0x90000
CALL_PAGE = 0xA0000
OUTPUT = 0xB0000
#: mov al,[rbx]; mov [rbx],al; jmp $   and the same with a fetch
READ_WRITE = bytes.fromhex("8a03 8803 e6d0")
FETCH = bytes.fromhex("ffd3 e6d0")
#: call rdi; out 0xD0
CALL = bytes.fromhex("ffd7 e6d0")
EVERYTHING = (1 << 64) - 1


class Hostage:
    """The root's memory, the sibling's and the hypervisor's, filled with what must not change, nor be read."""

    def __init__(self, guest: Guest, ours: Child, sibling: Child) -> None:
        self.guest = guest
        self.sibling = sibling
        ram = guest.ram
        self.root = range(0xE00000, 0xE80000, 4096)
        for at in self.root:
            ram[at : at + 4096] = b"ROOT".ljust(8, b"!") * 512
        self.sibling.memory[0x80000:0x81000] = b"SIBLING!" * 512
        owned = guest.partition.owned_pages
        self.owned = bytes(ram[g.OWNED : g.OWNED + guest.owned_pages * 4096])
        assert owned is not None
        self.ours = ours

    def check(self) -> None:
        ram = self.guest.ram
        for at in self.root:
            assert bytes(ram[at : at + 4096]) == b"ROOT!!!!" * 512, f"the root's page {at:#x}"
        assert bytes(self.sibling.memory[0x80000:0x81000]) == b"SIBLING!" * 512
        now = bytes(ram[g.OWNED : g.OWNED + self.guest.owned_pages * 4096])
        # the root's own SynIC pages and clock live there, its hypercall page above all must be what it was
        at = (self.guest.partition.hypercall_page.gpn << 12) - g.OWNED
        assert now[at : at + len(PAGE_CODE)] == self.owned[at : at + len(PAGE_CODE)] == PAGE_CODE
        memory = bytes(self.ours.memory)
        for canary in (b"ROOT!!!!", b"SIBLING!"):
            assert canary not in memory, "the child has got hold of a canary"


@pytest.fixture
def cell(guest: Guest) -> Iterator[tuple[Driver, Child, Child, Hostage]]:
    driver = Driver(guest)
    with Child(driver, features=EVERYTHING & ~(1 << 63)) as ours, Child(driver, number=1) as sibling:
        hostage = Hostage(guest, ours, sibling)
        yield driver, ours, sibling, hostage
        hostage.check()
        assert guest.partition.ended == ""


def rdmsr(child: Child, index: int) -> int | None:
    """As Child.rdmsr; a fault leaves its frame on the stack."""
    child.set({registers.RSP: STACKS + 0x1000})
    return child.rdmsr(index)


def wrmsr(child: Child, index: int, value: int) -> bool:
    child.set({registers.RSP: STACKS + 0x1000})
    return child.wrmsr(index, value)


def memory_message(child: Child) -> tuple[int, int, int]:
    """Type, access and GPA of a memory intercept."""
    kind, payload = child.intercept()
    assert kind in (intercepts.UNMAPPED_GPA, intercepts.GPA_INTERCEPT), hex(kind)
    return kind, payload[5], struct.unpack_from("<Q", payload, 56)[0]


def test_every_gpa_that_was_not_given_is_an_intercept(cell: tuple[Driver, Child, Child, Hostage]) -> None:
    """Addresses all over the 40 bits, and every page of the root's RAM by its own number; read, write and fetch."""
    _driver, child, _sibling, hostage = cell
    child.memory[CODE : CODE + len(READ_WRITE)] = READ_WRITE
    child.memory[CODE + 0x100 : CODE + 0x100 + len(FETCH)] = FETCH
    width = child.partition.memory.width
    own = range(SIZE)
    places = [page << 12 for page in range(SIZE >> 12, g.RAM >> 12, 37)]
    places += [1 << bit for bit in range(20, width)] + [
        (1 << width) - 4096,
        0xFEE01000,
        0xFEDFF000,
        g.OWNED,
        0xE00000,
    ]
    # page tables for what lies above 4 GiB: one page of 1 GiB that is moved about
    for gpa in places:
        if gpa in own:
            continue
        gva = gpa
        if gpa >= 1 << 32:
            table = 0x10000 + 0x1000 + 8 * 4  # the fifth GiB
            child.memory[table : table + 8] = struct.pack("<Q", gpa & -(1 << 30) | 0x87)
            gva = (4 << 30) + (gpa & (1 << 30) - 1)
        for rip, wanted in ((CODE, 0), (CODE + 2, 1), (CODE + 0x100, 2)):
            child.start(rip, rbx=gva, cr3=0x10000)
            kind, access, where = memory_message(child)
            assert (kind, where) == (intercepts.UNMAPPED_GPA, gpa), hex(gpa)
            assert access == wanted or (wanted == 2 and access == 1), hex(gpa)  # a call pushes first
    hostage.check()


def enable_calls(child: Child) -> None:
    assert child.wrmsr(msrs.GUEST_OS_ID, 0x8100_0000_0000_0001)
    assert child.wrmsr(msrs.HYPERCALL, CALL_PAGE | 1)
    child.memory[CODE : CODE + len(CALL)] = CALL


def call(child: Child, control: int, rdx: int, r8: int) -> int | None:
    """What the hypercall gives the child; None when it raises an exception."""
    faults = child.count(6) + child.count(13)
    child.set({registers.RSP: STACKS + 0x1000})
    child.start(CODE, rdi=CALL_PAGE, rcx=control, rdx=rdx, r8=r8, rax=0xEEEE)
    child.driver.wait_for(
        lambda: any(child.driver.slot()[:4]) or child.count(6) + child.count(13) > faults,
        f"for call {control:#x}",
    )
    if child.count(6) + child.count(13) > faults:
        child.suspend()
        return None
    kind, _payload = child.intercept()
    assert kind == intercepts.X64_IO_PORT_INTERCEPT, hex(kind)
    return child.get(registers.RAX)


#: What a child may do with all the features that its VMM can give it.
ALLOWED = frozenset((
    hv.NOTIFY_LONG_SPIN_WAIT, hv.SEND_IPI, hv.SEND_IPI_EX, hv.GET_VP_INDEX_FROM_APIC_ID, hv.GET_VP_REGISTERS,
    hv.SET_VP_REGISTERS, hv.POST_MESSAGE, hv.SIGNAL_EVENT, hv.GET_PARTITION_ID,
))  # fmt: skip


def test_every_hypercall_is_refused_that_is_not_a_childs(cell: tuple[Driver, Child, Child, Hostage]) -> None:
    """Every code that exists and 300 that do not, with plausible input that names the root, the sibling and itself."""
    _driver, child, sibling, hostage = cell
    enable_calls(child)
    calls.load()
    TABLE.find(0xFFFF)
    given = dict(child.guest.hypervisor.deposited.given)
    partitions = set(child.guest.hypervisor.partitions)
    seen: Counter[str] = Counter()
    for code in [*TABLE.calls, *range(0x100), 0x101, 0x131, 0x8001, 0xFFFF]:
        known = TABLE.calls.get(code)
        for partition_id in (1, sibling.id, child.id, hv.SELF) if known is not None else (sibling.id,):
            data = struct.pack("<QQQQ", partition_id, 0, 0, 0x100).ljust(256, b"\0")
            child.memory[OUTPUT : OUTPUT + 256] = data
            count = 1 if known is not None and known.kind == 2 else 0
            result = call(child, code | count << 32, OUTPUT, OUTPUT + 0x800)
            assert result is not None
            outcome = result & 0xFFFF
            seen[status.status_name(outcome)] += 1
            if known is None:
                assert outcome == status.INVALID_HYPERCALL_CODE, hex(code)
            elif outcome == 0:
                assert code in ALLOWED, f"{hv.call_name(code)} succeeds for partition {partition_id:#x}"
            result = call(child, code | count << 32 | hv.CONTROL_FAST, partition_id, 0)
            assert result is None or result & 0xFFFF or code in ALLOWED, hv.call_name(code)
    assert seen["HV_STATUS_ACCESS_DENIED"] > 50, dict(seen)
    hypervisor = child.guest.hypervisor
    assert set(hypervisor.partitions) == partitions
    assert hypervisor.deposited.given == given
    assert hypervisor.sleep_state is None
    hostage.check()


def test_operands_of_calls_cannot_lie_in_memory_of_others(cell: tuple[Driver, Child, Child, Hostage]) -> None:
    _driver, child, _sibling, hostage = cell
    enable_calls(child)
    for gpa in (SIZE, 0xE00000, g.OWNED, 0xFEE00000, 1 << 39, 1 << 45, EVERYTHING & ~7):
        for control in (hv.GET_VP_REGISTERS | 1 << 32, hv.POST_MESSAGE, hv.GET_PARTITION_ID):
            result = call(child, control, gpa, gpa)
            assert result is not None and result & 0xFFFF, f"{control:#x} with operands at {gpa:#x} succeeds"
    hostage.check()


def test_every_msr_and_the_overlay_pages_stay_in_the_child(
    cell: tuple[Driver, Child, Child, Hostage],
) -> None:
    """Synthetic MSRs take every page number; the pages land in the child's own address space, and nowhere else."""
    _driver, child, _sibling, hostage = cell
    assert child.wrmsr(msrs.GUEST_OS_ID, 1)
    for index in (msrs.HYPERCALL, msrs.REFERENCE_TSC, msrs.SIMP, msrs.SIEFP, msrs.SIRBP, msrs.VP_ASSIST_PAGE):
        for gpa in (0xE00000, g.OWNED, CALL_PAGE, 1 << 39, (1 << 40) - 4096, EVERYTHING & ~0xFFF):
            wrmsr(child, index, gpa | 1)
        wrmsr(child, index, 0)
    for index in range(msrs.FIRST, msrs.FIRST + 0x120):
        rdmsr(child, index)
    for index in (0x1B, 0xC0000080, 0x277, 0x12345678):
        rdmsr(child, index)
    hostage.check()


def processor_seconds(thread_id: int) -> float:
    """The processor time of a thread of this process (clock ids of threads: linux/posix-timers.h, CPUCLOCK_SCHED)."""
    return time.clock_gettime(~thread_id << 3 | 6)


def test_flood_of_intercepts_takes_no_more_than_its_share_from_a_sibling(
    cell: tuple[Driver, Child, Child, Hostage], capsys: pytest.CaptureFixture[str]
) -> None:
    """The sibling counts beside a child that does nothing but unanswerable hypercalls, MSR accesses and interrupts to
    itself, none of which leave to the root. Both are busy: half of what this process gets of the processors is the
    sibling's, be there one of them or two. Processor time is what is shared out, and is no matter of the host's other
    work; how fast the sibling counts in it (the flood empties caches) is told only."""
    _driver, child, sibling, hostage = cell
    enable_calls(child)
    flood = bytes.fromhex("b9ff1f0000 ffd7 b902000040 0f32 b930080000 b840c00400 31d2 0f30 ebe2")
    child.memory[CODE + 0x200 : CODE + 0x200 + len(flood)] = flood
    counter = bytes.fromhex("48ff04250000 0800 ebf6".replace(" ", ""))
    sibling.memory[CODE : CODE + len(counter)] = counter

    def count() -> int:
        return int(struct.unpack_from("<Q", sibling.memory, 0x80000)[0])

    sibling.memory[0x80000:0x80008] = bytes(8)
    sibling.start(CODE)
    deadline = time.monotonic() + 60
    while count() < 1000:
        assert time.monotonic() < deadline, "the sibling does not count"
        time.sleep(0.01)
    thread = sibling.vp().thread_id
    child.ready()  # with its local APIC on
    child.suspend()
    child.start(CODE + 0x200, rdi=CALL_PAGE)
    own, everything, counted = processor_seconds(thread), time.process_time(), count()
    deadline = time.monotonic() + 120
    while time.process_time() - everything < 3 or sum(child.vp().exits) < 1000:
        assert time.monotonic() < deadline, "the flood is none"
        time.sleep(0.1)
    own, everything, counted = (
        processor_seconds(thread) - own,
        time.process_time() - everything,
        count() - counted,
    )
    child.suspend()
    sibling.suspend()
    exits = sum(child.vp().exits)
    sibling.memory[0x80000:0x81000] = b"SIBLING!" * 512
    with capsys.disabled():
        print(
            f" a flood of {exits} exits leaves a sibling {own / everything:.0%}, {counted / own:,.0f} steps/s",
            end="",
        )
    assert counted > 1000, "the sibling stands still"
    assert own > 0.35 * everything, f"the sibling keeps {own / everything:.0%} of the processor time"
    hostage.check()


def test_flood_of_ports_messages_and_doorbells_ends_with_the_child(
    cell: tuple[Driver, Child, Child, Hostage],
) -> None:
    """Every intercept needs the root's answer; what a child can have under way at once is one message per VP."""
    driver, child, _sibling, hostage = cell
    enable_calls(child)
    out = bytes.fromhex("e6d0 ebfc")
    child.memory[CODE + 0x300 : CODE + 0x300 + 4] = out
    child.start(CODE + 0x300)
    for _ in range(200):
        kind, _ = child.intercept()
        assert kind == intercepts.X64_IO_PORT_INTERCEPT
        child.resume()
    child.suspend()
    if any(driver.slot()[:4]):
        driver.message()
    messages_of_root = child.guest.hypervisor.messages
    assert all(len(outlet.queue) <= 1 for outlet in messages_of_root.outlets)
    for connection in range(1, 50):
        for control in (hv.POST_MESSAGE, hv.SIGNAL_EVENT | hv.CONTROL_FAST):
            child.memory[OUTPUT : OUTPUT + 256] = struct.pack("<IIII", connection, 0, 1, 16).ljust(
                256, b"\x55"
            )
            rdx = connection if control & hv.CONTROL_FAST else OUTPUT
            result = call(child, control, rdx, 0)
            assert result is not None and result & 0xFFFF, f"connection {connection} exists"
    hostage.check()


def test_features_that_were_not_given_are_not_there(guest: Guest) -> None:
    """Without features neither MSRs nor calls exist for a child."""
    driver = Driver(guest)
    with Child(driver, features=properties.SYNTHETIC_HYPERVISOR_PRESENT) as child:
        for index in range(msrs.FIRST, msrs.FIRST + 0x120):
            assert rdmsr(child, index) is None, f"MSR {index:#x} can be read"
        for index in (msrs.HYPERCALL, msrs.SIMP, msrs.SCONTROL, msrs.RESET, msrs.CRASH_CTL):
            assert not wrmsr(child, index, 1), f"MSR {index:#x} can be written"
