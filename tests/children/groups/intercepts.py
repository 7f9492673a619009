# SPDX-License-Identifier: Apache-2.0
"""Intercepts but ports: memory accesses of every form, MSRs, CPUID, halt, exceptions, triple fault, hypercalls."""

from __future__ import annotations

import os
import struct

from rootvisor.mshv import (
    READ,
    WRITE,
    ExceptionIntercept,
    Hypercall,
    IoPort,
    Memory,
    MemoryAccess,
    Mshv,
    MshvError,
    Msr,
    Segment,
    UnrecoverableException,
)
from rootvisor.tlfs import intercepts, msrs, status
from rootvisor.tlfs import partition_properties as properties
from tests.children.code import Code
from tests.children.guest import (
    FREE,
    MIB,
    PAGE_TABLES,
    QEMU_FEATURES,
    Guest,
    check,
    interrupted_after,
    must_be,
    note,
)

HOLE = 0x40000000
PAGE = 4096
GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))

ACCESSES = Code("""
    movb (%rbx), %al
    movw (%rbx), %ax
    movl (%rbx), %eax
    movq (%rbx), %rax
    movzbl 3(%rbx), %eax
    movsbq 3(%rbx), %rax
    movb %al, 5(%rbx)
    movw %ax, 6(%rbx)
    movl %eax, 8(%rbx,%rcx,4)
    movq %rax, 16(%rbx)
    movl $0x11223344, 32(%rbx)
    addl %eax, 64(%rbx)
    xchgl %eax, 68(%rbx)
    lock cmpxchgl %ecx, 72(%rbx)
    btsl $5, 76(%rbx)
    cmpl %eax, 80(%rbx)
    testb $1, 84(%rbx)
    pushq 88(%rbx)
    movups 96(%rbx), %xmm0
    movups %xmm0, 112(%rbx)
    done
""")


def test_accesses_of_every_form_are_told_exactly_and_the_vp_is_untouched(mshv: Mshv) -> None:
    with Guest(mshv, ACCESSES) as guest:
        vp = guest.vp
        values = {name: 0x1111_1111_1111_1111 * (n % 14 + 1) for n, name in enumerate(GENERAL)}
        values.update(rbx=HOLE, rcx=2, rsp=0x20FF0)
        vp.set_registers(rflags=0x8D7, **values)
        for offset, length, writes in (
            (0, 2, False), (0, 3, False), (0, 2, False), (0, 3, False), (3, 4, False), (3, 5, False), (5, 3, True),
            (6, 4, True), (16, 4, True), (16, 4, True), (32, 7, True), (64, 3, None), (68, 3, None), (72, 5, None),
            (76, 5, None), (80, 3, False), (84, 4, False), (88, 3, False), (96, 4, False), (112, 4, True),
        ):  # fmt: skip
            message = guest.next()
            must_be(
                message, MemoryAccess, mapped=False, gpa=HOLE + offset, gva=HOLE + offset, gva_is_gpa=True,
                instruction_length=length, cpl=0, long_mode=True, interruption_pending=False,
            )  # fmt: skip
            assert isinstance(message, MemoryAccess)
            if writes is not None:  # a read-modify-write may be told as either
                check(message.access, WRITE if writes else READ, f"access at {offset}")
            check(message.instruction, guest.read(message.rip, 16), "instruction bytes")
            check(vp.get_registers(*GENERAL), list(values.values()), f"registers at {offset}")
            check(
                [getattr(vp.register_page, name) for name in GENERAL], list(values.values()), "register page"
            )
            check(vp.register_page.rflags, 0x8D7, "RFLAGS")
            vp.register_page.rip = message.rip + length
        guest.finish()


MMIO = Code("""
    movl (%rbx), %eax
    say %rax
    movl $0x99, (%rbx)
    movl 4(%rbx), %ecx
    say %rcx
    done
""")


