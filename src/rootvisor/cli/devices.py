# SPDX-License-Identifier: Apache-2.0
"""`rootvisor devices`: the PCI devices of this machine, and which of them the root partition can be given."""

from __future__ import annotations

from typing import Any

import click

from rootvisor.cli.errors import OWN_FAILURE
from rootvisor.cli.help import DocumentedCommand, debug_option, json_option, option
from rootvisor.cli.output import mark, print_json, table
from rootvisor.cli.pci_names import PciNames
from rootvisor.vfio.host_device import HostDevice, all_devices, obstacle

_EXAMPLES = (
    ("What can be given to the root partition, and what stands in the way", "rootvisor devices"),
    ("Bridges too", "rootvisor devices --all"),
    (
        "Addresses that run --device takes as they are",
        "rootvisor devices --json | jq -r '.devices[] | select(.available) | .address'",
    ),
    ("A device of the machine in the root partition", "rootvisor run --device pci:0000:03:00.0 -- lspci"),
    (
        "The same without any: the appliance emulates one",
        "rootvisor run --engine appliance --device emulated:nic -- ip link",
    ),
)
_STATUSES = (("0", "the list was made"), (str(OWN_FAILURE), "this machine has no PCI devices"))


@click.command(cls=DocumentedCommand, examples=_EXAMPLES, statuses=_STATUSES)
@option("--all", "bridges", is_flag=True, help="Show bridges too.")
@json_option
@debug_option
def devices(bridges: bool, as_json: bool) -> int:
    """List the PCI devices that the root partition can be given, and what stands in the way of the others.

    A device is given with all its IOMMU group, through VFIO: run --device pci:ADDRESS binds it to vfio-pci,
    and brings it back to its driver when the run ends.
    """
    names = PciNames()
    found = [describe(one, names) for one in all_devices() if bridges or not one.is_bridge]
    if as_json:
        print_json({"devices": found})
    elif not found:
        click.echo("This machine has no PCI devices.")
    else:
        show(found)
    return 0 if found else OWN_FAILURE


def describe(device: HostDevice, names: PciNames) -> dict[str, Any]:
    """A device as JSON-able data."""
    problem = obstacle(device)
    return {
        "address": device.address,
        "ids": f"{device.vendor:04x}:{device.device:04x}",
        "class": names.class_name(device.class_code),
        "name": names.device_name(device.vendor, device.device),
        "driver": device.driver or None,
        "group": device.group,
        "group_members": [one.address for one in device.members() if one.address != device.address],
        "available": problem is None,
        "obstacle": None if problem is None else problem.what,
        "mend": None if problem is None else problem.mend,
    }


def show(found: list[dict[str, Any]]) -> None:
    """The list for people: a line each, and below it what stands in the way."""
    rows = [
        (
            one["address"],
            one["ids"],
            one["driver"] or "-",
            "-" if one["group"] is None else f"group {one['group']}",
            f"{one['class']}: {one['name']}" if one["name"] else one["class"],
        )
        for one in found
    ]
    for one, line in zip(found, table(rows).splitlines(), strict=True):
        click.echo(f"{mark('ok' if one['available'] else 'warning')} {line}")
        if not one["available"]:
            click.echo(f"    {one['obstacle']}")
            click.echo(f"    {click.style('->', bold=True)} {one['mend']}")
    available = sum(one["available"] for one in found)
    click.echo()
    if available:
        first = next(one["address"] for one in found if one["available"])
        click.echo(
            f"{available} of {len(found)} can be given. Try: rootvisor run --device pci:{first} -- lspci"
        )
    else:
        click.echo(
            "None can be given. Try: rootvisor run --engine appliance --device emulated:nic -- ip link"
        )
