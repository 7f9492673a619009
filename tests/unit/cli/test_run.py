# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_dry_run_json_is_the_description(rootvisor: Run, bzimage: Path, tmp_path: Path) -> None:
    disk = tmp_path / "d.img"
    disk.write_bytes(bytes(4096))
    status, out, err = rootvisor(
        "run", "--dry-run", "--json", "--kernel", str(bzimage), "--vps", "4", "--memory", "512M",
        "--append", "nokaslr", "--disk", f"path={disk},readonly=on", "--timeout", "30", "--", "ls", "-l", "--json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    plan = json.loads(out)
    description = plan["description"]
    assert plan["engine"] == {"name": "kvm", "reason": "pretended"}
    assert description["kernel"]["image"] == str(bzimage)
    assert description["kernel"]["version"] == "6.12.0-test"
    assert (description["vps"], description["memory_bytes"], description["append"]) == (
        4,
        512 << 20,
        "nokaslr",
    )
    assert description["command"]["argv"] == ["ls", "-l", "--json"]
    assert description["command"]["cwd"] == os.getcwd()
    assert description["disks"] == [{"path": str(disk), "readonly": True}]
    assert description["devices"] == ["console", "rng", "fs", "disk"]
    assert description["timeout_s"] == 30


def test_dry_run_for_people_names_the_parts(rootvisor: Run, bzimage: Path) -> None:
    status, out, _ = rootvisor("run", "--dry-run", "--kernel", str(bzimage), "echo", "a b")
    assert status == 0
    assert "engine" in out
    assert "echo 'a b'" in out
    assert str(bzimage) in out
    assert re.search(r"kernel command line +rdinit=/init console=hvc0 quiet\n", out)
    assert re.search(r"file server +.*virtiofsd .*fd=\{fd\}", out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "rdinit=/init console=hvc0 quiet"),
        (("--append", "quiet loglevel=7"), "rdinit=/init console=hvc0 quiet quiet loglevel=7"),
        (("--console", "stderr"), "rdinit=/init earlyprintk=ttyS0 console=ttyS0"),
        (("--verbose",), "rdinit=/init earlyprintk=ttyS0 console=ttyS0"),
    ],
)
def test_dry_run_json_has_the_whole_kernel_command_line(
    rootvisor: Run, bzimage: Path, options: tuple[str, ...], words: str
) -> None:
    _, out, _ = rootvisor("run", "--dry-run", "--json", "--kernel", str(bzimage), *options, "true")
    assert json.loads(out)["kernel_command_line"] == words


def test_dry_run_with_a_ramdisk_of_ones_own_shows_both_consoles(
    rootvisor: Run, bzimage: Path, tmp_path: Path
) -> None:
    ramdisk = tmp_path / "initrd"
    ramdisk.write_bytes(b"070701")
    _, out, _ = rootvisor("run", "--dry-run", "--kernel", str(bzimage), "--initrd", str(ramdisk))
    assert "rdinit=/init console=ttyS0 console=hvc0" in out


def test_dry_run_without_a_cached_kernel_says_so(rootvisor: Run, own_cache: Path) -> None:
    status, out, _ = rootvisor("run", "--dry-run")
    assert status == 0
    assert "would be built" in out
    assert not own_cache.exists()


