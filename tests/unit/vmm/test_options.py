# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from rootvisor.vmm import config, options
from rootvisor.vmm.options import parse_command_line, parse_option, split, unquote
from rootvisor.vmm.schema import ConfigError


def vm(*arguments: str) -> dict[str, Any]:
    parsed = parse_command_line(["--kernel", "vmlinux", *arguments]).vm
    assert parsed is not None
    return parsed


def complaint(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a=1,b=2", ["a=1", "b=2"]),
        ('path="a,b",c=1', ['path="a,b"', "c=1"]),
        ("x=[1,2,[3,4]],y", ["x=[1,2,[3,4]]", "y"]),
        ('x="[",y=1', ['x="["', "y=1"]),
    ],
)
def test_split_commas_in_quotes_and_brackets_stay(text: str, parts: list[str]) -> None:
    assert split(text) == parts


@pytest.mark.parametrize("text", ['a="', "a=[", "a=]", "a=[1", 'a="[1]'])
def test_split_unbalanced_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="do not match"):
        split(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("a", "a"), ('"a,b"', "a,b"), ('a"b"c', "abc"), ('"a""b"', 'a"b'), ('""', ""), ('""""', '"')],
)
def test_unquote_doubled_mark_is_one(text: str, value: str) -> None:
    assert unquote(text) == value


def test_option_fields_go_by_their_option_names() -> None:
    disk = parse_option(config.DISK, "vhost_user=on,socket=/run/blk,queue_size=256,id=d")
    assert (disk["vhost_socket"], disk["queue_size"], disk["id"]) == ("/run/blk", 256, "d")
    assert parse_option(config.DISK, "path=a,image_type=qcow2")["image_type"] == "Qcow2"
    assert parse_option(config.CPUS, "boot=2,max=4")["max_vcpus"] == 4


def test_option_first_word_alone_is_the_main_field() -> None:
    assert parse_option(config.DISK, "disk.img,readonly=on")["path"] == "disk.img"
    assert parse_option(config.MEMORY, "1G")["size"] == 1 << 30
    assert parse_option(config.CONSOLE, "off")["mode"] == "Off"
    assert parse_option(config.CONSOLE, "file=/tmp/log") == config.CONSOLE.check(
        {"mode": "File", "file": "/tmp/log"}
    )


def test_command_line_is_the_document_that_the_api_takes() -> None:
    from_text = vm(
        "--initramfs", "rd", "--cmdline", "quiet", "--cpus", "boot=2", "--memory", "size=1G,shared=on",
        "--disk", "path=a,readonly=on", "path=b", "--disk=c",
        "--net", "tap=t0,mac=52:54:00:00:00:01", "--net", "default",
        "--fs", "tag=t,path=/srv", "--vsock", "cid=3", "--rng", "src=/dev/random", "--balloon", "size=64M",
        "--console", "off", "--serial", "tty",
    )  # fmt: skip
    assert from_text == config.VM.check(
        {
            "payload": {"kernel": "vmlinux", "initramfs": "rd", "cmdline": "quiet"},
            "cpus": {"boot_vcpus": 2},
            "memory": {"size": 1 << 30, "shared": True},
            "disks": [{"path": "a", "readonly": True}, {"path": "b"}, {"path": "c"}],
            "net": [{"tap": "t0", "mac": "52:54:00:00:00:01"}, {}],
            "fs": [{"tag": "t", "path": "/srv"}],
            "vsock": {"cid": 3},
            "rng": {"src": "/dev/random"},
            "balloon": {"size": 64 << 20},
            "console": {"mode": "Off"},
            "serial": {"mode": "Tty"},
        }
    )


def test_command_line_vps_and_spellings_of_rootvisor() -> None:
    parsed = vm("--vps", "4", "--initrd", "rd", "--append=a b=c")
    assert parsed["cpus"]["boot_vcpus"] == parsed["cpus"]["max_vcpus"] == 4
    assert parsed["payload"] == {"kernel": "vmlinux", "initramfs": "rd", "cmdline": "a b=c"}


def test_command_line_one_terminal_goes_to_the_serial_port_alone() -> None:
    assert vm("--serial", "tty")["console"]["mode"] == "Off"
    assert vm("--serial", "tty", "--console", "tty")["console"]["mode"] == "Tty"
    assert vm()["console"]["mode"] == "Tty"


def test_command_line_api_socket_alone_makes_no_guest() -> None:
    parsed = parse_command_line(["--api-socket", "/run/vmm.sock", "--event-monitor", "fd=3", "--no-shutdown"])
    assert parsed.vm is None
    assert parsed.api_socket == {"path": "/run/vmm.sock"}
    assert parsed.event_monitor == {"fd": 3}
    assert parsed.no_shutdown


