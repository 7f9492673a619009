# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong, and what a machine can lack, by the command as it is typed: one line, a status, no trace.

The command runs on this machine as it is, without a stand-in: engine by its own choice, kernels out of the cache, a
folder of its own for everything temporary.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rootvisor import kernels
from tests.integration.leftovers import TOKEN, processes_with, wait_until

SOURCE = Path(__file__).resolve().parents[2] / "src"
TIMEOUT_S = 240
ROOT = os.geteuid() == 0

pytestmark = pytest.mark.boot


class Machine:
    """This machine, seen by a command: a cache of its own with this machine's kernels, an empty folder for the rest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.cache = folder / "cache"
        self.cache.mkdir()
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(SOURCE),
            "ROOTVISOR_CACHE": str(self.cache),
            "TMPDIR": str(self.temporary),
            "XDG_RUNTIME_DIR": str(self.temporary),
            TOKEN: str(folder),
        }

    def with_kernels(self) -> Machine:
        """The cache has this machine's kernels."""
        self.stock = kernels.ensure("stock")
        (self.cache / "kernels").symlink_to(kernels.cache_dir() / "kernels")
        return self

    def start(self, *words: str, around: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """``rootvisor words``, behind the words of ``around``."""
        return subprocess.Popen(
            [*around, sys.executable, "-m", "rootvisor", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
        )

    def refuses(self, *words: str, status: int, around: Sequence[str] = ()) -> str:
        """The one line with which ``rootvisor run words`` ends, with ``status``."""
        process = self.start("run", *words, around=around)
        out, err = process.communicate(timeout=TIMEOUT_S)
        text = err.decode()
        assert process.returncode == status, text
        assert out == b""
        assert "Traceback" not in text and "internal error" not in text
        # Lines without a semicolon tell of progress: what is looked for, or downloaded.
        lines = text.splitlines()
        assert sum("; " in line for line in lines) == 1, text
        assert lines[-1].startswith("rootvisor: ")
        self.is_clean()
        return lines[-1]

    def is_clean(self) -> None:
        """Nothing runs any more, nothing lies about."""
        assert wait_until(lambda: not processes_with(str(self.folder)), 5), processes_with(str(self.folder))
        assert list(self.temporary.iterdir()) == []
        runs = self.cache / "runs"
        assert not runs.exists() or list(runs.iterdir()) == []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path).with_kernels()


@pytest.fixture
def fresh_machine(tmp_path: Path) -> Machine:
    """Nothing has been cached."""
    return Machine(tmp_path)


def private_mounts(script: str) -> list[str]:
    """Words before a command: they give it mounts of its own, made by ``script``."""
    unshare = ["unshare", "--mount", *([] if ROOT else ["--map-root-user"])]
    if subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("no mount name spaces here")
    return [*unshare, "sh", "-c", script + ' && exec "$@"', "sh"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "no such kernel image"),
        ("empty", "is empty"),
        ("text", "is not a kernel"),
        ("program", "not a kernel"),
        ("bzImage of 32 bits", "is a 32-bit kernel"),
        ("ELF of 32 bits", "is a 32-bit kernel"),
        ("cut bzImage", "is truncated"),
        ("cut ELF", "is truncated"),
    ],
)
def test_kernel_that_cannot_boot(name: str, message: str, machine: Machine) -> None:
    path = machine.folder / "kernel"
    head = bytearray(machine.stock.image.read_bytes()[:3_000_000])
    assert machine.stock.vmlinux is not None
    with machine.stock.vmlinux.open("rb") as file:
        elf = bytearray(file.read(3_000_000))
    if name == "bzImage of 32 bits":
        head[0x236] &= ~1  # xloadflags: XLF_KERNEL_64
    elif name == "ELF of 32 bits":
        elf[4], elf[18] = 1, 3  # ELFCLASS32, EM_386
    content: dict[str, bytes | bytearray] = {
        "empty": b"",
        "text": b"a line of text\n" * 1000,
        "program": Path(sys.executable).read_bytes(),
        "bzImage of 32 bits": head,
        "cut bzImage": head,
        "ELF of 32 bits": elf,
        "cut ELF": elf,
    }
    if name in content:
        path.write_bytes(content[name])
    assert message in machine.refuses("--kernel", str(path), "--", "true", status=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--initrd", "/nowhere"), "no such file"),
        (("--memory", "64M", "--", "true"), "at least 128M"),
        (("--memory", "lots", "--", "true"), "not a size"),
        (("--memory", "900G", "--", "true"), "this machine has"),
        (("--vps", "0", "--", "true"), "1 to 64"),
        (("--vps", "1000", "--", "true"), "1 to 64"),
        (("--engine", "xen", "--", "true"), "'auto', 'kvm', 'appliance'"),
        (("--on-reboot", "perhaps", "--", "true"), "perhaps"),
        (("--nonsense", "--", "true"), "No such option"),
    ],
)
def test_option_that_is_wrong(words: tuple[str, ...], message: str, machine: Machine) -> None:
    assert message in machine.refuses("--kernel", "stock", *words, status=2)


