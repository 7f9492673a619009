# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from rootvisor.appliance import hardware as emulated
from rootvisor.appliance.hardware import EmulatedDevice
from rootvisor.cli import devices, hardware
from rootvisor.cli.app import run
from rootvisor.cli.errors import UserError
from rootvisor.cli.pci_names import PciNames
from rootvisor.vfio import host_device
from tests.unit.vfio.sysfs import FakeHost

NIC = "0000:01:00.0"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("pci:01:00.0", f"pci:{NIC}"),
        ("pci:0000:01:00.0", f"pci:{NIC}"),
        ("emulated:nic", "emulated:nic"),
        ("emulated:nvme,path=/a,b=c.img", "emulated:nvme,path=/a,b=c.img"),
        ("emulated:nic,forward=2222:22,forward=8080:80", "emulated:nic,forward=2222:22,forward=8080:80"),
    ],
)
def test_devices_are_parsed(text: str, value: str) -> None:
    assert hardware.parse_device(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no device; use pci:ADDRESS or emulated:nvme"),
        ("pci:", "is no device"),
        ("pci:zz", "no PCI address; write it as"),
        ("usb:1", "is no device"),
        ("emulated:sound", "'sound' is no emulated device; choose from nvme, nic"),
        ("emulated:nvme", "needs an image, for example"),
        ("emulated:nvme,path=", "needs an image"),
        ("emulated:nvme,size=4G", "'size=4G' is no setting"),
        ("emulated:nic,path=x", "'path=x' is no setting of a network card; use forward=2222:22"),
        ("emulated:nic,forward=22", "'22' are no ports; write PORT-HERE:PORT-THERE"),
        ("emulated:nic,forward=0:22", "are no ports"),
        ("emulated:nic,forward=1:65536", "are no ports"),
        ("emulated:nic,forward=1:2:3", "are no ports"),
        ("emulated:nic,forward=1:2,", "'' is no setting"),
        ("emulated:display,path=x", "has no image"),
    ],
)
def test_what_is_no_device_is_refused_with_a_reason(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="^.*" + words.replace("?", "\\?")):
        hardware.parse_device(text)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    made = FakeHost(tmp_path)
    monkeypatch.setattr(hardware, "find", lambda address: host_device.find(address, str(made.devices)))
    for module in (hardware, devices):
        monkeypatch.setattr(
            module, "obstacle", lambda device: host_device.obstacle(device, str(made.proc), str(made.dev))
        )
    monkeypatch.setattr(devices, "all_devices", lambda: host_device.all_devices(str(made.devices)))
    return made


def test_a_device_of_the_machine_is_placed_where_the_machine_has_it(host: FakeHost) -> None:
    host.add(NIC, driver="e1000e")
    assert hardware.place((f"pci:{NIC}",), "kvm") == hardware.Hardware((NIC,), ())


def test_obstacles_are_told_with_the_option_and_the_mend(host: FakeHost) -> None:
    host.add(NIC, group=None)
    with pytest.raises(UserError, match=f"--device pci:{NIC}: {NIC} is in no IOMMU group.*; switch VT-d"):
        hardware.place((f"pci:{NIC}",), "kvm")
    with pytest.raises(UserError, match="no PCI device 0000:02:00.0; see what there is"):
        hardware.place(("pci:0000:02:00.0",), "kvm")


def test_a_device_given_twice_is_refused(host: FakeHost) -> None:
    with pytest.raises(UserError, match="given twice"):
        hardware.place((f"pci:{NIC}", f"pci:{NIC}"), "kvm")


def test_each_engine_has_its_own_devices() -> None:
    with pytest.raises(UserError, match="out of the appliance's reach"):
        hardware.place((f"pci:{NIC}",), "appliance")
    with pytest.raises(UserError, match="only the appliance has emulated hardware; add --engine appliance"):
        hardware.place(("emulated:nic",), "kvm")


def test_emulated_devices_have_places_of_their_own(tmp_path: Path) -> None:
    image = tmp_path / "disk,1.img"
    image.write_bytes(bytes(1 << 20))
    placed = hardware.place((f"emulated:nvme,path={image}", "emulated:nic", "emulated:nic"), "appliance")
    assert placed.addresses == ("0000:00:10.0", "0000:00:11.0", "0000:00:12.0")
    words = emulated.qemu_arguments(placed.emulated)
    assert words[:2] == ["-device", "intel-iommu"]
    assert f"if=none,id=backend0,file={str(image).replace(',', ',,')},format=raw,discard=unmap" in words
    assert "nvme,id=hardware0,addr=0x10,bus=pcie.0,drive=backend0,serial=rootvisor0" in words
    assert "e1000e,id=hardware2,addr=0x12,bus=pcie.0,netdev=backend2" in words


