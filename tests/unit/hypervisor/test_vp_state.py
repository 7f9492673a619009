# SPDX-License-Identifier: Apache-2.0
"""VP state and state pages, against a processor that only remembers."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from rootvisor.hypervisor import child_cpuid, vp_registers, vp_state
from rootvisor.hypervisor.errors import HvError
from rootvisor.kvm import abi
from rootvisor.tlfs import registers as names
from rootvisor.tlfs import status
from rootvisor.tlfs import vp_state as tlfs

from .parked_vp import ParkedVp

KINDS = [tlfs.LAPIC, tlfs.XSAVE, tlfs.SIM_PAGE, tlfs.SIEF_PAGE, tlfs.SYNTHETIC_TIMERS]


@pytest.fixture
def vp() -> Any:
    return ParkedVp()


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_comes_back(vp: Any, kind: int) -> None:
    vp.synic.simp.value = vp.synic.siefp.value = 0x1001
    state = bytearray(vp_state.get_state(vp, kind))
    assert len(state) == vp_state.size(vp, kind)
    if kind == tlfs.XSAVE:
        struct.pack_into("<Q", state, 512, 7)
        state[160], state[600] = 0x11, 0x22
    elif kind == tlfs.LAPIC:
        for word in range(1, 43):
            struct.pack_into("<I", state, word * 4, word << 16)
        state[39 * 4 : 40 * 4] = bytes(4)  # error_status is not kept
    else:
        state[:] = random.Random(kind).randbytes(len(state))
    vp_state.set_state(vp, kind, bytes(state))
    assert vp_state.get_state(vp, kind) == bytes(state)


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_a_running_vp_cannot_be_had(vp: Any, kind: int) -> None:
    vp.running = True
    for call in (lambda: vp_state.get_state(vp, kind), lambda: vp_state.set_state(vp, kind, bytes(4096))):
        with pytest.raises(HvError) as caught:
            call()
        assert caught.value.status == status.INVALID_VP_STATE


@pytest.mark.parametrize("kind", [0, 5, 0x80000004, 0x80000005, 0xFFFFFFFF])
def test_an_unknown_type_is_an_invalid_parameter(vp: Any, kind: int) -> None:
    for call in (lambda: vp_state.get_state(vp, kind), lambda: vp_state.set_state(vp, kind, bytes(4096))):
        with pytest.raises(HvError) as caught:
            call()
        assert caught.value.status == status.INVALID_PARAMETER


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_data_is_an_invalid_parameter(vp: Any, kind: int) -> None:
    with pytest.raises(HvError) as caught:
        vp_state.set_state(vp, kind, bytes(16))
    assert caught.value.status == status.INVALID_PARAMETER


# --- local APIC ---------------------------------------------------------------------------------------------------
def test_lapic_words_come_from_their_registers(vp: Any) -> None:
    for offset in range(0, 1024, 16):
        struct.pack_into("<I", vp.vcpu.page, offset, offset << 8)
    words = struct.unpack("<44I", vp_state.get_state(vp, tlfs.LAPIC))
    expected = [0x20, 0x30, 0xD0, 0xE0, 0xF0, *range(0x100, 0x280, 16), 0x280, 0x310, 0x300, 0x320, 0x330, 0x340, 0x350,
                0x360, 0x370, 0x2F0, 0, 0x380, 0x390, 0x3E0, 0]  # fmt: skip
    assert [word >> 8 for word in words] == expected


def test_lapic_id_has_two_forms(vp: Any) -> None:
    vp.apic_id = 5
    struct.pack_into("<I", vp.vcpu.page, 0x20, 5 << 24)
    assert vp_state.get_state(vp, tlfs.LAPIC)[0:4] == bytes((0, 0, 0, 5))
    vp.u64[(abi.SYNC_SREGS_AT + abi.SREGS_APIC_BASE) // 8] |= 1 << 10
    assert vp_state.get_state(vp, tlfs.LAPIC)[0:4] == bytes((5, 0, 0, 0))
    vp_state.set_state(vp, tlfs.LAPIC, vp_state.get_state(vp, tlfs.LAPIC))
    assert vp.vcpu.page[0x20:0x24] == bytes((0, 0, 0, 5))  # as KVM has it
    with pytest.raises(HvError) as caught:
        vp_state.set_state(vp, tlfs.LAPIC, bytes(176))
    assert caught.value.status == status.INVALID_REGISTER_VALUE


def test_tpr_is_cr8_and_no_part_of_the_state(vp: Any) -> None:
    vp_registers.set(vp, names.CR8, 7, None)  # type: ignore[arg-type]
    vp_state.set_state(vp, tlfs.LAPIC, bytes(176))
    assert vp.vcpu.page[0x80] == 0x70


def test_a_pending_nmi_is_bit_2_of_the_first_request_word(vp: Any) -> None:
    vp.vcpu.event_state[abi.EVENTS_NMI_PENDING] = 1
    state = bytearray(vp_state.get_state(vp, tlfs.LAPIC))
    assert state[84] == 4
    state[84] = 0
    vp_state.set_state(vp, tlfs.LAPIC, bytes(state))
    assert vp.vcpu.event_state[abi.EVENTS_NMI_PENDING] == 0
    state[84] = 4
    vp_state.set_state(vp, tlfs.LAPIC, bytes(state))
    assert vp.vcpu.event_state[abi.EVENTS_NMI_PENDING] == 1
    assert vp.vcpu.page[0x200] == 0


def test_the_current_count_stands_still_while_the_vp_is_parked(vp: Any) -> None:
    struct.pack_into("<I", vp.vcpu.page, 0x390, 1000)
    first = vp_state.get_state(vp, tlfs.LAPIC)
    struct.pack_into("<I", vp.vcpu.page, 0x390, 900)
    assert vp_state.get_state(vp, tlfs.LAPIC) == first
    vp_registers.before_run(vp)
    struct.pack_into("<I", vp.vcpu.page, 0x390, 800)
    assert vp_state.get_state(vp, tlfs.LAPIC)[41 * 4 : 42 * 4] == (800).to_bytes(4, "little")


# --- XSAVE --------------------------------------------------------------------------------------------------------
def image_with(vp: Any, states: int) -> bytearray:
    image = vp.vcpu.image
    struct.pack_into("<Q", image, 512, states)
    image[576:832] = random.Random(2).randbytes(256)
    image[0x980:0x988] = b"PKRUpkru"
    return bytearray(image)


def test_xsave_is_compacted(vp: Any) -> None:
    assert child_cpuid.xsave_states(vp.hypervisor, vp.partition) == 0x207
    standard = image_with(vp, 0x207)
    state = vp_state.get_state(vp, tlfs.XSAVE)
    assert len(state) == 576 + 256 + 8 == child_cpuid.max_xsave_size(vp.hypervisor, vp.partition)
    assert struct.unpack_from("<QQ", state, 512) == (0x207, 0x207 | 1 << 63)
    assert state[576:832] == standard[576:832]
    assert state[832:] == b"PKRUpkru"
    vp.vcpu.image[:28] = bytes(28)
    vp.vcpu.image[32:] = bytes(4064)
    vp.stored.fpu.forget()
    vp_state.set_state(vp, tlfs.XSAVE, state)
    assert vp.vcpu.image == standard


def test_xsave_with_fewer_states_is_taken(vp: Any) -> None:
    data = bytearray(4096)
    struct.pack_into("<QQ", data, 512, 0x200, 0x201 | 1 << 63)
    data[24:28] = (0x1F80).to_bytes(4, "little")
    data[576:584] = b"pkruPKRU"
    vp_state.set_state(vp, tlfs.XSAVE, bytes(data))
    assert vp.vcpu.image[0x980:0x988] == b"pkruPKRU"


@pytest.mark.parametrize(
    ("present", "layout"),
    [(3, 3), (3, 1 << 63), (0x10003, 0x10003 | 1 << 63), (7, 3 | 1 << 63), (0x20, 0x27 | 1 << 63)],
)
def test_an_xsave_header_that_cannot_be_is_refused(vp: Any, present: int, layout: int) -> None:
    data = bytearray(4096)
    struct.pack_into("<QQ", data, 512, present, layout)
    with pytest.raises(HvError) as caught:
        vp_state.set_state(vp, tlfs.XSAVE, bytes(data))
    assert caught.value.status == status.INVALID_REGISTER_VALUE


def test_without_xsave_there_is_the_legacy_image() -> None:
    vp: Any = ParkedVp(xsave=False)
    assert child_cpuid.xsave_states(vp.hypervisor, vp.partition) == 3
    assert len(vp_state.get_state(vp, tlfs.XSAVE)) == 576


def test_xmm_registers_set_before_are_in_the_image_and_the_other_way_round(vp: Any) -> None:
    vp_registers.set(vp, names.XMM0 + 3, 0x1234, None)  # type: ignore[arg-type]
    state = bytearray(vp_state.get_state(vp, tlfs.XSAVE))
    assert state[160 + 48] == 0x34
    state[160 + 48] = 0x56
    vp_state.set_state(vp, tlfs.XSAVE, bytes(state))
    assert vp_registers.get(vp, names.XMM0 + 3) == 0x1256
    vp_registers.before_run(vp)
    assert vp.vcpu.image[160 + 48] == 0x56


# --- SynIC pages and timers ---------------------------------------------------------------------------------------
def test_a_disabled_page_is_zero_and_takes_nothing(vp: Any) -> None:
    vp.synic.simp.view[:] = b"x" * 4096
    assert vp_state.get_state(vp, tlfs.SIM_PAGE) == bytes(4096)
    vp_state.set_state(vp, tlfs.SIM_PAGE, bytes(4096))
    assert vp.synic.simp.view[0] == ord("x")


def test_timer_registers_lie_in_the_timer_state(vp: Any) -> None:
    for n in range(8):
        vp_registers.set(vp, names.STIMER0_CONFIG + n, 0x100 + n, None)  # type: ignore[arg-type]
    state = vp_state.get_state(vp, tlfs.SYNTHETIC_TIMERS)
    for n in range(4):
        assert tlfs.STIMER.unpack_from(state, 40 * n) == (0, 0, 0x100 + 2 * n, 0x101 + 2 * n, 0, 0)


# --- state pages --------------------------------------------------------------------------------------------------
def test_state_pages_come_from_the_pool_and_go_back(vp: Any) -> None:
    pool = vp.partition.deposits
    with pytest.raises(HvError) as caught:
        vp_state.map_page(vp, tlfs.PAGE_REGISTERS)
    assert caught.value.status == status.INSUFFICIENT_MEMORY
    pool.free.extend((3, 4))
    vp.hypervisor.root.memory.bytes[:] = b"old" * (len(vp.hypervisor.root.memory.bytes) // 3) + b"o"
    message = vp_state.map_page(vp, tlfs.PAGE_INTERCEPT_MESSAGE)
    registers = vp_state.map_page(vp, tlfs.PAGE_REGISTERS)
    assert {message, registers} == {3, 4} == pool.used
    assert vp_state.map_page(vp, tlfs.PAGE_REGISTERS) == registers
    assert not any(vp.message_page)
    assert vp.register_page[0:3] == bytes((1, 0, 1))
    assert vp.register_page[0x88:0x8A] == bytes((0xF0, 0xFF))
    vp.explicit_suspend = False
    vp.running = True
    vp_state.unmap_page(vp, tlfs.PAGE_INTERCEPT_MESSAGE)
    assert vp.explicit_suspend
    assert vp.message_page is None
    vp_state.unmap_page(vp, tlfs.PAGE_REGISTERS)
    assert vp.register_page is None
    assert pool.used == set()
    assert sorted(pool.free) == [3, 4]
    with pytest.raises(HvError) as caught:
        vp_state.unmap_page(vp, tlfs.PAGE_REGISTERS)
    assert caught.value.status == status.INVALID_PARAMETER


def test_pages_of_a_vp_that_goes_are_given_back(vp: Any) -> None:
    vp.partition.deposits.free.extend((3, 4))
    vp_state.map_page(vp, tlfs.PAGE_INTERCEPT_MESSAGE)
    vp_state.map_page(vp, tlfs.PAGE_REGISTERS)
    vp_state.unmap_pages(vp)
    assert not vp.partition.deposits.used
    assert vp.message_page is vp.register_page is None
