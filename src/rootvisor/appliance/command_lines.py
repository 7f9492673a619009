# SPDX-License-Identifier: Apache-2.0
"""The command lines of QEMU and of the appliance's kernel, from plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: The processor. la57: KVM on an emulated 5-level host makes every page walk longer. erms/fsrm: an emulated
#: `rep movsb` moves one byte at a time, so it must not pass for the fast way to copy (0.3 s of the boot).
CPU_MODEL = "max,la57=off,erms=off,fsrm=off"
MACHINE = "q35,sata=off,usb=off,vmport=off,smm=off,hpet=off,smbus=off,memory-backend=ram"
ROOT_TAG = "root"
#: The ramdisk's first program (see guest.py).
FIRST_STAGE = "/appliance/init"

#: The kernel's command line.
#:   oops=panic panic=-1: a kernel in trouble resets at once, which -no-reboot turns into an end that we see.
#:   maxcpus=1: the init brings the others up after the modules are in. Patching code on one processor is
#:     quicker, and QEMU 7.2 with several threads may die of an int3 oops when running code is patched.
#:   cryptomgr.notests and the blacklist: self tests and certificates that nothing here needs (0.6 s).
KERNEL_ARGS = (
    "console=ttyS0",
    "quiet",
    "loglevel=3",
    "oops=panic",
    "panic=-1",
    "maxcpus=1",
    "mitigations=off",
    "no_timer_check",
    "tsc=reliable",
    "cryptomgr.notests",
    f"rdinit={FIRST_STAGE}",
    "initcall_blacklist=jent_mod_init,load_system_certificate_list",
)


def kernel_command_line(extra: Sequence[str] = (), tsc_khz: int | None = None) -> str:
    """What follows ``-append``. ``tsc_khz``: the frequency of the processor's time stamp counter, where it is known."""
    known = () if tsc_khz is None else (f"tsc_early_khz={tsc_khz}",)
    return " ".join((*KERNEL_ARGS, *known, *extra))


def qemu_command(
    qemu: str,
    *,
    kernel: str,
    initrd: str,
    append: str,
    memory_mib: int,
    cpus: int,
    shares: Mapping[str, int],
    ports: Mapping[str, int],
    console_fd: int,
    qmp_fd: int,
    terminal_fd: int | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """The emulated machine. ``shares``: connected vhost-user socket per virtiofs tag; ``ports``: socket per
    virtio-serial port name, which is its id for QMP as well; the other numbers are connected sockets as well.

    The machine stays, stopped, when its kernel powers off or resets (-no-shutdown, -no-reboot): what the guest
    wrote last may still wait in QEMU for a slow reader.
    """
    command = [
        qemu,
        "-name",
        "rootvisor-appliance",
        "-no-user-config",
        "-nodefaults",
        "-no-reboot",
        "-no-shutdown",
        "-display",
        "none",
        "-M",
        MACHINE,
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        CPU_MODEL,
        "-smp",
        str(cpus),
        "-m",
        f"{memory_mib}M",
        "-object",
        f"memory-backend-memfd,id=ram,size={memory_mib}M,share=on,reserve=off",
        "-kernel",
        kernel,
        "-initrd",
        initrd,
        "-append",
        append,
        "-chardev",
        f"socket,id=console,fd={console_fd}",
        "-serial",
        "chardev:console",
        "-chardev",
        f"socket,id=qmp,fd={qmp_fd}",
        "-mon",
        "chardev=qmp,mode=control",
    ]
    for number, (tag, fd) in enumerate(shares.items()):
        command += ["-chardev", f"socket,id=fs{number},fd={fd}"]
        command += ["-device", f"vhost-user-fs-pci,chardev=fs{number},tag={tag},queue-size=1024"]
    command += ["-device", "virtio-serial-pci,id=ports"]
    if terminal_fd is not None:  # port 0 can be nothing but a console
        command += ["-chardev", f"socket,id=terminal,fd={terminal_fd}"]
        command += ["-device", "virtconsole,bus=ports.0,nr=0,chardev=terminal"]
    for number, (name, fd) in enumerate(ports.items(), 1):
        command += ["-chardev", f"socket,id=port{number},fd={fd}"]
        command += [
            "-device",
            f"virtserialport,bus=ports.0,nr={number},chardev=port{number},id={name},name={name}",
        ]
    return command + list(extra)
