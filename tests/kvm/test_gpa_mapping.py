# SPDX-License-Identifier: Apache-2.0
"""A child's memory as its processor finds it, and the hypercalls that make it."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rootvisor.bus.address_space import GuestMemory, MemoryRegion
from rootvisor.hypervisor.child_memory import NO_ACCESS, READ_ONLY, UNMAPPED, WRITABLE, ChildMemory
from rootvisor.hypervisor.errors import HvError
from rootvisor.kvm import abi
from rootvisor.kvm.memory import SharedMemory
from rootvisor.kvm.system import Kvm
from rootvisor.tlfs import gpa as tlfs
from rootvisor.tlfs import hypercalls, status
from tests.kvm.guest import OWNED, SPARE, Guest
from tests.kvm.parent import Child, Parent

PAGE = 4096
MIB = 1 << 20
RAM = 16 * MIB
READ, WRITE = tlfs.MAP_READABLE, tlfs.MAP_READABLE | tlfs.MAP_WRITABLE
LARGE = tlfs.MAP_LARGE_PAGE

# The child's first 2 MiB, which are the root's: page tables, code, data behind them.
TABLES, CODE = 0x1000, 0x8000
WINDOW = 0x4000_0000
"""Linear addresses of the 2 MiB that a test looks at."""
FREE = 2 * MIB
"""From here on the root's memory is free for tests."""

LOAD = bytes.fromhex("488b03 f4")  # mov rax,[rbx]; hlt
STORE = bytes.fromhex("488903 f4")
ADD = bytes.fromhex("480103 f4")
JUMP = bytes.fromhex("ffe3")
PUSH = bytes.fromhex("4889dc 50 f4")  # mov rsp,rbx; push rax; hlt
COUNT = bytes.fromhex("48ffc0 488903 ebf8")  # for ever: inc rax; mov [rbx],rax


class Bare:
    """A child's memory with one processor in 64-bit mode, and nothing else."""

    def __init__(self, irqchip: bool = False) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        self.kvm = Kvm()
        self.vm = self.kvm.create_vm()
        if irqchip:
            self.vm.create_split_irqchip(24)
        hypervisor: Any = SimpleNamespace(kvm=self.kvm, owns=lambda page, count: False)
        self.memory = ChildMemory(self.vm, hypervisor)
        self.ram = SharedMemory("ram", RAM)
        self.memory.bind(GuestMemory((MemoryRegion(0, RAM, self.ram.view, self.ram.fd, 0),)))
        self.memory.map(0, 512, WRITE, tuple(range(512)))
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid(self.kvm.supported_cpuid())
        put = struct.Struct("<Q").pack_into
        put(self.ram.view, TABLES, TABLES + 0x1000 | 7)
        put(self.ram.view, TABLES + 0x1000, TABLES + 0x2000 | 7)
        put(self.ram.view, TABLES + 0x1008, TABLES + 0x3000 | 7)
        put(self.ram.view, TABLES + 0x2000, 0x87)
        code = (0, 0xFFFFF, 8, 11, 1, 0, 0, 1, 1, 1)
        data = (0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1)
        self.segments = {"cs": code, "ds": data, "es": data, "ss": data}

    def prepare(self, code: bytes, gpa: int, rax: int = 0) -> None:
        """The next KVM_RUN executes ``code`` with RBX at ``gpa``."""
        self.ram.view[CODE : CODE + len(code)] = code
        struct.pack_into("<Q", self.ram.view, TABLES + 0x3000, gpa & -2 * MIB | 0x87)
        self.vcpu.set_sregs(self.segments, cr0=0x80000031, cr3=TABLES, cr4=0x20, efer=0x500)
        self.vcpu.set_regs(rip=CODE, rbx=WINDOW | gpa & 2 * MIB - 1, rax=rax, rflags=2, rsp=0x7000)

    def run(self, code: bytes, gpa: int, rax: int = 0) -> int | None:
        """RAX after it has come to its HLT; None if memory was missing, which has changed nothing."""
        self.prepare(code, gpa, rax)
        before = self.vcpu.get_regs()
        for _ in range(2):  # the same once more, to see that it stays so
            try:
                ioctl(self.vcpu.fd, abi.KVM_RUN)
            except OSError as error:
                assert error.errno == 14
                after = self.vcpu.get_regs()
                if code is PUSH and after[16] == CODE + 3:
                    continue
                if code is JUMP and after[16] == before[1]:
                    continue
                assert after == before
                continue
            assert self.vcpu.u32[2] == abi.EXIT_HLT, self.vcpu.u32[2]
            return self.vcpu.get_regs()[0]
        return None

    def load(self, gpa: int) -> int | None:
        return self.run(LOAD, gpa)

    def store(self, gpa: int, value: int) -> bool:
        return self.run(STORE, gpa, value) is not None

    def root(self, page: int) -> memoryview:
        return self.ram.view[page * PAGE : (page + 1) * PAGE].cast("Q")

    def close(self) -> None:
        self.vm.close()
        self.memory.close()
        self.ram.close()
        self.kvm.close()

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def bare() -> Iterator[Bare]:
    with Bare() as made:
        yield made


