# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct

import pytest

from rootvisor.hypervisor.errors import GeneralProtection, HvError
from rootvisor.hypervisor.register_elements import read_each, write_each
from rootvisor.tlfs import status

NAMES = [0x10, 0x20, 0x30, 0x40]


def refuse(name: int, error: Exception) -> None:
    if name == NAMES[2]:
        raise error


def test_values_stand_where_their_names_stand() -> None:
    output = bytearray(b"\xee" * 64)
    wanted = memoryview(struct.pack("<4I", *NAMES)).cast("I")
    read_each(wanted, memoryview(output), 1, 3, lambda name: name << 64 | 7)
    assert struct.unpack_from("<4Q", output, 16) == (7, 0x20, 7, 0x30)
    assert output[:16] == output[48:] == b"\xee" * 16


def test_register_that_cannot_be_read_ends_the_list_with_the_number_done() -> None:
    output = bytearray(64)
    wanted = memoryview(struct.pack("<4I", *NAMES)).cast("I")

    def read(name: int) -> int:
        refuse(name, HvError(status.INVALID_PARAMETER))
        return name

    with pytest.raises(HvError) as caught:
        read_each(wanted, memoryview(output), 1, 4, read)
    assert (caught.value.status, caught.value.reps) == (status.INVALID_PARAMETER, 2)
    assert struct.unpack("<8Q", output) == (0, 0, 0x20, 0, 0, 0, 0, 0)


def elements() -> memoryview:
    return memoryview(b"".join(struct.pack("<I12xQQ", name, name + 1, 2) for name in NAMES))


def test_elements_are_written_in_order_with_all_their_bits() -> None:
    written: list[tuple[int, int]] = []
    write_each(elements(), 1, 3, lambda *element: written.append(element))
    assert written == [(0x20, 2 << 64 | 0x21), (0x30, 2 << 64 | 0x31)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (HvError(status.INVALID_PARAMETER), status.INVALID_PARAMETER),
        (GeneralProtection(), status.INVALID_REGISTER_VALUE),
    ],
)
def test_element_that_is_refused_ends_the_list_with_the_number_done(error: Exception, code: int) -> None:
    written: list[int] = []

    def write(name: int, _value: int) -> None:
        refuse(name, error)
        written.append(name)

    with pytest.raises(HvError) as caught:
        write_each(elements(), 0, 4, write)
    assert (caught.value.status, caught.value.reps, written) == (code, 2, NAMES[:2])
