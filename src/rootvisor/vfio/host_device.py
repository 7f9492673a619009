# SPDX-License-Identifier: Apache-2.0
"""PCI functions of the host in sysfs: what they are, who uses them, and what stands in the way of giving one away."""

from __future__ import annotations

import os
import stat

from .errors import VfioError

VFIO_DRIVER = "vfio-pci"
_DEVICES = "/sys/bus/pci/devices"
_HEADER_TYPE = 0x0E
_DEFAULT_IPV4 = "00000000"
_ROUTE_UP = 1


class HostDevice:
    """One function of ``/sys/bus/pci/devices``, read when made. ``folder`` exists; see :func:`find`."""

    __slots__ = ("address", "class_code", "device", "driver", "folder", "group", "header", "vendor")

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.address = os.path.basename(folder)
        self.vendor = self._number("vendor")
        self.device = self._number("device")
        self.class_code = self._number("class")
        self.driver = self._link("driver")
        group = self._link("iommu_group")
        self.group = int(group) if group.isdigit() else None
        self.header = 0
        try:
            with open(f"{folder}/config", "rb") as file:
                self.header = file.read(_HEADER_TYPE + 1)[_HEADER_TYPE] & 0x7F
        except (OSError, IndexError):
            pass

    @property
    def is_bridge(self) -> bool:
        """Whether it is no endpoint: bridges cannot be given away, and do not hinder others of their group."""
        return self.header != 0 or self.class_code >> 16 == 0x06

    def members(self) -> list[HostDevice]:
        """The devices of its IOMMU group, itself among them."""
        if self.group is None:
            return [self]
        folder = f"{self.folder}/iommu_group/devices"
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            return [self]
        return [HostDevice(os.path.join(os.path.dirname(self.folder), name)) for name in names]

    def _number(self, name: str) -> int:
        try:
            with open(f"{self.folder}/{name}", encoding="ascii") as file:
                return int(file.read(), 16)
        except (OSError, ValueError):
            return 0

    def _link(self, name: str) -> str:
        try:
            return os.path.basename(os.readlink(f"{self.folder}/{name}"))
        except OSError:
            return ""


def all_devices(folder: str = _DEVICES) -> list[HostDevice]:
    """Every PCI function of this machine, by address."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [HostDevice(os.path.join(folder, name)) for name in names]


def canonical(text: str) -> str:
    """The address in sysfs's form, ``0000:00:1f.2``; the domain may be left out. Raises :class:`VfioError`."""
    parts = text.lower().replace(".", ":").split(":")
    if len(parts) == 3:
        parts.insert(0, "0000")
    try:
        if (
            len(parts) != 4
            or text.count(".") != 1
            or any(not part or part.strip("0123456789abcdef") for part in parts)
        ):
            raise ValueError
        domain, bus, device, function = (int(part, 16) for part in parts)
        if domain > 0xFFFFFFFF or bus > 0xFF or device > 0x1F or function > 7:
            raise ValueError
    except ValueError as error:
        raise VfioError(
            f"'{text}' is no PCI address", "write it as [0000:]00:1f.2; see: rootvisor devices"
        ) from error
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function}"


def find(address: str, folder: str = _DEVICES) -> HostDevice:
    """The device at a canonical address. Raises :class:`VfioError`."""
    path = os.path.join(folder, address)
    if not os.path.isdir(path):
        raise VfioError(f"this machine has no PCI device {address}", "see what there is: rootvisor devices")
    return HostDevice(path)


def obstacle(device: HostDevice, proc: str = "/proc", dev: str = "/dev/vfio") -> VfioError | None:
    """What stands in the way of giving the device to a partition, most fundamental first; None when nothing does."""
    address = device.address
    if device.is_bridge:
        return VfioError(f"{address} is a bridge", "give a device behind it")
    if device.group is None:
        return VfioError(
            f"{address} is in no IOMMU group: this machine's IOMMU is off or missing",
            "switch VT-d or AMD-Vi on in the firmware, and boot with intel_iommu=on or amd_iommu=on",
        )
    for user in _users(device, proc):
        return VfioError(f"{address} is in use: {user}", "give another device")
    others = [
        one
        for one in device.members()
        if one.address != address and not one.is_bridge and one.driver not in ("", VFIO_DRIVER)
    ]
    if others:
        names = ", ".join(f"{one.address} ({one.driver})" for one in others)
        return VfioError(
            f"{address} shares IOMMU group {device.group} with {names}",
            "take their drivers away first: "
            + "; ".join(f"echo {one.address} >{one.folder}/driver/unbind" for one in others),
        )
    if not os.path.isdir(dev) or not os.path.exists(f"{dev}/vfio"):
        return VfioError("the kernel's VFIO is not loaded", "modprobe vfio-pci")
    if device.driver != VFIO_DRIVER and not os.access(f"{device.folder}/driver_override", os.W_OK):
        has = f"has the driver {device.driver}" if device.driver else "has no driver"
        return VfioError(
            f"{address} {has}, and you may not change that",
            f"run as root, or have root bind it: echo {VFIO_DRIVER} >{device.folder}/driver_override; "
            + (f"echo {address} >{device.folder}/driver/unbind; " if device.driver else "")
            + f"echo {address} >/sys/bus/pci/drivers_probe",
        )
    node = f"{dev}/{device.group}"
    if device.driver == VFIO_DRIVER and os.path.exists(node) and not os.access(node, os.R_OK | os.W_OK):
        return VfioError(f"{node}: permission denied", f"run as root, or: chown $USER {node}")
    return None


