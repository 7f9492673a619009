# SPDX-License-Identifier: Apache-2.0
"""Interrupts: asserted by call, by eventfd, message routes; level-triggered ones and their end; doorbells; SynIC."""

from __future__ import annotations

import os
import time

from rootvisor.mshv import EXTINT, NMI, ApicEoi, IoPort, Mshv, MshvError, SintDeliverable
from rootvisor.tlfs import intercepts, registers
from rootvisor.tlfs.messages import MESSAGE_HEADER
from tests.children.code import Code
from tests.children.guest import (
    FREE,
    QEMU_FEATURES,
    X2APIC_ON,
    Guest,
    Runner,
    check,
    must_be,
    note,
)

IDLE = Code(f"""
    {X2APIC_ON}
    outb %al, $0x70                 /* ready */
    sti
1:  hlt
    jmp 1b
""")
MSI = 0xFEE00000


def ready(guest: Guest) -> Runner:
    """Runs the guest until it sleeps with interrupts open."""
    guest.skip(must_be(guest.next(), IoPort, port=0x70))
    return Runner(guest, guest.vp).start()


def wait_for(guest: Guest, vector: int, count: int = 1, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while guest.interrupts_of(vector) < count:
        assert time.monotonic() < deadline, (
            f"vector {vector:#x} came {guest.interrupts_of(vector)} times, not {count}"
        )
        time.sleep(0.001)


def test_interrupt_wakes_a_halted_vp(mshv: Mshv) -> None:
    with Guest(mshv, IDLE, interrupts=True) as guest:
        runner = ready(guest)
        for number in range(1, 21):
            guest.partition.assert_interrupt(0x40)
            wait_for(guest, 0x40, number)
        check(runner.stop(), None)
        check(guest.interrupts_of(0x40), 20)


def test_nmi(mshv: Mshv) -> None:
    with Guest(mshv, IDLE, interrupts=True) as guest:
        runner = ready(guest)
        guest.partition.assert_interrupt(0, kind=NMI)
        wait_for(guest, 2)
        check(runner.stop(), None)


#: LINT0 brings ExtINT, as firmware leaves it.
WIRED = Code(f"""
    {X2APIC_ON}
    movl $0x700, %eax
    set $0x835
    outb %al, $0x70                 /* ready */
    sti
1:  hlt
    jmp 1b
""")


def test_extint_is_taken_once_and_one_that_was_cleared_is_not(mshv: Mshv) -> None:
    with Guest(mshv, WIRED, interrupts=True) as guest:
        message = must_be(guest.next(), IoPort, port=0x70)
        page = guest.vp.map_message_page()
        check(page.readonly, True)
        check(
            MESSAGE_HEADER.unpack_from(page)[0], intercepts.X64_IO_PORT_INTERCEPT, "the last message, mapped"
        )
        guest.partition.assert_interrupt(0x41, kind=EXTINT)
        guest.partition.clear_interrupt()
        guest.skip(message)
        runner = Runner(guest, guest.vp).start()
        guest.partition.assert_interrupt(0x42)
        wait_for(guest, 0x42)
        check(guest.interrupts_of(0x41), 0, "cleared before it was taken")
        for number in range(1, 31):
            guest.partition.assert_interrupt(0x41, kind=EXTINT)
            wait_for(guest, 0x41, number)
        guest.partition.clear_interrupt()  # nothing to take back
        guest.partition.assert_interrupt(0x42)
        wait_for(guest, 0x42, 2)
        check(guest.interrupts_of(0x41), 30)
        check(runner.stop(), None)


def test_irqfd_by_its_route(mshv: Mshv) -> None:
    with Guest(mshv, IDLE, interrupts=True) as guest:
        one, two = os.eventfd(0), os.eventfd(0)
        guest.partition.set_msi_routing([(5, MSI, 0x51), (4095, MSI, 0x52)])
        guest.partition.add_irqfd(one, 5)
        guest.partition.add_irqfd(two, 4095)
        runner = ready(guest)
        started = time.monotonic()
        for number in range(1, 51):
            os.eventfd_write(one, 1)
            wait_for(guest, 0x51, number)
        note(f"{(time.monotonic() - started) / 50 * 1000:.2f} ms per irqfd, with the wait for it")
        os.eventfd_write(two, 1)
        wait_for(guest, 0x52)
        guest.partition.set_msi_routing([(5, MSI, 0x53)])  # another route takes effect at once
        os.eventfd_write(one, 1)
        wait_for(guest, 0x53)
        guest.partition.remove_irqfd(one, 5)
        os.eventfd_write(one, 1)
        guest.partition.assert_interrupt(0x54)
        wait_for(guest, 0x54)
        check(guest.interrupts_of(0x53), 1, "the eventfd that was taken off")
        check(runner.stop(), None)
        for fd in (one, two):
            os.close(fd)


def test_interrupt_before_the_vp_runs_waits_for_it(mshv: Mshv) -> None:
    with Guest(mshv, IDLE, interrupts=True) as guest:
        guest.skip(must_be(guest.next(), IoPort, port=0x70))
        fd = os.eventfd(0)
        guest.partition.set_msi_routing([(1, MSI, 0x45)])
        guest.partition.add_irqfd(fd, 1)
        os.eventfd_write(fd, 1)
        guest.partition.assert_interrupt(0x46)
        check(guest.interrupts_of(0x45), 0)
        runner = Runner(guest, guest.vp).start()
        wait_for(guest, 0x45)
        wait_for(guest, 0x46)
        check(runner.stop(), None)
        os.close(fd)


def test_bad_interrupts_are_refused(mshv: Mshv) -> None:
    with Guest(mshv, IDLE) as guest:
        for vector, kind in ((3, 0), (300, 0), (0x40, 2), (0x40, 99)):
            try:
                guest.partition.assert_interrupt(vector, kind=kind)
            except MshvError as error:
                check(error.status, 5)
            else:
                raise AssertionError(f"vector {vector:#x} of type {kind} was accepted")
        for routes in ([(4096, MSI, 0x40)], [(1, 1 << 32 | MSI, 0x40)]):
            try:
                guest.partition.set_msi_routing(routes)
            except MshvError as error:
                check(error.errno, 22)
            else:
                raise AssertionError(f"{routes} was accepted")


def test_level_triggered_interrupt_has_its_end_told(mshv: Mshv) -> None:
    with Guest(mshv, IDLE, interrupts=True) as guest:
        runner = ready(guest)
        for number in range(1, 4):
            guest.partition.assert_interrupt(0x61, level=True)
            must_be(runner.wait(), ApicEoi, vector=0x61, vp_index=0)  # type: ignore[arg-type]
            check(guest.interrupts_of(0x61), number)
            runner = Runner(guest, guest.vp).start()
        guest.partition.assert_interrupt(0x62)
        wait_for(guest, 0x62)
        check(runner.stop(), None, "an edge-triggered one is not told")


def test_level_triggered_route_of_an_irqfd(mshv: Mshv) -> None:
    """The EOI comes as an exit: the driver signals a resample eventfd only on messages that it would block on
    (docs/develop/children.md)."""
    with Guest(mshv, IDLE, interrupts=True) as guest:
        fd, again = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
        guest.partition.set_msi_routing([(9, MSI, 0x63 | 1 << 15 | 1 << 14)])
        guest.partition.add_irqfd(fd, 9, resample=again)
        runner = ready(guest)
        os.eventfd_write(fd, 1)
        must_be(runner.wait(), ApicEoi, vector=0x63)  # type: ignore[arg-type]
        check(guest.interrupts_of(0x63), 1)
        for one in (fd, again):
            os.close(one)


def test_interrupts_at_a_vp_that_computes(mshv: Mshv) -> None:
    with Guest(mshv, BUSY, interrupts=True) as guest:
        runner = ready(guest)
        for number in range(1, 31):
            guest.partition.assert_interrupt(0x48)
            wait_for(guest, 0x48, number)
        check(runner.stop(), None)
        assert guest.vp.get_registers("rbx")[0] > 0


BUSY = Code(f"""
    {X2APIC_ON}
    xorl %ebx, %ebx
    outb %al, $0x70
    sti
1:  incq %rbx
    jmp 1b
""")
TIMER = Code(f"""
    {X2APIC_ON}
    movl $0x83E, %ecx
    movl $0xB, %eax                 /* divide by 1: 1 ns */
    xorl %edx, %edx
    wrmsr
    movl $0x832, %ecx
    movl $0x20070, %eax             /* periodic, vector 0x70 */
    wrmsr
    movl $0x838, %ecx
    movl $10000000, %eax
    wrmsr
    sti
1:  hlt
    cmpq $10, {0xB000 + 8 * 0x70:#x}
    jb 1b
    done
""")


def test_local_apic_timer_wakes_a_halted_vp(mshv: Mshv) -> None:
    with Guest(mshv, TIMER, interrupts=True) as guest:
        started = time.monotonic()
        guest.finish()
        seconds = time.monotonic() - started
        assert seconds >= 0.09, f"10 periods of 10 ms took {seconds:.3f} s"
        note(f"10 periods of 10 ms took {seconds:.3f} s")


RING = Code("""
1:  movl %eax, (%rbx)
    movw %ax, 8(%rbx)
    decl %ecx
    jnz 1b
    done
""")


def test_doorbells_ring_their_eventfds(mshv: Mshv) -> None:
    """Two queues of a device: 200 writes to each are no exit, and none of the eventfds stays silent."""
    with Guest(mshv, RING) as guest:
        one, two = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        guest.partition.add_doorbell(0x50000000, one, 4, 3)
        guest.partition.add_doorbell(0x50000008, two, 2)
        guest.vp.set_registers(rbx=0x50000000, rax=3, rcx=200)
        started = time.monotonic()
        guest.finish()
        note(f"{(time.monotonic() - started) / 400 * 1e6:.0f} us per doorbell")
        for fd in (one, two):
            guest.wait_event(fd)
        guest.partition.remove_doorbell(0x50000000, one, 4, 3)
        guest.load(RING)
        guest.vp.set_registers(rbx=0x50000000, rax=3, rcx=1)
        message = guest.next()
        check(message.gpa, 0x50000000)  # type: ignore[attr-defined]
        for fd in (one, two):
            os.close(fd)


def test_doorbells_that_are_there_already_or_not_at_all(mshv: Mshv) -> None:
    with Guest(mshv) as guest:
        fd = os.eventfd(0)
        guest.partition.add_doorbell(0x50000000, fd)
        for call, arguments, wanted in (
            (guest.partition.add_doorbell, (0x50000000, fd), 17),
            (guest.partition.remove_doorbell, (0x50000010, fd), 2),
            (guest.partition.remove_doorbell, (0x50000000, fd, 4), 2),
        ):
            try:
                call(*arguments)
            except MshvError as error:
                check(error.errno, wanted)
            else:
                raise AssertionError(f"{call.__name__}{arguments} succeeded")
        guest.partition.remove_doorbell(0x50000000, fd)
        os.close(fd)


SYNIC = Code(f"""
    {X2APIC_ON}
    outb %al, $0x70
    sti
1:  hlt
    jmp 1b
""")


def test_event_flags_and_messages_of_the_vmm_reach_the_guest(mshv: Mshv) -> None:
    with Guest(mshv, SYNIC, interrupts=True, features=QEMU_FEATURES) as guest:
        guest.skip(must_be(guest.next(), IoPort, port=0x70))
        simp, siefp = FREE, FREE + 0x1000
        guest.vp.set_registers(simp=simp | 1, siefp=siefp | 1, scontrol=1, sint2=0x82)
        runner = Runner(guest, guest.vp).start()
        check(guest.partition.signal_event(0, 2, 77), True)
        check(guest.partition.signal_event(0, 2, 77), False, "set already")
        wait_for(guest, 0x82)
        guest.partition.post_message(0, 2, 1, b"hello")
        wait_for(guest, 0x82, 2)
        try:
            guest.partition.post_message(0, 2, 1, b"again")
        except MshvError:
            pass
        else:
            raise AssertionError("a message went into a slot in use")
        check(runner.stop(), None)
        guest.vp.set_registers({registers.DELIVERABILITY_NOTIFICATIONS: 1 << 50})
        guest.vp.set_registers(eom=0)
        state = guest.vp.get_state(2)
        check(state[2 * 256 + 16 : 2 * 256 + 21], b"hello", "the slot of SINT2")
        check(guest.vp.get_state(3)[2 * 256 + 9], 1 << 5, "flag 77 of SINT2")
        cleared = bytearray(state)
        cleared[512:768] = bytes(256)
        guest.vp.set_state(2, bytes(cleared))
        message = must_be(guest.next(), SintDeliverable)
        check(message.sints, 4)  # type: ignore[attr-defined]
        for sint, flag in ((16, 0), (2, 2048)):
            try:
                guest.partition.signal_event(0, sint, flag)
            except MshvError as error:
                assert error.status
            else:
                raise AssertionError(f"flag {flag} of SINT {sint} was set")
