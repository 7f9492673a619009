# SPDX-License-Identifier: Apache-2.0
"""Registers by call and by page, VP state (LAPIC, XSAVE, SIMP, SIEFP, timers), address translation, CPUID values."""

from __future__ import annotations

import struct

from rootvisor.mshv import (
    STATE_LAPIC,
    STATE_SIEFP,
    STATE_SIMP,
    STATE_SYNTHETIC_TIMERS,
    STATE_XSAVE,
    IoPort,
    Mshv,
    MshvError,
    Segment,
    Table,
)
from rootvisor.tlfs import registers as names
from rootvisor.tlfs import status, translation
from tests.children.code import BASE, Code
from tests.children.guest import (
    FREE,
    GDT,
    PAGE_TABLES,
    QEMU_FEATURES,
    Guest,
    Runner,
    check,
    interrupted_after,
    must_be,
)

STOP = Code("""
1:  outb %al, $0x70
    jmp 1b
""")


def test_state_after_create_vp(mshv: Mshv) -> None:
    with Guest(mshv, vps=2) as guest:
        for vp in guest.vps:
            values = vp.get_registers(
                "explicit_suspend", "intercept_suspend", "rip", "rflags", "cr0", "efer", "cr8"
            )
            check(values, [1, 0, 0xFFF0, 2, 0x60000010, 0, 0])
            code = vp.get_segment("cs")
            check(
                (code.base, code.limit, code.selector, code.attributes | 1),
                (0xFFFF0000, 0xFFFF, 0xF000, 0x9B),
            )
            check(vp.get_table("idtr"), Table(0, 0xFFFF))
            (base,) = vp.get_registers("apic_base")
            check(base, 0xFEE00800 | (0 if vp.index else 0x100), "APIC base")
            lapic = struct.unpack_from("<44I", vp.get_state(STATE_LAPIC))
            check(lapic[0], vp.index << 24, "APIC id")
            check(lapic[4], 0xFF, "spurious vector")
            check([lapic[n] & 0x10000 for n in (32, 35, 36, 37)], [0x10000] * 4, "masked entries")
            page = vp.register_page
            check((page.version, page.valid, page.dirty), (1, True, 0))
            check((page.rip, page.rflags, page.cr0), (0xFFF0, 2, 0x60000010), "the page is filled")
            check(page.rdx & 0xF00 != 0, True, "family in RDX")
        check([vp.get_registers("internal_activity_state")[0] for vp in guest.vps], [0, 1])


def test_registers_come_back_as_they_were_set(mshv: Mshv) -> None:
    with Guest(mshv, STOP) as guest:
        values: dict[str | int, int] = {
            "rax": 1 << 63, "r15": 0x1234567890, "rflags": 0xCD7, "cr2": 0xFFFF800000001234, "cr8": 7,
            "xmm0": (1 << 127) + 5, "xmm15": 0xA5 << 64, "fp_mmx3": 0x3FFF_8000_0000_0000_0000,
            "dr0": 0x1000, "dr3": 0x3000, "dr6": 0xFFFF0FF1, "dr7": 0x402,
            "kernel_gs_base": 0xFFFF888000000000, "pat": 0x0007040600070406, "sysenter_cs": 0x10,
            "sysenter_eip": 0x81000000, "sysenter_esp": 0x123000, "star": 0x23001000000000,
            "lstar": 0xFFFFFFFF81000100, "cstar": 0xFFFFFFFF81000200, "sfmask": 0x47700,
            "mtrr_def_type": 0xC06, "mtrr_phys_base0": 0x80000000, "mtrr_phys_mask0": 0xFF80000800,
        }  # fmt: skip
        guest.vp.set_registers(dict(values))
        check(guest.vp.get_registers(*values), list(values.values()))
        guest.next()
        check(guest.vp.get_registers(*values), list(values.values()), "after it has run")


def test_order_of_control_registers_does_not_matter(mshv: Mshv) -> None:
    """CR0 with paging comes before EFER in all VMMs; only the end of the call, or the resume, is looked at."""
    with Guest(mshv) as guest:
        guest.write(BASE, b"\xe6\x70")
        guest.vp.set_registers(cr0=0x80050033)
        guest.vp.set_registers(cr3=PAGE_TABLES)
        guest.vp.set_registers(cr4=0x6A0)
        guest.vp.set_registers(efer=0xD00, cs=Segment.code64(), tr=Segment.tss(), rip=BASE)
        must_be(guest.next(), IoPort, port=0x70, long_mode=True)
        check(guest.vp.get_registers("efer"), [0xD00])


