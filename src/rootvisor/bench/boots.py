# SPDX-License-Identifier: Apache-2.0
"""One boot of either side, watched from outside: process start, first line of user space, end, resident memory.

Both sides get the same kernel, initial ramdisk and command line, one processor, the same amount of memory as a
shared memfd, the same devices, /dev/null as input and a pipe as the console. Time runs from before the first process
is started (virtiofsd included) to the marker in the pipe.
"""

from __future__ import annotations

import marshal
import os
import signal
import time
from select import POLLIN, poll

from rootvisor.bench.guest_code import MARKER
from rootvisor.peers.inner import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MEMORY_MIB = 512
COMMAND_LINE = "rdinit=/init console=ttyS0 console=hvc0 quiet"
"""The kernel's command line; `rootvisor.machine.main` makes the same one from "quiet"."""

DEVICES: dict[str, tuple[str, ...]] = {
    "no PCI device": (),
    "four virtio devices": ("console", "rng", "fs", "disk"),
}
"""Configuration name to its virtio devices. Without a virtio console the serial port carries the marker."""

_DEADLINE_S = 120.0


class BootError(Exception):
    """A boot did not come to its marker or did not end well; one line."""


class Boot:
    """What one boot cost: seconds, bytes, and our own report (None for QEMU)."""

    def __init__(self, user_space_s: float, exit_s: float, resident: int | None) -> None:
        self.user_space_s = user_space_s
        self.exit_s = exit_s
        self.resident = resident
        self.report: dict[str, Any] | None = None


def rootvisor(job: dict[str, Any], devices: tuple[str, ...], folder: str) -> Boot:
    """Boot the root partition."""
    import json

    report = f"{folder}/report"
    description = {
        "version": 1,
        "kernel": job["kernel"],
        "initrds": [job["initramfs"]],
        "append": "quiet",
        "vps": 1,
        "memory_bytes": MEMORY_MIB << 20,
        "rootfs": "none",
        "rootfs_path": f"{folder}/share",
        "command": None,
        "tty": False,
        "disks": [{"path": f"{folder}/disk", "readonly": False}],
        "devices": list(devices),
        "scheduler": "hypervisor",
        "trace": None,
        "timeout_s": _DEADLINE_S,
        "console_log": None,
        "on_reboot": "exit",
        "report": report,
        "verbose": False,
    }
    path = f"{folder}/description"
    with open(path, "wb") as file:
        file.write(marshal.dumps(description, 2))
    boot = _watch("rootvisor", [*job["machine_argv"], path], ())
    with open(report, encoding="utf-8") as text:
        boot.report = json.load(text)
    return boot


def qemu(job: dict[str, Any], devices: tuple[str, ...], folder: str, kernel: str) -> Boot:
    """Boot the same in QEMU."""
    started = time.monotonic()
    if "fs" not in devices:
        return _watch("QEMU", qemu_argv(job, devices, folder, kernel, None), (), started)
    from rootvisor.files import virtiofsd
    from rootvisor.machine.file_server import FileServer

    server = FileServer(virtiofsd.command(virtiofsd.find(), f"{folder}/share", virtiofsd.SOCKET))
    try:
        fd = server.connection
        return _watch("QEMU", qemu_argv(job, devices, folder, kernel, fd), (fd,), started)
    finally:
        os.close(server.connection)
        server.close()


def qemu_argv(
    job: dict[str, Any], devices: tuple[str, ...], folder: str, kernel: str, fs_socket: int | None
) -> list[str]:
    """QEMU's command line: machine type q35, no default devices, and the devices of the comparison."""
    argv = [
        job["qemu"], "-no-user-config", "-nodefaults", "-no-reboot", "-display", "none",
        "-M", "q35,memory-backend=ram", "-accel", "kvm", "-cpu", job["qemu_cpu"], "-smp", "1",
        "-m", f"{MEMORY_MIB}M", "-object", f"memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on",
        "-kernel", kernel, "-initrd", job["initramfs"], "-append", COMMAND_LINE,
        "-chardev", "stdio,id=out,signal=off",
    ]  # fmt: skip
    if "console" in devices:
        argv += ["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=out"]
    else:
        argv += ["-serial", "chardev:out"]
    if "rng" in devices:
        argv += ["-device", "virtio-rng-pci"]
    if "fs" in devices:
        argv += ["-chardev", f"socket,id=fs,fd={fs_socket}"]
        argv += ["-device", "vhost-user-fs-pci,chardev=fs,tag=root"]
    if "disk" in devices:
        argv += ["-drive", f"if=none,id=disk,format=raw,file={folder}/disk"]
        argv += ["-device", "virtio-blk-pci,drive=disk"]
    return argv


def _watch(name: str, argv: list[str], fds: tuple[int, ...], started: float | None = None) -> Boot:
    """Start a process, wait for the marker and for its end. Raises BootError."""
    for fd in fds:
        os.set_inheritable(fd, True)
    if started is None:
        started = time.monotonic()
    pid, output_read, error_read = spawn(argv)
    status: int | None = None
    text = {output_read: b"", error_read: b""}
    marked: float | None = None
    resident: int | None = None
    try:
        waiting = poll()
        waiting.register(output_read, POLLIN)
        waiting.register(error_read, POLLIN)
        left = 2
        while left:
            events = waiting.poll(max(0.0, started + _DEADLINE_S - time.monotonic()) * 1000)
            if not events:
                raise BootError(f"{name} did not end within {_DEADLINE_S:.0f} s{_words(text)}")
            for fd, _event in events:
                data = os.read(fd, 65536)
                if not data:
                    waiting.unregister(fd)
                    left -= 1
                text[fd] = (text[fd] + data)[-65536:]
            if marked is None and MARKER in text[output_read]:
                marked = time.monotonic() - started
                resident = resident_bytes(pid)
        _, wait_status = os.waitpid(pid, 0)
        ended = time.monotonic() - started
        status = os.waitstatus_to_exitcode(wait_status)
    finally:
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(output_read)
        os.close(error_read)
    if marked is None or status:
        what = f"ended with status {status}" if marked else "did not reach user space"
        raise BootError(f"{name} {what}{_words(text)}")
    return Boot(marked, ended, resident)


def _words(text: dict[int, bytes]) -> str:
    """The last line that the process printed."""
    lines = b"\n".join(text.values()).decode("utf-8", "replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process without what it shares (guest memory is a shared memfd), None if it has ended."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            kib = [int(line.split()[1]) for line in file if line.startswith(("RssAnon:", "RssFile:"))]
    except OSError:
        return None
    return sum(kib) << 10 if kib else None