def thp() -> bool:
    """Whether memory files come in pages of 2 MiB when that is asked for."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    except OSError:
        return False
    return any(f"[{word}]" in text for word in ("always", "within_size", "advise", "force"))


# --- rights ---------------------------------------------------------------------------------------------------------
FIRST = FREE // PAGE
AT = 0x1_0000_0000


@pytest.mark.parametrize("code", [LOAD, STORE, ADD, JUMP, PUSH])
@pytest.mark.parametrize("state", [UNMAPPED, NO_ACCESS, READ_ONLY, WRITABLE])
def test_an_access_succeeds_exactly_if_the_page_allows_it(bare: Bare, code: bytes, state: int) -> None:
    bare.root(FIRST)[0] = 0xF4
    gfn = AT // PAGE
    if state == NO_ACCESS:
        bare.memory.map(gfn, 1, tlfs.MAP_NO_ACCESS, None)
    elif state != UNMAPPED:
        bare.memory.map(gfn, 1, WRITE if state == WRITABLE else READ, (FIRST,))
    assert bare.memory.state(AT) == state
    needed = READ_ONLY if code in (LOAD, JUMP) else WRITABLE
    done = bare.run(code, AT + 8 if code is PUSH else AT, 0x10F4)
    assert (done is not None) == (state >= needed)
    if code in (STORE, ADD, PUSH):
        assert (bare.root(FIRST)[0] != 0xF4) == (state == WRITABLE)
    # The same instruction goes on when the page comes.
    bare.memory.map(gfn, 1, WRITE, (FIRST,))
    assert bare.run(code, AT + 8 if code is PUSH else AT, 0x10F4) is not None


def test_read_only_page_can_be_read_and_then_written_when_it_is_writable(bare: Bare) -> None:
    bare.root(FIRST)[0] = 77
    bare.memory.map(AT // PAGE, 1, READ, (FIRST,))
    assert bare.load(AT) == 77
    assert not bare.store(AT, 78)
    bare.memory.map(AT // PAGE, 1, WRITE, (FIRST,))
    assert bare.store(AT, 79)
    assert bare.root(FIRST)[0] == 79
    bare.memory.map(AT // PAGE, 1, READ, (FIRST,))
    assert not bare.store(AT, 80)
    assert bare.root(FIRST)[0] == 79


def test_neighbours_of_a_mapped_page_are_out_of_reach(bare: Bare) -> None:
    bare.memory.map(AT // PAGE + 1, 1, WRITE, (FIRST,))
    assert bare.load(AT + PAGE) is not None
    assert bare.load(AT + PAGE - 8) is None
    assert bare.load(AT + 2 * PAGE) is None
    assert bare.load(AT + 2 * PAGE - 4) is None  # the first half is there


def test_scattered_pages_lie_where_they_were_mapped(bare: Bare) -> None:
    pages = tuple(FIRST + n for n in (9, 3, 4, 5, 0, 17, 16, 15))
    for page in pages:
        bare.root(page)[0] = page
    bare.memory.map(AT // PAGE, len(pages), READ, pages)
    assert [bare.load(AT + index * PAGE) for index in range(len(pages))] == list(pages)


# --- changes --------------------------------------------------------------------------------------------------------
def test_another_page_at_the_same_place_is_seen_at_once(bare: Bare) -> None:
    for value in range(8):
        bare.root(FIRST + value)[0] = 100 + value
        bare.memory.map(AT // PAGE, 1, WRITE, (FIRST + value,))
        assert bare.load(AT) == 100 + value
        if value % 2:
            bare.memory.map(AT // PAGE, 1, tlfs.MAP_NO_ACCESS, None)
            assert bare.load(AT) is None


def test_part_of_a_large_page_is_replaced_and_the_whole_put_back(bare: Bare) -> None:
    large = (FREE + 2 * MIB) // PAGE
    gfn = AT // PAGE
    for page in range(large, large + 512):
        bare.root(page)[0] = page
    bare.memory.map(gfn, 1, WRITE | LARGE, (large,))
    assert bare.load(AT + 300 * PAGE) == large + 300
    bare.root(FIRST)[0] = 5
    bare.memory.map(gfn + 300, 1, READ, (FIRST,))
    assert [bare.load(AT + n * PAGE) for n in (299, 300, 301)] == [large + 299, 5, large + 301]
    bare.memory.map(gfn + 301, 1, tlfs.MAP_NO_ACCESS, None)
    assert [bare.load(AT + n * PAGE) for n in (299, 300, 301, 302)] == [large + 299, 5, None, large + 302]
    for first in range(0, 512, 256):
        bare.memory.map(gfn + first, 256, WRITE, tuple(range(large + first, large + first + 256)))
    assert [bare.load(AT + n * PAGE) for n in (299, 300, 301)] == [large + 299, large + 300, large + 301]
    bare.memory.map(gfn, 1, tlfs.MAP_NO_ACCESS | LARGE, None)
    assert bare.load(AT + 511 * PAGE) is None


def test_large_page_of_the_root_is_one_in_the_page_tables(bare: Bare) -> None:
    if not thp():
        pytest.skip("memory files have small pages here")
    large = (FREE + 2 * MIB) // PAGE
    bare.root(large)[0] = 1
    bare.memory.map(AT // PAGE, 1, WRITE | LARGE, (large,))
    bare.memory.map(AT // PAGE + 1024, 512, WRITE, tuple(range(large, large + 512)))  # as 4 KiB elements
    for gfn in (AT // PAGE, AT // PAGE + 1024):
        assert bare.load((gfn + 7) * PAGE) is not None
        assert bare.memory.access_states(gfn, 512, 0) == bytes((tlfs.STATE_ACCESSED,)) * 512


@pytest.mark.parametrize("change", ["no access", "other page", "unmap"])
def test_revocation_is_in_force_when_it_returns(bare: Bare, change: str) -> None:
    """A processor writes all the time; not one write comes after the call."""
    gfn = AT // PAGE
    for _ in range(5):
        bare.memory.map(gfn, 1, WRITE, (FIRST,))
        bare.prepare(COUNT, AT)
        outcome: list[int] = []

        def body(outcome: list[int] = outcome) -> None:
            bare.vcpu.thread = threading.get_ident()
            try:
                ioctl(bare.vcpu.fd, abi.KVM_RUN)
                outcome.append(0)
            except OSError as error:
                outcome.append(error.errno or 0)
            bare.vcpu.u8[abi.RUN_IMMEDIATE_EXIT] = 0

        cell = bare.root(FIRST)
        cell[0] = 0
        thread = threading.Thread(target=body)
        thread.start()
        while cell[0] < 1000:
            time.sleep(0.0005)
        if change == "no access":
            bare.memory.map(gfn, 1, tlfs.MAP_NO_ACCESS, None)
        elif change == "unmap":
            bare.memory.unmap(gfn, 1)
        else:
            bare.memory.map(gfn, 1, WRITE, (FIRST + 1,))
        value = cell[0]
        time.sleep(0.005)
        assert cell[0] == value
        if change == "other page":
            bare.vcpu.kick()
        thread.join(20)
        assert outcome == [4 if change == "other page" else 14]
        assert bare.vcpu.get_regs()[0] >= value


# --- edges of the address space -------------------------------------------------------------------------------------
def test_last_page_of_the_address_space(bare: Bare) -> None:
    end = 1 << bare.memory.width
    bare.root(FIRST)[511] = 9
    bare.memory.map(end // PAGE - 1, 1, WRITE, (FIRST,))
    assert bare.load(end - 8) == 9
    assert bare.load(end - PAGE - 8) is None


def test_page_of_the_local_apic_is_no_memory() -> None:
    with Bare(irqchip=True) as bare:
        apic = 0xFEE00000
        for gfn in (apic // PAGE - 1, apic // PAGE, apic // PAGE + 1):
            bare.memory.map(gfn, 1, WRITE, (FIRST + gfn % 4,))
            bare.root(FIRST + gfn % 4)[:] = memoryview(bytes(PAGE)).cast("Q")
            bare.root(FIRST + gfn % 4)[6] = 0xABCD
        # mov eax,[rbx]; the version register is KVM's; a halted processor has to be kicked
        outcome = []
        for gpa in (apic + 0x30, apic - PAGE + 0x30, apic + PAGE + 0x30):
            bare.prepare(bytes.fromhex("8b03 e680"), gpa)
            ioctl(bare.vcpu.fd, abi.KVM_RUN)
            assert bare.vcpu.u32[2] == abi.EXIT_IO
            outcome.append(bare.vcpu.get_regs()[0] & 0xFFFF)
        assert outcome[0] & 0xFF in range(0x10, 0x20)
        assert outcome[1:] == [0xABCD, 0xABCD]


# --- overlays -------------------------------------------------------------------------------------------------------
def test_overlay_hides_what_the_root_maps(bare: Bare) -> None:
    fd = os.memfd_create("overlay")
    os.ftruncate(fd, 4 * PAGE)
    os.pwrite(fd, b"\x07", 2 * PAGE)
    gfn = AT // PAGE
    bare.root(FIRST)[0] = 1
    bare.memory.map(gfn, 1, WRITE, (FIRST,))
    bare.memory.put_overlay(gfn, fd, 2 * PAGE, writable=False)
    assert bare.load(AT) == 7
    bare.memory.map(gfn, 1, tlfs.MAP_NO_ACCESS, None)
    assert bare.load(AT) == 7
    assert not bare.store(AT, 8)
    bare.memory.put_overlay(gfn, fd, 2 * PAGE)
    assert bare.store(AT, 8)
    assert os.pread(fd, 1, 2 * PAGE) == b"\x08"
    bare.memory.map(gfn, 1, WRITE, (FIRST,))
    bare.memory.remove_overlay(gfn)
    assert bare.load(AT) == 1
    os.close(fd)


# --- before a processor runs ----------------------------------------------------------------------------------------
def test_prefault_is_only_advice(bare: Bare) -> None:
    vp: Any = SimpleNamespace(vcpu=bare.vcpu)
    gfn = AT // PAGE
    bare.memory.map(gfn, 64, WRITE, tuple(range(FIRST, FIRST + 64)))
    bare.memory.map(gfn + 32, 1, tlfs.MAP_NO_ACCESS, None)
    bare.memory.map(0xFEDFF, 3, WRITE, (FIRST, FIRST + 1, FIRST + 2))
    bare.memory.prefault(vp)
    assert bare.load(AT) is not None
    assert bare.load(AT + 32 * PAGE) is None
    assert bare.load(AT + 63 * PAGE) is not None


def test_prefaulted_pages_are_there(bare: Bare) -> None:
    vp: Any = SimpleNamespace(vcpu=bare.vcpu)
    if bare.kvm.capability(abi.CAP_PRE_FAULT_MEMORY) == 0:
        pytest.skip("this KVM has no KVM_PRE_FAULT_MEMORY")
    gfn = AT // PAGE
    bare.memory.map(gfn, 64, WRITE, tuple(range(FIRST, FIRST + 64)))
    assert not any(bare.memory.access_states(gfn, 64, 0))
    bare.memory.prefault(vp)
    assert all(bare.memory.access_states(gfn, 64, 0))


# --- access states --------------------------------------------------------------------------------------------------
CLEAR = tlfs.ACCESS_CLEAR_DIRTY


def dirty(bare: Bare, flags: int = CLEAR, gfn: int = AT // PAGE, count: int = 8) -> list[int]:
    states = bare.memory.access_states(gfn, count, flags)
    return [index for index, state in enumerate(states) if state & tlfs.STATE_DIRTY]


def test_dirty_pages_are_those_written(bare: Bare) -> None:
    memory = bare.memory
    gfn = AT // PAGE
    memory.map(gfn, 8, WRITE, tuple(range(FIRST, FIRST + 8)))
    bare.store(AT, 1)
    assert dirty(bare) == []
    memory.start_tracking()
    assert dirty(bare) == []
    for page in (1, 5):
        assert bare.store(AT + page * PAGE, 1)
    assert dirty(bare, 0) == [1, 5]
    assert dirty(bare) == [1, 5]
    assert dirty(bare) == []
    assert bare.store(AT + 5 * PAGE, 2)
    memory.map(gfn + 5, 1, tlfs.MAP_NO_ACCESS, None)
    assert bare.store(AT + 5 * PAGE, 3) is False
    assert dirty(bare, 0) == [5]
    memory.map(gfn + 5, 1, WRITE, (FIRST + 9,))
    memory.write(AT + 6 * PAGE, b"x")
    assert dirty(bare) == [5, 6]
    memory.start_tracking()
    assert bare.store(AT, 3)
    assert dirty(bare, 0) == [0]
    memory.stop_tracking()
    assert dirty(bare) == []
    assert bare.store(AT + PAGE, 1)
    assert bare.load(AT + PAGE) == 1


def test_memory_works_on_all_sides_of_logged_slots(bare: Bare) -> None:
    memory = bare.memory
    places = (0x300000, 0xFEDFF000, 0xFEE01000, AT, AT + (64 << 30), (1 << memory.width) - PAGE)
    for index, gpa in enumerate(places):
        memory.map(gpa // PAGE, 1, WRITE, (FIRST + index,))
    for start in (memory.start_tracking, memory.stop_tracking):
        start()
        for index, gpa in enumerate(places):
            assert bare.store(gpa, index + 50)
            assert bare.root(FIRST + index)[0] == index + 50
            neighbour = gpa - PAGE if gpa != 0xFEE01000 else gpa + PAGE
            assert bare.load(neighbour) is None
        if memory.dirty is not None:
            assert [dirty(bare, 0, gpa // PAGE, 1) for gpa in places] == [[0]] * len(places)


def test_accessed_starts_anew_when_it_is_cleared(bare: Bare) -> None:
    gfn = AT // PAGE
    bare.memory.map(gfn, 8, WRITE, tuple(range(FIRST, FIRST + 8)))
    assert bare.memory.access_states(gfn, 8, 0) == bytes(8)
    assert bare.store(AT + PAGE, 44)
    assert bare.memory.access_states(gfn, 8, tlfs.ACCESS_CLEAR_ACCESSED)[1] == tlfs.STATE_ACCESSED
    assert bare.memory.access_states(gfn, 8, 0) == bytes(8)
    assert bare.load(AT + PAGE) == 44
    assert bare.memory.access_states(gfn, 8, 0)[1] == tlfs.STATE_ACCESSED


# --- what it costs --------------------------------------------------------------------------------------------------
def _vmalloc_kib() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("VmallocUsed:"):
            return int(line.split()[1])
    raise AssertionError("no VmallocUsed")


def test_idle_child_costs_at_most_4_mib_of_kernel_memory() -> None:
    before = _vmalloc_kib()
    made = [Bare() for _ in range(4)]
    try:
        assert _vmalloc_kib() - before <= 4 * 4096
    finally:
        for bare in made:
            bare.close()


def test_no_room_for_pieces_is_a_status_and_revocation_works_all_the_same(bare: Bare) -> None:
    if os.uname().nodename != "appliance":
        pytest.skip("changes a setting of the whole machine")
    setting = Path("/proc/sys/vm/max_map_count")
    before = setting.read_text()
    gfn = AT // PAGE
    bare.memory.map(gfn + 4096, 64, WRITE, tuple(range(FIRST, FIRST + 64)))
    pages = tuple(FIRST + (n ^ 1) for n in range(509))
    count = len(Path("/proc/self/maps").read_text().splitlines())
    try:
        setting.write_text(str(count + 100))
        with pytest.raises(HvError) as error:
            for at in range(gfn, gfn + 4096, 512):
                bare.memory.map(at, 509, WRITE, pages)
        assert error.value.status == status.NO_RESOURCES
        done = error.value.reps
        assert done is not None
        assert 0 < done < 200
        assert [bare.load(AT + n * PAGE) is not None for n in (done - 1, done, done + 1)] == [
            True,
            False,
            False,
        ]
        bare.memory.map(gfn + 4096 + 30, 1, tlfs.MAP_NO_ACCESS, None)
        assert bare.load((gfn + 4096 + 30) * PAGE) is None
        assert bare.memory.state((gfn + 4096 + 30) * PAGE) == NO_ACCESS
        state = bare.memory.state((gfn + 4096 + 29) * PAGE)
        assert (bare.load((gfn + 4096 + 29) * PAGE) is not None) == (state == WRITABLE)
    finally:
        setting.write_text(before)


# --- hypercalls -----------------------------------------------------------------------------------------------------
@pytest.fixture
def parent(guest: Guest) -> Parent:
    return Parent(guest)


@pytest.fixture
def child(parent: Parent) -> Iterator[Child]:
    made = parent.initialized()
    yield made
    made.finalize()
    made.withdraw()
    made.delete()


ROOM = SPARE >> 12
"""512 pages of the root's that tests may map."""


