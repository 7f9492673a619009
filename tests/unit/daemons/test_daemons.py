# SPDX-License-Identifier: Apache-2.0
"""The daemons themselves, where they are installed."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rootvisor.daemons import passt, sockets, storage
from rootvisor.daemons.passt import start_passt
from rootvisor.daemons.process import Daemon, DaemonError
from rootvisor.daemons.served import Served, start_vhost_user
from rootvisor.daemons.storage import start_storage
from rootvisor.daemons.virtiofsd import start_virtiofsd
from rootvisor.files import virtiofsd
from tests.unit.daemons.test_process import SOURCE, wait_until_gone

MAC = bytes.fromhex("525400123456")

has_storage = pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None,
    reason="qemu-storage-daemon is not installed (qemu-system-common)",
)


def no_passt() -> str:
    """Why passt cannot run here; it shuts itself in with a user namespace, which a chroot may not make."""
    if shutil.which("passt") is None:
        return "passt is not installed (passt)"
    made = subprocess.run(["unshare", "--user", "true"], check=False, capture_output=True, text=True)
    return f"passt needs a user namespace: {made.stderr.strip()}" if made.returncode else ""


has_passt = pytest.mark.skipif(bool(no_passt()), reason=no_passt())


def leftovers() -> list[str]:
    return [name for name in os.listdir(os.environ.get("TMPDIR") or "/tmp") if name.startswith("rootvisor-")]


@pytest.fixture(autouse=True)
def _own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    folder.chmod(0o711)
    for parent in tmp_path.parents:
        if parent.name.startswith("pytest-"):
            parent.chmod(0o711)
    tmp_path.chmod(0o711)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


@has_storage
def test_storage_answers_and_ends_leaving_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    served = start_storage(str(tmp_path / "disk"))
    assert not leftovers()
    assert served.daemon.alive
    served.close()
    assert served.daemon.status == 0
    wait_until_gone(served.daemon.pid)


@has_storage
def test_storage_of_an_image_that_is_none_says_what_qemu_says(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"QFI\xfb\0\0\0\x09" + bytes(8000))
    with pytest.raises(DaemonError, match=r"ended with status 1: .*version 9") as caught:
        start_storage(str(tmp_path / "disk"), image_format="qcow2")
    assert "\n" not in str(caught.value)


@has_storage
def test_storage_is_killed_with_the_process_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    program = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        "from rootvisor.daemons.storage import start_storage\n"
        f"s = start_storage({str(tmp_path / 'disk')!r})\n"
        "print(s.daemon.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    wait_until_gone(pid)


@pytest.mark.parametrize(
    ("name", "image_format", "message"),
    [
        ("absent", "raw", "cannot open disk image .*: No such file"),
        ("folder", "raw", "neither a file nor a block device"),
        ("disk", "qed", "no disk image format 'qed'; there are raw, qcow2"),
    ],
)
def test_storage_of_nothing_is_one_clear_line(
    tmp_path: Path, name: str, image_format: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "disk").write_bytes(bytes(512))
    with pytest.raises(DaemonError, match=message):
        storage.command("qsd", str(tmp_path / name), image_format, False, False, 1)


@has_passt
def test_passt_answers_who_has_the_gateway() -> None:
    served = start_passt(options=LOOPBACK)
    assert not leftovers()
    request = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + MAC + b"\n\0\2\x0f" + bytes(6) + b"\n\0\2\2"
    frame = b"\xff" * 6 + MAC + b"\x08\x06" + request
    if served.vhost_user:
        pytest.skip("this passt serves the rings itself")
    with socket.socket(fileno=served.take_socket()) as wire:
        wire.settimeout(10)
        wire.sendall(len(frame).to_bytes(4, "big") + frame)
        length = int.from_bytes(wire.recv(4), "big")
        answer = wire.recv(length)
    assert answer[:6] == MAC and answer[12:14] == b"\x08\x06" and answer[28:32] == b"\n\0\2\2"
    wait_until_ended(served)
    served.close()


LOOPBACK = (
    *("--ipv4-only", "--interface", "lo", "--address", "10.0.2.15", "--netmask", "24"),
    *("--gateway", "10.0.2.2", "--mac-addr", "02:00:00:00:00:01"),
)


def wait_until_ended(served: Served) -> None:
    """It ends by itself when its socket closes: what a killed VM leaves behind is nothing."""
    deadline = time.monotonic() + 10
    while served.daemon.alive:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@has_passt
def test_passt_that_does_not_like_its_options_says_why() -> None:
    with pytest.raises(DaemonError, match=r"passt ended with status 1: .*nonsense"):
        start_passt(options=["--tcp-ports", "nonsense"])
    assert not leftovers()


def test_passt_without_a_route_gets_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "has_default_route", lambda: False)
    argv = passt.command("passt", "pid", False)
    assert argv[argv.index("--gateway") + 1] == "10.0.2.2" and "--vhost-user" not in argv
    assert "--gateway" not in passt.command("passt", "pid", True, ["--pcap", "x"])
    monkeypatch.setattr(passt, "has_default_route", lambda: True)
    assert "--gateway" not in passt.command("passt", "pid", False)


def test_default_route_is_found_in_both_tables() -> None:
    line = "00000000000000000000000000000000 00 " + "0" * 32 + " 00 {} 00000400 00000001 00000000 00000003 {}"
    assert passt._is_default(line.format("fe80" + "0" * 27 + "1", "eth0").split(), 0)
    assert not passt._is_default(line.format("0" * 32, "lo").split(), 0)
    assert passt._is_default(
        ["eth0", "00000000", "010200C0", "0003", "0", "0", "0", "00000000", "0", "0", "0"], 1
    )
    assert not passt._is_default(
        ["eth0", "000200C0", "00000000", "0001", "0", "0", "0", "00FFFFFF", "0", "0", "0"], 1
    )


@pytest.mark.parametrize("readonly", [False, True])
def test_virtiofsd_answers_and_ends(tmp_path: Path, readonly: bool) -> None:
    try:
        virtiofsd.find()
    except virtiofsd.FileServerError as error:
        pytest.skip(str(error))
    served = start_virtiofsd(str(tmp_path), readonly=readonly)
    assert not leftovers()
    os.close(served.take_socket())
    wait_until_ended(served)
    served.close()


def test_virtiofsd_of_no_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="it is not a folder"):
        start_virtiofsd(str(tmp_path / "absent"))


def test_daemon_that_hangs_up_at_once_is_one_clear_line() -> None:
    with pytest.raises(DaemonError, match=r"^testd ended with status 2: cannot$"):
        start_vhost_user("testd", ["/bin/sh", "-c", "echo cannot >&2; exit 2"])


def test_daemon_that_does_not_answer_is_ended_in_time() -> None:
    with pytest.raises(DaemonError, match="does not answer within"):
        start_vhost_user("testd", ["/bin/sh", "-c", "exec sleep 60"], seconds=0.2)


def test_listener_can_be_reached_by_nobody_else() -> None:
    connection, listener = sockets.connected_listener()
    assert not leftovers()
    with socket.socket(fileno=connection) as ours, socket.socket(fileno=listener) as theirs:
        accepted, _ = theirs.accept()
        ours.send(b"x")
        assert accepted.recv(1) == b"x"
        accepted.close()


def test_socket_can_be_taken_once(tmp_path: Path) -> None:
    ours, theirs = sockets.connected_pair()
    served = Served(Daemon("testd", ["/bin/true"], (theirs,)), ours)
    os.close(theirs)
    os.close(served.take_socket())
    with pytest.raises(ValueError, match="is taken"):
        served.take_socket()
    served.close()
