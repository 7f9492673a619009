# SPDX-License-Identifier: Apache-2.0
"""Port intercepts: every form of IN, OUT, INS and OUTS, in 64-bit and real mode."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

from rootvisor.mshv import READ, WRITE, IoPort, Mshv, Segment
from tests.children.code import Code
from tests.children.guest import FREE, Guest, check, must_be

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

OUT = Code("""
    movq $0x1122334455667788, %rax
    movw $0x3F8, %dx
    outb %al, $0x10
    outw %ax, $0x20
    outl %eax, $0x30
    outb %al, %dx
    outw %ax, %dx
    outl %eax, %dx
    .byte 0x66, 0x48, 0x3E, 0xEE    /* out dx, al with prefixes that mean nothing */
    done
""")


def test_out_of_every_width_and_form(mshv: Mshv) -> None:
    with Guest(mshv, OUT) as guest:
        for port, size, value, length in (
            (0x10, 1, 0x88, 2), (0x20, 2, 0x7788, 3), (0x30, 4, 0x55667788, 2),
            (0x3F8, 1, 0x88, 1), (0x3F8, 2, 0x7788, 2), (0x3F8, 4, 0x55667788, 1), (0x3F8, 1, 0x88, 4),
        ):  # fmt: skip
            message = guest.next()
            must_be(
                message, IoPort, port=port, size=size, value=value, instruction_length=length, write=True, access=WRITE,
                string=False, rep=False, rax=0x1122334455667788, vp_index=0, cpl=0, long_mode=True, protected_mode=True,
            )  # fmt: skip
            assert isinstance(message, IoPort)
            check(guest.read(message.rip, 16), message.instruction, "instruction bytes")
            check(guest.vp.register_page.rip, message.rip, "RIP in the page")
            guest.skip(message)
        guest.finish()


IN = Code("""
    movq $-1, %rax
    inb $0x60, %al
    movq %rax, %rbx
    movq $-1, %rax
    movw $0x1F0, %dx
    inw %dx, %ax
    movq %rax, %rcx
    movq $-1, %rax
    inl %dx, %eax
    movq %rax, %rsi
    done
