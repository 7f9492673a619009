# SPDX-License-Identifier: Apache-2.0
"""Debian as the root partition, on an NVMe disk and a network card of its own, without any virtio device.

The disk has two partitions: the system, and space for a load. The system is tests/vmm/debian.py's, and asks for an
address by DHCP on top.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tests.integration.inner_suite import PROJECT
from tests.vmm import debian

MIB = 1 << 20
LOAD_BYTES = 128 * MIB
#: By which the multiples of seconds below are meant: patience for a machine that is emulated, and shared.
PATIENCE_S = 120 * float(os.environ.get("ROOTVISOR_TEST_PATIENCE", "1"))
_SECTOR = 512
_LINUX = 0x83
_WIRE = b"[Match]\nDriver=e1000e\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\n"
_ENVIRONMENT = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}


def make_disk(path: Path, system: Path) -> None:
    """The image of the disk, sparse: a table of two partitions, and the system in the first one."""
    size = system.stat().st_size
    entries = b""
    for first, length in ((MIB, size), (MIB + size, LOAD_BYTES)):
        entries += struct.pack(
            "<B3sB3sII", 0, bytes(3), _LINUX, bytes(3), first // _SECTOR, length // _SECTOR
        )
    with path.open("wb") as target, system.open("rb") as source:
        _copy_data(source, target, MIB, MIB + size + LOAD_BYTES)
        target.seek(0)
        target.write(bytes(446) + entries.ljust(64, b"\0") + b"\x55\xaa")
    wire = path.with_suffix(".network")
    wire.write_bytes(_WIRE)
    done = subprocess.run(
        ["debugfs", "-w", "-R", f"write {wire} /etc/systemd/network/05-card.network", f"{path}?offset={MIB}"],
        capture_output=True, text=True, check=True, env=_ENVIRONMENT,
    )  # fmt: skip
    assert "Allocated inode" in done.stdout, done.stderr


def _copy_data(source: IO[bytes], target: IO[bytes], to: int, size: int) -> None:
    """What is not a hole, to an offset of a file that gets a size."""
    target.truncate(size)
    at, end = 0, os.fstat(source.fileno()).st_size
    while at < end:
        try:
            start = os.lseek(source.fileno(), at, os.SEEK_DATA)
        except OSError:  # holes only
            return
        at = os.lseek(source.fileno(), start, os.SEEK_HOLE)
        source.seek(start)
        target.seek(to + start)
        while start < at:
            start += target.write(source.read(min(at - start, 16 * MIB)))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class DebianRoot:
    """A run of it, driven by its serial console and by ssh; as a context it is ended with all its processes."""

    def __init__(self, folder: Path, vps: int, timeout_s: int) -> None:
        system, self._key = debian.root_image(lambda *_: None)
        disk = folder / "nvme.img"
        make_disk(disk, system)
        self.report = folder / "report.json"
        self._errors = folder / "errors"
        self._port = free_port()
        self._folder = folder
        self._said = bytearray()
        self._seen = 0
        self._news = threading.Condition()
        self.started = time.monotonic()
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "rootvisor", "run", "--engine", "appliance", "--vps", str(vps),
                    "--memory", "768M", "--timeout", str(timeout_s), "--report", str(self.report),
                    "--devices", "none", "--initrd", "none", "--append", "root=/dev/nvme0n1p1 rw quiet",
                    "--device", f"emulated:nvme,path={disk}",
                    "--device", f"emulated:nic,forward={self._port}:22",
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=PROJECT, start_new_session=True,
            )  # fmt: skip
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def __enter__(self) -> DebianRoot:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._reader.join(60)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        while data := os.read(self._process.stdout.fileno(), 65536):
            with self._news:
                self._said += data
                self._news.notify()

    @property
    def console(self) -> str:
        """All that came from the serial port, and what the run said."""
        return (self._said + b"\n--- stderr\n" + self._errors.read_bytes()).decode(errors="replace")

    def prints(self, words: bytes, seconds: float = PATIENCE_S) -> None:
        """Waits for words on the console, behind those that were waited for before."""
        deadline = time.monotonic() + seconds
        with self._news:
            while (at := self._said.find(words, self._seen)) < 0:
                left = deadline - time.monotonic()
                assert left > 0 and self._process.poll() is None, f"no {words!r}:\n{self.console[-6000:]}"
                self._news.wait(min(left, 1))
            self._seen = at + len(words)

    def types(self, words: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(words)
        self._process.stdin.flush()

    def log_in(self) -> float:
        """By the prompt on the serial console; seconds until it was there."""
        self.prints(b"guest login: ", 8 * PATIENCE_S)
        prompt = time.monotonic() - self.started
        self.types(b"root\n")
        self.prints(b"Password: ")
        self.types(debian.PASSWORD.encode() + b"\n")
        self.prints(b"root@guest:~# ")
        return prompt

    def ssh(self, command: str, seconds: float = 4 * PATIENCE_S, data: bytes = b"") -> bytes:
        """What a command in the root partition prints, its input given; it fails with that command."""
        key = self._folder / "key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(self._key.read_bytes())
        options = (
            "BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR",
            "ConnectTimeout=100", "ConnectionAttempts=10",
        )  # fmt: skip
        words = [word for option in options for word in ("-o", option)]
        done = subprocess.run(
            ["ssh", "-F", "none", "-i", str(key), "-p", str(self._port), *words, "root@127.0.0.1", command],
            input=data, capture_output=True, timeout=seconds, check=False,
        )  # fmt: skip
        assert not done.returncode, (
            f"{command}: {done.stderr.decode()}{done.stdout.decode(errors='replace')}\n{self.console[-6000:]}"
        )
        return done.stdout

    def powers_off(self) -> dict[str, object]:
        """As its administrator does it; the report of the run."""
        self.ssh("systemctl poweroff --no-block")
        status = self._process.wait(4 * PATIENCE_S)
        assert status == 0, self.console[-6000:]
        report: dict[str, object] = json.loads(self.report.read_text())
        return report


@contextmanager
def iperf3_server(folder: Path) -> Iterator[int]:
    """The system's own iperf3, on this machine; the port on which it listens. It runs from a copy of its libraries."""
    system, _ = debian.root_image(lambda *_: None)
    libraries = "/usr/lib/x86_64-linux-gnu"
    target = folder / "iperf3"
    target.mkdir()
    commands = target / "commands"
    commands.write_text(f"rdump {libraries} {target}\ndump -p /usr/bin/iperf3 {target}/iperf3.bin\n")
    subprocess.run(
        ["debugfs", "-f", str(commands), str(system)], capture_output=True, check=True, env=_ENVIRONMENT
    )
    own = target / Path(libraries).name
    port = free_port()
    server = subprocess.Popen(
        [
            str(own / "ld-linux-x86-64.so.2"), "--library-path", str(own), str(target / "iperf3.bin"),
            "--server", "--bind", "127.0.0.1", "--port", str(port),
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield port
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(target)
