# SPDX-License-Identifier: Apache-2.0
"""SynIC of the root, as the mshv driver uses it: messages, event flags, EOM (contract/guest-interface 1.6 and 2.4)."""

from __future__ import annotations

import struct

import pytest

from rootvisor.hypervisor.errors import HvError
from rootvisor.hypervisor.synic import Synic
from rootvisor.tlfs import msrs, status
from tests.kvm.guest import Guest

VECTOR = 0xF3


def switch_on(guest: Guest, sint: int = 0, value: int = VECTOR, vp: int = 0) -> Synic:
    for index in (msrs.SIMP, msrs.SIEFP, msrs.SIRBP):
        guest.wrmsr(index, guest.rdmsr(index, vp) | 1, vp)
    guest.wrmsr(msrs.SINT0 + sint, value, vp)
    guest.wrmsr(msrs.SCONTROL, 1, vp)
    return guest.partition.vps[vp].synic


def slot(guest: Guest, sint: int = 0, vp: int = 0) -> tuple[int, int, int, int, bytes]:
    """Type, payload size, flags, sender, first 8 bytes of the payload; as the guest reads them at its SIMP."""
    at = (guest.rdmsr(msrs.SIMP, vp) & ~0xFFF) + sint * 256
    kind, size, flags, sender = struct.unpack_from("<IBBxxQ", guest.ram, at)
    return kind, size, flags, sender, bytes(guest.ram[at + 16 : at + 24])


def free_slot(guest: Guest, sint: int = 0, vp: int = 0) -> None:
    at = (guest.rdmsr(msrs.SIMP, vp) & ~0xFFF) + sint * 256
    guest.ram[at : at + 4] = bytes(4)


@pytest.mark.parametrize("vp", [0, 1])
def test_message_is_placed_and_raised_on_its_vp(guest2: Guest, vp: int) -> None:
    synic = switch_on(guest2, vp=vp)
    synic.post_message(0, 0x80000001, 0x77, b"payload!")
    assert slot(guest2, vp=vp) == (0x80000001, 8, 0, 0x77, b"payload!")
    assert guest2.take(VECTOR, vp) == 1
    assert guest2.interrupts(VECTOR, 1 - vp) == 0


def test_second_message_waits_for_eom(guest: Guest) -> None:
    synic = switch_on(guest)
    synic.post_message(0, 1, 0, b"first   ")
    synic.post_message(0, 2, 0, b"second  ")
    assert slot(guest) == (1, 8, 1, 0, b"first   "), "the pending flag is set"
    assert guest.take(VECTOR) == 1
    guest.wrmsr(msrs.EOM, 0)  # too early: the slot is busy
    assert slot(guest)[0] == 1
    free_slot(guest)
    guest.wrmsr(msrs.EOM, 0)
    assert slot(guest) == (2, 8, 0, 0, b"second  ")
    assert guest.take(VECTOR, count=2) == 2


def test_messages_keep_their_order(guest: Guest) -> None:
    synic = switch_on(guest)
    for number in range(1, 11):
        synic.post_message(0, number, 0, b"")
    seen = []
    while slot(guest)[0]:
        seen.append(slot(guest)[0])
        free_slot(guest)
        guest.wrmsr(msrs.EOM, 0)
    assert seen == list(range(1, 11))


def test_eom_serves_every_sint(guest: Guest) -> None:
    synic = switch_on(guest)
    guest.wrmsr(msrs.SINT0 + 5, 0x90)
    for sint in (0, 5):
        synic.post_message(sint, 1, 0, b"")
        synic.post_message(sint, 2, 0, b"")
        free_slot(guest, sint)
    guest.wrmsr(msrs.EOM, 0)
    assert (slot(guest, 0)[0], slot(guest, 5)[0]) == (2, 2)


def test_a_guest_that_forgets_eom_gets_the_rest_with_the_next_message(guest: Guest) -> None:
    synic = switch_on(guest)
    for number in range(1, 18):
        synic.post_message(0, number, 0, b"")
    with pytest.raises(HvError) as refused:
        synic.post_message(0, 18, 0, b"")
    assert refused.value.status == status.INSUFFICIENT_BUFFERS
    free_slot(guest)
    synic.post_message(0, 19, 0, b"")
    assert slot(guest)[0] == 2