def test_bad_registers_have_their_status_and_count(mshv: Mshv) -> None:
    with Guest(mshv) as guest:
        cases: tuple[tuple[dict[str | int, int | Segment | Table], int, int], ...] = (
            ({"rax": 1, 0x00012345: 0}, status.INVALID_PARAMETER, 1),
            ({"rax": 2, "rbx": 3, "apic_base": 1 << 60}, status.INVALID_REGISTER_VALUE, 2),
            ({"explicit_suspend": 2}, status.INVALID_REGISTER_VALUE, 0),
            ({"dr7": 1 << 40}, status.INVALID_REGISTER_VALUE, 0),
            ({"deliverability_notifications": 1}, status.INVALID_PARAMETER, 0),
        )
        for values, wanted, done in cases:
            try:
                guest.vp.set_registers(values)
            except MshvError as error:
                check((error.status, error.reps), (wanted, done), str(values))
            else:
                raise AssertionError(f"{values} was accepted")
        check(guest.vp.get_registers("rax", "rbx"), [2, 3], "elements before the bad one")
        try:
            guest.vp.get_registers("rip", 0x00012345)
        except MshvError as error:
            check((error.status, error.reps), (status.INVALID_PARAMETER, 1))


def test_register_page_is_taken_class_by_class(mshv: Mshv) -> None:
    with Guest(mshv, STOP) as guest:
        page = guest.vp.register_page
        message = guest.next()
        assert isinstance(message, IoPort)
        guest.vp.set_registers(rbx=5, xmm1=9)
        check((page.rbx, page.xmm(1), page.dirty), (5, 9, 0), "the page after a call")
        page.u64[2] = 0x99  # RCX, without its mark: not taken
        guest.vp.set_registers(rdx=1)
        check((page.rcx, guest.vp.get_registers("rcx")[0]), (0, 0), "what was not marked")
        page.rcx = 0x77
        page.set_xmm(2, 0x1234)
        check(page.dirty, names.DIRTY_GENERAL | names.DIRTY_XMM)
        # a call takes the page first, then its own values, then fills the page
        guest.vp.set_registers(rdx=0x88)
        check((page.rcx, page.rdx, page.dirty), (0x77, 0x88, 0))
        check(guest.vp.get_registers("rcx", "rdx", "xmm2"), [0x77, 0x88, 0x1234])
        page.rflags = 0x893
        page.rip = message.rip + 2
        page.ds = Segment(0x1000, 0xFFFFFFFF, 0x10, 0xC093)
        again = guest.next()
        assert isinstance(again, IoPort)
        check((again.rip, again.rflags), (message.rip, 0x893), "JMP went back to the OUT")
        check(again.ds.base, 0x1000)
        check((page.dirty, page.valid), (0, True))


def test_lapic_state_comes_back_as_it_was(mshv: Mshv) -> None:
    with Guest(mshv, STOP) as guest:
        guest.next()
        state = bytearray(guest.vp.get_state(STATE_LAPIC))
        check(len(state), 4096)
        check(any(state[176:]), False, "the rest is zero")
        for index, value in ((4, 0x1FF), (32, 0x10030), (35, 0x10700), (36, 0x400), (40, 1000), (42, 0xB)):
            struct.pack_into("<I", state, index * 4, value)
        guest.vp.set_state(STATE_LAPIC, bytes(state))
        got = guest.vp.get_state(STATE_LAPIC)
        words = struct.unpack_from("<44I", got)
        check((words[4], words[32], words[35], words[36], words[42]), (0x1FF, 0x10030, 0x10700, 0x400, 0xB))
        for _ in range(3):
            check(guest.vp.get_state(STATE_LAPIC), got, "stable while the VP stands")
        guest.vp.set_state(STATE_LAPIC, got)
        check(guest.vp.get_state(STATE_LAPIC), got)


def test_all_states_come_back_byte_by_byte(mshv: Mshv) -> None:
    with Guest(mshv, STOP, features=QEMU_FEATURES) as guest:
        guest.next()
        for kind, size in (
            (STATE_LAPIC, 4096), (STATE_XSAVE, None), (STATE_SIMP, 4096), (STATE_SIEFP, 4096),
            (STATE_SYNTHETIC_TIMERS, 200),
        ):  # fmt: skip
            state = guest.vp.get_state(kind)
            if size is not None:
                check(len(state), size, f"size of state {kind}")
            guest.vp.set_state(kind, state)
            check(guest.vp.get_state(kind), state, f"state {kind}")


XMM = Code("""
    movq %rbx, %xmm7
    movups %xmm7, %xmm9
    outb %al, $0x70
    movups %xmm7, 0x80000
    done
""")


def test_xsave_state_is_a_compacted_image_of_the_registers(mshv: Mshv) -> None:
    with Guest(mshv, XMM) as guest:
        guest.vp.set_registers(rbx=0x1122334455667788)
        message = guest.next()
        state = bytearray(guest.vp.get_state(STATE_XSAVE))
        assert len(state) <= 4096
        present, layout = struct.unpack_from("<QQ", state, 512)
        check(layout >> 63, 1, "compacted")
        check(present & ~layout, 0)
        check(struct.unpack_from("<Q", state, 160 + 7 * 16), (0x1122334455667788,), "XMM7")
        check(struct.unpack_from("<Q", state, 160 + 9 * 16), (0x1122334455667788,), "XMM9")
        struct.pack_into("<QQ", state, 160 + 7 * 16, 5, 6)
        struct.pack_into("<Q", state, 512, present | 2)
        guest.vp.set_state(STATE_XSAVE, bytes(state))
        guest.skip(message)
        guest.finish()
        check(guest.read(FREE, 16), struct.pack("<QQ", 5, 6))


