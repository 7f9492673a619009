# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import marshal
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rootvisor.boot import busybox
from rootvisor.cli import guest_plan, launch, ramdisk
from rootvisor.cli.description import CommandRequest, KernelImage
from rootvisor.cli.guest_plan import GuestOptions, guest_document
from rootvisor.cli.prepare import RunPlan

Run = Callable[..., tuple[int, str, str]]
COMMAND = CommandRequest(argv=("tr", "a-z", "A-Z"), cwd="/", env={"PATH": "/bin"}, tty=False)


@pytest.fixture(autouse=True)
def made_up_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """No busybox is looked for, no file server either; this machine is no root partition."""
    monkeypatch.setattr(ramdisk, "find_busybox", lambda _folder: __file__)
    monkeypatch.setattr(guest_plan, "confined_server", lambda: ("virtiofsd", "--fd={fd}"))
    monkeypatch.setattr(guest_plan, "in_root_partition", lambda: False)
    assert busybox.APPLETS


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, bzimage: Path) -> list[RunPlan]:
    """The plans that would be launched; all kernels are one file."""
    plans: list[RunPlan] = []

    def start(plan: RunPlan) -> int:
        plans.append(plan)
        return 7

    monkeypatch.setattr(launch, "launch", start)
    image = KernelImage(str(bzimage), None, "mshv", "7.3")
    for module in ("rootvisor.cli.prepare", "rootvisor.cli.guest_plan"):
        monkeypatch.setattr(f"{module}.choose_kernel", lambda *_wanted, **_how: image)
    return plans


def document(**options: Any) -> dict[str, Any]:
    kernel = KernelImage("/bz", "/vmlinux", "mshv", "7.3")
    raw = guest_document(
        GuestOptions(command=None, **options), kernel, COMMAND, guest_plan.confined_server(), None
    )
    guest: dict[str, Any] = marshal.loads(raw)["guest"]
    return guest


def test_document_is_a_configuration_that_the_vmm_takes(own_cache: Path) -> None:
    guest = document(vps=2, memory_bytes=256 << 20, append="nokaslr")
    vm = guest["vm"]
    assert (vm["cpus"]["boot_vcpus"], vm["memory"]["size"]) == (2, 256 << 20)
    assert vm["payload"]["kernel"] == "/vmlinux"
    assert vm["payload"]["cmdline"].split()[-2:] == ["quiet", "nokaslr"]
    assert guest["file_server"] == ["virtiofsd", "--fd=3"]
    base, request = guest["initrds"]
    assert Path(base).is_relative_to(own_cache)
    assert b"'tr' 'a-z' 'A-Z'" in request


def test_panic_of_the_guest_can_be_told_from_a_reboot() -> None:
    assert {"panic=-1", "reboot=panic_warm"} <= set(document()["vm"]["payload"]["cmdline"].split())


def test_outside_the_command_is_the_vmm_and_the_guest_its_job(
    rootvisor: Run, launched: list[RunPlan]
) -> None:
    status, _, err = rootvisor(
        "guest", "--memory", "256M", "--root-vps", "2", "--scheduler", "root", "--timeout", "9", "--", "true"
    )
    assert (status, len(launched)) == (7, 1), err
    description = launched[0].description
    assert (description.vps, description.scheduler, description.timeout_s) == (2, "root", 9.0)
    assert description.memory_bytes == (256 << 20) + guest_plan.ROOT_BYTES
    command = description.command
    assert command is not None
    assert command.argv[-1] == ramdisk.JOB
    assert command.argv[1:3] == ("-I", "-S")
    guest = marshal.loads(command.job)["guest"]
    assert b"set -- 'true'" in guest["initrds"][1]
    assert guest["timeout_s"] is None  # the root partition ends at its own timeout
    assert b"job" in ramdisk.request_part(command, "host", description.devices)


def test_root_partition_smaller_than_its_guest_is_refused(rootvisor: Run, launched: list[RunPlan]) -> None:
    status, _, err = rootvisor("guest", "--memory", "1G", "--root-memory", "1G", "--", "true")
    assert (status, launched, err.count("\n")) == (2, [], 1)
    assert "--root-memory" in err


@pytest.mark.parametrize(
    "options", [("--vps", "0"), ("--memory", "1"), ("--kernel", "/nowhere"), ("--nonsense",)]
)
def test_wrong_option_is_one_line(rootvisor: Run, options: tuple[str, ...]) -> None:
    status, _, err = rootvisor("guest", *options, "--", "true")
    assert (status, err.count("\n")) == (2, 1), err


def test_inside_this_process_becomes_the_vmm(
    rootvisor: Run, launched: list[RunPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def become(_path: str, argv: list[str]) -> None:
        seen.append(argv)
        with open(argv[-1], "rb") as file:
            guest = marshal.loads(file.read())["guest"]
        assert guest["timeout_s"] == 5.0
        raise OSError(2, "No such file or directory")

    monkeypatch.setattr(guest_plan, "in_root_partition", lambda: True)
    monkeypatch.setattr(os, "execv", become)
    status, _, err = rootvisor("guest", "--timeout", "5", "--", "true")
    assert (status, launched) == (125, [])
    assert seen[0][-1].startswith("/proc/self/fd/")
    assert "cannot execute" in err
