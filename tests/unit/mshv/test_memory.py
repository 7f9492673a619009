# SPDX-License-Identifier: Apache-2.0
"""Memory whose address is known."""

from __future__ import annotations

import ctypes
import os

import pytest

from rootvisor.mshv import Memory, MshvError


def test_memory_address_is_where_the_view_is() -> None:
    with Memory(0x3000) as first, Memory(0x3000) as second:
        for number, memory in enumerate((first, second)):
            memory.view[0x2FFF] = 0x40 + number
            assert ctypes.string_at(memory.address + 0x2FFF, 1) == bytes([0x40 + number])


def test_memory_over_a_callers_file_is_shared() -> None:
    fd = os.memfd_create("file")
    os.ftruncate(fd, 0x4000)
    with Memory(0x2000, fd=fd, offset=0x1000) as one, Memory(0x2000, fd=fd, offset=0x1000) as two:
        assert one.address != two.address
        ctypes.memset(two.address, 0x77, 1)
        assert one.view[0] == 0x77
        one.close()
        two.view[1] = 5
        assert ctypes.string_at(two.address, 2) == b"\x77\x05"
    assert os.pread(fd, 2, 0x1000) == b"\x77\x05"
    os.close(fd)


def test_memory_with_a_wrong_size_is_refused() -> None:
    for size, offset in ((0, 0), (100, 0), (4096, 7), (-4096, 0)):
        with pytest.raises(ValueError, match="multiples"):
            Memory(size, offset=offset)


def test_memory_that_does_not_fit_is_an_error_and_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(MshvError, match="give the guest less memory"):
        Memory(1 << 62)
    assert os.listdir("/proc/self/fd") == before


def test_discarded_pages_read_as_zero() -> None:
    with Memory(0x3000) as memory:
        memory.view[:] = b"\xff" * 0x3000
        memory.discard(0x1000, 0x1000)
        assert (memory.view[0xFFF], memory.view[0x1000], memory.view[0x2000]) == (255, 0, 255)


def test_memory_closes_its_descriptors() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Memory(0x1000).close()
    assert len(os.listdir("/proc/self/fd")) == before
