# SPDX-License-Identifier: Apache-2.0
"""Hypercalls about a child's VP: registers, register page, state pages, state, translation, CPUID. The guest runs."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from rootvisor.tlfs import cpuid_results, hypercalls, status, translation
from rootvisor.tlfs import registers as names
from rootvisor.tlfs import vp_state as tlfs
from tests.kvm import guest as g
from tests.kvm.guest import Guest, Result
from tests.kvm.parent import CHILD_RAM, Child, Parent

SELF = hypercalls.SELF
#: mov al, 0x21; again: out 0x10, al; inc al; jmp again
COUNT_UP = bytes.fromhex("b021e610fec0ebfa")
STATE_PAGES = g.SPARE + (64 << 12)
ONES = 0xFFFFFFFF


@pytest.fixture
def child(guest: Guest) -> Child:
    """One VP with its pages, parked."""
    return Parent(guest).initialized(vps=1)


def get(child: Child, *wanted: int, index: int = 0, partition_id: int | None = None) -> Result:
    data = hypercalls.VP_REGISTERS_INPUT.pack(
        child.id if partition_id is None else partition_id, index, 0, bytes(3)
    )
    data += struct.pack(f"<{len(wanted)}I", *wanted)
    return child.guest.call(hypercalls.GET_VP_REGISTERS, data, count=len(wanted), output=16 * len(wanted))


def put(child: Child, *values: tuple[int, int], index: int = 0, partition_id: int | None = None) -> Result:
    data = hypercalls.VP_REGISTERS_INPUT.pack(
        child.id if partition_id is None else partition_id, index, 0, bytes(3)
    )
    for name, value in values:
        data += struct.pack("<I12xQQ", name, value & SELF, value >> 64)
    return child.guest.call(hypercalls.SET_VP_REGISTERS, data, count=len(values))


def page(child: Child) -> memoryview:
    gpa = child.state_pages[0, tlfs.PAGE_REGISTERS] << 12
    return child.guest.ram[gpa : gpa + 4096]


def shown(child: Child, offset: int) -> int:
    return int.from_bytes(page(child)[offset : offset + 8], "little")


# --- GET and SET --------------------------------------------------------------------------------------------------
def test_registers_come_in_the_order_of_their_names(child: Child) -> None:
    wanted = [
        names.RIP,
        names.CS,
        names.RFLAGS,
        names.CR0,
        names.PAT,
        names.DR7,
        names.EXPLICIT_SUSPEND,
        names.XFEM,
    ]
    answer = get(child, *wanted)
    assert (answer.status, answer.reps) == (0, 8)
    values = [low | high << 64 for low, high in struct.iter_unpack("<QQ", answer.output)]
    assert values[0] == 0xFFF0
    assert values[1] >> 96 & 0xFFFF == 0xF000
    assert values[2:] == [2, 0x60000010, 0x0007_0406_0007_0406, 0x400, 1, 1]


def test_256_names_in_one_call(child: Child) -> None:
    answer = get(child, *([names.RIP, names.LSTAR, names.XMM0, names.CR0] * 64))
    assert (answer.status, answer.reps) == (0, 256)
    assert answer.output[255 * 16 : 255 * 16 + 4] == (0x60000010).to_bytes(4, "little")


def test_an_unknown_name_stops_the_call_there(child: Child) -> None:
    answer = get(child, names.RIP, names.RAX, 0x00040006, names.RBX)
    assert (answer.status, answer.reps) == (status.INVALID_PARAMETER, 2)
    assert int.from_bytes(answer.output[:8], "little") == 0xFFF0


def test_an_invalid_value_stops_the_call_there_and_what_came_before_is_done(child: Child) -> None:
    answer = put(child, (names.RAX, 7), (names.CR8, 0x99), (names.RBX, 8))
    assert (answer.status, answer.reps) == (status.INVALID_REGISTER_VALUE, 1)
    assert (child.register(0, names.RAX), child.register(0, names.RBX)) == (7, 0)


def test_elements_before_the_rep_start_are_not_looked_at(child: Child) -> None:
    data = hypercalls.VP_REGISTERS_INPUT.pack(child.id, 0, 0, bytes(3))
    data += struct.pack("<3I", 0x00040006, 0x00040006, names.RIP)
    answer = child.guest.call(hypercalls.GET_VP_REGISTERS, data, count=3, start=2, output=48)
    assert (answer.status, answer.reps) == (0, 3)
    assert int.from_bytes(answer.output[32:40], "little") == 0xFFF0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"partition_id": 77}, status.INVALID_PARTITION_ID),
        ({"index": 1}, status.INVALID_VP_INDEX),
        ({"index": names.VP_INDEX_SELF}, status.INVALID_VP_INDEX),
        ({"index": 0xFFFFFFFF}, status.INVALID_VP_INDEX),
    ],
)
def test_a_vp_that_is_not_there(child: Child, change: Any, expected: int) -> None:
    assert get(child, names.RIP, **change).status == expected
    assert put(child, (names.RIP, 0), **change).status == expected


def test_the_callers_own_synthetic_registers(child: Child) -> None:
    for index in (names.VP_INDEX_SELF, 0):
        for partition_id in (SELF, child.guest.partition.id):
            answer = get(child, names.VP_INDEX, names.SVERSION, index=index, partition_id=partition_id)
            assert answer.status == 0
            assert answer.output == bytes(16) + b"\1" + bytes(15)
    assert get(child, names.RIP, partition_id=SELF).status == status.INVALID_PARAMETER
    assert put(child, (names.VP_INDEX, 1), partition_id=SELF).status == status.INVALID_PARAMETER
    assert put(child, (names.SINT0 + 9, 0x10055), partition_id=SELF).status == 0
    assert get(child, names.SINT0 + 9, partition_id=SELF).output[:3] == bytes((0x55, 0, 1))


def test_a_running_vp_keeps_its_registers_to_itself(child: Child) -> None:
    child.load(bytes.fromhex("ebfe"))
    child.resume()
    answer = get(child, names.EXPLICIT_SUSPEND, names.INTERCEPT_SUSPEND, names.VP_INDEX, names.RIP)
    assert (answer.status, answer.reps) == (status.INVALID_VP_STATE, 3)
    assert answer.output[:48] == bytes(48)
    answer = put(child, (names.RIP, 0))
    assert (answer.status, answer.reps) == (status.INVALID_VP_STATE, 0)
    assert child.suspend() == 0
    assert child.register(0, names.RIP) == 0x1000
    assert shown(child, names.PAGE_RIP) == 0x1000


# --- the register page --------------------------------------------------------------------------------------------
def test_a_vmm_that_completes_ports_by_the_page_alone(child: Child) -> None:
    """Cloud Hypervisor: RIP and RAX in the page, dirty bits 0 and 1."""
    child.load(COUNT_UP)
    seen = []
    for _ in range(20):
        kind, payload = child.run()
        assert kind == 0x80010000
        seen.append(child.port_write(payload)[1] & 0xFF)
        assert page(child)[0:8] == bytes((1, 0, 1, 0, 0, 0, 0, 0))
        rip = shown(child, names.PAGE_RIP)
        assert rip == struct.unpack_from("<Q", payload, 24)[0]
        page(child)[names.PAGE_RIP : names.PAGE_RIP + 8] = (rip + 2).to_bytes(8, "little")
        page(child)[names.PAGE_GENERAL : names.PAGE_GENERAL + 8] = (seen[-1] + 1).to_bytes(8, "little")
        page(child)[4] |= names.DIRTY_GENERAL | names.DIRTY_RIP
    assert seen == [(0x21 + 2 * n) & 0xFF for n in range(20)]


def test_a_vmm_that_writes_the_page_and_then_special_registers(child: Child) -> None:
    """QEMU after its emulator: dirty 0x13, then SET of 17 registers must not lose the page."""
    child.load(COUNT_UP)
    special = (names.CR0, names.CR2, names.CR3, names.CR4, names.CR8, names.EFER, names.APIC_BASE, names.CS, names.DS,
               names.ES, names.FS, names.GS, names.SS, names.TR, names.LDTR, names.GDTR, names.IDTR)  # fmt: skip
    for turn in range(5):
        _kind, payload = child.run()
        assert child.port_write(payload)[1] & 0xFF == 0x21 + turn
        rip = shown(child, names.PAGE_RIP)
        page(child)[names.PAGE_RIP : names.PAGE_RIP + 8] = (rip + 2).to_bytes(8, "little")
        page(child)[4] |= names.DIRTY_GENERAL | names.DIRTY_RIP | names.DIRTY_RFLAGS
        values = [low | high << 64 for low, high in struct.iter_unpack("<QQ", get(child, *special).output)]
        assert page(child)[4] == 0  # taken over before the call
        assert put(child, *zip(special, values, strict=True)).status == 0
        assert child.register(0, names.RIP) == rip + 2
        assert shown(child, names.PAGE_RIP) == rip + 2


def test_a_set_shows_in_the_page_at_once(child: Child) -> None:
    assert put(child, (names.R9, 0x99), (names.CR3, 0x5000), (names.XMM0 + 5, 0x1234 << 64)).status == 0
    assert shown(child, names.PAGE_GENERAL + 9 * 8) == 0x99
    assert shown(child, names.PAGE_CR3) == 0x5000
    assert shown(child, names.PAGE_XMM + 5 * 16 + 8) == 0x1234


# --- state pages --------------------------------------------------------------------------------------------------
def test_state_pages_need_memory_and_give_it_back(guest: Guest) -> None:
    parent = Parent(guest)
    child = parent.create()
    child.deposit(1)
    child.initialize()
    assert child.create_vp(0) == 0
    assert child.map_state_page(0, tlfs.PAGE_INTERCEPT_MESSAGE)[0] == 0
    assert child.map_state_page(0, tlfs.PAGE_REGISTERS)[0] == status.INSUFFICIENT_MEMORY
    assert child.withdraw() == (status.NO_RESOURCES, [])
    child.deposit(1)
    first = child.map_state_page(0, tlfs.PAGE_REGISTERS)
    assert first[0] == 0
    assert child.map_state_page(0, tlfs.PAGE_REGISTERS) == first
    parent.check_accounts()
    for kind in (tlfs.PAGE_GHCB, 3, 0xFFFF):
        assert child.map_state_page(0, kind)[0] == status.INVALID_PARAMETER
        assert child.unmap_state_page(0, kind) == status.INVALID_PARAMETER
    assert child.map_state_page(1, 0)[0] == status.INVALID_VP_INDEX
    for kind in (tlfs.PAGE_REGISTERS, tlfs.PAGE_INTERCEPT_MESSAGE):
        assert child.unmap_state_page(0, kind) == 0
        assert child.unmap_state_page(0, kind) == status.INVALID_PARAMETER
    assert len(child.withdraw()[1]) == 2


def test_a_running_vp_stops_when_its_message_page_goes(child: Child) -> None:
    child.load(bytes.fromhex("ebfe"))
    child.resume()
    assert child.unmap_state_page(0, tlfs.PAGE_INTERCEPT_MESSAGE) == 0
    assert child.register(0, names.EXPLICIT_SUSPEND) == 1
    assert child.register(0, names.RIP) == 0x1000


# --- state --------------------------------------------------------------------------------------------------------
def state_call(child: Child, code: int, kind: int, tail: bytes, output: int = 0, vp_index: int = 0) -> Result:
    data = tlfs.VP_STATE_INPUT.pack(child.id, vp_index, 0, 0, 0, kind, 0, 0, 3) + tail
    return child.guest.call(code, data, variable=(len(tail) + 7) // 8, output=output)


def pages(count: int) -> bytes:
    return struct.pack(f"<{count}Q", *((STATE_PAGES >> 12) + 3 * n for n in range(count)))


@pytest.mark.parametrize("kind", [tlfs.LAPIC, tlfs.XSAVE, tlfs.SIM_PAGE, tlfs.SIEF_PAGE])
@pytest.mark.parametrize("count", [1, 2])
def test_state_travels_through_the_callers_pages(child: Child, kind: int, count: int) -> None:
    ram = child.guest.ram
    views = [ram[STATE_PAGES + n * 3 * 4096 :][:4096] for n in range(count)]
    for view in views:
        view[:] = b"\xee" * 4096
    assert state_call(child, hypercalls.GET_VP_STATE, kind, pages(count)).status == 0
    first = [bytes(view) for view in views]
    assert first[0] != b"\xee" * 4096
    assert all(not any(rest) for rest in first[1:])
    assert state_call(child, hypercalls.SET_VP_STATE, kind, pages(count)).status == 0
    for view in views:
        view[:] = b"\xee" * 4096
    assert state_call(child, hypercalls.GET_VP_STATE, kind, pages(count)).status == 0
    assert [bytes(view) for view in views] == first


def test_timers_travel_inline(child: Child) -> None:
    timers = bytes(range(200))
    assert state_call(child, hypercalls.SET_VP_STATE, tlfs.SYNTHETIC_TIMERS, timers).status == 0
    answer = state_call(child, hypercalls.GET_VP_STATE, tlfs.SYNTHETIC_TIMERS, b"", output=200)
    assert (answer.status, answer.output) == (0, timers)


@pytest.mark.parametrize(
    ("kind", "tail", "expected"),
    [
        (tlfs.LAPIC, b"", status.INVALID_PARAMETER),
        (tlfs.LAPIC, struct.pack("<Q", 1 << 50), status.INVALID_PARAMETER),
        (tlfs.LAPIC, struct.pack("<Q", 0x100000), status.INVALID_PARAMETER),
        (0x80000007, pages(1), status.INVALID_PARAMETER),
        (9, pages(1), status.INVALID_PARAMETER),
    ],
)
def test_state_that_cannot_travel(child: Child, kind: int, tail: bytes, expected: int) -> None:
    for code in (hypercalls.GET_VP_STATE, hypercalls.SET_VP_STATE):
        assert state_call(child, code, kind, tail).status == expected


def test_state_of_a_running_vp(child: Child) -> None:
    child.load(bytes.fromhex("ebfe"))
    child.resume()
    for code in (hypercalls.GET_VP_STATE, hypercalls.SET_VP_STATE):
        assert state_call(child, code, tlfs.LAPIC, pages(1)).status == status.INVALID_VP_STATE
    assert (
        state_call(child, hypercalls.GET_VP_STATE, tlfs.LAPIC, pages(1), vp_index=5).status
        == status.INVALID_VP_INDEX
    )


# --- translation --------------------------------------------------------------------------------------------------
def translate(child: Child, gva: int, flags: int, index: int = 0) -> tuple[int, int, int]:
    data = names.TRANSLATE_INPUT.pack(child.id, index, flags, gva >> 12)
    answer = child.guest.call(hypercalls.TRANSLATE_VIRTUAL_ADDRESS, data, output=16)
    code, _cache, _overlay, gpa_page = names.TRANSLATE_OUTPUT.unpack(answer.output)
    return answer.status, code, gpa_page


def test_translation_in_long_mode(child: Child) -> None:
    child.load(b"\xf4")
    ram = child.guest.ram
    tables = CHILD_RAM + 0x4000
    struct.pack_into("<Q", ram, tables, 0x5007)
    struct.pack_into("<Q", ram, tables + 0x1000, 0x6007)
    struct.pack_into("<Q", ram, tables + 0x2000, 0x7007)
    for entry, value in ((0, 0x1001), (1, 0x2003), (2, 0xC000_0003), (3, 0), (4, 0x8000_0000_0000_3003)):
        struct.pack_into("<Q", ram, tables + 0x3000 + 8 * entry, value)
    assert put(
        child, (names.CR4, 0x20), (names.CR3, 0x4000), (names.CR0, 0x80050033), (names.EFER, 0xD00),
    ).status == 0  # fmt: skip
    read, write, execute = translation.VALIDATE_READ, translation.VALIDATE_WRITE, translation.VALIDATE_EXECUTE
    assert translate(child, 0, read) == (0, 0, 1)
    assert translate(child, 0, write) == (0, translation.PRIVILEGE_VIOLATION, 0)
    assert translate(child, 0x1000, write) == (0, 0, 2)
    assert translate(child, 0x2000, read | write) == (0, 0, 0xC0000)
    assert translate(child, 0x3000, read) == (0, translation.PAGE_NOT_PRESENT, 0)
    assert translate(child, 0x4000, execute)[1] == translation.PRIVILEGE_VIOLATION
    assert translate(child, 0x1000, write | translation.SET_PAGE_TABLE_BITS) == (0, 0, 2)
    assert struct.unpack_from("<Q", ram, tables + 0x3008)[0] == 0x2063
    assert translate(child, 0, read, index=3)[0] == status.INVALID_VP_INDEX


# --- CPUID --------------------------------------------------------------------------------------------------------
def register(
    child: Child, leaf: int, values: tuple[int, ...], *, subleaf: int = 0, specific: int = 0, always: int = 1,
    masks: tuple[int, ...] = (ONES,) * 4, index: int = 0, kind: int = 2,
) -> int:  # fmt: skip
    pairs = [word for pair in zip(values, masks, strict=True) for word in pair]
    data = cpuid_results.REGISTER_INTERCEPT_RESULT_INPUT.pack(
        child.id, index, kind, leaf, subleaf, specific, always, *pairs
    )
    return child.guest.call(hypercalls.REGISTER_INTERCEPT_RESULT, data + bytes(4)).status


def cpuid_values(child: Child, *leaves: tuple[int, int], flags: int = 3) -> list[tuple[int, ...]]:
    data = cpuid_results.GET_VP_CPUID_VALUES_INPUT.pack(child.id, 0, flags)
    for leaf, subleaf in leaves:
        data += cpuid_results.CPUID_LEAF.pack(leaf, subleaf, 1, 0)
    answer = child.guest.call(
        hypercalls.GET_VP_CPUID_VALUES, data, count=len(leaves), output=16 * len(leaves)
    )
    assert (answer.status, answer.reps) == (0, len(leaves))
    return list(struct.iter_unpack("<4I", answer.output))


def guest_cpuid(child: Child, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    """What the child's own CPUID instruction says: mov eax, leaf; mov ecx, subleaf; cpuid; out 0x10, al."""
    code = (
        b"\x66\xb8"
        + leaf.to_bytes(4, "little")
        + b"\x66\xb9"
        + subleaf.to_bytes(4, "little")
        + b"\x0f\xa2\xe6\x10"
    )
    child.guest.ram[CHILD_RAM + 0x1000 : CHILD_RAM + 0x1000 + len(code)] = code
    assert put(child, (names.RIP, 0x1000)).status == 0
    kind, _payload = child.run()
    assert kind == 0x80010000
    return tuple(child.register(0, name) & ONES for name in (names.RAX, names.RBX, names.RCX, names.RDX))  # type: ignore[return-value]


