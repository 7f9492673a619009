# SPDX-License-Identifier: Apache-2.0
"""`--device`: physical devices for the root partition, this machine's or the appliance's emulated ones."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rootvisor.appliance.hardware import KINDS, LIMIT, EmulatedDevice, address
from rootvisor.cli.errors import UserError, usage_error
from rootvisor.vfio.errors import VfioError
from rootvisor.vfio.host_device import canonical, find, obstacle


@dataclass(frozen=True, slots=True)
class Hardware:
    """What `--device` asks for, placed: addresses as the machine finds them, and what the appliance has to emulate."""

    addresses: tuple[str, ...] = ()
    emulated: tuple[EmulatedDevice, ...] = ()


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
    for value in values:
        kind, _, rest = value.partition(":")
        if kind == "pci":
            if engine == "appliance":
                raise UserError(
                    f"--device {value}: a device of this machine is out of the appliance's reach",
                    "use a machine with KVM, or an emulated device: --device emulated:nic",
                )
            try:
                problem = obstacle(find(rest))
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
        path = setting.removeprefix("path=") or None
        addresses.append(address(len(emulated)))
        emulated.append(EmulatedDevice(name, None if path is None else _image(value, path)))
    return Hardware(tuple(addresses), tuple(emulated))


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
