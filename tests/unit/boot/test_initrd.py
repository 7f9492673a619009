# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.boot.errors import InitrdError
from rootvisor.boot.initrd import load_initrd

KIB, MIB = 1 << 10, 1 << 20


def test_parts_lie_behind_each_other_below_the_limit(tmp_path: Path) -> None:
    ram = memoryview(bytearray(4 * MIB))
    base = tmp_path / "base"
    base.write_bytes(b"A" * 5001)
    placed = load_initrd([str(base), b"BBB"], ram, MIB, 3 * MIB)
    assert placed is not None
    assert placed.gpa % 4096 == 0
    assert 3 * MIB - 4096 <= placed.gpa + placed.size <= 3 * MIB
    content = bytes(ram[placed.gpa : placed.gpa + placed.size])
    assert content == b"A" * 5001 + bytes(3) + b"BBB\0"


def test_no_parts_is_none() -> None:
    assert load_initrd([], memoryview(bytearray(MIB)), 0, MIB) is None


def test_too_large_names_the_file_and_the_memory(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(bytes(3 * MIB))
    with pytest.raises(InitrdError, match="big: 4 MiB of initial ramdisk do not fit: of 4 MiB") as caught:
        load_initrd([str(big)], memoryview(bytearray(4 * MIB)), 2 * MIB, 4 * MIB)
    assert "\n" not in str(caught.value)


def test_missing_empty_and_directory_are_refused(tmp_path: Path) -> None:
    ram = memoryview(bytearray(MIB))
    (tmp_path / "empty").touch()
    for name, words in [("none", "no such"), ("empty", "is empty"), (".", "is a directory")]:
        with pytest.raises(InitrdError, match=words):
            load_initrd([str(tmp_path / name)], ram, 0, MIB)
