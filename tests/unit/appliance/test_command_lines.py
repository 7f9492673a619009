# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from rootvisor.appliance.command_lines import kernel_command_line, qemu_command


def qemu(terminal_fd: int | None = None, extra: tuple[str, ...] = ()) -> list[str]:
    return qemu_command(
        "qemu",
        kernel="/k",
        initrd="/proc/self/fd/9",
        append="quiet",
        memory_mib=1024,
        cpus=2,
        shares={"root": 5, "writable0": 6},
        ports={"one": 7, "two": 8},
        console_fd=10,
        qmp_fd=11,
        terminal_fd=terminal_fd,
        extra=extra,
    )


def test_kernel_command_line_extra_comes_last() -> None:
    assert kernel_command_line(("quiet2", "rdinit=/x")).endswith(" quiet2 rdinit=/x")


def test_kernel_command_line_known_frequency_is_passed_on() -> None:
    assert "tsc_early_khz=2596128" in kernel_command_line(("x",), 2_596_128).split()
    assert "tsc_early_khz" not in kernel_command_line(("x",), None)


def test_kernel_command_line_ends_a_kernel_in_trouble() -> None:
    assert {"oops=panic", "panic=-1"} <= set(kernel_command_line().split())


def test_qemu_shares_get_device_each() -> None:
    command = qemu()
    assert "vhost-user-fs-pci,chardev=fs1,tag=writable0,queue-size=1024" in command
    assert "socket,id=fs1,fd=6" in command


def test_qemu_memory_is_shared_and_sized_once() -> None:
    command = qemu()
    assert command[command.index("-m") + 1] == "1024M"
    assert "memory-backend-memfd,id=ram,size=1024M,share=on,reserve=off" in command


def test_qemu_ports_start_behind_the_console() -> None:
    devices = [word for word in qemu(terminal_fd=12) if word.startswith(("virtserialport", "virtconsole"))]
    assert devices == [
        "virtconsole,bus=ports.0,nr=0,chardev=terminal",
        "virtserialport,bus=ports.0,nr=1,chardev=port1,id=one,name=one",
        "virtserialport,bus=ports.0,nr=2,chardev=port2,id=two,name=two",
    ]


def test_qemu_without_terminal_has_no_console_device() -> None:
    assert not any("virtconsole" in word for word in qemu())


def test_qemu_extra_arguments_come_last() -> None:
    assert qemu(extra=("-device", "e1000e"))[-2:] == ["-device", "e1000e"]
