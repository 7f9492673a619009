# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from rootvisor.boot.cpio import CpioWriter


def build() -> bytes:
    archive = CpioWriter()
    archive.directory("/dev")
    archive.file("/bin/deep/program", b"#!/bin/sh\n", 0o755)
    archive.file("/bin/deep/data", b"x" * 5)
    archive.symlink("/bin/link", "deep/program")
    return archive.finish()


def test_equal_calls_give_equal_bytes_aligned_for_another_archive() -> None:
    assert build() == build()
    assert len(build()) % 4 == 0


def test_parents_come_before_children_and_only_once() -> None:
    archive = build()
    assert archive.count(b"bin/deep\0") == 1
    assert archive.index(b"bin\0") < archive.index(b"bin/deep\0") < archive.index(b"bin/deep/program\0")


def test_device_node_carries_its_numbers() -> None:
    archive = CpioWriter()
    archive.character_device("/console", 5, 1)
    header = archive.finish()
    assert header[14:22] == b"00002180"  # S_IFCHR | 0600
    assert header[78:94] == b"0000000500000001"


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is missing: apt-get install cpio")
def test_cpio_unpacks_it(tmp_path: Path) -> None:
    command = ["cpio", "--quiet", "-idm", "--no-absolute-filenames"]
    subprocess.run(command, input=build(), cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "bin/deep/program").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "bin/deep/program").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "bin/link").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "dev").is_dir()
