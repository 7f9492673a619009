# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from rootvisor.vfio.errors import VfioError
from rootvisor.vfio.host_device import HostDevice, all_devices, canonical, find, obstacle
from tests.unit.vfio.sysfs import FakeHost

NIC = "0000:01:00.0"


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def problem(host: FakeHost, address: str = NIC) -> VfioError | None:
    return obstacle(find(address, str(host.devices)), str(host.proc), str(host.dev))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("00:1f.2", "0000:00:1f.2"),
        ("0000:01:00.0", NIC),
        ("ABCD:ff:1F.7", "abcd:ff:1f.7"),
        ("1:2.3", "0000:01:02.3"),
    ],
)
def test_an_address_gets_sysfs_spelling(text: str, address: str) -> None:
    assert canonical(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "00:1f",
        "00:1f:2",
        "00:20.0",
        "00:00.8",
        "100:00.0",
        "0:0:0:0.0",
        "../../etc",
        "00:0_1.0",
        " 0:1.0",
        "-1:0.0",
    ],
)
def test_what_is_no_address_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(VfioError, match="no PCI address; write it as"):
        canonical(text)


def test_a_device_that_is_not_there(host: FakeHost) -> None:
    with pytest.raises(VfioError, match="no PCI device 0000:09:00.0; see what there is"):
        find("0000:09:00.0", str(host.devices))


def test_devices_are_listed_by_address_with_group_and_driver(host: FakeHost) -> None:
    host.add("0000:02:00.0", group=None)
    host.add(NIC, driver="e1000e", group=7)
    first, second = all_devices(str(host.devices))
    assert (first.address, first.driver, first.group, first.vendor, first.device) == (
        NIC,
        "e1000e",
        7,
        0x8086,
        0x10D3,
    )
    assert (second.group, second.driver, second.members()[0].address) == (None, "", "0000:02:00.0")
    assert all_devices(str(host.devices / "nothing")) == []


def test_a_device_alone_in_its_group_can_be_given(host: FakeHost) -> None:
    host.add(NIC, driver="e1000e")
    assert problem(host) is None


def test_a_bridge_cannot(host: FakeHost) -> None:
    host.add(NIC, class_code=0x060400, header=1)
    assert "is a bridge; give a device behind it" in str(problem(host))


def test_without_an_iommu_nothing_can(host: FakeHost) -> None:
    host.add(NIC, group=None)
    assert "no IOMMU group" in str(problem(host)) and "intel_iommu=on" in str(problem(host))


def test_others_of_the_group_with_drivers_stand_in_the_way_bridges_and_vfio_do_not(host: FakeHost) -> None:
    host.add(NIC, driver="e1000e")
    host.add("0000:00:1c.0", class_code=0x060400, header=1, driver="pcieport")
    host.add("0000:01:00.1", driver="vfio-pci")
    host.add("0000:01:00.2")
    assert problem(host) is None
    host.add("0000:01:00.3", driver="snd_hda_intel")
    assert "shares IOMMU group 1 with 0000:01:00.3 (snd_hda_intel)" in str(problem(host))
    assert "0000:01:00.3/driver/unbind" in str(problem(host))


def disk(folder: Path, name: str, number: str) -> Path:
    path = folder / "nvme/nvme0" / name
    path.mkdir(parents=True)
    (path / "subsystem").symlink_to("../../../../../class/block")
    (path / "dev").write_text(number + "\n")
    return path


def test_a_disk_with_several_ways_to_it_hangs_on_each_of_its_controllers(host: FakeHost) -> None:
    controller = host.add(NIC, driver="nvme", class_code=0x010802) / "nvme/nvme3"
    controller.mkdir(parents=True)
    (controller / "subsystem").symlink_to("../../../../../class/nvme")
    for name, members in (("nvme-subsys0", ("nvme0",)), ("nvme-subsys1", ("nvme3", "nvme4"))):
        subsystem = host.root / "sys/class/nvme-subsystem" / name
        drive = subsystem / f"nvme{name[-1]}n1"
        drive.mkdir(parents=True)
        (drive / "subsystem").symlink_to("../../../block")
        (drive / "dev").write_text(f"259:{name[-1]}\n")
        for member in members:
            (subsystem / member).mkdir()
    (host.proc / "self/mountinfo").write_text("29 1 259:0 / /other rw - ext4 /dev/x rw\n")
    assert problem(host) is None
    (host.proc / "self/mountinfo").write_text("29 1 259:1 / /home rw - ext4 /dev/x rw\n")
    assert "nvme1n1 is mounted at /home" in str(problem(host))


@pytest.mark.parametrize("where", ["disk", "partition", "holder"])
def test_a_mounted_disk_is_in_use_also_by_partition_and_mapping(host: FakeHost, where: str) -> None:
    drive = disk(host.add(NIC, driver="nvme", class_code=0x010802), "nvme0n1", "259:0")
    partition = drive / "nvme0n1p1"
    partition.mkdir()
    (partition / "dev").write_text("259:1\n")
    mapping = host.root / "sys/devices/virtual/block/dm-0"
    mapping.mkdir(parents=True)
    (mapping / "dev").write_text("253:0\n")
    (partition / "holders").mkdir()
    (partition / "holders/dm-0").symlink_to(mapping)
    assert problem(host) is None
    number = {"disk": "259:0", "partition": "259:1", "holder": "253:0"}[where]
    (host.proc / "self/mountinfo").write_text(f"29 1 {number} / /home rw - ext4 /dev/x rw\n")
    assert "is mounted at /home; give another device" in str(problem(host))


def test_the_default_route_is_a_use(host: FakeHost) -> None:
    (host.add(NIC, driver="e1000e") / "net/eth7").mkdir(parents=True)
    head = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
    (host.proc / "net/route").write_text(head + "eth7 0000A8C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n")
    assert problem(host) is None
    (host.proc / "net/route").write_text(head + "eth7 00000000 0101A8C0 0003 0 0 0 00000000 0 0 0\n")
    assert "eth7 carries the default route" in str(problem(host))


def test_the_default_route_of_ipv6_is_a_use(host: FakeHost) -> None:
    (host.add(NIC, driver="e1000e") / "net/eth7").mkdir(parents=True)
    zero = "0" * 32
    (host.proc / "net/ipv6_route").write_text(
        f"{zero} 00 {zero} 00 fe8{'0' * 29} 00000400 00000001 00000000 00000003     eth7\n"
    )
    assert "default route" in str(problem(host))


def test_without_vfio_it_says_what_to_load(host: FakeHost) -> None:
    host.add(NIC)
    (host.dev / "vfio").unlink()
    assert str(problem(host)) == "the kernel's VFIO is not loaded; modprobe vfio-pci"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may everything")
def test_who_may_not_bind_hears_the_commands(host: FakeHost) -> None:
    folder = host.add(NIC, driver="e1000e")
    (folder / "driver_override").chmod(0o444)
    assert "has the driver e1000e, and you may not change that; run as root" in str(problem(host))


def test_garbage_in_sysfs_is_survived(tmp_path: Path) -> None:
    folder = tmp_path / "0000:00:00.0"
    folder.mkdir()
    (folder / "vendor").write_text("not a number")
    device = HostDevice(str(folder))
    assert (device.vendor, device.group, device.driver, device.is_bridge) == (0, None, "", False)