def test_device_in_the_vmm(mshv: Mshv) -> None:
    """Loads get what the VMM says, by the register page, with no hypercall in between."""
    with Guest(mshv, MMIO) as guest:
        guest.vp.set_registers(rbx=HOLE)
        page = guest.vp.register_page
        message = must_be(guest.next(), MemoryAccess, access=READ, gpa=HOLE)
        page.rax, page.rip = 0xCAFE, message.rip + message.instruction_length  # type: ignore[attr-defined]
        message = must_be(guest.next(), MemoryAccess, access=WRITE, gpa=HOLE)
        page.rip = message.rip + message.instruction_length  # type: ignore[attr-defined]
        message = must_be(guest.next(), MemoryAccess, access=READ, gpa=HOLE + 4)
        page.rcx, page.rip = 0xF00D, message.rip + message.instruction_length  # type: ignore[attr-defined]
        check(guest.finish(), [0xCAFE, 0xF00D])


CROSSING = Code("""
    movq (%rbx), %rax
    say %rax
    movq %rax, 8(%rbx)
    done
""")


def test_access_that_crosses_into_a_hole_names_the_first_byte_there(mshv: Mshv) -> None:
    with Guest(mshv, CROSSING) as guest, Memory(PAGE) as more:
        guest.partition.map(HOLE, more)
        more.view[PAGE - 4 :] = b"\1\2\3\4"
        guest.vp.set_registers(rbx=HOLE + PAGE - 4)
        message = must_be(
            guest.next(), MemoryAccess, mapped=False, access=READ, gpa=HOLE + PAGE, gva=HOLE + PAGE
        )
        check(guest.vp.register_page.rip, message.rip)  # type: ignore[attr-defined]
        with Memory(PAGE) as beyond:
            beyond.view[:4] = b"\5\6\7\x08"
            guest.partition.map(HOLE + PAGE, beyond)
            check(guest.finish(), [0x04030201])
            check(bytes(beyond.view[4:12]), b"\1\2\3\4\5\6\7\x08")


CODE_CROSSING = Code("""
    jmp *%rbx
""")


def test_instruction_that_crosses_into_a_hole_is_a_fetch(mshv: Mshv) -> None:
    with Guest(mshv, CODE_CROSSING) as guest, Memory(PAGE) as more, Memory(PAGE) as beyond:
        guest.partition.map(HOLE, more)
        more.view[PAGE - 2 :] = b"\x48\xb8"  # movabs $..., %rax
        guest.vp.set_registers(rbx=HOLE + PAGE - 2)
        must_be(guest.next(), MemoryAccess, mapped=False, access=2, gpa=HOLE + PAGE, rip=HOLE + PAGE - 2)
        beyond.view[:10] = struct.pack("<Q", 0x123456789ABCDEF0) + b"\xe6\xd0"
        guest.partition.map(HOLE + PAGE, beyond)
        guest.finish()
        check(guest.vp.get_registers("rax"), [0x123456789ABCDEF0])


STRING = Code(f"""
    cld
    movl ${FREE:#x}, %esi
    movq %rbx, %rdi
    movl $5, %ecx
    rep movsb
    done
""")


def test_rep_movs_into_a_hole_stops_at_the_element_and_goes_on_there(mshv: Mshv) -> None:
    """Two bytes have a page, the third has none."""
    with Guest(mshv, STRING) as guest, Memory(PAGE) as more:
        guest.write(FREE, b"abcde")
        guest.partition.map(HOLE, more)
        guest.vp.set_registers(rbx=HOLE + PAGE - 2)
        must_be(guest.next(), MemoryAccess, mapped=False, access=WRITE, gpa=HOLE + PAGE)
        check(guest.vp.get_registers("rcx", "rsi", "rdi"), [3, FREE + 2, HOLE + PAGE])
        check(bytes(more.view[-2:]), b"ab")
        with Memory(PAGE) as beyond:
            guest.partition.map(HOLE + PAGE, beyond)
            guest.finish()
            check(bytes(beyond.view[:4]), b"cde\0")


def test_rep_movs_element_by_element_with_the_vmm(mshv: Mshv) -> None:
    with Guest(mshv, STRING) as guest:
        guest.write(FREE, b"abcde")
        guest.vp.set_registers(rbx=HOLE)
        written = b""
        page = guest.vp.register_page
        for number in range(5):
            message = must_be(guest.next(), MemoryAccess, access=WRITE, gpa=HOLE + number)
            check((page.rcx, page.rsi, page.rdi), (5 - number, FREE + number, HOLE + number))
            written += guest.read(page.rsi, 1)
            page.rcx, page.rsi, page.rdi = 4 - number, FREE + number + 1, HOLE + number + 1
            if number == 4:
                page.rip = message.rip + message.instruction_length  # type: ignore[attr-defined]
        guest.finish()
        check(written, b"abcde")


