# SPDX-License-Identifier: Apache-2.0
"""Several processors: started by the guest with INIT and SIPI, interrupts between them, work on the same memory."""

from __future__ import annotations

import struct
import time

from rootvisor.mshv import IoPort, Mshv, MshvError
from tests.children.code import Code
from tests.children.guest import (
    COUNTERS,
    FREE,
    GDT,
    PAGE_TABLES,
    X2APIC_ON,
    Guest,
    Runner,
    check,
    interrupted_after,
    must_be,
    note,
)

#: How many application processors have come up; what each has counted.
UP, WORK, GO = FREE, FREE + 0x100, FREE + 0x40

TRAMPOLINE = Code(
    f"""
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl pointer
    movl $0x6A0, %eax
    movl %eax, %cr4
    movl ${PAGE_TABLES:#x}, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx
    movl $0xD00, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80050033, %eax
    movl %eax, %cr0
    ljmpl $8, $ap
pointer:
    .word 39
    .long {GDT:#x}
    .code64
ap: movw $16, %ax
    movw %ax, %ss
    movw %ax, %ds
    movw %ax, %es
    {X2APIC_ON}
    movl $0x802, %ecx
    rdmsr
    movl %eax, %ebx                 /* APIC id */
    lidt idt(%rip)
    leaq 1(%rbx), %rsp
    shlq $12, %rsp
    addq $0x20000, %rsp
    lock incl {UP:#x}
1:  pause
    cmpl $0, {GO:#x}
    je 1b
    movl $100000, %ecx
2:  lock incq {WORK:#x}
    decl %ecx
    jnz 2b
    lock decl {UP:#x}
    sti
3:  hlt
    jmp 3b
idt: .word 0xFFF
    .quad 0x9000
    """,
    bits=16,
)
START = Code(f"""
    {X2APIC_ON}
    movl %ebx, %esi                 /* RBX: processors */
    movl $1, %edi
1:  cmpl %esi, %edi
    jae 4f
    movl $0x830, %ecx               /* INIT, SIPI to 0x8000 */
    movl %edi, %edx
    movl $0x4500, %eax
    wrmsr
    movl $0x4608, %eax
    wrmsr
2:  pause
    cmpl %edi, {UP:#x}
    jb 2b
    incl %edi
    jmp 1b
4:  movl $1, {GO:#x}
5:  pause
    cmpl $0, {UP:#x}
    jne 5b
    movq {WORK:#x}, %rax
    say %rax
    movl $0x830, %ecx               /* an interrupt for each, by number */
    movl $1, %edi
6:  cmpl %esi, %edi
    jae 7f
    movl %edi, %edx
    movl $0x4071, %eax
    wrmsr
    incl %edi
    jmp 6b
7:  leal -1(%esi), %edi
8:  pause
    cmpl %edi, {COUNTERS + 8 * 0x71:#x}
    jb 8b
    done
""")


def work(mshv: Mshv, vps: int) -> None:
    with Guest(mshv, START, vps=vps, interrupts=True) as guest:
        guest.write(TRAMPOLINE.base, TRAMPOLINE.image)
        guest.vp.set_registers(rbx=vps)
        others = [Runner(guest, vp).start() for vp in guest.vps[1:]]
        started = time.monotonic()
        try:
            check(guest.finish(), [100000 * (vps - 1)])
            note(f"{vps} VPs in {time.monotonic() - started:.2f} s")
        finally:
            for runner in others:
                check(runner.stop(), None)
        check(guest.interrupts_of(0x71), vps - 1)


def test_2_vps(mshv: Mshv) -> None:
    work(mshv, 2)


def test_4_vps(mshv: Mshv) -> None:
    work(mshv, 4)


def test_8_vps(mshv: Mshv) -> None:
    work(mshv, 8)


test_8_vps.limit = 180  # type: ignore[attr-defined]

EACH = Code("""
1:  incq (%rbx)
    outb %al, %dx
    jmp 1b
""")


def test_vps_have_their_own_intercepts(mshv: Mshv) -> None:
    """Four processors at once, each with its own port; messages do not meet."""
    with Guest(mshv, EACH, vps=4) as guest:
        for vp in guest.vps:
            guest.long_mode(vp, EACH.base, internal_activity_state=0)
            vp.set_registers(rbx=FREE + 0x1000 * vp.index, rdx=0x100 + vp.index)
        for turn in range(1, 26):
            runners = [Runner(guest, vp).start() for vp in guest.vps]
            for runner in runners:
                message = runner.wait()
                assert message is not None
                must_be(message, IoPort, port=0x100 + runner.vp.index, vp_index=runner.vp.index)
                guest.skip(message, runner.vp)
                check(guest.u64(FREE + 0x1000 * runner.vp.index), turn)


def test_vp_that_waits_for_sipi_is_silent(mshv: Mshv) -> None:
    with Guest(mshv, EACH, vps=2) as guest:
        check(interrupted_after(guest.vps[1], 0.2), True)
        check(guest.vps[1].get_registers("internal_activity_state"), [1])


def test_processors_of_any_index(mshv: Mshv) -> None:
    with Guest(mshv) as guest:
        for index in (200, 3, 255):
            guest.vps.append(guest.partition.create_vp(index))
            check(guest.vps[-1].get_registers("apic_base")[0] & 0x100, 0)
        for index, wanted in ((256, 22), (3, 17)):
            try:
                guest.partition.create_vp(index)
            except MshvError as error:
                check(error.errno, wanted, f"VP {index}")
            else:
                raise AssertionError(f"VP {index} was created")


SHOOTDOWN = Code(f"""
1:  movq (%rbx), %rax               /* a page that the root takes away again and again */
    incq {WORK:#x}(,%rcx,8)
    jmp 1b
""")


def test_revocation_is_synchronous_for_all_vps(mshv: Mshv) -> None:
    """Two VPs read a page while the VMM empties it; the next value each reads is not older than the last discard."""
    with Guest(mshv, SHOOTDOWN, vps=2) as guest:
        page = FREE + 0x8000
        for vp in guest.vps:
            guest.long_mode(vp, SHOOTDOWN.base, internal_activity_state=0)
            vp.set_registers(rbx=page, rcx=vp.index)
        for number in range(1, 11):
            guest.memory.discard(page, 4096)
            guest.write(page, struct.pack("<Q", number))
            runners = [Runner(guest, vp).start() for vp in guest.vps]
            before = [guest.u64(WORK + 8 * n) for n in range(2)]
            deadline = time.monotonic() + 20
            while any(guest.u64(WORK + 8 * n) <= before[n] for n in range(2)):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            for runner in runners:
                check(runner.stop(), None)
                check(runner.vp.get_registers("rax"), [number])
