# SPDX-License-Identifier: Apache-2.0
"""SEND_IPI and SEND_IPI_EX (TLFS "Virtual Interrupts"; VP sets: contract/guest-interface 2.8)."""

from __future__ import annotations

import struct

import pytest

from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import status
from tests.kvm.guest import Guest

VECTOR = 0x51


def ipi(guest: Guest, vector: int, mask: int, *, vtl: int = 0, reserved: bytes = bytes(3)) -> int:
    return guest.call(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(vector, vtl, reserved, mask)).status


def ipi_ex(
    guest: Guest, vector: int, set_format: int, bank_mask: int, *banks: int, junk: bytes = bytes(3)
) -> int:
    data = hv.SEND_IPI_EX_INPUT.pack(vector, 0, junk, set_format, bank_mask)
    return guest.call(
        hv.SEND_IPI_EX, data + struct.pack(f"<{len(banks)}Q", *banks), variable=len(banks)
    ).status


@pytest.mark.parametrize(
    ("mask", "wanted"), [(1, (1, 0)), (2, (0, 1)), (3, (1, 1)), (0, (0, 0)), (6, (0, 1))]
)
def test_ipi_reaches_the_mask(guest2: Guest, mask: int, wanted: tuple[int, int]) -> None:
    assert ipi(guest2, VECTOR, mask) == 0
    for vp in (0, 1):
        assert guest2.take(VECTOR, vp, turns=3_000_000 if wanted[vp] else 1000) == wanted[vp]


def test_ipi_from_another_vp(guest2: Guest) -> None:
    data = hv.SEND_IPI_INPUT.pack(VECTOR, 0, bytes(3), 1)
    assert guest2.fast(hv.SEND_IPI, data, vp=1).status == 0
    assert guest2.take(VECTOR, 0) == 1


@pytest.mark.parametrize("vector", [0, 15, 256, 0xFFFFFFFF])
def test_ipi_vector_out_of_range(guest2: Guest, vector: int) -> None:
    assert ipi(guest2, vector, 1) == status.INVALID_PARAMETER
    assert ipi_ex(guest2, vector, 0, 1, 1) == status.INVALID_PARAMETER


def test_ipi_reserved_and_vtl(guest2: Guest) -> None:
    assert ipi(guest2, VECTOR, 1, reserved=b"\1\0\0") == status.INVALID_PARAMETER
    assert ipi(guest2, VECTOR, 1, vtl=1) == status.INVALID_PARAMETER


def test_ipi_ex_of_a_sparse_set(guest2: Guest) -> None:
    assert ipi_ex(guest2, VECTOR, 0, 1, 2) == 0
    assert guest2.take(VECTOR, 1) == 1
    assert guest2.interrupts(VECTOR, 0) == 0


def test_ipi_ex_ignores_vps_that_do_not_exist(guest2: Guest) -> None:
    assert ipi_ex(guest2, VECTOR, 0, 0x5, 0x21, 0x4) == 0
    assert guest2.take(VECTOR, 0) == 1
    assert ipi_ex(guest2, VECTOR, 0, 1 << 63, hv.SELF) == 0


def test_ipi_ex_of_all(guest2: Guest) -> None:
    assert ipi_ex(guest2, VECTOR, 1, 0) == 0
    assert (guest2.take(VECTOR, 0), guest2.take(VECTOR, 1)) == (1, 1)


def test_ipi_ex_of_nobody(guest2: Guest) -> None:
    assert ipi_ex(guest2, VECTOR, 0, 0) == 0
    assert guest2.take(VECTOR, 0, turns=1000) == 0


def test_ipi_ex_tolerates_old_bytes(guest2: Guest) -> None:
    """Linux leaves what was in its page (contract/root-partition 3.2)."""
    assert ipi_ex(guest2, VECTOR, 0, 1, 1, junk=b"\xff\xff\xff") == 0


@pytest.mark.parametrize(
    ("set_format", "mask", "banks"), [(0, 1, ()), (0, 3, (1,)), (0, 1, (1, 1)), (2, 1, (1,))]
)
def test_ipi_ex_set_that_makes_no_sense(
    guest2: Guest, set_format: int, mask: int, banks: tuple[int, ...]
) -> None:
    assert ipi_ex(guest2, VECTOR, set_format, mask, *banks) == status.INVALID_PARAMETER