def test_the_guest_sees_registered_results(child: Child) -> None:
    child.load(b"\xf4")
    own = cpuid_values(child, (0, 0), (0x80000002, 0))
    assert register(child, 0x80000002, (1, 2, 3, 4), index=ONES) == 0
    assert register(child, 0x80000003, (5, 6, 7, 8)) == 0
    assert register(child, 0, (0, 0x41414141, 0, 0), masks=(0, ONES, 0, 0)) == 0
    assert register(child, 7, (0, 0, 0, 0), subleaf=0, specific=1) == 0
    assert cpuid_values(child, (0, 0), (0x80000002, 0), flags=1) == own
    assert cpuid_values(child, (0x80000003, 0)) == [(5, 6, 7, 8)]
    assert guest_cpuid(child, 0x80000002) == (1, 2, 3, 4)
    assert guest_cpuid(child, 0x80000003) == (5, 6, 7, 8)
    assert guest_cpuid(child, 0)[:2] == (own[0][0], 0x41414141)
    assert guest_cpuid(child, 7) == (0, 0, 0, 0)
    # Now the VP has run.
    assert register(child, 0x80000003, (9, 9, 9, 9)) == status.INVALID_VP_STATE
    assert register(child, 0x80000003, (9, 9, 9, 9), index=ONES) == status.INVALID_VP_STATE


