# SPDX-License-Identifier: Apache-2.0
"""`--device`: physical devices for the root partition, this machine's or the appliance's emulated ones."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from rootvisor.appliance.hardware import KINDS, LIMIT, EmulatedDevice, address, display_id
from rootvisor.cli.errors import UserError, usage_error
from rootvisor.vfio.errors import VfioError
from rootvisor.vfio.host_device import canonical, find, obstacle

#: Base class of display controllers (PCI Code and ID Assignment Specification, 1.4).
_DISPLAY_CLASS = 0x03


@dataclass(frozen=True, slots=True)
class Hardware:
    """What `--device` asks for, placed: addresses as the machine finds them, what the appliance has to emulate, and
    whether there is a display among them."""

    addresses: tuple[str, ...] = ()
    emulated: tuple[EmulatedDevice, ...] = ()
    display: bool = False


def parse_device(text: str) -> str:
    """A value of `--device` in its canonical spelling. Raises `ValueError`."""
    kind, _, rest = text.partition(":")
    if kind == "pci" and rest:
        try:
            return f"pci:{canonical(rest)}"
        except VfioError as error:
            raise ValueError(str(error)) from error
    if kind == "emulated" and rest:
        name, _, more = rest.partition(",")
        if name not in KINDS:
            raise ValueError(f"'{name}' is no emulated device; choose from {', '.join(KINDS)}")
        if KINDS[name].backend == "netdev":
            if more:
                _forwards(more)
            return text
        if more and not more.startswith("path="):
            raise ValueError(f"'{more}' is no setting of an emulated device; use path=FILE")
        path = more.removeprefix("path=")
        if KINDS[name].needs_path and not path:
            raise ValueError(f"emulated:{name} needs an image, for example: emulated:{name},path=disk.img")
        if path and not KINDS[name].needs_path:
            raise ValueError(f"emulated:{name} has no image: leave path= out")
        return text
    raise ValueError(f"'{text}' is no device; use pci:ADDRESS or emulated:{'|'.join(KINDS)}")


def place(values: tuple[str, ...], engine: str) -> Hardware:
    """Where the machine finds the devices. Raises `UserError` with what stands in the way."""
    if len(values) > LIMIT:
        raise usage_error(f"--device: {len(values)} devices", f"give {LIMIT} at most")
    repeated = next((value for value in values if value.startswith("pci:") and values.count(value) > 1), None)
    if repeated is not None:
        raise usage_error(f"--device {repeated} is given twice", "give it once")
    addresses: list[str] = []
    emulated: list[EmulatedDevice] = []
    display = False
    for value in values:
        kind, _, rest = value.partition(":")
        if kind == "pci":
            if engine == "appliance":
                raise UserError(
                    f"--device {value}: a device of this machine is out of the appliance's reach",
                    "use a machine with KVM, or an emulated device: --device emulated:nic",
                )
            try:
                device = find(rest)
                problem = obstacle(device)
                display = display or device.class_code >> 16 == _DISPLAY_CLASS
            except VfioError as error:
                problem = error
            if problem is not None:
                raise UserError(f"--device {value}: {problem.what}", problem.mend)
            addresses.append(rest)
            continue
        if engine != "appliance":
            raise UserError(
                f"--device {value}: only the appliance has emulated hardware", "add --engine appliance"
            )
        name, _, setting = rest.partition(",")
        addresses.append(address(len(emulated)))
        emulated.append(_emulated(value, name, setting))
    display = display or display_id(tuple(emulated)) is not None
    return Hardware(tuple(addresses), tuple(emulated), display)


def _emulated(value: str, name: str, setting: str) -> EmulatedDevice:
    if not setting:
        return EmulatedDevice(name)
    if KINDS[name].backend == "netdev":
        forwards = _forwards(setting)
        for ours, _ in forwards:
            _check_free(value, ours)
        return EmulatedDevice(name, forwards=forwards)
    return EmulatedDevice(name, _image(value, setting.removeprefix("path=")))


def _forwards(text: str) -> tuple[tuple[int, int], ...]:
    """What `forward=2222:22,...` says. Raises `ValueError`."""
    found = []
    for part in text.split(","):
        key, _, ports = part.partition("=")
        ours, _, theirs = ports.partition(":")
        if key != "forward":
            raise ValueError(f"'{part}' is no setting of a network card; use forward=2222:22")
        if not all(
            port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) <= 0xFFFF
            for port in (ours, theirs)
        ):
            raise ValueError(f"'{ports}' are no ports; write PORT-HERE:PORT-THERE, for example 2222:22")
        found.append((int(ours), int(theirs)))
    return tuple(found)


def _check_free(value: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise usage_error(f"--device {value}: port {port}: {reason}", "give another port") from error


def _image(value: str, text: str) -> str:
    path = os.path.abspath(text)
    if not os.path.isfile(path):
        what = "is no file" if os.path.exists(path) else "no such file"
        raise usage_error(
            f"--device {value}: {text}: {what}", f"give an image, for example: truncate -s 1G {text}"
        )
    if not os.access(path, os.R_OK | os.W_OK):
        raise usage_error(f"--device {value}: {text}: permission denied", "make it readable and writable")
    if os.path.getsize(path) < 1 << 20:
        raise usage_error(
            f"--device {value}: {text}: too small for a disk", f"make it larger: truncate -s 1G {text}"
        )
    return path
