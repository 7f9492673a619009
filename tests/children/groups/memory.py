# SPDX-License-Identifier: Apache-2.0
"""Memory of children: fault-in, rights, large pages, large regions, revocation, dirty pages, overlay pages."""

from __future__ import annotations

import os
import struct
import time

from rootvisor.mshv import EXECUTE, READ, WRITE, Memory, MemoryAccess, Mshv, MshvError
from rootvisor.tlfs import gpa as gpa_layouts
from rootvisor.tlfs import msrs
from tests.children.code import Code
from tests.children.guest import (
    FREE,
    MIB,
    PAGE_TABLES,
    QEMU_FEATURES,
    Guest,
    check,
    must_be,
    note,
)

GIB = 1 << 30
PAGE = 4096
HIGH = 0x100000000
HOLE = 0x40000000

FILL = Code("""
    movq %rbx, %rdi                 /* the page's number into each of RCX pages from RBX on */
1:  movq %rdi, %rax
    shrq $12, %rax
    movq %rax, (%rdi)
    addq $4096, %rdi
    decq %rcx
    jnz 1b
    done
""")
SUM = Code("""
    xorl %eax, %eax                 /* the sum of the first words of RCX pages from RBX on */
1:  addq (%rbx), %rax
    addq $4096, %rbx
    decq %rcx
    jnz 1b
    say %rax
    done
""")


def fill(guest: Guest, gpa: int, pages: int) -> None:
    guest.load(FILL)
    guest.vp.set_registers(rbx=gpa, rcx=pages)
    guest.finish()


def sum_of(guest: Guest, gpa: int, pages: int) -> int:
    guest.load(SUM)
    guest.vp.set_registers(rbx=gpa, rcx=pages)
    guest.said.clear()
    return guest.finish()[0]


def high_tables(guest: Guest, gib: int = 8) -> None:
    """4 GiB to 12 GiB one to one."""
    for number in range(gib):
        table = 0x90000 + number * PAGE
        guest.write(PAGE_TABLES + 0x1000 + (4 + number) * 8, struct.pack("<Q", table | 7))
        first = HIGH + number * GIB
        guest.write(table, struct.pack("<512Q", *(first + entry * 2 * MIB | 0x87 for entry in range(512))))


def test_pages_come_when_they_are_touched_and_both_sides_see_the_same(mshv: Mshv) -> None:
    with Guest(mshv, FILL, memory=4 * MIB) as guest:
        fill(guest, 2 * MIB, 512)
        for page in (512, 700, 1023):
            check(guest.u64(page * PAGE), page)
        guest.write(3 * MIB, struct.pack("<Q", 0x1234))
        check(sum_of(guest, 3 * MIB, 1), 0x1234)


def test_hole_is_unmapped_and_a_region_there_later_is_memory(mshv: Mshv) -> None:
    with Guest(mshv, SUM) as guest, Memory(PAGE) as more:
        guest.vp.set_registers(rbx=HOLE + 8, rcx=1)
        message = must_be(
            guest.next(), MemoryAccess, mapped=False, access=READ, gpa=HOLE + 8, gva=HOLE + 8, gva_is_gpa=True
        )
        assert isinstance(message, MemoryAccess)
        check(message.instruction, guest.read(message.rip, 16), "instruction bytes")
        check(message.instruction_length, 3)
        more.view[8:16] = struct.pack("<Q", 77)
        guest.partition.map(HOLE, more)
        check(guest.finish(), [77])


STORE = Code(f"""
    movl $0x11223344, {FREE:#x}
    movl $0x55667788, (%rbx)
    movl (%rbx), %ecx
    say %rcx
    done
""")


def test_read_only_region_is_read_and_writes_are_told(mshv: Mshv) -> None:
    with Guest(mshv, STORE) as guest, Memory(2 * PAGE) as rom:
        rom.view[16:20] = b"\x0a\x0b\x0c\x0d"
        guest.partition.map(HOLE, rom, writable=False)
        guest.vp.set_registers(rbx=HOLE + 16)
        message = must_be(
            guest.next(), MemoryAccess, mapped=True, access=WRITE, gpa=HOLE + 16, instruction_length=6
        )
        check(bytes(rom.view[16:20]), b"\x0a\x0b\x0c\x0d", "memory")
        must_be(guest.next(), MemoryAccess, mapped=True, access=WRITE, gpa=HOLE + 16)  # and again
        assert isinstance(message, MemoryAccess)
        guest.vp.register_page.rip = message.rip + 6
        check(guest.finish(), [0x0D0C0B0A])


def test_region_that_is_taken_away_is_not_reached_any_more(mshv: Mshv) -> None:
    with Guest(mshv, FILL) as guest, Memory(16 * PAGE) as more:
        region = guest.partition.map(HOLE, more)
        fill(guest, HOLE, 16)
        region.unmap()
        more.view[0:8] = bytes(8)
        guest.load(FILL)
        guest.vp.set_registers(rbx=HOLE, rcx=16)
        must_be(guest.next(), MemoryAccess, access=WRITE, gpa=HOLE)
        check(bytes(more.view[0:8]), bytes(8))
        guest.partition.map(HOLE, more, offset=8 * PAGE, size=8 * PAGE)
        guest.vp.set_registers(rcx=8)
        guest.finish()
        check(int.from_bytes(more.view[8 * PAGE : 8 * PAGE + 8], "little"), HOLE >> 12)
        check(bytes(more.view[0:8]), bytes(8))


