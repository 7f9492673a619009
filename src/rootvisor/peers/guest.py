# SPDX-License-Identifier: Apache-2.0
"""The guest that a peer boots: its initial ramdisk, its disk, what it says, and what of that is right.

`guest_init` is its process 1. Everything here is cheap to import: the judge runs where processors are emulated.
"""

from __future__ import annotations

import os
import re

MACHINES = ("microvm", "q35")
DISK_BYTES = 4 << 20
PAGE_BYTES = 200_000
MARK = b"guest: "

#: What a kernel prints when there is no use in waiting any longer.
FATAL = re.compile(
    rb"Kernel panic - not syncing.*|Oops: .*|BUG: .*|Unable to mount root fs.*|Attempted to kill init.*"
)
#: What must not be in a kernel's log.
COMPLAINT = re.compile(rb"WARNING:|BUG:|Oops|Call Trace|rcu.*stall|soft lockup|hung task|nobody cared")

_MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net")
_INIT = "guest_init"
_PAGE_ROUTE = "http://10.0.2.2:{port}/page"


def ramdisk(modules_dir: str | None, busybox: str) -> bytes:
    """The archive for a kernel whose modules lie in `modules_dir`; None for one that has all drivers built in.

    Raises `rootvisor.boot.errors.InitramfsError` when the kernel lacks a driver.
    """
    from rootvisor.boot.busybox_guest import archive

    init = os.path.join(os.path.dirname(os.path.abspath(__file__)), _INIT)
    return archive(init, busybox, modules_dir, _MODULES)


def filler(size: int, seed: int) -> bytes:
    """`size` bytes that do not repeat and are the same on every machine."""
    from hashlib import shake_128

    return shake_128(seed.to_bytes(8, "little")).digest(size)


def md5(data: bytes) -> str:
    """The checksum that the guest computes too."""
    from hashlib import md5 as algorithm

    return algorithm(data, usedforsecurity=False).hexdigest()


def command_line(port: int, machine: str, extra: str = "") -> str:
    """The guest kernel's command line. Only warnings are printed: each character on the console is an exit.

    So is each of the 16,000 accesses with which Linux looks for more host bridges on the buses that a q35 has not got
    (``arch/x86/pci/legacy.c``).
    """
    words = [
        "console=ttyS0",
        "loglevel=5",
        "panic=-1",
        "oops=panic",
        "pci=lastbus=0" if machine == "q35" else "",
        f"guest.url={_PAGE_ROUTE.format(port=port)}",
        extra,
    ]
    return " ".join(word for word in words if word)


def qemu_argv(
    program: str,
    *,
    accelerator: str,
    cpu: str,
    machine: str,
    vps: int,
    memory_mib: int,
    kernel: str,
    initrd: str,
    disk: str,
    append: str,
) -> list[str]:
    """QEMU's command line for a guest with a console, a disk and a network, and nothing else.

    A q35 has no HPET: where an access to a device takes 8 ms or more, Linux does not come out of its interrupt. It
    moves the comparator on by 1/64 s with two accesses until that is ahead of the counter (``arch/x86/kernel/hpet.c``:
    ``hpet_rtc_timer_reinit``), which took 30 s to 80 s where processors are emulated, until 32 bits had wrapped.
    """
    suffix = "device" if machine == "microvm" else "pci"
    network = f"virtio-net-{suffix},netdev=net" + ("" if machine == "microvm" else ",romfile=")
    return [
        program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-accel", accelerator, "-cpu", cpu,
        # without a clock chip Linux looks for one for five seconds
        "-M", machine + (",rtc=on" if machine == "microvm" else ",hpet=off"),
        "-smp", str(vps), "-m", f"{memory_mib}M",
        "-kernel", kernel, "-initrd", initrd, "-append", append,
        "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
        "-drive", f"if=none,id=disk,format=raw,readonly=on,file={disk}", "-device", f"virtio-blk-{suffix},drive=disk",
        "-netdev", "user,id=net", "-device", network,
    ]  # fmt: skip


def judge(said: list[tuple[str, str]], expected: dict[str, str]) -> list[str]:
    """What is wrong with what a guest said: (key, value) in its order, against the values that it should have said."""
    problems = [value for key, value in said if key == "problem"]
    values = dict(said)
    for key, wanted in expected.items():
        got = values.get(key)
        if got is None:
            problems.append(f"the guest did not get to `{key}`")
            break
        if got != wanted:
            problems.append(f"{key}: {got or 'nothing'} instead of {wanted}")
    else:
        if "end" not in values:
            problems.append("the guest did not get to its end")
    return problems
