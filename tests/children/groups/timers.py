# SPDX-License-Identifier: Apache-2.0
"""Synthetic timers of a child that its VMM asked for; EOIs that are not needed; what an INIT by a sibling resets."""

from __future__ import annotations

import struct
import time

from rootvisor.mshv import Mshv, MshvError
from rootvisor.mshv.vp import STATE_LAPIC, STATE_SIMP, STATE_SYNTHETIC_TIMERS
from rootvisor.tlfs import partition_properties as properties
from rootvisor.tlfs import registers, status
from rootvisor.tlfs.vp_state import STIMER
from tests.children.code import DONE_PORT, Code
from tests.children.groups.interrupts import wait_for
from tests.children.groups.smp import TRAMPOLINE, UP
from tests.children.guest import (
    COUNTERS,
    FREE,
    QEMU_FEATURES,
    X2APIC_ON,
    Guest,
    Runner,
    check,
    interrupted_after,
    note,
)

#: Of ``rootvisor run``.
OPTIONS = ("--vps", "2", "--child-timers")
CONFIG, COUNT, NOW = 0x400000B0, 0x400000B1, 0x40000020
VECTOR, SINT_VECTOR = 0xE1, 0xE2
ENABLE, PERIODIC, AUTO, DIRECT = 1, 2, 8, 1 << 12 | VECTOR << 4
BY_MESSAGE = 2 << 16
MS = 10_000
SIMP = FREE + 0x1000


def sleep_until(vector: int, count: str) -> str:
    """Code that sleeps until a vector has come so often."""
    return f"""
1:  cli
    cmpq {count}, {COUNTERS + 8 * vector:#x}
    jae 2f
    sti
    hlt
    jmp 1b
2:
    """


#: R8 is the configuration; R9 the delay or period, R10 how many expiries.
TIMER = Code(f"""
    {X2APIC_ON}
    movq %r8, %rax
    set ${CONFIG:#x}
    get ${NOW:#x}
    movq %rax, %r12
    testq ${PERIODIC}, %r8
    jnz 3f
    addq %r9, %rax
    jmp 4f
3:  movq %r9, %rax
4:  set ${COUNT:#x}
    {sleep_until(VECTOR, "%r10")}
    get ${NOW:#x}
    subq %r12, %rax
    say %rax
    get ${CONFIG:#x}
    say %rax
    done
""")


def enabled(guest: Guest) -> bool:
    """Whether timer 0 is on, as the VMM sees it."""
    return bool(STIMER.unpack_from(guest.vp.get_state(STATE_SYNTHETIC_TIMERS))[2] & ENABLE)


def test_direct_one_shot_wakes_the_vp_after_its_time(mshv: Mshv) -> None:
    with Guest(mshv, TIMER, interrupts=True, features=QEMU_FEATURES) as guest:
        guest.vp.set_registers(r8=AUTO | DIRECT, r9=20 * MS, r10=1)
        late, config = guest.finish()
        assert late >= 20 * MS, f"{late / MS:.3f} ms"
        check(config, AUTO | DIRECT, "off after it")
        check(guest.interrupts_of(VECTOR), 1)
        note(f"20 ms took {late / MS:.1f} ms")


def test_direct_periodic_goes_on_and_keeps_its_phase(mshv: Mshv) -> None:
    with Guest(mshv, TIMER, interrupts=True, features=QEMU_FEATURES) as guest:
        guest.vp.set_registers(r8=ENABLE | PERIODIC | DIRECT, r9=5 * MS, r10=20)
        late, config = guest.finish()
        assert late >= 100 * MS, f"20 periods of 5 ms took {late / MS:.3f} ms"
        check(config, ENABLE | PERIODIC | DIRECT)
        _flags, _, config, count, due, expired = STIMER.unpack_from(
            guest.vp.get_state(STATE_SYNTHETIC_TIMERS)
        )
        check((config, count, expired), (ENABLE | PERIODIC | DIRECT, 5 * MS, 0))
        assert due > 100 * MS
        note(f"20 periods of 5 ms took {late / MS:.1f} ms")


#: Timer 1 by message, SINT 2; R9 the delay. What is said: the message, in four pieces.
MESSAGE = Code(f"""
    {X2APIC_ON}
    movl ${SIMP | 1:#x}, %eax
    set $0x40000083
    movl $1, %eax
    set $0x40000080
    movl ${SINT_VECTOR}, %eax
    set $0x40000092
    movl ${AUTO | BY_MESSAGE:#x}, %eax
    set ${CONFIG + 2:#x}
    get ${NOW:#x}
    addq %r9, %rax
    movq %rax, %r12
    set ${COUNT + 2:#x}
    {sleep_until(SINT_VECTOR, "$1")}
    get ${NOW:#x}
    cmpq {SIMP + 2 * 256 + 24 + 8:#x}, %rax
    jb 9f
    movq {SIMP + 2 * 256 + 24:#x}, %rbx
    cmpq %rbx, %r12
    jne 9f
    movl {SIMP + 2 * 256:#x}, %eax
    say %rax
    movl {SIMP + 2 * 256 + 16:#x}, %eax
    say %rax
    done
9:  ud2
""")