def do_map(child: Child, gfn: int, flags: int, pages: list[int], start: int = 0) -> tuple[int, int]:
    data = tlfs.MAP_GPA_PAGES_INPUT.pack(child.id, gfn, flags) + struct.pack(f"<{len(pages)}Q", *pages)
    answer = child.guest.call(hypercalls.MAP_GPA_PAGES, data, count=len(pages), start=start)
    return answer.status, answer.reps


def do_unmap(child: Child, gfn: int, flags: int, count: int) -> tuple[int, int]:
    data = tlfs.UNMAP_GPA_PAGES_INPUT.pack(child.id, gfn, flags)
    answer = child.guest.call(hypercalls.UNMAP_GPA_PAGES, data, count=count)
    return answer.status, answer.reps


def states_of(child: Child, gfn: int, flags: int, count: int) -> tuple[int, int, bytes]:
    data = tlfs.GET_GPA_PAGES_ACCESS_STATES_INPUT.pack(child.id, flags, gfn)
    answer = child.guest.call(hypercalls.GET_GPA_PAGES_ACCESS_STATES, data, count=count, output=count)
    return answer.status, answer.reps, answer.output


def memory_of(child: Child) -> ChildMemory:
    memory: Any = child.guest.hypervisor.partitions[child.id].memory
    return cast("ChildMemory", memory)


