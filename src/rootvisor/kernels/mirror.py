# SPDX-License-Identifier: Apache-2.0
"""The machine's package mirror, seen with its configured suites or with all the others that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from .apt import Apt, Package, system_distribution
from .cache import kernels_dir, locked
from .kernel import KernelError, OfflineError, Progress
from .sources import (
    Distribution,
    Source,
    other_suites,
    own_sources,
    read_sources,
    suite_rounds,
    ubuntu_series,
)

_SOURCES_FILE = Path("/etc/apt/sources.list")
_SOURCES_PARTS = Path("/etc/apt/sources.list.d")
_UBUNTU_TABLE = Path("/usr/share/distro-info/ubuntu.csv")

Choose = Callable[[Apt], list[Package]]


def system_view() -> Apt:
    """apt with the lists of the system's last `apt-get update`."""
    return Apt(kernels_dir() / "apt" / "system")


def find_configured(choose: Choose, progress: Progress, refresh: bool) -> tuple[Apt, list[Package]]:
    """What `choose` finds in the system's lists, else in freshly fetched lists of the configured suites."""
    if not refresh:
        apt = system_view()
        packages = choose(apt)
        if packages:
            return apt, packages
    apt = fresh_configured(progress)
    return apt, choose(apt)


def fresh_configured(progress: Progress) -> Apt:
    """apt with lists, fetched now, of the suites that the machine is configured for."""
    apt = Apt(
        kernels_dir() / "apt" / "configured", distribution_sources(system_view(), system_distribution())
    )
    with locked("apt", progress, "fetching package lists"):
        apt.update(progress, "fetching package lists")
    return apt


def find_anywhere(choose: Choose, progress: Progress) -> tuple[Apt, list[Package]]:
    """What `choose` finds in any suite of the mirror; the newest suites are looked at first.

    Raises `OfflineError` if no suite could be reached, `KernelError` if there is no mirror to ask.
    """
    system = system_distribution()
    entries = distribution_sources(system_view(), system)
    offline: OfflineError | None = None
    last: tuple[Apt, list[Package]] | None = None
    for number, suites in enumerate(_rounds(system)):
        apt = Apt(kernels_dir() / "apt" / f"round{number}", other_suites(entries, system, suites))
        with locked("apt", progress, "fetching package lists"):
            try:
                apt.update(progress, f"looking for kernel sources in {', '.join(suites)}")
            except OfflineError as error:
                offline = error
                continue
            except KernelError:
                continue  # the mirror has none of these suites
            packages = choose(apt)
        last = apt, packages
        if packages:
            return last
    if last is not None:
        return last
    raise offline or KernelError(
        f"the package mirror has no further suites of {system.origin}",
        "build from a tree of your own with: rootvisor kernel build mshv --source DIR",
    )


def distribution_sources(apt: Apt, system: Distribution) -> list[Source]:
    """The distribution's own entries in the apt configuration. Raises `KernelError` if there is none."""
    entries = own_sources(read_sources(_SOURCES_FILE, _SOURCES_PARTS), system, apt.targets())
    if not entries:
        raise KernelError(
            f"the apt configuration names no mirror of {system.origin}",
            "add one to /etc/apt/sources.list.d and run apt-get update",
        )
    return entries


def _rounds(system: Distribution) -> Iterator[tuple[str, ...]]:
    try:
        series = ubuntu_series(_UBUNTU_TABLE.read_text()) if system.origin == "Ubuntu" else []
    except OSError:
        series = []
    return (suites for suites in suite_rounds(system, series) if suites)
