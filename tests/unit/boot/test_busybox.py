# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rootvisor.boot import busybox
from rootvisor.boot.errors import InitramfsError


def make_program(path: Path, *kinds: int) -> None:
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, len(kinds), 0, 0, 0)
    path.write_bytes(head + b"".join(struct.pack("<I52x", kind) for kind in kinds))
    path.chmod(0o755)


def test_applet_names_are_sorted_and_unique() -> None:
    assert list(busybox.APPLETS) == sorted(set(busybox.APPLETS))


def test_dynamic_busybox_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(tmp_path / "busybox", 1, 3)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InitramfsError, match=r"no apt-get to fetch one; install busybox-static") as caught:
        busybox.find_busybox(str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_failing_download_names_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        script = tmp_path / tool
        script.write_text("#!/bin/sh\nexit 100\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InitramfsError, match="check the network, or apt-get install busybox-static"):
        busybox.find_busybox(str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(InitramfsError, match="cannot keep busybox there"):
        busybox.find_busybox(str(tmp_path / "file" / "cache"))