def _users(device: HostDevice, proc: str) -> list[str]:
    """Mounted file systems, swap and the default route that hang on the device."""
    found = []
    numbers = _block_numbers(device.folder)
    if numbers:
        try:
            with open(f"{proc}/self/mountinfo", encoding="utf-8", errors="replace") as file:
                for line in file:
                    fields = line.split()
                    if len(fields) > 4 and fields[2] in numbers:
                        found.append(f"{numbers[fields[2]]} is mounted at {fields[4]}")
        except OSError:
            pass
        try:
            with open(f"{proc}/swaps", encoding="utf-8", errors="replace") as file:
                for line in list(file)[1:]:
                    path = line.split()[0]
                    if _number_of(path) in numbers:
                        found.append(f"{path} is swap space")
        except OSError:
            pass
    routes = _default_routes(proc)
    try:
        interfaces = os.listdir(f"{device.folder}/net")
    except OSError:
        interfaces = []
    found += [f"{name} carries the default route" for name in interfaces if name in routes]
    return found


def _block_numbers(folder: str) -> dict[str, str]:
    """``major:minor`` and name of the disks below a device, of their partitions, and of what is built on those."""
    numbers: dict[str, str] = {}
    waiting = []
    controllers = []
    for path, _names, _files in os.walk(folder):  # links are not followed: only what is the device's own
        kind = _class_of(path)
        if kind == "block":
            waiting.append(path)
        elif kind == "nvme":
            controllers.append(os.path.basename(path))
    waiting += _shared_namespaces(folder, controllers)
    while waiting:
        disk = waiting.pop()
        try:
            with open(f"{disk}/dev", encoding="ascii") as file:
                number = file.read().strip()
            entries = os.listdir(disk)
        except OSError:
            continue
        if number in numbers:
            continue
        numbers[number] = os.path.basename(disk)
        waiting += [os.path.join(disk, name) for name in entries if name.startswith(os.path.basename(disk))]
        holders = f"{disk}/holders"
        if os.path.isdir(holders):
            waiting += [os.path.join(holders, name) for name in os.listdir(holders)]
    return numbers


def _class_of(path: str) -> str:
    try:
        return os.path.basename(os.readlink(f"{path}/subsystem"))
    except OSError:
        return ""


def _shared_namespaces(folder: str, controllers: list[str]) -> list[str]:
    """Disks of NVMe subsystems to which these controllers lead: with multipath they are no children of the device."""
    subsystems = os.path.normpath(f"{folder}/../../../../class/nvme-subsystem")
    found = []
    try:
        for subsystem in os.listdir(subsystems):
            path = f"{subsystems}/{subsystem}"
            names = os.listdir(path)
            if any(name in names for name in controllers):
                found += [f"{path}/{name}" for name in names if _class_of(f"{path}/{name}") == "block"]
    except OSError:
        pass
    return found


def _number_of(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return ""
    if not stat.S_ISBLK(status.st_mode):
        return ""
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def _default_routes(proc: str) -> set[str]:
    """Interfaces that a default route goes through."""
    found = set()
    try:
        with open(f"{proc}/net/route", encoding="ascii", errors="replace") as file:
            for line in list(file)[1:]:
                fields = line.split()
                if (
                    len(fields) > 7
                    and fields[1] == _DEFAULT_IPV4 == fields[7]
                    and int(fields[3], 16) & _ROUTE_UP
                ):
                    found.add(fields[0])
    except (OSError, ValueError):
        pass
    try:
        with open(f"{proc}/net/ipv6_route", encoding="ascii", errors="replace") as file:
            for line in file:
                fields = line.split()
                if len(fields) > 9 and fields[1] == "00" and not fields[0].strip("0") and fields[9] != "lo":
                    found.add(fields[9])
    except OSError:
        pass
    return found