def test_map_a_whole_page_of_elements(child: Child) -> None:
    assert do_map(child, 0x100, WRITE | tlfs.MAP_ADJUSTABLE, list(range(ROOM, ROOM + 509))) == (0, 509)
    memory = memory_of(child)
    assert memory.mapped_pages == 509
    assert memory.state(0x100000) == WRITABLE
    assert do_map(child, 0x100, tlfs.MAP_NO_ACCESS, [0] * 509) == (0, 509)
    assert memory.mapped_pages == 0
    assert memory.state(0x100000 + 508 * PAGE) == NO_ACCESS
    assert do_unmap(child, 0x90, 0, 512) == (0, 512)
    assert memory.state(0x100000) == UNMAPPED
    assert memory.state(0x290000) == NO_ACCESS


def test_map_that_starts_in_the_middle_leaves_the_first_elements_alone(child: Child) -> None:
    assert do_map(child, 0, WRITE, [1 << 60, 0xFFFFFF, ROOM, ROOM + 1], start=2) == (0, 4)
    memory = memory_of(child)
    assert [memory.state(gfn * PAGE) for gfn in range(4)] == [UNMAPPED, UNMAPPED, WRITABLE, WRITABLE]


@pytest.mark.parametrize("wrong", [1 << 20, (1 << 64) - 1, 1 << 51, OWNED >> 12])
def test_map_of_a_page_that_is_not_the_roots_to_give_counts_what_is_done(child: Child, wrong: int) -> None:
    assert do_map(child, 0, WRITE, [ROOM, ROOM + 1, wrong, ROOM + 3]) == (status.INVALID_PARAMETER, 2)
    memory = memory_of(child)
    assert [memory.state(gfn * PAGE) for gfn in range(4)] == [WRITABLE, WRITABLE, UNMAPPED, UNMAPPED]
    not_cached = WRITE | tlfs.MAP_NOT_CACHED
    assert do_map(child, 0, not_cached, [ROOM, wrong], start=1) == (status.INVALID_PARAMETER, 1)


