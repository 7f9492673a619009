# SPDX-License-Identifier: Apache-2.0
"""`rootvisor kernel`: the kernels that `run` can boot by name."""

from __future__ import annotations

from typing import Any

import click

from rootvisor.cli import options as types
from rootvisor.cli.description import KernelImage
from rootvisor.cli.errors import UserError, usage_error
from rootvisor.cli.help import DocumentedCommand, DocumentedGroup, debug_option, json_option, option
from rootvisor.cli.kernel_choice import (
    NAMES,
    found_kernel,
    known_kernels,
    make_from_tree,
    make_kernel,
    prune_kernels,
)
from rootvisor.cli.output import Progress, format_bytes, print_json, table

_ABOUT = {
    "mshv": "the distribution's newest Linux source, built with /dev/mshv (CONFIG_MSHV_ROOT)",
    "stock": "the distribution's newest cloud kernel, as it is",
}


@click.group(
    cls=DocumentedGroup,
    examples=(
        ("Build the kernel with /dev/mshv now, rather than at the first run", "rootvisor kernel build mshv"),
        ("What is there", "rootvisor kernel list"),
        ("Remove those that are out of date", "rootvisor kernel prune"),
        ("Use it elsewhere", "file $(rootvisor kernel path stock)"),
    ),
)
def kernel() -> None:
    """Build, list, find and remove kernels.

    mshv is built from the newest Linux source that this machine's package mirror offers, stock is the
    distribution's newest cloud kernel. Both are kept in the cache and used from there, also without a
    network.
    """


@kernel.command(
    cls=DocumentedCommand,
    examples=(
        ("From the distribution's newest source", "rootvisor kernel build mshv"),
        (
            "From a source tree of yours, then boot it",
            "rootvisor run --kernel $(rootvisor kernel build mshv --source .)",
        ),
    ),
)
@click.argument("name", type=click.Choice(NAMES))
@option(
    "--refresh", is_flag=True, help="Ask the mirror for something newer, even if there is one in the cache."
)
@option(
    "--source",
    type=types.NameOrPath((), "DIR", kind="dir"),
    help="Build from this Linux source tree (only mshv); what was built before is not built again.",
)
@json_option
@debug_option
def build(name: str, refresh: bool, source: str | None, as_json: bool) -> None:
    """Build (mshv) or fetch (stock) a kernel into the cache, and print the path of its image."""
    if source is not None and name != "mshv":
        raise usage_error("--source is for the kernel mshv", "leave it out, or build mshv")
    with Progress() as progress:
        if source is not None:
            image = make_from_tree(source, progress)
        else:
            image = (None if refresh else found_kernel(name)) or make_kernel(name, progress, refresh)
    if as_json:
        print_json(document(image.name, image))
    else:
        click.echo(image.image)


@kernel.command("list", cls=DocumentedCommand)
@json_option
@debug_option
def list_kernels(as_json: bool) -> None:
    """List the kernels on this machine; the first of a name is the one that `run` takes."""
    found = [document(image.name, image) for image in known_kernels()]
    there = {row["name"] for row in found}
    found += [document(name, None) for name in NAMES if name not in there]
    if as_json:
        print_json({"kernels": found})
        return
    rows = [
        (row["name"], row["version"] or "-", row["image"] or f"(not here: {_ABOUT[row['name']]})")
        for row in found
    ]
    click.echo(table(rows, ("name", "version", "image")))


@kernel.command(cls=DocumentedCommand)
@click.argument("name", type=click.Choice(NAMES))
@option(
    "--elf",
    is_flag=True,
    help="The uncompressed ELF image (vmlinux), which starts faster, rather than the bzImage.",
)
@debug_option
def path(name: str, elf: bool) -> None:
    """Print the path of a kernel's image."""
    image = found_kernel(name)
    if image is None:
        raise UserError(
            f"the kernel {name} is not on this machine", f"make it with: rootvisor kernel build {name}"
        )
    if elf and image.vmlinux is None:
        raise UserError(f"the kernel {name} has no ELF image here", "leave --elf out")
    click.echo(image.vmlinux if elf else image.image)


@kernel.command(
    cls=DocumentedCommand,
    examples=(
        ("What would go", "rootvisor kernel prune --dry-run"),
        ("Make room", "rootvisor kernel prune"),
    ),
)
@option("--dry-run", is_flag=True, help="Only say what would be removed.")
@json_option
@debug_option
def prune(dry_run: bool, as_json: bool) -> None:
    """Remove kernels from the cache that neither mshv nor stock stands for any more.

    Those are older versions and builds of an older configuration. A kernel that a run is using stays, and so do those
    built from a source tree of yours. Making a newer kernel does this for its predecessors, too.
    """
    removed = prune_kernels(dry_run)
    total = sum(one.size_bytes for one in removed)
    if as_json:
        print_json(
            {
                "removed": [
                    {"name": one.name, "version": one.version, "path": str(one.path), "bytes": one.size_bytes}
                    for one in removed
                ],
                "bytes": total,
                "dry_run": dry_run,
            }
        )
        return
    if removed:
        click.echo(table([(one.name, one.version, format_bytes(one.size_bytes)) for one in removed]))
    verb = "would be freed" if dry_run else "freed"
    click.echo(f"{format_bytes(total)} {verb}" if removed else "nothing to remove")


def document(name: str, image: KernelImage | None) -> dict[str, Any]:
    """A kernel as JSON-able data; everything but the name is null when it is not here."""
    return {
        "name": name,
        "cached": image is not None,
        "version": image.version if image else None,
        "image": image.image if image else None,
        "vmlinux": image.vmlinux if image else None,
        "modules": image.modules if image else None,
    }