PUSH = Code("""
    movq %rbx, %rsp
    pushq %rbx
    done
""")


def test_push_and_stack_of_an_exception_in_a_hole(mshv: Mshv) -> None:
    with Guest(mshv, PUSH) as guest:
        guest.vp.set_registers(rbx=HOLE)
        must_be(guest.next(), MemoryAccess, access=WRITE, gpa=HOLE - 8, gva=HOLE - 8)
        check(guest.vp.get_registers("rsp"), [HOLE])


#: In user mode: a write that the guest's own tables forbid, an undefined opcode, a division by zero.
FORBIDDEN, UNDEFINED, DIVISION = (
    Code("movq %rax, (%rbx)\n1: jmp 1b\n"),
    Code("ud2\n"),
    Code("xorl %edx, %edx\nxorl %ecx, %ecx\ndivl %ecx\n"),
)
#: The stack lies where nothing else is: the driver maps 2 MiB around what it is asked for.
TASK, TASK_STACK = 0x8F000, 4 * MIB


def test_exception_of_user_mode_whose_stack_is_not_there(mshv: Mshv) -> None:
    """Nothing but the task state says where the processor pushes to: the page must come all the same."""
    for code, vector in ((FORBIDDEN, 14), (UNDEFINED, 6), (DIVISION, 0)):
        with Guest(mshv, code, memory=8 * MIB, interrupts=True, large_pages=False) as guest:
            guest.write(
                PAGE_TABLES + 0x2000, struct.pack("<2Q", 0x87, 2 * MIB | 0x85)
            )  # the second is read-only
            guest.write(TASK, struct.pack("<IQ", 0, TASK_STACK + 0x1000).ljust(0x68, b"\0"))
            user, data = Segment.code64(0x33), Segment.data(0x2B)
            for segment in (user, data):
                segment.attributes |= 3 << 5
            task = Segment.tss()
            task.base, task.limit = TASK, 0x67
            guest.vp.set_registers(cs=user, ss=data, ds=data, es=data, tr=task, rbx=2 * MIB)
            message = guest.next()
            check(message.port, 0xE1, f"instead of vector {vector}: {message}")  # type: ignore[attr-defined]
            check(message.value & 0xFF, vector)  # type: ignore[attr-defined]


MSR_CODE = Code("""
    movl $0x10A, %ecx
    rdmsr
    movl $0x174, %ecx
    movl $0x55, %eax
    xorl %edx, %edx
    wrmsr
    rdmsr
    say %rax
    done
""")


def test_msr_intercepts_that_were_asked_for(mshv: Mshv) -> None:
    with Guest(mshv, MSR_CODE) as guest:
        guest.partition.install_intercept(
            intercepts.TYPE_MSR_INDEX, intercepts.MASK_READ | intercepts.MASK_WRITE, 0x10A
        )
        guest.partition.install_intercept(intercepts.TYPE_MSR_INDEX, intercepts.MASK_WRITE, 0x174)
        page = guest.vp.register_page
        message = must_be(guest.next(), Msr, number=0x10A, write=False, access=READ, instruction_length=2)
        check(page.rcx, 0x10A)
        page.rax, page.rdx, page.rip = 1, 2, message.rip + 2  # type: ignore[attr-defined]
        message = must_be(guest.next(), Msr, number=0x174, write=True, access=WRITE, value=0x55)
        page.rip = message.rip + 2  # type: ignore[attr-defined]
        guest.finish()
        check(guest.said, [0], "the write that the VMM swallowed")


UNKNOWN_MSR = Code("""
    movl $0x12345678, %ecx
    rdmsr
    say %rax
    movl $7, %eax
    wrmsr
    done
""")