def test_map_of_a_deposited_page_is_refused(child: Child) -> None:
    page = next(iter(child.parent.given))
    assert do_map(child, 0, WRITE, [ROOM, page]) == (status.INVALID_PARAMETER, 1)


def test_map_of_large_pages_wants_alignment(child: Child) -> None:
    aligned = ROOM & -512
    assert do_map(child, 512, WRITE | LARGE, [aligned]) == (0, 1)
    assert memory_of(child).mapped_pages == 512
    assert do_map(child, 513, WRITE | LARGE, [aligned]) == (status.INVALID_PARAMETER, 0)
    assert do_map(child, 1024, WRITE | LARGE, [aligned, aligned + 1]) == (status.INVALID_PARAMETER, 1)
    assert memory_of(child).state(1024 * PAGE) == WRITABLE
    assert do_map(child, 512, tlfs.MAP_NO_ACCESS | LARGE, [0, 0]) == (0, 2)
    assert memory_of(child).mapped_pages == 0
    assert do_unmap(child, 512, tlfs.UNMAP_LARGE_PAGE, 2) == (0, 2)
    assert do_unmap(child, 513, tlfs.UNMAP_LARGE_PAGE, 1) == (status.INVALID_PARAMETER, 0)


@pytest.mark.parametrize("flags", [0, tlfs.MAP_WRITABLE, READ | 0x40000, READ | 0x10])
def test_map_with_flags_that_mean_nothing_is_refused(child: Child, flags: int) -> None:
    assert do_map(child, 0, flags, [ROOM]) == (status.INVALID_PARAMETER, 0)