def test_masked_sint_gets_the_message_silently(guest: Guest) -> None:
    synic = switch_on(guest, value=msrs.SINT_MASKED | VECTOR)
    synic.post_message(0, 9, 0, b"")
    assert slot(guest)[0] == 9
    assert guest.take(VECTOR, turns=1000) == 0


def test_polling_sint_gets_no_interrupt(guest: Guest) -> None:
    synic = switch_on(guest, value=msrs.SINT_POLLING | VECTOR)
    synic.post_message(0, 9, 0, b"")
    assert slot(guest)[0] == 9
    assert guest.take(VECTOR, turns=1000) == 0


def test_message_to_a_synic_that_is_off(guest: Guest) -> None:
    synic = switch_on(guest)
    for index, value in ((msrs.SCONTROL, 0), (msrs.SIMP, guest.rdmsr(msrs.SIMP) & ~1)):
        before = guest.rdmsr(index)
        guest.wrmsr(index, value)
        with pytest.raises(HvError) as refused:
            synic.post_message(0, 1, 0, b"")
        assert refused.value.status == status.INVALID_SYNIC_STATE
        guest.wrmsr(index, before)
    assert slot(guest)[0] == 0


def test_queue_survives_off_and_on(guest: Guest) -> None:
    synic = switch_on(guest)
    synic.post_message(0, 1, 0, b"")
    synic.post_message(0, 2, 0, b"")
    guest.wrmsr(msrs.SCONTROL, 0)
    free_slot(guest)
    guest.wrmsr(msrs.EOM, 0)
    assert slot(guest)[0] == 0, "nothing is delivered while it is off"
    guest.wrmsr(msrs.SCONTROL, 1)
    guest.wrmsr(msrs.EOM, 0)
    assert slot(guest)[0] == 2


@pytest.mark.parametrize(("kind", "size"), [(0, 0), (1, 241)])
def test_message_that_is_none(guest: Guest, kind: int, size: int) -> None:
    synic = switch_on(guest)
    with pytest.raises(HvError) as refused:
        synic.post_message(0, kind, 0, bytes(size))
    assert refused.value.status == status.INVALID_PARAMETER


def test_longest_message_stays_in_its_slot(guest: Guest) -> None:
    synic = switch_on(guest, sint=3)
    synic.post_message(3, 1, 0, b"\xff" * 240)
    page = guest.rdmsr(msrs.SIMP) & ~0xFFF
    assert bytes(guest.ram[page + 4 * 256 : page + 4 * 256 + 16]) == bytes(16)
    assert bytes(guest.ram[page + 3 * 256 + 16 : page + 4 * 256]) == b"\xff" * 240


@pytest.mark.parametrize("flag", [0, 7, 8, 2047])
def test_event_flag_interrupts_on_the_change_only(guest: Guest, flag: int) -> None:
    synic = switch_on(guest, sint=5)
    at = (guest.rdmsr(msrs.SIEFP) & ~0xFFF) + 5 * 256 + flag // 8
    synic.signal_event(5, flag)
    assert guest.ram[at] == 1 << flag % 8
    assert guest.take(VECTOR) == 1
    synic.signal_event(5, flag)
    assert guest.take(VECTOR, count=2, turns=1000) == 1
    guest.ram[at] = 0
    synic.signal_event(5, flag)
    assert guest.take(VECTOR, count=2) == 2


def test_event_flag_errors(guest: Guest) -> None:
    synic = switch_on(guest)
    for flag in (-1, 2048):
        with pytest.raises(HvError) as refused:
            synic.signal_event(0, flag)
        assert refused.value.status == status.INVALID_PARAMETER
    with pytest.raises(HvError) as refused:  # SINT 1 is masked
        synic.signal_event(1, 0)
    assert refused.value.status == status.INVALID_SYNIC_STATE


def test_pages_of_two_vps_are_apart(guest2: Guest) -> None:
    first, second = switch_on(guest2, vp=0), switch_on(guest2, vp=1)
    first.post_message(0, 1, 0, b"")
    second.post_message(0, 2, 0, b"")
    assert (slot(guest2, vp=0)[0], slot(guest2, vp=1)[0]) == (1, 2)