def test_no_command_gives_a_shell(rootvisor: Run, bzimage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/sh")
    _, out, _ = rootvisor("run", "--dry-run", "--json", "--kernel", str(bzimage))
    assert json.loads(out)["description"]["command"]["argv"] == ["/bin/sh"]


def test_services_of_this_machine_do_not_reach_the_partition(
    rootvisor: Run, bzimage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    monkeypatch.setenv("MY_OWN", "kept")
    _, out, _ = rootvisor("run", "--dry-run", "--json", "--kernel", str(bzimage), "env")
    env = json.loads(out)["description"]["command"]["env"]
    assert "SSH_AUTH_SOCK" not in env
    assert env["MY_OWN"] == "kept"


def test_a_folder_as_root_has_a_plain_environment(rootvisor: Run, bzimage: Path, tmp_path: Path) -> None:
    _, out, _ = rootvisor(
        "run", "--dry-run", "--json", "--kernel", str(bzimage), "--rootfs", str(tmp_path), "env"
    )
    description = json.loads(out)["description"]
    assert (description["rootfs"], description["rootfs_path"]) == (str(tmp_path), str(tmp_path))
    assert description["command"]["cwd"] == "/"
    assert description["command"]["env"]["HOME"] == "/root"


def test_without_a_ramdisk_the_root_is_on_a_disk_and_the_terminal_on_the_serial_port(
    rootvisor: Run, bzimage: Path
) -> None:
    words = ("--initrd", "none", "--devices", "none", "--append", "root=/dev/nvme0n1")
    status, out, _ = rootvisor("run", "--dry-run", "--kernel", str(bzimage), *words)
    assert status == 0 and re.search(r"initial ramdisk +none\n", out)
    assert re.search(r"kernel command line +console=ttyS0 root=/dev/nvme0n1\n", out)


def test_initrd_of_the_user_runs_without_the_agent(rootvisor: Run, bzimage: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"070701")
    _, out, _ = rootvisor("run", "--dry-run", "--json", "--kernel", str(bzimage), "--initrd", str(initrd))
    plan = json.loads(out)
    assert plan["agent"] is False
    assert plan["description"]["initrds"] == [str(initrd)]
    assert plan["description"]["command"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vps", "0"), "1 to 64"),
        (("--vps", "1000"), "1 to 64"),
        (("--memory", "lots"), "not a size"),
        (("--memory", "64M"), "at least 128M"),
        (("--memory", "1T"), "this machine has"),
        (("--engine", "xen"), "'auto', 'kvm', 'appliance'"),
        (("--scheduler", "fair"), "'hypervisor', 'root'"),
        (("--kernel", "/nowhere/bzImage"), "no such kernel image"),
        (("--kernel", "/"), "directory"),
        (("--kernel", "/etc/passwd"), "is not a kernel"),
        (("--kernel", ""), "empty"),
        (("--rootfs", "/nowhere"), "no such file or directory"),
        (("--rootfs", "/etc/passwd"), "not a folder"),
        (("--initrd", "/nowhere"), "no such file or directory"),
        (("--initrd", "/"), "a folder"),
        (
            ("--initrd", "none"),
            "--initrd none needs a root file system; name its disk, for example: --append",
        ),
        (("--initrd", "none", "--append", "root=/dev/vda", "--", "ls"), "CMD needs"),
        (("--initrd", "/etc/passwd", "--", "ls"), "CMD needs"),
        (("--disk", "path=/nowhere"), "no such file or directory"),
        (("--disk", "/etc/passwd", "--devices", "console"), "add disk to --devices"),
        (("--devices", "fs", "--", "ls"), "add console"),
        (("--devices", "net"), "unknown device 'net'"),
        (("--trace", "/nowhere/file"), "/nowhere is not there"),
        (("--trace", "/"), "is a folder"),
        (("--console", "/nowhere/file"), "/nowhere is not there"),
        (("--timeout", "soon"), "number of seconds"),
        (("--json",), "--dry-run"),
        (("--nonsense",), "No such option"),
    ],
)
def test_bad_command_line_is_one_line_and_status_2(
    rootvisor: Run, bzimage: Path, arguments: tuple[str, ...], message: str
) -> None:
    kernel = () if "--kernel" in arguments else ("--kernel", str(bzimage))
    status, out, err = rootvisor("run", *kernel, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("rootvisor: ")
    assert err.count("\n") == 1
    assert message in err


def test_too_small_a_disk_names_the_command_that_mends_it(
    rootvisor: Run, bzimage: Path, tmp_path: Path
) -> None:
    (tmp_path / "d").touch()
    status, _, err = rootvisor("run", "--kernel", str(bzimage), "--disk", str(tmp_path / "d"))
    assert status == 2
    assert "truncate" in err


def test_help_shows_groups_examples_and_statuses(rootvisor: Run) -> None:
    status, out, _ = rootvisor("run", "--help")
    assert status == 0
    for text in (
        "Kernel and files:",
        "Examples:",
        "rootvisor run -- ls -l /dev/mshv",
        "Exit status:",
        "triple fault",
    ):
        assert text in out