def test_message_of_a_timer(mshv: Mshv) -> None:
    with Guest(mshv, MESSAGE, interrupts=True, features=QEMU_FEATURES) as guest:
        guest.vp.set_registers(r9=10 * MS)
        check(guest.finish(), [0x80000010, 1], "type, timer")


def test_message_waits_for_its_slot_and_the_state_says_so(mshv: Mshv) -> None:
    """A busy slot: the expiry is undelivered, also over a copy of the state, and comes when the slot is free."""
    with Guest(mshv, MESSAGE, interrupts=True, features=QEMU_FEATURES) as guest:
        guest.vp.set_registers(r9=10 * MS)
        guest.finish()
        guest.vp.set_registers({registers.STIMER0_COUNT + 2: 1})  # long ago; the slot still has the first
        state = guest.vp.get_state(STATE_SYNTHETIC_TIMERS)
        check(STIMER.unpack_from(state, 40), (1, 0, AUTO | ENABLE | BY_MESSAGE, 1, 0, 1), "undelivered")
        guest.load(IDLE)
        check(interrupted_after(guest.vp, 0.05), True)
        check(guest.vp.get_state(STATE_SYNTHETIC_TIMERS), state)
        guest.vp.set_state(STATE_SYNTHETIC_TIMERS, state)
        check(guest.vp.get_state(STATE_SYNTHETIC_TIMERS), state)
        page = bytearray(guest.vp.get_state(STATE_SIMP))
        page[2 * 256 : 3 * 256] = bytes(256)
        guest.vp.set_state(STATE_SIMP, bytes(page))
        runner = Runner(guest, guest.vp).start()
        wait_for(guest, SINT_VECTOR, 2)
        check(runner.stop(), None)
        check(guest.vp.get_state(STATE_SYNTHETIC_TIMERS)[40], 0)


IDLE = Code(f"""
    {X2APIC_ON}
    sti
1:  hlt
    jmp 1b
""")


#: Sets timer 0 to R8 and R9 after now, says so, and sleeps.
ARMED = Code(f"""
    {X2APIC_ON}
    movq %r8, %rax
    set ${CONFIG:#x}
    testq ${PERIODIC}, %r8
    jnz 3f
    get ${NOW:#x}
    addq %rax, %r9
3:  movq %r9, %rax
    set ${COUNT:#x}
    outb %al, $0x70
    sti
4:  hlt
    jmp 4b
""")


def armed(guest: Guest, config: int, delay: int) -> None:
    """Runs until timer 0 is set; the VP stands still then."""
    guest.vp.set_registers(r8=config, r9=delay)
    guest.skip(guest.next())


def test_frozen_time_has_no_expiry_and_what_is_left_of_it_comes_afterwards(mshv: Mshv) -> None:
    with Guest(mshv, ARMED, interrupts=True, features=QEMU_FEATURES) as guest:
        armed(guest, AUTO | DIRECT, 200 * MS)
        guest.partition.freeze_time(True)
        time.sleep(0.3)  # longer than the delay: time stands still
        check(enabled(guest), True, "still on")
        check(any(guest.vp.get_state(STATE_LAPIC)[4 * 21 : 4 * 29]), False, "nothing requested")
        guest.partition.freeze_time(False)
        runner = Runner(guest, guest.vp).start()
        wait_for(guest, VECTOR)
        check(runner.stop(), None)
        check(enabled(guest), False)


def test_timer_of_a_suspended_vp_expires_and_its_interrupt_waits(mshv: Mshv) -> None:
    with Guest(mshv, ARMED, interrupts=True, features=QEMU_FEATURES) as guest:
        armed(guest, AUTO | DIRECT, 20 * MS)
        deadline = time.monotonic() + 10
        while enabled(guest):
            assert time.monotonic() < deadline
        check(guest.interrupts_of(VECTOR), 0)
        runner = Runner(guest, guest.vp).start()
        wait_for(guest, VECTOR)
        check(runner.stop(), None)