@pytest.mark.parametrize("gfn", [(1 << 52) - 1, (1 << 63) - 1, (1 << 64) - 512])
def test_addresses_beyond_the_width_are_refused(child: Child, gfn: int) -> None:
    assert do_map(child, gfn, READ, [ROOM]) == (status.INVALID_PARAMETER, 0)
    assert do_map(child, gfn, tlfs.MAP_NO_ACCESS, [0]) == (status.INVALID_PARAMETER, 0)
    assert do_unmap(child, gfn, 0, 1) == (status.INVALID_PARAMETER, 0)
    assert states_of(child, gfn, 0, 3) == (0, 3, bytes(3))


def test_access_states_of_a_whole_page(child: Child) -> None:
    assert do_map(child, 2, WRITE, [ROOM, ROOM + 1]) == (0, 2)
    result, reps, states = states_of(child, 0, 0, 4095)
    assert (result, reps) == (0, 4095)
    assert not states[0]
    assert states_of(child, 0, 16, 1)[:2] == (status.INVALID_PARAMETER, 0)


def test_mapping_wants_an_initialized_child(parent: Parent) -> None:
    child = parent.create()
    assert do_map(child, 0, READ, [ROOM])[0] == status.INVALID_PARTITION_STATE
    assert child.deposit(208) == 0
    assert child.initialize() == 0
    assert do_map(child, 0, WRITE, [ROOM]) == (0, 1)
    assert child.finalize() == 0
    assert do_map(child, 0, READ, [ROOM])[0] == status.INVALID_PARTITION_STATE
    assert do_unmap(child, 0, 0, 1)[0] == status.INVALID_PARTITION_STATE
    assert states_of(child, 0, 0, 1)[0] == status.INVALID_PARTITION_STATE
    child.withdraw()
    assert child.delete() == 0
    assert do_map(child, 0, READ, [ROOM])[0] == status.INVALID_PARTITION_ID


