# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from rootvisor.vmm import config
from rootvisor.vmm.schema import ConfigError

KERNEL = {"payload": {"kernel": "/boot/vmlinuz"}}


def checked(**fields: Any) -> dict[str, Any]:
    return config.VM.check(KERNEL | fields)


def complaint(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(**fields)
    return str(caught.value)


def test_vm_kernel_alone_gives_a_whole_configuration() -> None:
    vm = checked()
    assert vm["cpus"]["boot_vcpus"] == vm["cpus"]["max_vcpus"] == 1
    assert vm["memory"]["size"] == 512 << 20
    assert vm["rng"]["src"] == "/dev/urandom"
    assert (vm["console"]["mode"], vm["serial"]["mode"]) == ("Tty", "Null")
    assert not {"disks", "net", "fs", "vsock", "balloon"} & set(vm)


def test_vm_documents_do_not_share_their_defaults() -> None:
    first, second = checked(), checked()
    first["rng"]["src"] = "/dev/zero"
    assert second["rng"]["src"] == checked()["rng"]["src"] == "/dev/urandom"


def test_vm_checked_configuration_is_accepted_again() -> None:
    vm = checked(
        disks=[{"path": "a"}, {"path": "b", "id": "b"}],
        net=[{}],
        fs=[{"tag": "t", "path": "/srv"}],
        vsock={"cid": 3},
        balloon={"size": 0},
    )
    config.name_devices(vm)
    assert config.VM.check(vm) == vm


def test_vm_what_cloud_hypervisor_prints_is_accepted() -> None:
    """The `config` of `vm.info` of a Cloud Hypervisor with one disk, as its serializer writes it."""
    vm = checked(
        cpus={
            "boot_vcpus": 2,
            "max_vcpus": 4,
            "kvm_hyperv": False,
            "max_phys_bits": 46,
            "affinity": None,
            "features": {"amx": False},
            "nested": True,
            "core_scheduling": "Vm",
            "profile": "Host",
        },
        memory={
            "size": 1 << 30,
            "mergeable": False,
            "hotplug_method": "Acpi",
            "hotplug_size": None,
            "hotplugged_size": None,
            "shared": True,
            "hugepages": False,
            "hugepage_size": None,
            "prefault": False,
            "reserve": False,
            "zones": None,
            "thp": True,
        },
        rate_limit_groups=None,
        disks=[
            {
                "path": "/disk.img",
                "readonly": False,
                "direct": False,
                "iommu": False,
                "num_queues": 1,
                "queue_size": 128,
                "vhost_user": False,
                "vhost_socket": None,
                "rate_limit_group": None,
                "rate_limiter_config": None,
                "id": "_disk0",
                "disable_io_uring": False,
                "disable_aio": False,
                "pci_segment": 0,
                "serial": None,
                "queue_affinity": None,
                "backing_files": False,
                "sparse": True,
                "image_type": "Unknown",
                "lock_granularity": "ByteRange",
            }
        ],
        net=None,
        rng={"src": "/dev/urandom", "iommu": False},
        balloon=None,
        fs=None,
        pmem=None,
        serial={"file": None, "mode": "Null", "socket": None},
        console={"file": None, "mode": "Tty", "iommu": False, "socket": None},
        debug_console={"file": None, "mode": "Off", "iobase": 233},
        devices=None,
        user_devices=None,
        vdpa=None,
        vsock=None,
        pvpanic=False,
        iommu=False,
        numa=None,
        watchdog=False,
        pci_segments=None,
        platform=None,
        tpm=None,
        landlock_enable=False,
        landlock_rules=None,
    )
    assert vm["memory"]["size"] == 1 << 30


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"payload": None}, "payload: is missing"),
        ({"payload": {}}, "payload.kernel: is missing"),
        ({"payload": {"kernel": "k", "firmware": "f"}}, "payload.firmware: is not supported; give a kernel"),
        (
            {"payload": {"kernel": "k", "cmdline": "x" * 2048}},
            "payload.cmdline: has 2048 bytes; at most 2047",
        ),
        ({"cpus": {"boot_vcpus": 65}}, "cpus.boot_vcpus: 65 is out of range; write 1 to 64"),
        ({"cpus": {"boot_vcpus": 4, "max_vcpus": 2}}, "cpus.max_vcpus: 2 is less than cpus.boot_vcpus=4"),
        ({"cpus": {"features": {"amx": True}}}, "cpus.features.amx: true is not supported"),
        ({"memory": {"size": 16 << 20}}, "memory.size: 16M is out of range; write 32M to 1T"),
        ({"memory": {"size": 1 << 30, "hotplug_size": 1 << 30}}, "memory.hotplug_size: 1073741824 is not"),
        ({"disks": [{}]}, "disks[0].path: is missing"),
        ({"disks": [{"path": "a", "vhost_socket": "s"}]}, "disks[0].vhost_socket: means something with"),
        ({"disks": [{"vhost_user": True}]}, "disks[0].vhost_socket: is missing"),
        ({"disks": [{"vhost_user": True, "vhost_socket": "s", "path": "p"}]}, "exclude each other"),
        ({"disks": [{"path": "a", "num_queues": 2}]}, "disks[0].num_queues: 2 is more than the guest's 1"),
        ({"disks": [{"path": "a", "serial": "x" * 21}]}, "disks[0].serial: has 21 bytes; at most 20"),
        ({"disks": [{"path": "a", "image_type": "Vhdx"}]}, "'Vhdx' is not supported; convert it"),
        ({"disks": [{"path": str(i)} for i in range(31)]}, "disks: has 31 items; at most 30"),
        ({"disks": [{"path": str(i)} for i in range(30)]}, "there are more than 30 devices"),
        ({"net": [{"num_queues": 4}]}, "net[0].num_queues: 4 is not supported; there is one pair of queues"),
        ({"net": [{"offload_csum": False}]}, "net[0].offload_csum: false is not supported; the tap or the"),
        (
            {"rng": {"src": "/dev/hwrng"}},
            "rng.src: '/dev/hwrng' is not supported; entropy is that of the root",
        ),
        ({"balloon": {"size": 0, "id": "b"}}, "balloon.id: 'b' is not supported; the device exists once"),
        ({"net": [{"tap": "t", "vhost_user": True, "vhost_socket": "s"}]}, "net[0].tap: and a vhost-user"),
        ({"net": [{"ip": "10.0.0.1"}]}, "net[0].ip: '10.0.0.1' is not supported; give the tap its address"),
        ({"net": [{"mtu": 1279}]}, "net[0].mtu: 1279 is out of range"),
        ({"fs": [{"tag": "t"}]}, "fs[0].socket: is missing"),
        ({"fs": [{"tag": "t", "path": "p", "socket": "s"}]}, "fs[0].path: and fs[0].socket exclude"),
        ({"fs": [{"tag": "t" * 37, "path": "p"}]}, "fs[0].tag: has 37 bytes; at most 36"),
        ({"vsock": {"cid": 2}}, "vsock.cid: 2 is out of range; write 3 to 4294967294"),
        ({"vsock": {"cid": 3, "socket": "s"}}, "vsock.socket: 's' is not supported; leave it out"),
        ({"balloon": {"size": 1 << 30}}, "balloon.size: 1G is more than the guest has, 512M"),
        ({"console": {"mode": "File"}}, "console.file: is missing"),
        ({"console": {"mode": "Tty", "file": "f"}}, "console.file: means something with"),
        ({"serial": {"mode": "Socket", "socket": "s"}}, "serial.mode: 'Socket' is not supported"),
        ({"devices": [{"path": "p"}]}, "devices: is not supported"),
        ({"iommu": True}, "iommu: true is not supported; the guest has no virtual IOMMU"),
        ({"disks": [{"path": "a", "id": "x"}], "net": [{"id": "x"}]}, "net[0].id: 'x' is that of disks[0]"),
    ],
)
def test_vm_wrong_configuration_names_field_and_fault(fields: dict[str, Any], message: str) -> None:
    assert message in complaint(**fields)


def test_vm_identifier_given_twice_is_a_conflict() -> None:
    with pytest.raises(ConfigError) as caught:
        checked(disks=[{"path": "a", "id": "x"}, {"path": "b", "id": "x"}])
    assert caught.value.conflict


def test_name_devices_leaves_names_and_avoids_them() -> None:
    vm = checked(
        disks=[{"path": "a"}, {"path": "b", "id": "_disk0"}, {"path": "c"}],
        net=[{"id": "_vsock0"}],
        vsock={"cid": 3},
    )
    config.name_devices(vm)
    assert [disk["id"] for disk in vm["disks"]] == ["_disk1", "_disk0", "_disk2"]
    assert (vm["net"][0]["id"], vm["vsock"]["id"]) == ("_vsock0", "_vsock1")
    assert (vm["rng"]["id"], vm["console"]["id"]) == ("__rng", "__console")
    assert config.VM.check(vm) == vm
