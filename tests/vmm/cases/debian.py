# SPDX-License-Identifier: Apache-2.0
"""Debian as it is: its kernel of 2023, and a whole system with systemd, a login prompt and ssh over the network."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from tests.unit.virtio.qcow2 import name_backing_file, resize_qcow2, write_qcow2
from tests.vmm.cases.boots import boots
from tests.vmm.guest import FOLDER, PATIENCE_S, Guest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Job = dict[str, Any]

#: The tests' init hands over to the system's own.
_WORK = """\
await /dev/vda
mount -t ext4 /dev/vda /mnt
mount --move /dev /mnt/dev
exec switch_root /mnt /sbin/init
"""


def test_kernel_6_1_on_two_processors(job: Job) -> None:
    boots(job, "debian-6.1", 2, "256M")


def test_kernel_6_1_as_an_elf_image(job: Job) -> None:
    boots(job, "debian-6.1-elf", 1, "256M")


def test_whole_system_has_a_login_prompt_and_ssh(job: Job) -> None:
    """On a qcow2 image whose backing file is the system: the system itself is not written."""
    debian = job["debian"]
    os.makedirs(FOLDER, exist_ok=True)
    image = Path(f"{FOLDER}/debian.qcow2")
    write_qcow2(image, b"")
    resize_qcow2(image, debian["bytes"])
    name_backing_file(image, debian["image"], "raw")
    for words in (
        ("tuntap", "add", "tap0", "mode", "tap"),
        ("address", "add", f"{debian['root_address']}/24", "dev", "tap0"),
        ("link", "set", "tap0", "up"),
    ):
        _run("ip", *words)
    options = ("--disk", f"path={image},image_type=qcow2,backing_files=on", "--net", "tap=tap0")
    with Guest(job, _WORK, *options, kernel="stock-elf", memory="512M", cpus=2) as guest:
        guest.prints(b"guest login: ", 6 * PATIENCE_S)
        prompt = time.monotonic() - guest.started
        guest.types(b"root\n")
        guest.prints(b"Password: ")
        guest.types(debian["password"].encode() + b"\n")
        guest.prints(b"root@guest:~# ")
        guest.types(b"echo $((6 * 7))-on-the-console\n")
        guest.prints(b"42-on-the-console")
        key = f"{FOLDER}/key"
        with open(debian["key"], "rb") as source, open(key, "wb", opener=_private) as file:
            file.write(source.read())
        answer = _ssh(key, debian["guest_address"], "uname -r; systemctl is-system-running --wait; nproc")
        assert answer.split() == [job["kernels"]["stock"]["version"], "running", "2"], answer
        ready = time.monotonic() - guest.started
        _ssh(key, debian["guest_address"], "systemctl poweroff --no-block")
        guest.ends(seconds=2 * PATIENCE_S)
    print("note", f"login prompt after {prompt:.1f} s, all units and an answer by ssh after {ready:.1f} s")


test_whole_system_has_a_login_prompt_and_ssh.limit = 1800  # type: ignore[attr-defined]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _ssh(key: str, address: str, command: str) -> str:
    options = ("BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
    words = [word for option in options for word in ("-o", option)]
    return _run("ssh", "-F", "none", "-i", key, *words, f"root@{address}", command)


def _run(program: str, *words: str) -> str:
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, timeout=4 * PATIENCE_S, check=False,
        env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
    )  # fmt: skip
    assert not done.returncode, f"{program} {' '.join(words)}: {done.stderr}{done.stdout}"
    return done.stdout