def test_regions_must_not_overlap_and_unmap_names_them_exactly(mshv: Mshv) -> None:
    with Guest(mshv) as guest, Memory(4 * PAGE) as more:
        guest.partition.map(HOLE, more)
        for gpa, wanted in ((HOLE, 17), (HOLE + PAGE, 17), (PAGE, 17)):
            try:
                guest.partition.map(gpa, more, size=PAGE)
            except MshvError as error:
                check(error.errno, wanted)
            else:
                raise AssertionError(f"a region at {gpa:#x} was accepted")
        for gpa, size in ((HOLE, PAGE), (HOLE + PAGE, 4 * PAGE)):
            try:
                guest.partition.unmap(gpa, size, more.address)
            except MshvError:
                continue
            raise AssertionError("another region was unmapped")
        guest.partition.unmap(HOLE, 4 * PAGE, more.address)


def test_large_pages_are_mapped_at_once(mshv: Mshv) -> None:
    """2 MiB pages of the root: a fault brings 512 pages. Where the root has none, the result is the same."""
    with Guest(mshv, FILL) as guest, Memory(8 * MIB, huge_pages=True) as more:
        guest.partition.map(HOLE, more)
        started = time.monotonic()
        fill(guest, HOLE, 2048)
        note(f"8 MiB faulted in in {time.monotonic() - started:.3f} s")
        check(sum_of(guest, HOLE, 2048), sum(range(HOLE >> 12, (HOLE >> 12) + 2048)) & 0xFFFFFFFF)


def test_8_gib_cost_nothing_until_they_are_used(mshv: Mshv) -> None:
    with Guest(mshv, FILL) as guest, Memory(8 * GIB) as more:
        high_tables(guest)
        started = time.monotonic()
        guest.partition.map(HIGH, more)
        mapped = time.monotonic() - started
        for gpa in (HIGH, HIGH + 3 * GIB + 0x5000, HIGH + 8 * GIB - PAGE):
            fill(guest, gpa, 1)
            check(int.from_bytes(more.view[gpa - HIGH : gpa - HIGH + 8], "little"), gpa >> 12)
        blocks = os.fstat(more.fd).st_blocks * 512
        # a fault brings up to 512 pages
        assert blocks <= 3 * 2 * MIB, f"{blocks >> 20} MiB are used"
        started = time.monotonic()
        guest.partition.unmap(HIGH, 8 * GIB, more.address)
        note(
            f"8 GiB mapped in {mapped:.2f} s, unmapped in {time.monotonic() - started:.2f} s, {blocks >> 10} KiB used"
        )


test_8_gib_cost_nothing_until_they_are_used.limit = 180  # type: ignore[attr-defined]


def test_memory_that_the_root_takes_back_is_faulted_in_again(mshv: Mshv) -> None:
    """madvise(MADV_REMOVE) in the VMM: the driver revokes, the guest's next access finds zeros."""
    with Guest(mshv, FILL, memory=4 * MIB) as guest:
        for _ in range(3):
            fill(guest, 2 * MIB, 64)
            guest.memory.discard(2 * MIB, 32 * PAGE)
            check(sum_of(guest, 2 * MIB, 64), sum(range(512 + 32, 512 + 64)))


def test_memory_shrinks_while_the_guest_works_in_it(mshv: Mshv) -> None:
    """The guest goes round over pages that the root takes away all the time; each it sees is its own or zero."""
    with Guest(mshv, ROUND, memory=4 * MIB, interrupts=True) as guest:
        stop = time.monotonic() + 1.0
        rounds = 0
        while time.monotonic() < stop:
            guest.memory.discard(2 * MIB, 128 * PAGE)
            message = guest.next()
            guest.skip(message)
            rounds += 1
        wrong, turns = guest.vp.get_registers("r8", "r9")
        check(wrong, 0, "pages with other contents")
        assert turns >= rounds - 1 > 2, (turns, rounds)


ROUND = Code(f"""
    xorl %r8d, %r8d
    xorl %r9d, %r9d
2:  movl ${2 * MIB:#x}, %edi
    movl $128, %ecx
1:  movq (%rdi), %rax
    testq %rax, %rax
    jz 3f
    cmpq %rdi, %rax
    je 3f
    incq %r8
3:  movq %rdi, (%rdi)
    addq $4096, %rdi
    decl %ecx
    jnz 1b
    incq %r9
    outb %al, $0x77
    jmp 2b
""")


