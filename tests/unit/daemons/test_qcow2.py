# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from rootvisor.daemons import storage
from rootvisor.daemons.process import DaemonError
from rootvisor.daemons.qcow2 import Qcow2Error, chain
from rootvisor.daemons.served import start_vhost_user
from tests.unit.virtio.qcow2 import name_backing_file, resize_qcow2, write_qcow2


def image(path: Path, backing: str = "", image_format: str = "") -> Path:
    write_qcow2(path, b"")
    resize_qcow2(path, 1 << 20)
    if backing:
        name_backing_file(path, backing, image_format)
    return path


@pytest.mark.parametrize("readonly", [False, True])
def test_backing_file_that_nobody_asked_for_is_refused(tmp_path: Path, readonly: bool) -> None:
    path = image(tmp_path / "disk", "/etc/shadow", "raw")
    with pytest.raises(DaemonError, match=r"has a backing file \(/etc/shadow\), .* backing_files=on only$"):
        storage.command("qsd", str(path), "qcow2", readonly, False, 1)


def test_raw_disk_with_a_header_of_qcow2_stays_raw(tmp_path: Path) -> None:
    path = image(tmp_path / "disk", "/etc/shadow", "raw")
    argv = storage.command("qsd", str(path), "raw", False, False, 1)
    assert '"driver":"raw"' in argv[4] and "qcow2" not in " ".join(argv)


def test_chain_of_backing_files_is_followed_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base").write_bytes(bytes(1 << 20))
    middle = image(tmp_path / "deep" / "middle", "base", "raw")
    top = image(tmp_path / "top", "deep/middle", "qcow2")
    assert chain(str(top), backing_files=True) == [
        (str(top), "qcow2"), (str(middle), "qcow2"), (str(tmp_path / "deep" / "base"), "raw"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("backing", "image_format", "reason"),
    [
        ("base", "", "the format of base, the backing file of .*, is not said; .* qemu-img rebase"),
        ("base", "vmdk", "is vmdk, not raw or qcow2"),
        ("nbd://example.org/x", "raw", "is no file: nbd:"),
        ("json:{}", "raw", "is no file: json:"),
        ("nowhere", "qcow2", "cannot open disk image .*nowhere: No such file"),
        ("disk", "qcow2", "more than 15 backing files"),
    ],
)
def test_chain_that_cannot_be_is_refused(
    tmp_path: Path, backing: str, image_format: str, reason: str
) -> None:
    path = image(tmp_path / "disk", backing, image_format)
    (tmp_path / "base").write_bytes(bytes(512))
    with pytest.raises(Qcow2Error, match=reason) as caught:
        chain(str(path), backing_files=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backing_files", [False, True])
def test_data_in_another_file_is_refused(tmp_path: Path, backing_files: bool) -> None:
    path = image(tmp_path / "disk")
    name_backing_file(path, "", external_data=True)
    with pytest.raises(Qcow2Error, match="keeps its data in another file"):
        chain(str(path), backing_files=backing_files)


@pytest.mark.parametrize("size", [0, 4, 71, 72, 80, 104, 1030])
def test_header_that_ends_early_is_one_clear_line(tmp_path: Path, size: int) -> None:
    path = image(tmp_path / "disk", "base" * 10, "raw")
    os.truncate(path, size)
    try:
        chain(str(path), backing_files=False)
    except Qcow2Error as error:
        assert "\n" not in str(error)
    else:
        pytest.fail("it was taken for an image")


@pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None, reason="qemu-storage-daemon is not installed"
)
def test_backing_file_that_is_named_too_late_is_not_opened(tmp_path: Path) -> None:
    """Between our look at the header and the daemon's."""
    base = tmp_path / "base"
    base.write_bytes(bytes(1 << 20))
    path = image(tmp_path / "disk")
    argv = storage.command(shutil.which("qemu-storage-daemon") or "", str(path), "qcow2", False, False, 1)
    name_backing_file(path, str(base), "raw")
    served = start_vhost_user("qemu-storage-daemon", argv)
    try:
        folder = f"/proc/{served.daemon.pid}/fd"
        opened = {os.readlink(f"{folder}/{number}") for number in os.listdir(folder)}
    finally:
        served.close()
    assert str(path) in opened and str(base) not in opened
