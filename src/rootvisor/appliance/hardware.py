# SPDX-License-Identifier: Apache-2.0
"""Emulated physical hardware in the appliance: an IOMMU, and PCI devices behind it that somebody inside may take.

What a machine of metal has in its slots, QEMU has as a model: for tests, and for trying direct hardware without any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: The modules that hand devices out, and what the kernel has to be told for it.
MODULES = ("vfio_iommu_type1", "vfio-pci")
KERNEL_ARGS = ("intel_iommu=on",)
#: The program inside asks here for a picture of the display: a line "picture", answered by "done" or "error WORDS".
SCREEN_PORT = "rootvisor.screen"
#: The first device number on bus 0 that QEMU's own devices leave free.
_FIRST_DEVICE = 0x10
LIMIT = 15


@dataclass(frozen=True, slots=True)
class Kind:
    """A model: its name for QEMU's ``-device``, what is behind it, and whether it needs an image file."""

    model: str
    backend: str = ""
    needs_path: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "nvme": Kind("nvme", "drive", needs_path=True),
    "nic": Kind("e1000e", "netdev"),
    "display": Kind("bochs-display"),
    "dma": Kind(
        "edu", settings={"dma_mask": "0xffffffffffffffff"}
    ),  # QEMU\'s teaching device, whose DMA a program aims
}


@dataclass(frozen=True, slots=True)
class EmulatedDevice:
    """One of :data:`KINDS`; ``path`` is its image file. ``forwards``: (TCP port of this machine's 127.0.0.1, port of
    the partition behind the network card)."""

    kind: str
    path: str | None = None
    forwards: tuple[tuple[int, int], ...] = ()


def display_id(devices: tuple[EmulatedDevice, ...]) -> str | None:
    """QEMU's name of the first display, if there is one."""
    return next((f"hardware{number}" for number, one in enumerate(devices) if one.kind == "display"), None)


def address(number: int) -> str:
    """Where device ``number`` (from 0) is found inside the appliance, as sysfs writes it."""
    return f"0000:00:{_FIRST_DEVICE + number:02x}.0"


def for_request(devices: tuple[EmulatedDevice, ...]) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """``qemu_args``, ``kernel_args`` and ``modules`` of a :class:`Request` for an appliance with these devices."""
    return (qemu_arguments(devices), KERNEL_ARGS, MODULES) if devices else ([], (), ())


def qemu_arguments(devices: tuple[EmulatedDevice, ...]) -> list[str]:
    """The words for QEMU's command line."""
    arguments = ["-device", "intel-iommu"]
    for number, device in enumerate(devices):
        kind = KINDS[device.kind]
        words = [kind.model, f"id=hardware{number}", f"addr={_FIRST_DEVICE + number:#x}", "bus=pcie.0"]
        if kind.backend == "drive":
            path = (device.path or "").replace(",", ",,")
            arguments += ["-drive", f"if=none,id=backend{number},file={path},format=raw,discard=unmap"]
            words += [f"drive=backend{number}", f"serial=rootvisor{number}"]
        elif kind.backend == "netdev":
            doors = "".join(f",hostfwd=tcp:127.0.0.1:{ours}-:{theirs}" for ours, theirs in device.forwards)
            arguments += ["-netdev", f"user,id=backend{number}{doors}"]
            words.append(f"netdev=backend{number}")
        words += [f"{name}={value}" for name, value in kind.settings.items()]
        arguments += ["-device", ",".join(words)]
    return arguments
