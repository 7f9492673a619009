# SPDX-License-Identifier: Apache-2.0
"""Debian as it is: its kernel of 2023, and a whole system with systemd, a login prompt and ssh over the network."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.unit.virtio.qcow2 import name_backing_file, resize_qcow2, write_qcow2
from tests.vmm.cases.boots import boots
from tests.vmm.guest import FOLDER, PATIENCE_S, Guest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Job = dict[str, Any]

#: Seconds of load on disks and network; `make soak` takes ten minutes.
LOAD_S = int(os.environ.get("ROOTVISOR_VMM_LOAD_S", "30"))
_LOAD_BYTES = 64 << 20
_ENVIRONMENT = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}

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


class System:
    """A guest of the whole Debian, on a qcow2 image whose backing file is the system: the system itself is not written.
    As a context it is killed at the end."""

    def __init__(self, job: Job, *options: str) -> None:
        self._debian = job["debian"]
        wire = (*_disk_of_the_system(self._debian), *_wire(self._debian))
        self.guest = Guest(job, _WORK, *wire, *options, kernel="stock-elf", memory="512M", cpus=2)

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        self.guest.kill()
        _run("ip", "link", "delete", "tap0")

    def log_in(self) -> float:
        """By the prompt on the console; seconds until it was there."""
        guest = self.guest
        guest.prints(b"guest login: ", 6 * PATIENCE_S)
        prompt = time.monotonic() - guest.started
        guest.types(b"root\n")
        guest.prints(b"Password: ")
        guest.types(self._debian["password"].encode() + b"\n")
        guest.prints(b"root@guest:~# ")
        return prompt

    def ssh(self, command: str, seconds: float = 4 * PATIENCE_S) -> str:
        """What a command in the guest prints."""
        key = f"{FOLDER}/key"
        with open(self._debian["key"], "rb") as source, open(key, "wb", opener=_private) as file:
            file.write(source.read())
        options = (
            "BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR",
            "ConnectTimeout=100", "ConnectionAttempts=10",
        )  # fmt: skip
        words = [word for option in options for word in ("-o", option)]
        address = f"root@{self._debian['guest_address']}"
        return _run("ssh", "-F", "none", "-i", key, *words, address, command, seconds=seconds)

    def powers_off(self) -> None:
        """As its administrator does it."""
        self.ssh("systemctl poweroff --no-block")
        self.guest.ends(seconds=2 * PATIENCE_S)


def _disk_of_the_system(debian: Job) -> tuple[str, str]:
    os.makedirs(FOLDER, exist_ok=True)
    image = Path(f"{FOLDER}/debian.qcow2")
    write_qcow2(image, b"")
    resize_qcow2(image, debian["bytes"])
    name_backing_file(image, debian["image"], "raw")
    return "--disk", f"path={image},image_type=qcow2,backing_files=on"


def _wire(debian: Job) -> tuple[str, str]:
    """A tap device between root and guest."""
    for words in (
        ("tuntap", "add", "tap0", "mode", "tap"),
        ("address", "add", f"{debian['root_address']}/24", "dev", "tap0"),
        ("link", "set", "tap0", "up"),
    ):
        _run("ip", *words)
    return "--net", "tap=tap0"


def test_whole_system_has_a_login_prompt_and_ssh(job: Job) -> None:
    with System(job) as system:
        prompt = system.log_in()
        system.guest.types(b"echo $((6 * 7))-on-the-console\n")
        system.guest.prints(b"42-on-the-console")
        answer = system.ssh("uname -r; systemctl is-system-running --wait; nproc")
        assert answer.split() == [job["kernels"]["stock"]["version"], "running", "2"], answer
        ready = time.monotonic() - system.guest.started
        system.powers_off()
    print("note", f"login prompt after {prompt:.1f} s, all units and an answer by ssh after {ready:.1f} s")


def test_fio_verifies_and_iperf3_runs_both_ways_without_a_stall(job: Job) -> None:
    """All at once: fio on a raw disk and on a qcow2 disk, reading back what it wrote, and iperf3 in both directions.
    Its server is the system's own, in the root."""
    disks = []
    for kind in ("raw", "qcow2"):
        path = Path(f"{FOLDER}/load.{kind}")
        os.makedirs(FOLDER, exist_ok=True)
        if kind == "raw":
            with path.open("wb") as file:
                file.truncate(_LOAD_BYTES)
        else:
            write_qcow2(path, b"")
            resize_qcow2(path, _LOAD_BYTES)
        disks += ["--disk", f"path={path},image_type={kind}"]
    with System(job, *disks) as system, _iperf3_server(job["debian"]) as address:
        system.log_in()
        fio = (
            "fio --name={0} --filename=/dev/{0} --rw=randwrite --bs=4k-64k --size=100% --ioengine=libaio --iodepth=16 "
            "--direct=1 --verify=crc32c --verify_fatal=1 --verify_backlog=256 --loops=100000 --time_based "
            f"--runtime={LOAD_S} --output-format=json --output=/tmp/{{0}}.json"
        )
        script = (
            "set -e; udevadm settle; lsblk -nd -o NAME,SIZE >&2\n"
            f"({fio.format('vdb')}; echo $? >/tmp/vdb.status) & ({fio.format('vdc')}; echo $? >/tmp/vdc.status) &\n"
            f"iperf3 --client {address} --bidir --time {LOAD_S} --interval 10 --json >/tmp/iperf3.json || true\n"
            "wait; cat /tmp/vdb.status /tmp/vdc.status"
        )
        statuses = system.ssh(script, seconds=4 * LOAD_S + 4 * PATIENCE_S).split()
        figures = [json.loads(system.ssh(f"cat /tmp/{name}.json")) for name in ("vdb", "vdc", "iperf3")]
        system.powers_off()
    assert statuses == ["0", "0"], statuses
    for one in figures[:2]:
        (done,) = one["jobs"]
        assert not done["error"] and done["write"]["io_bytes"] and done["read"]["io_bytes"], done
        print(
            "note",
            f"fio {done['jobname']}: {done['write']['io_bytes'] >> 20} MiB written, "
            f"{done['read']['io_bytes'] >> 20} verified",
        )
    network = figures[2]
    assert "error" not in network, network["error"]
    for name in ("sum", "sum_bidir_reverse"):
        moved = [interval[name]["bytes"] for interval in network["intervals"]]
        assert len(moved) >= LOAD_S // 10 - 1 and all(moved), f"{name}: bytes in each 10 s: {moved}"
        print(
            "note",
            f"iperf3 {name}: {sum(moved) >> 20} MiB in {LOAD_S} s, {min(moved) >> 20} in the poorest 10 s",
        )