def test_command_line_restore_takes_the_place_of_a_guest() -> None:
    parsed = parse_command_line(
        ["--restore", "source_url=file:///snap,memory_restore_mode=ondemand,resume=true"]
    )
    assert parsed.vm is None
    assert parsed.restore == {
        "source_url": "file:///snap",
        "prefault": False,
        "memory_restore_mode": "OnDemand",
        "resume": True,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do: give --kernel, --restore or --api-socket"),
        (("--disk", "a"), "--kernel: is missing"),
        (("--append", "x"), "--kernel: is missing"),
        (("--api-socket", "s", "--disk", "a"), "--kernel: is missing"),
        (("zork",), "zork: an option is expected here"),
        (("--zork",), "--zork: no such option"),
        (("-x",), "-x: no such option"),
        (("--watchdog",), "--watchdog: is not supported; there is no watchdog"),
        (("--firmware=f",), "--firmware: is not supported; give a kernel"),
        (("--kernel",), "--kernel: needs a value: FILE"),
        (("--kernel", "--disk", "a"), "--kernel: needs a value"),
        (("--kernel", ""), "--kernel: is empty"),
        (("--kernel", "a", "--kernel", "b"), "--kernel: is given twice"),
        (("--kernel", "a", "--initrd", "b", "--initramfs", "c"), "--initramfs: is given twice"),
        (("--kernel", "a", "--vps", "2", "--cpus", "boot=2"), "--cpus: and --vps exclude each other"),
        (("--kernel", "a", "--cpus", "boot=2", "--vps", "2"), "--vps: and --cpus exclude each other"),
        (("--kernel", "a", "--vps", "0"), "--vps: 0 is out of range; write 1 to 64"),
        (("--kernel", "a", "--vps", "two"), "--vps: 'two' is not a whole number; write 1 to 64"),
        (("--kernel", "a", "--cpus", "boot=4,max=2"), "--cpus max: 2 is less than --cpus boot=4"),
        (("--kernel", "a", "--cpus", "features=[amx]"), "--cpus features: is not supported"),
        (("--kernel", "a", "--cpus", "topology=1:1:1:1"), "--cpus topology: is not supported"),
        (("--kernel", "a", "--memory", "16M"), "--memory size: 16M is out of range; write 32M to 1T"),
        (
            ("--kernel", "a", "--memory", "lots"),
            "--memory size: 'lots' is not a size; write for example 512M",
        ),
        (("--kernel", "a", "--memory", "hugepages=on"), "--memory hugepages: on is not supported"),
        (("--kernel", "a", "--disk", "readonly=on"), "--disk path: is missing"),
        (("--kernel", "a", "--disk", "a,readonly"), "--disk readonly: has no value"),
        (("--kernel", "a", "--disk", "a,,readonly=on"), "has an empty part"),
        (("--kernel", "a", "--disk", ""), "--disk: '' has an empty part"),
        (("--kernel", "a", "--disk", "path="), "--disk path: is empty"),
        (("--kernel", "a", "--disk", "path=a,path=b"), "--disk path: is given twice"),
        (
            ("--kernel", "a", "--disk", "path=a,readonly=maybe"),
            "--disk readonly: 'maybe' is neither on nor off",
        ),
        (("--kernel", "a", "--disk", "path=a,image_type=vhd"), "--disk image_type: vhd is not supported"),
        (
            ("--kernel", "a", "--disk", "path=a,zork=1"),
            "--disk zork: there is no such field; write path=FILE",
        ),
        (
            ("--kernel", "a", "--disk", "path=a,bw_size=1"),
            "--disk bw_size: is not supported; limit the process",
        ),
        (("--kernel", "a", "--disk", "path=a,iommu=on"), "--disk iommu: on is not supported"),
        (("--kernel", "a", "--disk", "a,id=x", "--net", "id=x"), "net[0].id: 'x' is that of disks[0]"),
        (("--kernel", "a", "--net", "vhost_user=on"), "--net socket: is missing"),
        (("--kernel", "a", "--net", "vhost_mode=server"), "--net vhost_mode: server is not supported"),
        (
            ("--kernel", "a", "--fs", "tag=x"),
            "--fs socket: is missing: virtiofsd's socket, or --fs path=FOLDER",
        ),
        (
            ("--kernel", "a", "--console", "zork"),
            "--console mode: 'zork' is none of off, null, pty, tty, file",
        ),
        (("--kernel", "a", "--console", "file"), "--console file: is missing"),
        (("--kernel", "a", "--serial", "socket=s"), "--serial socket: is not supported"),
        (("--kernel", "a", "--api-socket", "path=s,fd=3"), "--api-socket: needs either a path or a file"),
        (("--kernel", "a", "--event-monitor", "fd=x"), "--event-monitor fd: 'x' is not a whole number"),
        (("--kernel", "a", "--restore", "source_url=s"), "--restore: brings the guest's configuration"),
        (("--restore", "resume=true"), "--restore source_url: is missing"),
        (("--no-shutdown=on",), "--no-shutdown: takes no value"),
        (("--" + "x" * 5000,), "xxx...: no such option"),
    ],
)
def test_command_line_wrong_option_names_option_and_fault(arguments: tuple[str, ...], message: str) -> None:
    assert message in complaint(*arguments)
    assert len(complaint(*arguments)) < 400


def test_options_name_each_field_of_the_configuration_that_does_something() -> None:
    """A device that the tables offer can be asked for on the command line."""
    targets = {option.target.partition(".")[0] for option in options.OPTIONS}
    assert {field.name for field in config.VM.fields if field.is_offered} <= targets
