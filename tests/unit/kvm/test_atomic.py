# SPDX-License-Identifier: Apache-2.0
"""Bits that two writers set and clear at the same time."""

from __future__ import annotations

import mmap

from rootvisor.kvm.atomic import set_bit


def test_set_bit_sets_that_bit_and_no_other() -> None:
    memory = memoryview(mmap.mmap(-1, 4096))
    bits = (0, 7, 8, 31, 32, 2047, 32767)
    for bit in bits:
        set_bit(memory, bit)
        set_bit(memory, bit)
    assert [bit for bit in range(32768) if memory[bit >> 3] >> (bit & 7) & 1] == list(bits)


def test_set_bit_in_a_part_of_a_page() -> None:
    page = memoryview(mmap.mmap(-1, 4096))
    set_bit(page[256:512], 9)
    assert page[257] == 2
    assert sum(page) == 2