def test_the_roots_own_memory_is_not_up_for_mapping(parent: Parent) -> None:
    for partition_id in (1, hypercalls.SELF):
        data = tlfs.MAP_GPA_PAGES_INPUT.pack(partition_id, 0, READ) + struct.pack("<Q", ROOM)
        assert parent.guest.call(hypercalls.MAP_GPA_PAGES, data, count=1).status != 0


def test_hostile_calls_leave_everything_alive(child: Child) -> None:
    import random

    chance = random.Random(4)
    for _ in range(60):
        code = chance.choice(
            (hypercalls.MAP_GPA_PAGES, hypercalls.UNMAP_GPA_PAGES, hypercalls.GET_GPA_PAGES_ACCESS_STATES)
        )
        gfn = chance.choice((0, 511, 0xFEE00, (1 << 28) - 1, 1 << 52, (1 << 64) - 1))
        flags = chance.choice((0, READ, WRITE, WRITE | LARGE, tlfs.MAP_NO_ACCESS, 1 << 31, 0xFFFFFFFF, 0xF))
        count = chance.choice((1, 2, 509))
        data = struct.pack("<QQQ", child.id, gfn, flags)
        if code == hypercalls.GET_GPA_PAGES_ACCESS_STATES:
            data = struct.pack("<QQQ", child.id, flags, gfn)
        data += b"".join(
            struct.pack("<Q", chance.choice((ROOM, ROOM + 1, ROOM & -512, chance.getrandbits(64))))
            for _ in range(count)
        )
        start = chance.randrange(count)
        answer = child.guest.call(code, data, count=count, start=start, output=count)
        assert start <= answer.reps <= count
        assert answer.status or answer.reps == count
    assert do_map(child, 0, WRITE, [ROOM]) == (0, 1)