def test_unknown_msr_by_the_property(mshv: Mshv) -> None:
    with Guest(mshv, UNKNOWN_MSR) as guest:
        guest.partition.set_property(properties.UNIMPLEMENTED_MSR_ACTION, 1)
        check(guest.finish(), [0])
    with Guest(mshv, UNKNOWN_MSR, interrupts=True) as guest:
        guest.partition.set_property(properties.UNIMPLEMENTED_MSR_ACTION, 0)
        message = must_be(guest.next(), IoPort, port=0xE1, value=13)
        guest.skip(message)
        must_be(guest.next(), IoPort, port=0xE2, value=0)


CPUID = Code("""
    movl $0x40000000, %eax
    cpuid
    say %rbx
    movl $0x40000011, %eax
    cpuid
    say %rax
    say %rdx
    movl $7, %eax
    xorl %ecx, %ecx
    cpuid
    done
""")


def test_cpuid_is_answered_inside_with_what_was_registered(mshv: Mshv) -> None:
    with Guest(mshv, CPUID) as guest:
        partition = guest.partition
        partition.register_cpuid(0x40000000, ebx=0x41414141, masks=(0, 0xFFFFFFFF, 0, 0))
        partition.register_cpuid(0x40000011, eax=1, edx=2)
        partition.register_cpuid(0x40000011, eax=3, edx=4, vp=0)
        for kind in (intercepts.TYPE_CPUID, intercepts.TYPE_GLOBAL_CPUID):
            partition.install_intercept(kind, intercepts.MASK_EXECUTE, 0x40000011)
        check(guest.finish(), [0x41414141, 3, 4])
        check(guest.vp.cpuid(0x40000011)[0], 3)


HALT = Code("""
    hlt
    done
""")


def test_halt_stays_inside_until_a_signal_interrupts_the_wait(mshv: Mshv) -> None:
    with Guest(mshv, HALT) as guest:
        check(interrupted_after(guest.vp, 0.3), True, "RUN_VP came back for the signal alone")
        check(interrupted_after(guest.vp, 0.05), True)
        guest.vp.set_registers(internal_activity_state=0)
        guest.finish()


BREAKPOINT = Code("""
    int3
    done
""")
STEP = Code("""
    pushq $0x102                    /* TF */
    popfq
    nop
    done
""")


def test_exception_intercepts(mshv: Mshv) -> None:
    with Guest(mshv, STEP) as guest:
        guest.partition.install_intercept(intercepts.TYPE_EXCEPTION, intercepts.MASK_EXECUTE, 1)
        message = must_be(guest.next(), ExceptionIntercept, vector=1, software=False, error_code=None)
        assert isinstance(message, ExceptionIntercept)
        check(message.parameter & 0x4000, 0x4000, "DR6.BS")
        check(guest.read(message.rip, 2), b"\xe6\xd0", "a trap: behind the NOP")
        guest.vp.register_page.rflags = 2
        guest.finish()
        for vector in (0, 6, 13, 14):
            try:
                guest.partition.install_intercept(intercepts.TYPE_EXCEPTION, intercepts.MASK_EXECUTE, vector)
            except MshvError as error:
                check(error.status, status.FEATURE_UNAVAILABLE)
            else:
                raise AssertionError(f"vector {vector} was accepted")


def test_breakpoint_intercept(mshv: Mshv) -> None:
    with Guest(mshv, BREAKPOINT) as guest:
        guest.partition.install_intercept(intercepts.TYPE_EXCEPTION, intercepts.MASK_EXECUTE, 3)
        message = guest.next()
        if isinstance(message, UnrecoverableException):
            note("this processor does not intercept INT3 (QEMU's emulation of SVM)")
            return
        must_be(message, ExceptionIntercept, vector=3, software=True, error_code=None, instruction_length=1)
        check(guest.vp.register_page.rip, 0x40000, "RIP at INT3")
        guest.vp.register_page.rip = 0x40001
        guest.finish()


TRIPLE_FAULT = Code("""
    lidt none(%rip)
    ud2
none: .word 0
    .quad 0
""")


def test_triple_fault(mshv: Mshv) -> None:
    with Guest(mshv, TRIPLE_FAULT) as guest:
        must_be(guest.next(), UnrecoverableException, vp_index=0)
        # A VMM resets the processor, and it works again.
        guest.load(HALT_DONE)
        guest.finish()