def test_values_are_those_that_the_guest_sees(child: Child) -> None:
    child.load(b"\xf4")
    plain = (0, 1, 6, 0x40000000, 0x40000001, 0x40000003, 0x40000005, 0x80000000, 0x80000001, 0x80000008)
    leaves = [(leaf, 0) for leaf in plain] + [(4, 0), (7, 0), (0xB, 0), (0xB, 1), (0xD, 0), (0xD, 1)]
    for (leaf, subleaf), expected in zip(leaves, cpuid_values(child, *leaves), strict=True):
        assert guest_cpuid(child, leaf, subleaf) == expected, f"{leaf:#x}.{subleaf}"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda child: register(child, 1, (0,) * 4, kind=1), status.INVALID_PARAMETER),
        (lambda child: register(child, 1, (0,) * 4, specific=2), status.INVALID_PARAMETER),
        (lambda child: register(child, 1, (0,) * 4, always=2), status.INVALID_PARAMETER),
        (lambda child: register(child, 1, (0,) * 4, index=9), status.INVALID_VP_INDEX),
    ],
)
def test_results_that_cannot_be_registered(child: Child, call: Callable[[Child], int], expected: int) -> None:
    assert call(child) == expected


# --- application processors ---------------------------------------------------------------------------------------
def test_an_application_processor_waits_and_keeps_what_the_vmm_set(guest: Guest) -> None:
    child = Parent(guest).initialized(vps=2)
    assert put(child, (names.RBX, 0x1234), index=1).status == 0
    child.resume(1)
    assert child.suspend(1) == 0
    assert child.register(1, names.RBX) == 0x1234
    assert child.register(1, names.INTERNAL_ACTIVITY_STATE) == names.ACTIVITY_STARTUP_SUSPEND
    assert child.register(1, names.INTERCEPT_SUSPEND) == 0
    # The VMM starts it by hand.
    child.load(COUNT_UP)
    child.enter(1)
    assert put(child, (names.INTERNAL_ACTIVITY_STATE, 0), index=1).status == 0
    kind, payload = child.run(1)
    assert (kind, child.port_write(payload)[0]) == (0x80010000, 0x10)


