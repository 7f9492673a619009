# SPDX-License-Identifier: Apache-2.0
"""Which writes ring which doorbell."""

from __future__ import annotations

import threading

import pytest

from rootvisor.hypervisor.errors import HvError
from rootvisor.tlfs import ports as tlfs
from rootvisor.tlfs import status

from .root_model import Child, RootModel

ANY = tlfs.DOORBELL_ANY_VALUE
GPA = 0xFEBC_0104


def connect(model: RootModel, child: Child, port_id: int, gpa: int, value: int, flags: int) -> None:
    model.port(port_id, child)
    model.ports.connect(child, port_id, model.root, port_id, tlfs.PORT_DOORBELL, gpa, value, flags)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "trigger", "size", "value", "rings"),
    [
        (0 | ANY, 0, 1, 7, True),
        (0 | ANY, 0, 2, 7, True),
        (0 | ANY, 0, 4, 7, True),
        (0 | ANY, 0, 8, 7, True),
        (0 | ANY, 0, 16, 7, True),
        (1 | ANY, 0, 1, 7, True),
        (1 | ANY, 0, 2, 7, False),
        (2 | ANY, 0, 2, 7, True),
        (2 | ANY, 0, 4, 7, False),
        (3 | ANY, 0, 4, 7, True),
        (3 | ANY, 0, 1, 7, False),
        (4 | ANY, 0, 8, 7, True),
        (4 | ANY, 0, 4, 7, False),
        (1, 7, 1, 7, True),
        (1, 7, 1, 8, False),
        (1, 0x107, 1, 7, True),  # only the written width is compared
        (2, 0x107, 2, 7, False),
        (2, 0x10107, 2, 0x107, True),
        (3, 0xFFFF_FFFF_0000_0001, 4, 1, True),
        (4, 0xFFFF_FFFF_0000_0001, 8, 1, False),
        (4, 1, 8, 1, True),
        (0, 5, 1, 5, True),
        (0, 5, 2, 5, True),
        (0, 5, 4, 5, True),
        (0, 5, 4, 0x105, False),
        (0, 0x105, 1, 5, True),
    ],
)
def test_match_size_and_value(flags: int, trigger: int, size: int, value: int, rings: bool) -> None:
    model = RootModel()
    child = model.child()
    connect(model, child, 1, GPA, trigger, flags)
    assert child.doorbells.match(GPA, size, value) is rings
    model.run()
    assert model.doorbells() == [1] * rings


@pytest.mark.parametrize("flags", [5, 6, 7, 8, 0x4000_0000, 1 << 32, ANY | 5])
def test_connect_flags_that_do_not_exist(flags: int) -> None:
    model = RootModel()
    child = model.child()
    with pytest.raises(HvError) as refused:
        connect(model, child, 1, GPA, 0, flags)
    assert refused.value.status == status.INVALID_PARAMETER
    assert not child.doorbells.by_gpa
    assert not child.doorbells.match(GPA, 4, 0)


@pytest.mark.parametrize("gpa", [GPA - 1, GPA + 1, GPA + 4, 0, GPA | 1 << 40])
def test_match_only_at_the_exact_gpa(gpa: int) -> None:
    model = RootModel()
    child = model.child()
    connect(model, child, 1, GPA, 0, ANY)
    assert not child.doorbells.match(gpa, 4, 0)


def test_match_picks_the_doorbell_by_value() -> None:
    model = RootModel()
    child = model.child()
    for queue in range(4):
        connect(model, child, queue + 1, GPA, queue, 2)
    for queue in (2, 0, 3):
        assert child.doorbells.match(GPA, 2, queue)
        model.run()
    assert model.doorbells() == [3, 1, 4]
    assert not child.doorbells.match(GPA, 2, 4)
    assert child.doorbells.rung == 3


def test_match_is_per_child() -> None:
    model = RootModel()
    first, second = model.child(2), model.child(3)
    connect(model, first, 1, GPA, 0, ANY)
    assert not second.doorbells.match(GPA, 4, 0)


def test_disconnect_removes_only_its_own() -> None:
    model = RootModel()
    child = model.child()
    for queue in range(3):
        connect(model, child, queue + 1, GPA, queue, 2)
    model.ports.disconnect(child, 2, True)  # type: ignore[arg-type]
    assert not child.doorbells.match(GPA, 2, 1)
    assert child.doorbells.match(GPA, 2, 0)
    assert child.doorbells.match(GPA, 2, 2)
    for connection in (1, 3):
        model.ports.disconnect(child, connection, True)  # type: ignore[arg-type]
    assert not child.doorbells.by_gpa


def test_port_deleted_before_the_connection_makes_the_write_an_ordinary_one() -> None:
    model = RootModel()
    child = model.child()
    connect(model, child, 1, GPA, 0, ANY)
    model.ports.delete(model.root, 1)
    assert not child.doorbells.match(GPA, 4, 0)
    model.run()
    assert not model.doorbells()


def test_deleted_port_never_rings_again_whatever_other_threads_write() -> None:
    """DELETE_PORT has returned: no new entry (contract T18)."""
    model = RootModel()
    child = model.child()
    for _ in range(50):
        connect(model, child, 1, GPA, 0, ANY)
        stop = threading.Event()

        def write(stop: threading.Event = stop) -> None:
            while not stop.is_set():
                child.doorbells.match(GPA, 4, 0)

        writers = [threading.Thread(target=write) for _ in range(2)]
        for writer in writers:
            writer.start()
        model.run()
        model.ports.delete(model.root, 1)
        model.run()
        seen = len(model.doorbells())
        stop.set()
        for writer in writers:
            writer.join()
        model.run()
        assert len(model.doorbells()) == seen
        model.ports.disconnect(child, 1, True)  # type: ignore[arg-type]