def test_state_of_timers_moves_to_another_partition(mshv: Mshv) -> None:
    """What a VMM does to restore a guest: reference time, TSC, the local APIC, timers, then the thaw."""
    for config, delay in ((AUTO | DIRECT, 50 * MS), (ENABLE | PERIODIC | DIRECT, 50 * MS)):
        with Guest(mshv, ARMED, interrupts=True, features=QEMU_FEATURES) as old:
            armed(old, config, delay)
            old.partition.freeze_time(True)
            registers = old.vp.get_registers("rip", "rsp", "r8", "r9", "apic_base", "tsc")
            states = {kind: old.vp.get_state(kind) for kind in (STATE_LAPIC, STATE_SYNTHETIC_TIMERS)}
            moment = old.partition.get_property(properties.REFERENCE_TIME)
        with Guest(mshv, ARMED, interrupts=True, features=QEMU_FEATURES) as guest:
            guest.partition.freeze_time(True)
            guest.partition.set_property(properties.REFERENCE_TIME, moment)
            names = ("apic_base", "rip", "rsp", "r8", "r9")
            values = dict(zip(("rip", "rsp", "r8", "r9", "apic_base", "tsc"), registers, strict=True))
            guest.vp.set_registers({name: values[name] for name in names})
            for kind, state in states.items():
                guest.vp.set_state(kind, state)
                check(guest.vp.get_state(kind), state, f"state {kind}")
            guest.vp.set_registers(tsc=values["tsc"])
            guest.partition.freeze_time(False)
            runner = Runner(guest, guest.vp).start()
            wait_for(guest, VECTOR, 3 if config & PERIODIC else 1)
            check(runner.stop(), None)
            check(enabled(guest), bool(config & PERIODIC))


