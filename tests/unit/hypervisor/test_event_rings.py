# SPDX-License-Identifier: Apache-2.0
"""Event rings against a model of their consumer (``synic_event_ring_get_queued_port``)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from rootvisor.hypervisor.ports import Port
from rootvisor.tlfs import messages, msrs

from .root_model import EVENT_SINT, SINT5_VALUE, Child, RootModel

ENTRIES = messages.EVENT_RING_ENTRIES


def ring_ports(model: RootModel, child: Child, count: int) -> list[Port]:
    return [model.port(number, child) for number in range(1, count + 1)]


def signal(model: RootModel, *ports: Port) -> None:
    for port in ports:
        model.messages.rings.signal(port)


def test_first_port_lies_in_the_first_entry_and_one_message_tells() -> None:
    model = RootModel()
    port = model.port(77, model.child())
    signal(model, port)
    vp = model.vps[0]
    assert bytes(vp.ring()[:8]) == bytes((1, 0, 0, 0, 77, 0, 0, 0))
    assert messages.MESSAGE_HEADER.unpack_from(vp.slot)[:3] == (messages.SYNIC_SINT_INTERCEPT, 4, 0)
    assert vp.slot[16] == EVENT_SINT
    assert model.root.vm.raised == [(0, 0xF3)]


def test_no_second_message_while_signals_are_masked() -> None:
    model = RootModel()
    signal(model, *ring_ports(model, model.child(), 20))
    assert len(model.root.vm.raised) == 1
    model.run()
    assert model.doorbells() == list(range(1, 21))
    assert model.vps[0].ring()[0] == 0


def test_same_port_is_queued_once_until_it_is_taken() -> None:
    model = RootModel()
    port = model.port(1, model.child())
    signal(model, port, port, port)
    model.run()
    assert model.doorbells() == [1]
    signal(model, port)
    model.run()
    assert model.doorbells() == [1, 1]


def test_head_wraps_with_the_tail() -> None:
    model = RootModel()
    ports = ring_ports(model, model.child(), 10)
    for turn in range(30):
        signal(model, *ports)
        model.run()
        assert model.doorbells() == [*range(1, 11)] * (turn + 1)
    assert model.vps[0].tails[EVENT_SINT] == 300 % ENTRIES


def test_full_ring_keeps_the_rest_and_asks_for_a_call() -> None:
    model = RootModel()
    ports = ring_ports(model, model.child(), 200)
    signal(model, *ports, *ports)
    assert model.vps[0].ring()[1] == 1
    model.run()
    assert sorted(model.doorbells()) == list(range(1, 201))
    assert bytes(model.vps[0].ring()) == bytes(256)


def test_deleted_port_leaves_the_waiting_list() -> None:
    model = RootModel()
    ports = ring_ports(model, model.child(), ENTRIES + 5)
    signal(model, *ports)
    for port in ports[ENTRIES:-1]:
        model.ports.delete(model.root, port.id)
    model.run()
    assert model.doorbells() == [*range(1, ENTRIES + 1), ENTRIES + 5]


def test_deleted_port_does_not_ring() -> None:
    model = RootModel()
    port = model.port(1, model.child())
    model.ports.delete(model.root, 1)
    signal(model, port)
    assert bytes(model.vps[0].ring()) == bytes(256)


def test_port_with_a_target_uses_that_vp_and_waits_for_it() -> None:
    model = RootModel(3)
    child = model.child()
    port = model.port(5, child, target_vp=2)
    model.module_unload(model.vps[2])
    signal(model, port)
    assert not model.root.vm.raised
    model.module_load(model.vps[2])
    assert model.root.vm.raised == [(2, 0xF3)]
    model.run()
    assert model.doorbells() == [5]


def test_port_prefers_its_home_while_that_is_on() -> None:
    model = RootModel(2)
    port = model.port(5, model.child())
    port.home = model.vps[1].synic.outlet
    for taker in (1, 0, 1):
        if model.vps[1].synic.scontrol and not taker:
            model.module_unload(model.vps[1])
        elif taker:
            model.module_load(model.vps[1])
        signal(model, port)
        assert model.vps[taker].kind == messages.SYNIC_SINT_INTERCEPT
        model.run()
    assert model.doorbells() == [5] * 3


def test_waiting_port_comes_with_the_first_vp_that_is_ready() -> None:
    model = RootModel(2, enabled=False)
    ports = ring_ports(model, model.child(), 3)
    signal(model, *ports, *ports)
    model.module_load(model.vps[1])
    model.run()
    assert model.doorbells() == [1, 2, 3]


def test_unload_and_load_keep_head_and_tail_in_step() -> None:
    model = RootModel()
    ports = ring_ports(model, model.child(), 7)
    signal(model, *ports)
    model.run()
    model.module_unload(model.vps[0])
    model.module_load(model.vps[0])
    signal(model, *ports)
    model.run()
    assert model.doorbells() == [*range(1, 8)] * 2


def test_ids_that_an_unload_left_come_again_in_step() -> None:
    model = RootModel()
    ports = ring_ports(model, model.child(), 9)
    signal(model, *ports[:4])
    model.run()
    signal(model, *ports)
    model.module_unload(model.vps[0])
    assert bytes(model.vps[0].ring()) == bytes(256)
    assert model.vps[0].kind == 0
    model.module_load(model.vps[0])
    model.run()
    assert model.doorbells() == [1, 2, 3, 4, *range(1, 10)]


def test_ids_of_a_cpu_that_goes_move_to_another() -> None:
    model = RootModel(2)
    child = model.child()
    ports = ring_ports(model, child, ENTRIES + 10)
    signal(model, *ports)
    assert model.vps[0].ring()[0]
    model.module_unload(model.vps[0])
    model.run()
    assert sorted(model.doorbells()) == list(range(1, ENTRIES + 11))
    assert model.vps[1].tails[EVENT_SINT] == (ENTRIES + 10) % ENTRIES


def test_cpu_that_comes_online_begins_at_0() -> None:
    model = RootModel(2)
    ports = ring_ports(model, model.child(), 3)
    signal(model, *ports)
    model.run()
    vp = model.vps[0]
    assert vp.tails[EVENT_SINT] == 3
    model.module_unload(vp)
    model.cpu_online(vp)
    model.module_unload(model.vps[1])
    model.module_load(vp)
    signal(model, ports[2])
    assert vp.ring().cast("I")[1] == 3
    model.run()
    assert model.doorbells() == [1, 2, 3, 3]


def test_cpu_that_began_anew_without_going_off_loses_nothing() -> None:
    model = RootModel(2)
    ports = ring_ports(model, model.child(), ENTRIES + 3)
    signal(model, *ports)
    model.cpu_online(model.vps[0])
    model.run()
    assert set(model.doorbells()) == set(range(1, ENTRIES + 4))


def test_sint_that_is_no_intercept_gets_its_own_vector() -> None:
    model = RootModel()
    model.vps[0].synic.write_sint(EVENT_SINT, 0x61)
    signal(model, model.port(1, model.child()))
    assert model.root.vm.raised == [(0, 0x61)]
    assert model.vps[0].kind == 0


def test_masked_sint_takes_no_ids() -> None:
    model = RootModel()
    port = model.port(1, model.child())
    model.vps[0].synic.write_sint(EVENT_SINT, SINT5_VALUE | msrs.SINT_MASKED)
    signal(model, port)
    assert bytes(model.vps[0].ring()) == bytes(256)
    model.vps[0].synic.write_sint(EVENT_SINT, SINT5_VALUE)
    model.run()
    assert model.doorbells() == [1]


def test_id_of_a_port_that_was_deleted_is_not_given_to_its_successor() -> None:
    """The ids that a CPU leaves behind are looked up as ports, not as numbers."""
    model = RootModel(2)
    child = model.child()
    signal(model, model.port(1, child))
    model.ports.delete(model.root, 1)
    model.port(1, child)
    model.module_unload(model.vps[0])
    model.run()
    assert model.doorbells() == []


def test_garbage_in_the_ring_is_nobodys() -> None:
    model = RootModel(2)
    vp = model.vps[0]
    port = model.port(1, model.child())
    vp.pages[2].memory[:] = b"\xa5" * 4096
    signal(model, port)
    model.module_unload(vp)
    model.run()
    assert model.doorbells() == [1]


@pytest.mark.parametrize("seed", range(80))
@pytest.mark.parametrize("ports", [3, 70])
def test_no_doorbell_is_lost_however_the_two_sides_meet(seed: int, ports: int) -> None:
    chance = random.Random(seed)
    model = RootModel(2)
    child = model.child()
    bells = ring_ports(model, child, ports)
    owed: set[int] = set()
    seen = 0

    def account() -> None:
        nonlocal seen
        for event in model.events[seen:]:
            assert event[0] == "doorbell"
            assert 1 <= event[1] <= ports
            owed.discard(event[1])
        seen = len(model.events)

    for _ in range(300):
        port = chance.choice(bells)
        account()
        owed.add(port.id)
        model.meet_randomly(chance)
        signal(model, port)
        model.meeting = None
        for _ in range(chance.choice((0, 0, 1, 3, 40))):
            model.step(chance.choice(model.vps))
        if chance.random() < 0.1:
            model.run()
            account()
            assert not owed or not any(vp.synic.scontrol for vp in model.vps)
        if chance.random() < 0.04:
            vp = chance.choice(model.vps)
            while vp.handler is not None:
                model.step(vp)
            if vp.synic.scontrol:
                model.module_unload(vp)
                if chance.random() < 0.5:
                    model.cpu_online(vp)
            else:
                model.module_load(vp)
    for vp in model.vps:
        if not vp.synic.scontrol:
            model.module_load(vp)
    model.run()
    account()
    assert not owed
    assert all(vp.kind == 0 for vp in model.vps)


@pytest.mark.parametrize("access", range(8))
def test_full_ring_loses_nothing_wherever_its_consumer_stops(access: int) -> None:
    """Before our ``access``-th access the consumer makes any number of steps up to its end."""
    for steps in range(4 * ENTRIES):
        model = RootModel()
        ports = ring_ports(model, model.child(), ENTRIES + 1)
        signal(model, *ports[:-1])
        accesses = iter(range(1000))

        def meeting(model: RootModel = model, steps: int = steps, accesses: Iterator[int] = accesses) -> None:
            if next(accesses) == access:
                for _ in range(steps):
                    if model.vps[0].leaving or not model.step(model.vps[0]):
                        break

        model.meeting = meeting
        signal(model, ports[-1])
        model.meeting = None
        model.run()
        assert sorted(model.doorbells()) == list(range(1, ENTRIES + 2)), f"{steps} steps"