def test_ports_of_this_machine_lead_to_the_network_card() -> None:
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        free.bind(("127.0.0.1", 0))
        busy, port = (one.getsockname()[1] for one in (taken, free))
        free.close()
        placed = hardware.place((f"emulated:nic,forward={port}:22",), "appliance")
        words = emulated.qemu_arguments(placed.emulated)
        assert f"user,id=backend0,hostfwd=tcp:127.0.0.1:{port}-:22" in words
        with pytest.raises(UserError, match=f"port {busy}: address already in use; give another port"):
            hardware.place((f"emulated:nic,forward={busy}:22",), "appliance")


def test_a_display_of_either_kind_is_known_as_one(host: FakeHost) -> None:
    host.add(NIC, class_code=0x030000)
    host.add("0000:02:00.0", group=2)
    assert hardware.place((f"pci:{NIC}",), "kvm").display
    assert not hardware.place(("pci:0000:02:00.0",), "kvm").display
    assert hardware.place(("emulated:nic", "emulated:display"), "appliance").display


def test_too_many_devices_are_refused() -> None:
    with pytest.raises(UserError, match="give 15 at most"):
        hardware.place(("emulated:nic",) * 16, "appliance")


def test_an_image_must_be_a_file_of_some_size(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "no such file"), (tmp_path, "is no file")):
        with pytest.raises(UserError, match=words):
            hardware.place((f"emulated:nvme,path={path}",), "appliance")
    (tmp_path / "small").touch()
    with pytest.raises(UserError, match="too small for a disk"):
        hardware.place((f"emulated:nvme,path={tmp_path}/small",), "appliance")


def test_every_kind_has_its_words_for_qemu() -> None:
    for name in emulated.KINDS:
        assert emulated.KINDS[name].model in emulated.qemu_arguments((EmulatedDevice(name, "/x"),))[-1]


# --- rootvisor devices ----------------------------------------------------------------------------------------------
def test_the_list_names_what_can_be_given_and_what_stands_in_the_way(host: FakeHost) -> None:
    host.add(NIC, driver="e1000e")
    host.add("0000:02:00.0", group=None)
    host.add("0000:00:1c.0", header=1, class_code=0x060400)
    done = CliRunner().invoke(devices.devices, [], standalone_mode=False)
    assert done.return_value == 0, done.output
    assert NIC in done.output and "0000:00:1c.0" not in done.output
    assert "0000:02:00.0 is in no IOMMU group" in done.output and "-> switch VT-d" in done.output
    assert f"1 of 2 can be given. Try: rootvisor run --device pci:{NIC} -- lspci" in done.output


def test_the_list_as_json(host: FakeHost) -> None:
    host.add(NIC, driver="e1000e", group=3)
    host.add("0000:01:00.1", driver="vfio-pci", group=3)
    done = CliRunner().invoke(devices.devices, ["--json"], standalone_mode=False)
    first = json.loads(done.output)["devices"][0]
    assert (first["address"], first["ids"], first["driver"], first["group"]) == (
        NIC,
        "8086:10d3",
        "e1000e",
        3,
    )
    assert (
        first["group_members"] == ["0000:01:00.1"]
        and first["available"] is True
        and first["obstacle"] is None
    )


def test_a_machine_without_pci_says_so(host: FakeHost) -> None:
    done = CliRunner().invoke(devices.devices, [], standalone_mode=False)
    assert done.return_value == 125 and "no PCI devices" in done.output


def test_names_come_from_the_list_or_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "pci.ids"
    path.write_text(
        "# comment\n8086  Intel Corporation\n\t10d3  82574L\n\t\t8086 0001  subsystem\n"
        "C 02  Network controller\n\t00  Ethernet controller\n\t\t01  interface\n"
    )
    names = PciNames((str(tmp_path / "none"), str(path)))
    assert names.device_name(0x8086, 0x10D3) == "Intel Corporation 82574L"
    assert names.device_name(0x8086, 1) == "Intel Corporation" and names.device_name(1, 1) == ""
    assert (
        names.class_name(0x020000) == "Ethernet controller"
        and names.class_name(0x02FF00) == "Network controller"
    )
    assert PciNames(()).class_name(0x010802) == "Mass storage controller"
    assert PciNames(()).class_name(0xFE0000) == "Class fe00"


# --- the display ------------------------------------------------------------------------------------------------------
def test_the_first_display_is_the_one_that_is_shown() -> None:
    assert emulated.display_id((EmulatedDevice("nic"), EmulatedDevice("display"))) == "hardware1"
    assert emulated.display_id((EmulatedDevice("nic"),)) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--screenshot", "a.png", "--", "true"],
            "--screenshot shows an emulated display; add --device emulated:display",
        ),
        (
            ["--device", "emulated:display", "--screenshot", "a.png"],
            "--screenshot is taken at the end of CMD; give a command",
        ),
        (
            ["--device", "emulated:display", "--screenshot", "/no/where/a.png", "--", "true"],
            "the folder /no/where is not there; create it first",
        ),
        (
            ["--as", "guest", "--device", "emulated:nic", "--", "true"],
            "--device gives physical devices to a root partition",
        ),
        (["--device", "emulated:floppy", "--", "true"], "'floppy' is no emulated device; choose from nvme"),
    ],
)
def test_wrong_options_of_run_are_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", "--engine", "appliance", "--dry-run", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]