HALT_DONE = Code("""
    done
""")
CALLS = Code(f"""
    movl ${msrs.GUEST_OS_ID:#x}, %ecx
    movl $1, %eax
    movl $0x81000000, %edx
    wrmsr
    movl ${msrs.HYPERCALL:#x}, %ecx
    movl ${FREE | 1:#x}, %eax
    xorl %edx, %edx
    wrmsr
    movl ${FREE:#x}, %edi
    movl $0x1FFF, %ecx              /* no such call */
    movl $0x1234, %edx
    movl $0x5678, %r8d
    call *%rdi
    say %rax
    movl $0x1005D, %ecx             /* SIGNAL_EVENT, fast, to a connection that does not exist */
    movl $0x77, %edx
    xorl %r8d, %r8d
    call *%rdi
    say %rax
    done
""")


def test_hypercalls_are_refused_unless_the_vmm_wants_them(mshv: Mshv) -> None:
    with Guest(mshv, CALLS, features=QEMU_FEATURES | properties.SYNTHETIC_SIGNAL_EVENTS) as guest:
        check(
            [one & 0xFFFF for one in guest.finish()],
            [status.INVALID_HYPERCALL_CODE, status.INVALID_CONNECTION_ID],
        )


def test_hypercalls_that_the_vmm_wants(mshv: Mshv) -> None:
    with Guest(mshv, CALLS, features=QEMU_FEATURES | properties.SYNTHETIC_SIGNAL_EVENTS) as guest:
        for kind in (intercepts.TYPE_HYPERCALL, intercepts.TYPE_UNKNOWN_SYNIC_CONNECTION):
            guest.partition.install_intercept(kind, intercepts.MASK_EXECUTE)
        page = guest.vp.register_page
        for rcx, rdx, r8 in ((0x1FFF, 0x1234, 0x5678), (0x1005D, 0x77, 0)):
            message = must_be(guest.next(), Hypercall, rcx=rcx, rdx=rdx, r8=r8, instruction_length=3)
            check((page.rcx, page.rdx, page.rip), (rcx, rdx, message.rip))  # type: ignore[attr-defined]
            page.rax, page.rip = 0xAB00 + (rcx & 0xFF), message.rip + 3  # type: ignore[attr-defined]
        check(guest.finish(), [0xABFF, 0xAB5D])


def test_intercepts_that_cannot_be_are_refused(mshv: Mshv) -> None:
    with Guest(mshv) as guest:
        for kind, wanted in (
            (intercepts.TYPE_APIC_INIT_SIPI, status.FEATURE_UNAVAILABLE),
            (intercepts.TYPE_APIC_WRITE, status.FEATURE_UNAVAILABLE),
            (intercepts.TYPE_REGISTER, status.FEATURE_UNAVAILABLE),
            (0x77, status.INVALID_PARAMETER),
        ):
            try:
                guest.partition.install_intercept(kind, intercepts.MASK_EXECUTE)
            except MshvError as error:
                check(error.status, wanted, f"intercept type {kind:#x}")
            else:
                raise AssertionError(f"intercept type {kind:#x} was accepted")


DOORBELLS = Code("""
    movl $7, (%rbx)
    movl $8, (%rbx)
    movw $7, 8(%rbx)
    done
""")


def test_doorbells_complete_the_write_and_others_are_told(mshv: Mshv) -> None:
    with Guest(mshv, DOORBELLS) as guest:
        one, two = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        guest.partition.add_doorbell(HOLE, one, 4, 7)
        guest.partition.add_doorbell(HOLE + 8, two)
        guest.vp.set_registers(rbx=HOLE)
        message = must_be(guest.next(), MemoryAccess, access=WRITE, gpa=HOLE)
        check(guest.read(message.rip + 2, 1), b"\x08", "the write of 8")  # type: ignore[attr-defined]
        guest.vp.register_page.rip = message.rip + 6  # type: ignore[attr-defined]
        guest.finish()
        for fd in (one, two):
            guest.wait_event(fd)
            os.close(fd)