def test_partition_goes_with_armed_timers(mshv: Mshv) -> None:
    """Armed, expiring all the time, while the VP runs, sleeps or stands still; VMs and VPs go."""
    for number in range(6):
        with Guest(mshv, ARMED, interrupts=True, features=QEMU_FEATURES) as guest:
            armed(guest, ENABLE | PERIODIC | DIRECT, (1, 600_000_000)[number & 1] * (number // 2 * MS + 1))
            if number % 3 == 0:
                runner = Runner(guest, guest.vp).start()
                interrupted_after_some(guest)
                check(runner.stop(), None)


def interrupted_after_some(guest: Guest) -> None:
    """Gives a timer time to expire."""
    deadline = time.monotonic() + 0.05
    while not guest.interrupts_of(VECTOR) and time.monotonic() < deadline:
        time.sleep(0.001)


#: RBX: an MSR to write RAX to; a #GP is said by the handler at port 0xE1.
WRITE = Code("""
    movq %r8, %rax
    set %ebx
    done
""")
READ = Code("""
    movl %ebx, %ecx
    rdmsr
    done
""")


def test_timers_that_were_not_asked_for_are_not_there(mshv: Mshv) -> None:
    """CPUID and #GP go together: without the bit no timers, without that of direct mode no direct mode."""
    without, by_message = QEMU_FEATURES & ~0x20, QEMU_FEATURES & ~(1 << 22)
    for code, features, number, value, allowed in (
        (WRITE, without, CONFIG, 0, False), (WRITE, without, COUNT + 6, 1, False), (READ, without, CONFIG, 0, False),
        (WRITE, by_message, CONFIG, DIRECT, False), (READ, by_message, CONFIG, 0, True),
        (WRITE, QEMU_FEATURES, CONFIG, DIRECT, True), (WRITE, QEMU_FEATURES, CONFIG + 8, 0, False),
    ):  # fmt: skip
        with Guest(mshv, code, interrupts=True, features=features) as guest:
            guest.vp.set_registers(rbx=number, r8=value)
            leaf = guest.vp.cpuid(0x40000003)
            check(bool(leaf[0] & 8), bool(features & 0x20), "privilege")
            check(bool(leaf[3] & 1 << 19), features & 0x400020 == 0x400020, "direct mode")
            message = guest.next()
            check(message.port, DONE_PORT if allowed else 0xE1, f"{features:#x} {number:#x}")  # type: ignore[attr-defined]


#: An INIT and a SIPI for VP 1, once it has set up its registers; R8 is not 0 once VP 1 has begun anew.
PARENT = Code(f"""
    {X2APIC_ON}
    movl $0x830, %ecx
    movl $1, %edx
    movl $0x4500, %eax
    wrmsr
    outb %al, $0x70                 /* the VMM looks */
    movl $0x830, %ecx
    movl $1, %edx
    movl $0x4608, %eax
    wrmsr
1:  pause
    cmpl $1, {UP:#x}
    jb 1b
    done
""")
#: VP 1: SynIC, a periodic timer and the assist page on.
SIBLING = Code(
    f"""
    {X2APIC_ON}
    movl ${SIMP | 1:#x}, %eax
    set $0x40000083
    movl ${SIMP + 0x1001:#x}, %eax
    set $0x40000082
    movl $1, %eax
    set $0x40000080
    movl ${SINT_VECTOR}, %eax
    set $0x40000092
    movl ${SIMP + 0x2001:#x}, %eax
    set $0x40000073
    movl $10000000, %eax
    set ${COUNT:#x}
    movl ${ENABLE | PERIODIC | DIRECT:#x}, %eax
    set ${CONFIG:#x}
    outb %al, $0x71
1:  pause
    jmp 1b
    """,
    base=0x50000,
)
RESET_BY_INIT = ("scontrol", "simp", "siefp", "sint2", "vp_assist_page", "stimer0_config", "stimer0_count")


def test_init_by_a_sibling_resets_the_hypervisors_registers(mshv: Mshv) -> None:
    """While VP 1 waits for a SIPI a message of the VMM's is refused; then its registers are as after creation."""
    with Guest(mshv, PARENT, vps=2, interrupts=True, features=QEMU_FEATURES) as guest:
        guest.write(TRAMPOLINE.base, TRAMPOLINE.image)
        guest.write(SIBLING.base, SIBLING.image)
        sibling = guest.vps[1]
        guest.long_mode(sibling, SIBLING.base, internal_activity_state=0)
        guest.skip(guest.next(sibling), sibling)
        check(guest.partition.signal_event(1, 2, 7), True)
        guest.partition.post_message(1, 2, 1, b"before")
        runner = Runner(guest, sibling).start()
        guest.skip(guest.next())
        for call, arguments in (
            (guest.partition.signal_event, (1, 2, 8)), (guest.partition.post_message, (1, 2, 1, b"after")),
        ):  # fmt: skip
            try:
                call(*arguments)
            except MshvError as error:
                check(error.status, status.INVALID_SYNIC_STATE, str(error))
            else:
                raise AssertionError(f"{call.__name__} reached a VP that waits for a SIPI")
        guest.finish()
        check(runner.stop(), None)
        got = sibling.get_registers(*RESET_BY_INIT)
        check(got, [0, 0, 0, 0x10000, 0, 0, 0])
        check(guest.u64(SIMP + 0x1000 + 2 * 256), 0, "the page below, not the one with the flag")


#: R8 interrupts of vector 0x50 to itself, each ended by the hypervisor's register unless the assist page says that it
#: needs no end. RBX: EOIs left out.
LAZY = Code(f"""
    {X2APIC_ON}
    movl ${SIMP | 1:#x}, %eax
    set $0x40000073
    lidt lazy_idt(%rip)
    leaq lazy_handler(%rip), %rax
    movw %ax, lazy_gate(%rip)
    shrq $16, %rax
    movw %ax, lazy_gate + 6(%rip)
    xorl %ebx, %ebx
    sti
1:  movl $0x83F, %ecx
    movl $0x50, %eax
    xorl %edx, %edx
    wrmsr
    nop
    decq %r8
    jnz 1b
    say %rbx
    done
lazy_handler:
    pushq %rax
    pushq %rcx
    pushq %rdx
    incq {FREE:#x}
    btrl $0, {SIMP:#x}
    jc 2f
    xorl %eax, %eax
    set $0x40000070
    jmp 3f
2:  incq %rbx
3:  popq %rdx
    popq %rcx
    popq %rax
    iretq
lazy_idt: .word 0xFFF
    .quad lazy_table
    .balign 16
lazy_table:
    .fill 0x50 * 16, 1, 0
lazy_gate:
    .word 0, 8, 0x8E00, 0
    .quad 0
""")


def test_interrupts_that_need_no_eoi(mshv: Mshv) -> None:
    """KVM says so where the end of an interrupt would be an exit, and CPUID recommends the register exactly then."""
    with Guest(mshv, LAZY, features=QEMU_FEATURES) as guest:
        guest.vp.set_registers(r8=1000)
        offered = bool(guest.vp.cpuid(0x40000004)[0] & 8)
        (left_out,) = guest.finish()
        check(guest.u64(FREE), 1000, "interrupts")
        note(f"{left_out} of 1000 EOIs left out{'' if offered else ' (not offered)'}")
        check(left_out > 500, offered)
    with Guest(mshv, LAZY, interrupts=True, features=QEMU_FEATURES & ~0x40) as guest:
        check(guest.vp.cpuid(0x40000004)[0] & 8, 0, "without the APIC's registers")


def test_vp_with_a_timer_far_away_sleeps(mshv: Mshv) -> None:
    with Guest(mshv, ARMED, interrupts=True, features=QEMU_FEATURES) as guest:
        armed(guest, AUTO | DIRECT, 1 << 40)
        check(interrupted_after(guest.vp, 0.2), True)
        check(struct.unpack_from("<I", guest.vp.get_state(STATE_SYNTHETIC_TIMERS))[0], 0)
        check(guest.interrupts_of(VECTOR), 0)