for _test in (
    test_whole_system_has_a_login_prompt_and_ssh,
    test_fio_verifies_and_iperf3_runs_both_ways_without_a_stall,
):
    _test.limit = 1800 + 4 * LOAD_S  # type: ignore[attr-defined]
del _test


@contextmanager
def _iperf3_server(debian: Job) -> Iterator[str]:
    """The system's iperf3 in the root, from its read-only image; the address on which it listens."""
    folder = f"{FOLDER}/system"
    os.makedirs(folder, exist_ok=True)
    _run("mount", "-o", "ro,loop", debian["image"], folder)
    try:
        _run("mount", "-t", "tmpfs", "tmpfs", f"{folder}/tmp")  # for the file that it sends from
        server = subprocess.Popen(
            ["chroot", folder, "iperf3", "--server", "--bind", debian["root_address"]],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_ENVIRONMENT,
        )  # fmt: skip
        try:
            yield debian["root_address"]
        finally:
            server.kill()
            server.wait()
    finally:
        _run("umount", "--recursive", folder)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _run(program: str, *words: str, seconds: float = 4 * PATIENCE_S) -> str:
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, timeout=seconds, check=False, env=_ENVIRONMENT
    )
    assert not done.returncode, f"{program} {' '.join(words)}: {done.stderr}{done.stdout}"
    return done.stdout