def test_initial_ramdisk_larger_than_memory(machine: Machine) -> None:
    ramdisk = machine.folder / "initrd"
    with ramdisk.open("wb") as file:
        file.truncate(300 << 20)
    text = machine.refuses("--kernel", "stock", "--initrd", str(ramdisk), "--memory", "256M", status=125)
    assert "301 MiB of initial ramdisk do not fit" in text
    assert "more memory" in text


@pytest.mark.parametrize("program", ["qemu-system-x86_64", "virtiofsd"])
def test_program_of_this_machine_missing(program: str, machine: Machine) -> None:
    if program == "virtiofsd":
        from rootvisor.files.virtiofsd import find

        path: str | None = find().path
    else:
        path = shutil.which(program)
    assert path is not None
    around = private_mounts(f"mount --bind /dev/null {path}")
    line = machine.refuses(
        "--engine", "appliance", "--kernel", "stock", "--", "true", status=125, around=around
    )
    assert f"{program} is missing; apt-get install " in line


@pytest.mark.parametrize(
    ("size", "kernel"), [("64k", "path"), ("2M", "path"), ("20M", "path"), ("2M", "stock"), ("2M", "mshv")]
)
def test_cache_without_space(size: str, kernel: str, fresh_machine: Machine) -> None:
    """Found out before anything is begun where a download or a build would not fit, by the write that fails else."""
    named = str(kernels.ensure("stock").image) if kernel == "path" else kernel
    around = private_mounts(f"mount -t tmpfs -o size={size} none {fresh_machine.cache}")
    line = fresh_machine.refuses("--kernel", named, "--", "true", status=125, around=around)
    assert "ROOTVISOR_CACHE" in line
    assert "space left" in line or "MiB left" in line


@pytest.mark.parametrize("kernel", ["path", "stock", "mshv"])
def test_network_down_before_anything_is_cached(kernel: str, fresh_machine: Machine) -> None:
    unshare = ["unshare", "--net", *([] if ROOT else ["--map-root-user"])]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no network name spaces here")
    named = str(kernels.ensure("stock").image) if kernel == "path" else kernel
    # This machine's own busybox serves the ramdisk; the kernels are what is missing.
    line = fresh_machine.refuses(
        "--engine", "appliance", "--kernel", named, "--", "true", status=125, around=unshare
    )
    assert "connect this machine to the network" in line


# --- Ctrl-C in every phase ------------------------------------------------------------------------------------------


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C as a terminal gives it: to the whole process group."""
    os.killpg(process.pid, signal.SIGINT)


def ends_interrupted(process: subprocess.Popen[bytes], machine: Machine) -> None:
    begun = time.monotonic()
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err
    assert time.monotonic() - begun < 30
    machine.is_clean()


@pytest.mark.parametrize("kernel", ["stock", "mshv"])
def test_interrupt_while_a_kernel_is_fetched(kernel: str, fresh_machine: Machine) -> None:
    apt = shutil.which("apt-get")
    if apt is None:
        pytest.skip("no apt here")
    programs = fresh_machine.folder / "bin"
    programs.mkdir()
    begun = fresh_machine.folder / "begun"
    stalled = programs / "apt-get"  # a mirror that does not answer
    stalled.write_text(
        f'#!/bin/sh\ncase " $* " in *" download "* | *" update "*) >{begun}; sleep 1000 ;; esac\nexec {apt} "$@"\n'
    )
    stalled.chmod(0o755)
    fresh_machine.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    process = fresh_machine.start("run", "--kernel", kernel, "--", "true")
    assert wait_until(begun.exists, TIMEOUT_S)
    interrupt(process)
    ends_interrupted(process, fresh_machine)


def test_interrupt_while_the_kernel_boots(machine: Machine) -> None:
    process = machine.start("run", "--kernel", "stock", "--console", "stderr", "--", "sleep", "1000")
    assert process.stderr is not None
    lines = iter(process.stderr.readline, b"")
    assert any(b"running as root partition" in line for line in lines)
    interrupt(process)
    ends_interrupted(process, machine)


def test_interrupt_while_the_command_runs(machine: Machine) -> None:
    process = machine.start("run", "--kernel", "stock", "--", "sh", "-c", "echo up; sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    interrupt(process)
    ends_interrupted(process, machine)


def test_interrupt_twice_ends_a_command_that_does_not_listen(machine: Machine) -> None:
    script = "trap '' INT; echo up; while :; do sleep 1; done"
    process = machine.start("run", "--kernel", "stock", "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    interrupt(process)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    interrupt(process)
    ends_interrupted(process, machine)


def test_interrupt_while_it_ends_leaves_nothing(machine: Machine) -> None:
    """The command has ended, the partition is powering off: its status, or that of Ctrl-C."""
    process = machine.start("run", "--kernel", "stock", "--", "echo", "last words")
    assert process.stdout is not None
    assert process.stdout.readline() == b"last words\n"
    interrupt(process)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode in (0, 130), err.decode()
    assert b"Traceback" not in err
    machine.is_clean()