""")


def test_in_of_every_width_gives_what_the_vmm_says(mshv: Mshv) -> None:
    with Guest(mshv, IN) as guest:
        for port, size in ((0x60, 1), (0x1F0, 2), (0x1F0, 4)):
            message = must_be(guest.next(), IoPort, port=port, size=size, write=False, access=READ)
            check(guest.vp.register_page.rax, 0xFFFF_FFFF_FFFF_FFFF, "RAX is untouched")
            guest.reply(message, 0x8899AABB)
        guest.finish()
        rbx, rcx, rsi = guest.vp.get_registers("rbx", "rcx", "rsi")
        check([rbx, rcx, rsi], [0xFFFF_FFFF_FFFF_FFBB, 0xFFFF_FFFF_FFFF_AABB, 0x8899AABB])


def test_resumed_unchanged_the_same_intercept_comes_again(mshv: Mshv) -> None:
    with Guest(mshv, IN) as guest:
        first = guest.next()
        for _ in range(3):
            check(guest.next().payload, first.payload)


STRINGS = Code(f"""
    cld
    movw $0x100, %dx
    leaq {FREE:#x}, %rsi
    outsb
    movl $3, %ecx
    rep outsw
    movl $2, %ecx
    leaq {FREE + 0x100:#x}, %rdi
    rep insl
    std
    insb
    xorl %ecx, %ecx
    rep outsb                        /* nothing to do: no exit */
    done
""")


def test_string_forms_leave_registers_and_memory_to_the_vmm(mshv: Mshv) -> None:
    """The VMM moves the data; here as VMMs do it: all of it, then RCX, RSI or RDI, RIP."""
    with Guest(mshv, STRINGS) as guest:
        page = guest.vp.register_page
        message = must_be(
            guest.next(), IoPort, string=True, rep=False, write=True, size=1, rsi=FREE, port=0x100
        )
        page.rsi = FREE + 1
        guest.skip(message)
        message = must_be(
            guest.next(),
            IoPort,
            string=True,
            rep=True,
            write=True,
            size=2,
            rcx=3,
            rsi=FREE + 1,
            instruction_length=3,
        )
        assert isinstance(message, IoPort)
        check(message.ds, Segment.data(), "DS")
        page.rsi, page.rcx = FREE + 7, 0
        guest.skip(message)
        message = must_be(
            guest.next(), IoPort, string=True, rep=True, write=False, size=4, rcx=2, rdi=FREE + 0x100
        )
        assert isinstance(message, IoPort)
        check(message.es, Segment.data(), "ES")
        check(guest.vp.register_page.rcx, 2, "RCX is untouched")
        guest.write(FREE + 0x100, bytes(range(8)))
        page.rdi, page.rcx = FREE + 0x108, 0
        guest.skip(message)
        message = must_be(guest.next(), IoPort, string=True, rep=False, write=False, size=1, rdi=FREE + 0x108)
        assert isinstance(message, IoPort)
        check(message.rflags & 0x400, 0x400, "DF")
        page.rdi = FREE + 0x107
        guest.skip(message)
        guest.finish()


REP_ONE_BY_ONE = Code(f"""
    cld
    movw $0x100, %dx
    movl $5, %ecx
    leaq {FREE:#x}, %rsi
    rep outsb
    say %rcx
    done
""")


def test_rep_may_be_done_element_by_element(mshv: Mshv) -> None:
    """A VMM that does one element and leaves RIP gets the rest."""
    with Guest(mshv, REP_ONE_BY_ONE) as guest:
        for left in (5, 4, 3, 2, 1):
            message = must_be(guest.next(), IoPort, rcx=left, rsi=FREE + 5 - left, rep=True)
            page = guest.vp.register_page
            page.rcx, page.rsi = left - 1, FREE + 6 - left
            if left == 1:
                guest.skip(message)
        check(guest.finish(), [0])


REAL = Code(
    """
    movw $0x1234, %ax
    outb %al, $0x42
    movw $0x3F8, %dx
    outl %eax, %dx
    inw %dx, %ax
    movw %ax, %bx
    rep outsb
    done
    """,
    bits=16,
)


def test_ports_in_real_mode(mshv: Mshv) -> None:
    with Guest(mshv, REAL) as guest:
        message = must_be(
            guest.next(), IoPort, port=0x42, value=0x34, protected_mode=False, long_mode=False, rip=3
        )
        assert isinstance(message, IoPort)
        check((message.cs.selector, message.cs.base), (0x800, 0x8000), "CS")
        guest.skip(message)
        guest.skip(must_be(guest.next(), IoPort, port=0x3F8, size=4, instruction_length=2))
        guest.reply(must_be(guest.next(), IoPort, size=2, instruction_length=1), 0xBEEF)
        guest.vp.set_registers(rcx=2, rsi=0x10)
        message = must_be(guest.next(), IoPort, string=True, rep=True, rcx=2, rsi=0x10, size=1)
        guest.vp.register_page.rcx = 0
        guest.skip(message)
        guest.finish()
        check(guest.vp.get_registers("rbx")[0] & 0xFFFF, 0xBEEF)


ALL_REGISTERS = Code("""
    outb %al, $0x80
    done
""")
GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))


def test_intercept_leaves_every_register_alone(mshv: Mshv) -> None:
    with Guest(mshv, ALL_REGISTERS) as guest:
        values = {name: 0x1111_1111_1111_1111 * (n % 14 + 1) + n for n, name in enumerate(GENERAL)}
        xmm = {f"xmm{n}": (0xA5A5 << 112) + n for n in range(16)}
        guest.vp.set_registers(rflags=0xCD7, **values, **xmm)
        message = guest.next()
        assert isinstance(message, IoPort)
        check(guest.vp.get_registers(*GENERAL), list(values.values()), "general registers")
        check(guest.vp.get_registers(*xmm), list(xmm.values()), "XMM")
        check(guest.vp.get_registers("rflags", "rip"), [0xCD7, 0x40000])
        page = guest.vp.register_page
        check([getattr(page, name) for name in GENERAL], list(values.values()), "register page")
        check([page.xmm(n) for n in range(6)], list(xmm.values())[:6], "XMM in the page")


EVERY_PORT = Code("""
    xorl %ebx, %ebx
1:  movl %ebx, %edx
    inb %dx, %al
    addl $257, %ebx
    cmpl $65536, %ebx
    jb 1b
    done
""")


def test_every_port_is_the_vmms(mshv: Mshv) -> None:
    with Guest(mshv, EVERY_PORT) as guest:
        for port in range(0, 65536, 257):
            if port == 0xE0E0 & 0xFF:
                continue
            guest.reply(must_be(guest.run(), IoPort, port=port), 0)
        guest.finish()


WORDS = Code("""
1:  movw $0x604, %dx
    outw %ax, %dx
    outb %al, $0x70
    movw $0xCFE, %dx
    outw %ax, %dx
    outb %al, $0x70
    jmp 1b
""")


def test_root_has_time_to_act_upon_a_word_at_a_port(mshv: Mshv) -> None:
    # A guest powers off by such a word, and QEMU's processor thread must be in RUN_VP when QEMU stops it. The time is
    # a quarter of a second as long as the root is busy, and words for PCI configuration space are not held up.
    with Guest(mshv, WORDS) as guest, busy_root():
        waits: dict[int, list[float]] = {0x604: [], 0xCFE: []}
        for port in (0x604, 0xCFE) * 4:
            guest.skip(must_be(guest.next(), IoPort, port=port, size=2))
            began = time.monotonic()
            message = must_be(guest.next(), IoPort, port=0x70)
            waits[port].append(time.monotonic() - began)
            guest.skip(message)
    assert min(waits[0x604]) >= 0.24, waits
    assert min(waits[0xCFE]) < 0.24, waits


POLL = Code("""
    movw $0x604, %dx
    outw %ax, %dx
    movw $0x600, %dx
1:  inw %dx, %ax
    jmp 1b
""")


def test_guest_that_polls_after_such_a_word_waits_for_the_root(mshv: Mshv) -> None:
    # until the root has been idle for 50 ms; the first read may be all that the guest does
    with Guest(mshv, POLL) as guest:
        guest.skip(must_be(guest.next(), IoPort, port=0x604, size=2))
        for _ in range(2):
            guest.reply(must_be(guest.next(), IoPort, port=0x600, size=2), 0)
        for _ in range(3):
            began = time.monotonic()
            message = must_be(guest.next(), IoPort, port=0x600, size=2)
            passed = time.monotonic() - began
            assert passed >= 0.045, passed
            guest.reply(message, 0)


@contextmanager
def busy_root() -> Iterator[None]:
    """Every processor of the root has something to do."""
    children = []
    for cpu in os.sched_getaffinity(0):
        child = os.fork()
        if not child:
            os.sched_setaffinity(0, [cpu])
            while True:
                pass
        children.append(child)
    try:
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