def test_dirty_pages_are_the_written_ones(mshv: Mshv) -> None:
    with Guest(mshv, FILL, memory=4 * MIB) as guest:
        fill(guest, 2 * MIB, 64)
        guest.partition.track_access(True)
        check(guest.partition.access_bitmap(2 * MIB, 64), bytes(8), "clean at first")
        fill(guest, 2 * MIB + 3 * PAGE, 2)
        fill(guest, 2 * MIB + 40 * PAGE, 1)
        states = guest.partition.access_states(2 * MIB, 64)
        check([at for at in range(64) if states[at] & 2], [3, 4, 40], "dirty")
        assert all(states[at] & 1 for at in (3, 4, 40)), "a written page was accessed"
        check(guest.partition.access_bitmap(2 * MIB, 64), (0b11000 | 1 << 40).to_bytes(8, "little"))
        check(guest.partition.access_bitmap(2 * MIB, 64), bytes(8), "cleared by the last call")
        # KVM maps a page as writable also when it is read first, and counts it once.
        for _ in range(2):
            guest.partition.access_bitmap(2 * MIB, 64)
            check(sum_of(guest, 2 * MIB, 64), sum(range(512, 576)))
        check(guest.partition.access_bitmap(2 * MIB, 64), bytes(8), "after reading")
        # before they stop, VMMs set all bits
        states = guest.partition.access_states(2 * MIB, 64, gpa_layouts.ACCESS_SET_DIRTY)
        check(any(one & 2 for one in states), False)
        check(all(one & 2 for one in guest.partition.access_states(2 * MIB, 64)), True)
        guest.partition.track_access(False)


def test_dirty_page_stays_dirty_over_its_revocation(mshv: Mshv) -> None:
    with Guest(mshv, FILL, memory=4 * MIB) as guest:
        guest.partition.track_access(True)
        fill(guest, 2 * MIB, 4)
        guest.memory.discard(2 * MIB, 4 * PAGE)
        check([one & 2 for one in guest.partition.access_states(2 * MIB, 5)], [2, 2, 2, 2, 0])
        sum_of(guest, 2 * MIB, 4)
        check(guest.partition.access_bitmap(2 * MIB, 8), b"\x0f")
        guest.partition.track_access(False)


JUMP = Code("""
    call *%rbx
    done
""")


def test_fetch_from_a_hole_is_an_execute_access(mshv: Mshv) -> None:
    with Guest(mshv, JUMP) as guest, Memory(PAGE) as more:
        guest.vp.set_registers(rbx=HOLE + 0x20)
        must_be(
            guest.next(),
            MemoryAccess,
            mapped=False,
            access=EXECUTE,
            gpa=HOLE + 0x20,
            gva=HOLE + 0x20,
            rip=HOLE + 0x20,
        )
        more.view[0x20] = 0xC3
        guest.partition.map(HOLE, more)
        guest.finish()


OVERLAY = Code(f"""
    movl ${msrs.GUEST_OS_ID:#x}, %ecx
    movl $1, %eax
    movl $0x81000000, %edx
    wrmsr
    movl ${msrs.HYPERCALL:#x}, %ecx
    rdmsr
    say %rax
    movl ${FREE | 1:#x}, %eax
    xorl %edx, %edx
    wrmsr
    movq {FREE:#x}, %rbx
    say %rbx
    movl $0x46, %ecx                /* a call that this child may not make */
    xorl %r8d, %r8d
    movl ${FREE:#x}, %eax
    call *%rax
    say %rax
    outb %al, $0x71
    movq {FREE:#x}, %rbx
    say %rbx
    movl ${msrs.HYPERCALL:#x}, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    movq {FREE:#x}, %rbx
    say %rbx
    done
""")


def test_overlay_page_lies_over_memory_and_survives_its_remapping(mshv: Mshv) -> None:
    with Guest(mshv, OVERLAY, features=QEMU_FEATURES) as guest:
        guest.write(FREE, struct.pack("<Q", 0x5A5A5A5A))
        guest.skip(guest.next())
        check(guest.u64(FREE), 0x5A5A5A5A, "the root's page below")
        guest.memory.discard(FREE, PAGE)
        guest.write(FREE, struct.pack("<Q", 0x1234))
        initial, code, status, again, below = guest.finish()
        check(initial & 1, 0, "the page is off at first")
        assert code not in (0, 0x5A5A5A5A), hex(code)
        check(again, code, "the overlay after a remap")
        check(status & 0xFFFF, 6, "HV_STATUS_ACCESS_DENIED")
        check(below, 0x1234, "memory, when the overlay is off")


def test_two_children_have_their_own_memory(mshv: Mshv) -> None:
    with Guest(mshv, FILL, memory=4 * MIB) as one, Guest(mshv, FILL, memory=4 * MIB) as two:
        fill(one, 2 * MIB, 16)
        check(sum_of(two, 2 * MIB, 16), 0)
        fill(two, 2 * MIB, 1)
        check(sum_of(one, 2 * MIB, 16), sum(range(512, 528)))


def test_one_memory_may_be_in_two_children(mshv: Mshv) -> None:
    with Memory(PAGE) as shared, Guest(mshv, FILL) as one, Guest(mshv, SUM) as two:
        one.partition.map(HOLE, shared)
        two.partition.map(HOLE + PAGE, shared)
        fill(one, HOLE, 1)
        check(sum_of(two, HOLE + PAGE, 1), HOLE >> 12)
