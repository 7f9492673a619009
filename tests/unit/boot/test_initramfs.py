# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from rootvisor.boot.busybox import APPLETS
from rootvisor.boot.errors import InitramfsError
from rootvisor.boot.initramfs import InitRequest, Mount, build_base, request_archive

AWKWARD = ("", "it's", 'say "hi" $HOME `id` \\', "two\nlines", "\udcff\udc81\udc88", "-n", "*")
AGENT = Path(build_base.__code__.co_filename).parent / "agent"


@pytest.fixture
def busybox(tmp_path: Path) -> str:
    path = tmp_path / "busybox"
    path.write_bytes(b"\x7fELF busybox")
    return str(path)


def content(archive: bytes, path: str) -> bytes:
    """One file out of a newc archive."""
    position = 0
    while True:
        size, name_size = (int(archive[position + at : position + at + 8], 16) for at in (54, 94))
        name = archive[position + 110 : position + 110 + name_size - 1].decode()
        start = position + (110 + name_size + 3 & ~3)
        if name == path.lstrip("/"):
            return archive[start : start + size]
        assert name != "TRAILER!!!", f"{path} is not in the archive"
        position = start + (size + 3 & ~3)


def test_base_is_cached_by_content(tmp_path: Path, busybox: str) -> None:
    cache = tmp_path / "cache"
    first = build_base(busybox, None, [], str(cache))
    inode = os.stat(first).st_ino
    assert build_base(busybox, None, [], str(cache)) == first
    assert os.stat(first).st_ino == inode
    Path(busybox).write_bytes(b"\x7fELF another")
    assert build_base(busybox, None, [], str(cache)) != first
    assert [name for name in os.listdir(cache) if name.startswith(".")] == []


def test_truncated_cache_file_is_replaced(tmp_path: Path, busybox: str) -> None:
    path = Path(build_base(busybox, None, [], str(tmp_path)))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    build_base(busybox, None, [], str(tmp_path))
    assert path.read_bytes() == whole


def test_base_nobody_used_for_long_is_removed(tmp_path: Path, busybox: str) -> None:
    old, young, foreign = (tmp_path / name for name in ("base-old.cpio", "base-young.cpio", "busybox"))
    for path in (old, young):
        path.write_bytes(b"")
    for path in (old, foreign):
        os.utime(path, (0, 0))
    build_base(busybox, None, [], str(tmp_path))
    assert (old.exists(), young.exists(), foreign.exists()) == (False, True, True)


def test_base_holds_agent_and_applets(tmp_path: Path, busybox: str) -> None:
    archive = Path(build_base(busybox, None, [], str(tmp_path))).read_bytes()
    assert content(archive, "/init").startswith(b"#!/rootvisor/busybox sh\n")
    assert content(archive, "/rootvisor/busybox") == b"\x7fELF busybox"
    assert content(archive, "/rootvisor/modules.order") == b""
    for applet in APPLETS:
        assert content(archive, f"/rootvisor/bin/{applet}") == b"../busybox"


def test_cache_that_cannot_be_written_is_one_line(tmp_path: Path, busybox: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        InitramfsError, match=r"cannot keep the initial ramdisk there: .*ROOTVISOR_CACHE"
    ) as caught:
        build_base(busybox, None, [], str(tmp_path / "file"))
    assert "\n" not in str(caught.value)


def test_missing_busybox_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InitramfsError, match="cannot read it"):
        build_base(str(tmp_path / "none"), None, [], str(tmp_path))


def test_request_files(tmp_path: Path) -> None:
    archive = request_archive(
        InitRequest(
            rootfs="virtiofs",
            tag="files",
            overlay=False,
            mounts=(Mount("cache", "/var/my cache", writable=True), Mount("other", "/mnt")),
            tmpfs=("/tmp",),
            control=False,
        ),
        {"/extra/file": b"content"},
    )
    lines = content(archive, "/rootvisor/request").decode().splitlines()
    assert {"control=none", "rootfs=virtiofs", "tag=files", "overlay=no", "writable=no"} <= set(lines)
    assert content(archive, "/rootvisor/mounts") == b"cache rw /var/my cache\nother ro /mnt\n"
    assert content(archive, "/rootvisor/tmpfs") == b"/tmp\n"
    assert content(archive, "/extra/file") == b"content"


@pytest.mark.parametrize("shell", ["sh", "bash", "busybox"])
def test_arguments_and_environment_survive_the_shell(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is missing: apt-get install {shell}")
    request = InitRequest(
        argv=AWKWARD,
        cwd="/tmp/it's",
        environment=(("A", "it's\n\udcfe"), ("PPID", "1"), ("bad-name", "x"), ("B", "")),
    )
    script = tmp_path / "command"
    script.write_bytes(content(request_archive(request), "/rootvisor/command"))
    show = f'. {script}; printf \'%s\\0\' "$@"; printf \'%s|\' "$A" "$_rv_directory"'
    command = [shell, "sh", "-c", show] if shell == "busybox" else [shell, "-c", show]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout
    expected = b"".join(os.fsencode(argument) + b"\0" for argument in AWKWARD)
    assert output == expected + b"it's\n\xfe|/tmp/it's|"


@pytest.mark.parametrize(
    "request_",
    [
        InitRequest(tag="a b"),
        InitRequest(hostname=""),
        InitRequest(tty="../x"),
        InitRequest(mounts=(Mount("t", "relative"),)),
        InitRequest(tmpfs=("/two\nlines",)),
        InitRequest(argv=("a\0b",)),
    ],
)
def test_what_cannot_be_passed_on_is_refused(request_: InitRequest) -> None:
    with pytest.raises(InitramfsError):
        request_archive(request_)


@pytest.mark.parametrize("script", ["init", "main", "run", "end", "sweep", "linuxrc"])
def test_agent_scripts_parse(script: str) -> None:
    subprocess.run(["sh", "-n", str(AGENT / script)], check=True, timeout=60)