def test_simp_and_siefp_once_the_guest_has_enabled_them(mshv: Mshv) -> None:
    with Guest(mshv, STOP, features=QEMU_FEATURES) as guest:
        guest.next()
        guest.vp.set_registers(simp=FREE | 1, siefp=FREE + 0x1000 | 1, scontrol=1)
        for kind in (STATE_SIMP, STATE_SIEFP):
            state = bytes(range(256)) * 16
            guest.vp.set_state(kind, state)
            check(guest.vp.get_state(kind), state)


def test_translate(mshv: Mshv) -> None:
    with Guest(mshv, STOP) as guest:
        vp = guest.vp
        # Nothing is in the guest yet, the page tables neither.
        check(vp.translate(0x12345).code, translation.GPA_NO_READ_ACCESS)
        guest.next()
        check(vp.translate(0x12345).gpa, 0x12345)
        check(vp.translate(0x40000000).gpa, 0x40000000, "a hole is a device")
        check(vp.translate(0xFFFF800000000000).code, translation.PAGE_NOT_PRESENT)
        guest.write(
            PAGE_TABLES + 0x2000 + 8, struct.pack("<Q", 0x200000 | 0x81)
        )  # 2 MiB, read-only, supervisor
        check(vp.translate(0x234567).gpa, 0x234567)
        check(vp.translate(0x234567, write=True).code, translation.PRIVILEGE_VIOLATION)
        vp.set_registers(cr0=0x80000011, ss=Segment.data())
        check(vp.translate(0x234567, write=True).code, 0, "without CR0.WP")


def test_cpuid_values_are_what_the_instruction_gives(mshv: Mshv) -> None:
    with Guest(mshv, CPUID) as guest:
        for leaf, subleaf in (
            (0, 0),
            (1, 0),
            (7, 0),
            (0xB, 1),
            (0x80000001, 0),
            (0x80000008, 0),
            (0x40000000, 0),
        ):
            guest.load(CPUID)
            guest.vp.set_registers(rax=leaf, rcx=subleaf)
            guest.said.clear()
            got = guest.finish()
            check(got, list(guest.vp.cpuid(leaf, subleaf)), f"leaf {leaf:#x}")


CPUID = Code("""
    cpuid
    say %rax
    say %rbx
    say %rcx
    say %rdx
    done
""")
SPIN = Code("""
1:  incq %rbx
    jmp 1b
""")


def test_signal_leaves_the_vp_where_it_is(mshv: Mshv) -> None:
    with Guest(mshv, SPIN) as guest:
        one = 0
        while one < 1000:
            check(interrupted_after(guest.vp, 0.1), True)
            one, rip = guest.vp.get_registers("rbx", "rip")
            check(
                (guest.vp.register_page.rbx, guest.vp.register_page.rip), (one, rip), "the page is up to date"
            )
        assert interrupted_after(guest.vp, 0.05)
        assert guest.vp.get_registers("rbx")[0] > one
        guest.vp.set_registers(rip=BASE, rbx=0)
        guest.write(BASE, b"\xe6\x70")
        must_be(guest.next(), IoPort, port=0x70)


def test_many_signals_meet_a_vp_at_work(mshv: Mshv) -> None:
    """Every stop is between two instructions: RBX and memory keep together."""
    with Guest(mshv, PAIR) as guest:
        before = 0
        for turn in range(20):
            runner = Runner(guest, guest.vp).start()
            check(runner.stop(), None, f"turn {turn}")
            count = guest.vp.get_registers("rbx")[0]
            assert 0 <= count - guest.u64(FREE) <= 1, (count, guest.u64(FREE))
            assert count >= before
            before = count


PAIR = Code(f"""
    xorl %ebx, %ebx
1:  incq %rbx
    movq %rbx, {FREE:#x}
    jmp 1b
""")


def test_descriptor_tables_and_system_segments(mshv: Mshv) -> None:
    with Guest(mshv, STOP) as guest:
        guest.next()
        check(guest.vp.get_table("gdtr"), Table(GDT, 39))
        tr = guest.vp.get_segment("tr")
        check((tr.selector, tr.limit), (0x18, 0x67))
        guest.vp.set_registers(ldtr=Segment(0x5000, 0xFF, 0x28, 0x82), gdtr=Table(0x6000, 0x17))
        check(guest.vp.get_segment("ldtr"), Segment(0x5000, 0xFF, 0x28, 0x82))
        check(guest.vp.get_table("gdtr"), Table(0x6000, 0x17))
