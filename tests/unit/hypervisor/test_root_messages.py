# SPDX-License-Identifier: Apache-2.0
"""Messages to the root against a model of the mshv driver: slot, queue, EOM, CPUs that go, partitions that end."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rootvisor.hypervisor.errors import HvError
from rootvisor.tlfs import messages, msrs, status

from .root_model import SINT0_VALUE, ChildVp, RootModel, RootVp


def post(model: RootModel, child: Any, index: int, root_vp: RootVp | None = None) -> None:
    model.messages.post_opaque(child, ChildVp(index, root_vp))  # type: ignore[arg-type]


def test_opaque_fills_slot_0_and_interrupts() -> None:
    model = RootModel()
    post(model, model.child(7), 3)
    assert messages.MESSAGE_HEADER.unpack_from(model.vps[0].slot) == (messages.OPAQUE_INTERCEPT, 4, 0, 7)
    assert model.vps[0].slot[16:20] == (3).to_bytes(4, "little")
    assert model.root.vm.raised == [(0, 0xF3)]
    assert model.vps[0].interrupts == 1


def test_no_other_slot_is_touched() -> None:
    model = RootModel()
    child = model.child()
    for index in range(5):
        post(model, child, index)
    model.run()
    assert not any(model.vps[0].pages[0].memory[256:])


def test_messages_wait_behind_the_slot_and_come_with_eom_in_order() -> None:
    model = RootModel()
    child = model.child()
    for index in range(40):
        post(model, child, index)
    assert model.root.vm.raised == [(0, 0xF3)]
    assert model.vps[0].slot[5] == messages.MESSAGE_FLAG_PENDING
    model.run()
    assert model.kicks() == [(2, index) for index in range(40)]
    assert model.vps[0].kind == 0


def test_pending_flag_is_only_set_while_more_wait() -> None:
    model = RootModel()
    child = model.child()
    vp = model.vps[0]
    for index in range(3):
        post(model, child, index)
    flags = []
    for _ in range(3):
        flags.append(vp.slot[5])
        vp.slot[:4] = bytes(4)
        vp.synic.end_of_message()
    assert flags == [1, 1, 0]


def test_waiting_kick_stands_for_a_second_one() -> None:
    model = RootModel()
    child = model.child()
    post(model, child, 0)
    for _ in range(5):
        post(model, child, 1)
    model.run()
    assert model.kicks() == [(2, 0), (2, 1)]


def test_kick_in_the_slot_does_not_stand_for_a_second_one() -> None:
    """Its receiver may have resumed the VP before the handler cleared the slot."""
    model = RootModel()
    child = model.child()
    post(model, child, 0)
    while not model.events:
        model.step(model.vps[0])
    post(model, child, 0)
    model.run()
    assert model.kicks() == [(2, 0)] * 2


def test_slot_freed_without_eom_is_found_by_the_next_message() -> None:
    model = RootModel()
    child = model.child()
    post(model, child, 0)
    post(model, child, 1)
    model.vps[0].slot[:4] = bytes(4)
    post(model, child, 2)
    assert model.vps[0].slot[16] == 1
    model.run()
    assert model.kicks() == [(2, 1), (2, 2)]


def test_message_goes_to_the_vp_that_resumed() -> None:
    model = RootModel(4)
    child = model.child()
    for index in range(4):
        post(model, child, index, model.vps[3 - index])
    assert [vp.slot[16] for vp in model.vps] == [3, 2, 1, 0]


def test_message_goes_elsewhere_when_the_preferred_vp_is_off() -> None:
    model = RootModel(3, enabled=False)
    model.module_load(model.vps[1])
    post(model, model.child(), 9, model.vps[2])
    assert model.vps[1].slot[16] == 9


@pytest.mark.parametrize("off", ["scontrol", "simp", "sint0"])
def test_messages_wait_while_no_vp_is_ready(off: str) -> None:
    model = RootModel(1)
    synic = model.vps[0].synic
    before = {"scontrol": synic.scontrol, "simp": synic.simp.value, "sint0": synic.sints[0]}

    def switch(value: int) -> None:
        if off == "scontrol":
            synic.write_scontrol(value)
        elif off == "simp":
            synic.write_page(synic.simp, value)
        else:
            synic.write_sint(0, value)

    switch(msrs.SINT_MASKED if off == "sint0" else 0)
    child = model.child()
    for index in (0, 1, 0):
        post(model, child, index)
    assert model.vps[0].kind == 0
    assert not model.root.vm.raised
    switch(before[off])
    model.run()
    assert model.kicks() == [(2, 0), (2, 1)]


def test_queue_and_unseen_slot_move_when_a_cpu_goes() -> None:
    model = RootModel(2)
    child = model.child()
    for index in range(4):
        post(model, child, index, model.vps[1])
    model.module_unload(model.vps[1])
    assert model.vps[1].kind == 0
    model.run()
    assert sorted(model.kicks()) == [(2, index) for index in range(4)]


def test_queue_waits_when_the_last_cpu_goes_and_moves_to_the_next() -> None:
    model = RootModel(2)
    child = model.child()
    model.module_unload(model.vps[0])
    for index in range(3):
        post(model, child, index)
    model.module_unload(model.vps[1])
    model.run()
    assert not model.kicks()
    model.module_load(model.vps[0])
    model.run()
    assert model.kicks() == [(2, index) for index in range(3)]


def test_reset_of_a_synic_moves_its_queue() -> None:
    model = RootModel(2)
    child = model.child()
    for index in range(3):
        post(model, child, index, model.vps[1])
    model.vps[1].synic.reset()
    assert not model.vps[1].synic.scontrol
    model.run()
    assert sorted(model.kicks()) == [(2, 0), (2, 1), (2, 2)]


def test_eom_of_a_vp_that_is_off_delivers_nothing() -> None:
    model = RootModel(1)
    vp = model.vps[0]
    model.module_unload(vp)
    post(model, model.child(), 0)
    vp.synic.end_of_message()
    assert vp.kind == 0


def test_purge_drops_what_waits_and_tells_of_the_slot() -> None:
    model = RootModel(2)
    first, second = model.child(2), model.child(3)
    for index in range(3):
        post(model, first, index, model.vps[0])
        post(model, second, index, model.vps[0])
        post(model, second, index, model.vps[1])
    assert not model.messages.purge(2)
    model.step(model.vps[0])
    while model.vps[0].handler is not None:
        model.step(model.vps[0])
    assert model.kicks()[0] == (2, 0)
    assert model.messages.purge(2)
    model.run()
    assert [sender for sender, _ in model.kicks()].count(2) == 1
    assert [sender for sender, _ in model.kicks()].count(3) == 6


def test_purge_drops_what_waits_for_any_vp() -> None:
    model = RootModel(1, enabled=False)
    post(model, model.child(2), 0)
    post(model, model.child(3), 0)
    assert model.messages.purge(2)
    model.module_load(model.vps[0])
    model.run()
    assert model.kicks() == [(3, 0)]


def test_slot_0_takes_nothing_else() -> None:
    model = RootModel()
    with pytest.raises(HvError) as refused:
        model.vps[0].synic.post_message(0, 1, 0, b"")
    assert refused.value.status == status.INVALID_PARAMETER
    with pytest.raises(HvError):
        model.vps[0].synic.post_message_direct(0, b"\1" * 16)
    model.vps[0].synic.write_sint(2, 0x40)
    model.vps[0].synic.post_message(2, 1, 0, b"")
    assert model.root.vm.raised


def test_moving_simp_takes_the_waiting_message_along() -> None:
    """The view of the page changes; the slot is looked for where it is now."""
    model = RootModel()
    child = model.child()
    vp = model.vps[0]
    post(model, child, 0)
    post(model, child, 1)
    memory = memoryview(bytearray(vp.pages[0].memory))
    vp.pages[0].memory = memory
    vp.pages[0].view = type(vp.pages[0].view)(memory, model.meet)
    vp.synic.write_page(vp.synic.simp, vp.synic.simp.value | 0x5000)
    model.run()
    assert model.kicks() == [(2, 0), (2, 1)]


def test_sint0_vector_change_is_followed() -> None:
    model = RootModel()
    model.vps[0].synic.write_sint(0, 0x55)
    post(model, model.child(), 0)
    assert model.root.vm.raised == [(0, 0x55)]


def test_polled_sint0_gets_no_interrupt() -> None:
    model = RootModel()
    model.vps[0].synic.write_sint(0, SINT0_VALUE | msrs.SINT_POLLING)
    post(model, model.child(), 0)
    assert model.vps[0].kind
    assert not model.root.vm.raised


def test_other_messages_are_posted_whole() -> None:
    model = RootModel(2)
    payload = bytes(range(24))
    model.messages.post(messages.ASYNC_CALL_COMPLETION, 2, payload, model.vps[1])  # type: ignore[arg-type]
    assert messages.MESSAGE_HEADER.unpack_from(model.vps[1].slot) == (
        messages.ASYNC_CALL_COMPLETION, 24, 0, 2,
    )  # fmt: skip
    assert model.vps[1].slot[16:40] == payload


def test_other_messages_are_delivered_as_often_as_they_were_posted() -> None:
    model = RootModel(2)
    for _ in range(3):
        model.messages.post(0x80000101, 0, bytes(240), model.vps[1])  # type: ignore[arg-type]
    vp = model.vps[1]
    model.module_unload(vp)
    vp = model.vps[0]
    seen = 0
    while vp.kind:
        seen += 1
        vp.slot[:4] = bytes(4)
        vp.synic.end_of_message()
    assert seen == 3


@pytest.mark.parametrize("seed", range(60))
def test_no_kick_is_lost_however_the_two_sides_meet(seed: int) -> None:
    """Every kick is seen after it was posted, with handlers and CPU changes at any point of ours."""
    chance = random.Random(seed)
    model = RootModel(3)
    child = model.child()
    owed: set[int] = set()
    seen = 0

    def account() -> None:
        nonlocal seen
        for event in model.events[seen:]:
            assert event[0] == "kick"
            owed.discard(event[2])
        seen = len(model.events)

    for _ in range(400):
        index = chance.randrange(6)
        account()
        owed.add(index)
        model.meet_randomly(chance)
        post(model, child, index, chance.choice(model.vps))
        model.meeting = None
        for _ in range(chance.randrange(6)):
            model.step(chance.choice(model.vps))
            account()
        if chance.random() < 0.1:
            model.run()
            account()
            assert not owed or not any(vp.synic.scontrol for vp in model.vps)
        if chance.random() < 0.05:
            vp = chance.choice(model.vps)
            while vp.handler is not None:  # the driver's exit path is no part of the handler
                model.step(vp)
            account()
            if vp.synic.scontrol:
                model.module_unload(vp)
            else:
                model.module_load(vp)
    for vp in model.vps:
        if not vp.synic.scontrol:
            model.module_load(vp)
    model.run()
    account()
    assert not owed
    assert all(vp.kind == 0 for vp in model.vps)