# --- anything goes ------------------------------------------------------------------------------------------------
class Random:
    """Random calls about two VPs of a child that run now and then; whatever they are told, they end in a status."""

    CODES = (
        hypercalls.GET_VP_REGISTERS, hypercalls.SET_VP_REGISTERS, hypercalls.TRANSLATE_VIRTUAL_ADDRESS,
        hypercalls.MAP_VP_STATE_PAGE, hypercalls.UNMAP_VP_STATE_PAGE, hypercalls.GET_VP_STATE, hypercalls.SET_VP_STATE,
        hypercalls.REGISTER_INTERCEPT_RESULT, hypercalls.GET_VP_CPUID_VALUES,
    )  # fmt: skip
    NAMES = (
        *range(6), *range(0x10002, 0x10007), *range(0x20000, 0x20013), *range(0x30000, 0x3001B),
        *range(0x40000, 0x40009), *range(0x41000, 0x41006), *range(0x50000, 0x50007), *range(0x60000, 0x60009),
        0x70000, 0x70001, *range(0x80000, 0x800A2), *range(0x90000, 0x90020), *range(0xA0000, 0xA0018),
        *range(0xB0000, 0xB000A), 0x84802, *range(0x200, 0x217),
    )  # fmt: skip

    def __init__(self, child: Child, seed: int) -> None:
        self.child = child
        self.rng = random.Random(seed)
        self.statuses: set[tuple[int, int]] = set()

    def word(self) -> int:
        rng = self.rng
        return rng.choice(
            (0, 1, rng.getrandbits(8), rng.getrandbits(32), rng.getrandbits(64), 1 << rng.randrange(64))
        )

    def head(self) -> tuple[int, int]:
        rng = self.rng
        partition_id = self.child.id if rng.random() < 0.97 else rng.choice((SELF, 0, 1, 99))
        return partition_id, rng.choice((0, 0, 0, 1, 1, 2, names.VP_INDEX_SELF, ONES))

    def call(self) -> None:
        rng = self.rng
        code = rng.choice(self.CODES)
        partition_id, index = self.head()
        count = variable = 0
        if code in (hypercalls.GET_VP_REGISTERS, hypercalls.SET_VP_REGISTERS):
            count = rng.choice((1, 2, 5, 40))
            data = hypercalls.VP_REGISTERS_INPUT.pack(partition_id, index, rng.random() < 0.01, bytes(3))
            for _ in range(count):
                name = rng.choice(self.NAMES)
                if name == names.EXPLICIT_SUSPEND and rng.random() < 0.5:
                    name = names.RAX
                data += name.to_bytes(4, "little")
                if code == hypercalls.SET_VP_REGISTERS:
                    data += rng.randbytes(12) + struct.pack("<QQ", self.word(), self.word())
        elif code == hypercalls.TRANSLATE_VIRTUAL_ADDRESS:
            data = names.TRANSLATE_INPUT.pack(partition_id, index, rng.getrandbits(6), self.word())
        elif code in (hypercalls.MAP_VP_STATE_PAGE, hypercalls.UNMAP_VP_STATE_PAGE):
            data = tlfs.MAP_VP_STATE_PAGE_INPUT.pack(
                partition_id, index, rng.randrange(4), 0, rng.random() < 0.1, 0
            )
        elif code in (hypercalls.GET_VP_STATE, hypercalls.SET_VP_STATE):
            kind = rng.choice(
                (tlfs.LAPIC, tlfs.XSAVE, tlfs.SIM_PAGE, tlfs.SIEF_PAGE, tlfs.SYNTHETIC_TIMERS, 7, ONES)
            )
            variable = rng.choice((0, 1, 2, 25, 100))
            data = tlfs.VP_STATE_INPUT.pack(partition_id, index, 0, 0, 0, kind, 0, 0, self.word())
            for _ in range(variable):
                data += struct.pack(
                    "<Q", rng.choice((STATE_PAGES >> 12, (STATE_PAGES >> 12) + 1, self.word()))
                )
            if rng.random() < 0.5:
                self.child.guest.ram[STATE_PAGES : STATE_PAGES + 1024] = rng.randbytes(1024)
        elif code == hypercalls.REGISTER_INTERCEPT_RESULT:
            leaf = rng.choice((0, 1, 4, 7, 0xB, 0xD, 0x40000001, 0x80000000, 0x80000008, rng.getrandbits(32)))
            words = [rng.getrandbits(32) for _ in range(8)]
            data = cpuid_results.REGISTER_INTERCEPT_RESULT_INPUT.pack(
                partition_id,
                index,
                rng.choice((2, 2, 2, 1)),
                leaf,
                rng.randrange(70),
                rng.randrange(3),
                1,
                *words,
            )
        else:
            count = rng.choice((1, 4))
            data = cpuid_results.GET_VP_CPUID_VALUES_INPUT.pack(partition_id, index, rng.randrange(4))
            for _ in range(count):
                data += cpuid_results.CPUID_LEAF.pack(
                    rng.choice((0, 1, 0xD, 7)), rng.randrange(70), self.word(), 0
                )
        answer = self.child.guest.call(code, data, count=count, variable=variable, output=1024)
        assert answer.status in status.NAMES
        assert answer.reps <= count
        self.statuses.add((code, answer.status))


def run_random_calls(guest: Guest, seed: int, calls: int) -> set[tuple[int, int]]:
    child = Parent(guest).initialized(vps=2)
    child.deposit(8)
    child.load(COUNT_UP)
    chaos = Random(child, seed)
    for number in range(calls):
        chaos.call()
        if number % 50 == 25:
            for index in (0, 1):
                put(child, (names.INTERCEPT_SUSPEND, 0), (names.EXPLICIT_SUSPEND, 0), index=index)
        if number % 50 == 35:
            for index in (0, 1):
                assert child.suspend(index) == 0
    child.finalize()
    return chaos.statuses


def test_random_calls_end_in_a_status(guest: Guest) -> None:
    statuses = run_random_calls(guest, 1, 1500)
    seen = {code for _call, code in statuses}
    assert {0, status.INVALID_PARAMETER, status.INVALID_REGISTER_VALUE, status.INVALID_VP_STATE} <= seen
    assert {code for code, answer in statuses if answer == 0} >= set(Random.CODES) - {hypercalls.SET_VP_STATE}
