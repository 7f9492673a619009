# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.boot.busybox_guest import archive
from rootvisor.boot.errors import InitramfsError


def entries(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Name to mode and content of a cpio archive (newc)."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        start = at + 110 + fields[11] + -(110 + fields[11]) % 4
        if name == "TRAILER!!!":
            return found
        found[name] = fields[1], data[start : start + fields[6]]
        at = start + fields[6] + -fields[6] % 4


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "guest_init").write_text("#!/bin/busybox sh\n")
    (tmp_path / "busybox").write_bytes(b"\x7fELF")
    return str(tmp_path / "guest_init"), str(tmp_path / "busybox")


def test_archive_without_modules_has_init_busybox_and_the_programs(
    files: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "load").write_bytes(b"program")
    found = entries(archive(*files, programs={"/bin/load": str(tmp_path / "load")}))
    assert found["init"] == (0o100755, b"#!/bin/busybox sh\n")
    assert found["bin/busybox"] == (0o100755, b"\x7fELF")
    assert found["bin/load"] == (0o100755, b"program")
    assert found["modules/order"][1] == b""
    assert found["dev/console"][0] == 0o020600


def test_archive_has_the_modules_that_are_wanted_in_their_order(
    files: tuple[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "modules" / "kernel"
    folder.mkdir(parents=True)
    for name in ("virtio_blk", "virtio", "other"):
        (folder / f"{name}.ko").write_bytes(name.encode())
    (tmp_path / "modules" / "modules.dep").write_text(
        "kernel/virtio_blk.ko: kernel/virtio.ko\nkernel/virtio.ko:\nkernel/other.ko:\n"
    )
    (tmp_path / "modules" / "modules.builtin").write_text("kernel/virtio_net.ko\n")
    found = entries(archive(*files, str(tmp_path / "modules"), ("virtio_blk", "virtio_net")))
    assert found["modules/order"][1] == b"virtio\nvirtio_blk\n"
    assert found["modules/virtio_blk.ko"][1] == b"virtio_blk"
    assert "modules/other.ko" not in found
    with pytest.raises(InitramfsError):
        archive(*files, str(tmp_path / "modules"), ("virtio_fs",))
