# SPDX-License-Identifier: Apache-2.0
"""MSI-X vectors by eventfd, the table of routes, messages of the I/O APIC."""

from __future__ import annotations

import os
from random import Random

import pytest

from rootvisor.mshv.abi import MAX_GUEST_IRQS
from rootvisor.vmm.interrupts import ApicMessages, MshvVector, MsiRoutes
from rootvisor.vmm.pci_platform import MshvPlatform
from tests.unit.vmm.fake_partition import FakePartition

ADDRESS, DATA = 0xFEE0_1000, 0x41


@pytest.fixture
def partition() -> FakePartition:
    return FakePartition()


def vector(partition: FakePartition) -> MshvVector:
    return MshvVector(MsiRoutes(partition))  # type: ignore[arg-type]


def test_unmasked_vector_gives_its_eventfd_to_the_kernel(partition: FakePartition) -> None:
    one = vector(partition)
    one.program(ADDRESS, DATA)
    assert partition.irqfds == []
    one.mask(False)
    ((fd, number),) = partition.irqfds
    assert fd == one.eventfd() and partition.routes == [(number, ADDRESS, DATA)]
    one.close()
    assert partition.irqfds == []
    with pytest.raises(OSError):
        os.fstat(fd)


def test_masked_vector_keeps_its_signal(partition: FakePartition) -> None:
    one = vector(partition)
    one.program(ADDRESS, DATA)
    one.mask(False)
    one.mask(True)
    one.trigger()
    one.eventfd()
    one.trigger()
    assert partition.irqfds == [] and os.eventfd_read(one.eventfd()) == 2
    one.close()


def test_trigger_of_a_vector_that_was_never_used_is_nothing(partition: FakePartition) -> None:
    one = vector(partition)
    one.trigger()
    one.close()
    one.close()
    assert partition.irqfds == [] and partition.routes == []


def test_reprogrammed_vector_keeps_its_number_and_changes_its_route(partition: FakePartition) -> None:
    one = vector(partition)
    one.program(ADDRESS, DATA)
    one.mask(False)
    one.program(ADDRESS + 0x1000, DATA + 1)
    assert len(partition.irqfds) == 1
    assert partition.routes == [(partition.irqfds[0][1], ADDRESS + 0x1000, DATA + 1)]
    one.close()


@pytest.mark.parametrize("address", [0, 0x1000, 0xFED0_0000, 0xFEF0_0000, 0x1_FEE0_0000, (1 << 64) - 1])
def test_message_for_no_local_apic_goes_nowhere(partition: FakePartition, address: int) -> None:
    one = vector(partition)
    one.mask(False)
    one.program(address, DATA)
    assert partition.irqfds == []
    one.program(ADDRESS, DATA)
    assert len(partition.irqfds) == 1
    one.program(address, DATA)
    assert partition.irqfds == []
    one.close()


@pytest.mark.parametrize("what", ["add_irqfd", "set_msi_routing"])
def test_refused_vector_is_tried_again_when_it_is_programmed_again(
    partition: FakePartition, what: str
) -> None:
    one = vector(partition)
    partition.fail.add(what)
    one.program(ADDRESS, DATA)
    one.mask(False)
    assert partition.irqfds == []
    partition.fail.clear()
    one.program(ADDRESS, DATA + 1)
    assert len(partition.irqfds) == 1
    one.close()
    assert partition.irqfds == []


def test_numbers_are_used_again(partition: FakePartition) -> None:
    routes = MsiRoutes(partition)  # type: ignore[arg-type]
    for _ in range(2 * MAX_GUEST_IRQS):
        number = routes.take()
        routes.set(number, ADDRESS, DATA)
        routes.give_back(number)
    assert number == 0


def test_more_vectors_than_the_kernel_has_cost_only_their_own_interrupts(partition: FakePartition) -> None:
    routes = MsiRoutes(partition)  # type: ignore[arg-type]
    for number in range(MAX_GUEST_IRQS):
        assert routes.take() == number
    one = MshvVector(routes)
    one.program(ADDRESS, DATA)
    one.mask(False)
    assert partition.irqfds == []
    one.close()


def test_any_programming_leaves_nothing_behind(partition: FakePartition) -> None:
    random = Random(5)
    routes = MsiRoutes(partition)  # type: ignore[arg-type]
    vectors = [MshvVector(routes) for _ in range(8)]
    for _ in range(4000):
        one = random.choice(vectors)
        partition.fail = {"add_irqfd"} if random.random() < 0.05 else set()
        kind = random.randrange(4)
        if kind == 0:
            one.program(random.choice((ADDRESS, random.getrandbits(64))), random.getrandbits(32))
        elif kind < 3:
            one.mask(bool(random.getrandbits(1)))
        else:
            one.trigger()
        numbers = [number for _fd, number in partition.irqfds]
        assert len(set(numbers)) == len(numbers) <= len(vectors)
    partition.fail.clear()
    for one in vectors:
        one.close()
    assert partition.irqfds == []


@pytest.mark.parametrize("refused", [False, True])
def test_message_of_the_io_apic_that_nobody_takes_is_lost(partition: FakePartition, refused: bool) -> None:
    if refused:
        partition.fail.add("assert_interrupt")
    ApicMessages(partition).deliver(3, True, 1, 0x55, True)  # type: ignore[arg-type]
    assert partition.interrupts == ([] if refused else [(0x55, 3, 1, True, True)])


def test_function_that_is_unplugged_gives_its_vectors_back(partition: FakePartition) -> None:
    platform = MshvPlatform(partition, None)  # type: ignore[arg-type]
    for bdf in (8, 16):
        one = platform.msi_vector(bdf)
        one.program(ADDRESS, DATA)
        one.mask(False)
    platform.forget(8)
    assert len(partition.irqfds) == 1
    platform.forget(8)
    platform.close()
    assert partition.irqfds == []
