# SPDX-License-Identifier: Apache-2.0
"""The machine's package mirror, seen with its configured suites or with all the others that it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .apt import Apt, Package, system_distribution
from .cache import kernels_dir, locked
from .kernel import DiskFullError, KernelError, OfflineError, Progress
from .sources import (
    Distribution,
    Source,
    complete_sets,
    nearest_first,
    newest_first,
    other_suites,
    own_sources,
    read_sources,
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
    """What `choose` finds in the system's lists, else in freshly fetched ones, else in any suite of the mirror."""
    if not refresh:
        apt = system_view()
        packages = choose(apt)
        if packages:
            return apt, packages
    apt = fresh_configured(progress)
    packages = choose(apt)
    return (apt, packages) if packages else find_nearest(choose, progress)


def fresh_configured(progress: Progress) -> Apt:
    """apt with lists, fetched now, of the suites that the machine is configured for."""
    apt = Apt(
        kernels_dir() / "apt" / "configured", distribution_sources(system_view(), system_distribution())
    )
    with locked("apt", progress, "fetching package lists"):
        apt.update(progress, "fetching package lists")
    return apt


def find_newest(choose: Choose, progress: Progress) -> tuple[Apt, list[Package]]:
    """What `choose` finds in any suite of the mirror; the suites with the newest kernels are looked at first.

    Raises `OfflineError` if the mirror cannot be reached, `KernelError` if none could be used.
    """
    return _find_in_rounds(
        "newest", newest_first(system_distribution(), _series()), choose, progress, "kernels"
    )


def find_nearest(choose: Choose, progress: Progress) -> tuple[Apt, list[Package]]:
    """What `choose` finds in any suite of the mirror; those of the running release are looked at first.

    Raises as `find_newest`.
    """
    return _find_in_rounds(
        "nearest", nearest_first(system_distribution(), _series()), choose, progress, "kernels"
    )


def find_complete(choose: Choose, progress: Progress, what: str) -> tuple[Apt, list[Package]]:
    """What `choose` finds in sets of suites that hold all that their packages need; the nearest set goes first.

    Raises as `find_newest`. `what` is looked for, in the words of the progress.
    """
    return _find_in_rounds(
        "complete", complete_sets(system_distribution(), _series()), choose, progress, what
    )


def _find_in_rounds(
    name: str, rounds: Sequence[tuple[str, ...]], choose: Choose, progress: Progress, what: str
) -> tuple[Apt, list[Package]]:
    system = system_distribution()
    entries = distribution_sources(system_view(), system)
    apt: Apt | None = None
    failures: list[KernelError] = []
    for number, suites in enumerate(filter(None, rounds)):
        apt = Apt(kernels_dir() / "apt" / f"{name}{number}", other_suites(entries, system, suites))
        with locked("apt", progress, "fetching package lists"):
            try:
                apt.update(progress, f"looking for {what} in {', '.join(suites)}")
            except (DiskFullError, OfflineError):
                raise
            except KernelError as error:
                failures.append(error)
                continue
            packages = choose(apt)
        if packages:
            return apt, packages
    if failures:
        raise failures[0]
    assert apt is not None
    return apt, []


def distribution_sources(apt: Apt, system: Distribution) -> list[Source]:
    """The distribution's own entries in the apt configuration. Raises `KernelError` if there is none."""
    entries = own_sources(read_sources(_SOURCES_FILE, _SOURCES_PARTS), system, apt.targets())
    if not entries:
        raise KernelError(
            f"the apt configuration names no mirror of {system.origin}",
            "add one to /etc/apt/sources.list.d and run apt-get update",
        )
    return entries


def _series() -> list[str]:
    try:
        return ubuntu_series(_UBUNTU_TABLE.read_text())
    except OSError:
        return []
