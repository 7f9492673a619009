# SPDX-License-Identifier: Apache-2.0
"""Reads the machine's apt sources and derives the same mirror's other suites from them.

Both formats of sources.list(5) are understood. Only the distribution's own entries count: what apt's index targets
call `Debian` or `Ubuntu` by their Origin, or, before the first `apt-get update`, an entry whose suite is the
distribution's.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_POCKETS = ("-security", "-updates", "-backports", "-backports-sloppy", "-proposed")
_DEBIAN_SUITES = frozenset(
    {"oldoldstable", "oldstable", "stable", "testing", "unstable", "sid", "experimental"}
)
_DEBIAN_COMPONENTS = ("main",)
_UBUNTU_COMPONENTS = ("main", "universe")

#: Options of an entry that say how to reach and trust it; what narrows its use (lang, target) is left out.
_KEPT_OPTIONS = frozenset(
    {
        "signed-by",
        "trusted",
        "check-valid-until",
        "valid-until-min",
        "valid-until-max",
        "check-date",
        "date-max-future",
        "allow-insecure",
        "allow-weak",
        "allow-downgrade-to-insecure",
        "by-hash",
        "inrelease-path",
    }
)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The running system: `origin` as its Release files say it, `codename` as its suites are called."""

    origin: str
    codename: str

    @property
    def components(self) -> tuple[str, ...]:
        """The components that hold kernels."""
        return _UBUNTU_COMPONENTS if self.origin == "Ubuntu" else _DEBIAN_COMPONENTS


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of binary packages: a mirror, suites of it, components, options by their lower-case names."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)

    def with_suites(self, suites: Sequence[str], components: Sequence[str]) -> Source:
        """The same mirror with other suites."""
        return Source(self.uris, tuple(suites), tuple(components), self.options)


def distribution(os_release: str) -> Distribution | None:
    """Which distribution /etc/os-release describes; None when it is neither Debian or Ubuntu nor made from one."""
    values: dict[str, str] = {}
    for line in os_release.splitlines():
        name, equals, value = line.partition("=")
        if equals and not name.startswith("#"):
            values[name.strip()] = "".join(shlex.split(value))
    family = [values.get("ID", ""), *values.get("ID_LIKE", "").split()]
    if "UBUNTU_CODENAME" in values or "ubuntu" in family:
        return Distribution("Ubuntu", values.get("UBUNTU_CODENAME") or values.get("VERSION_CODENAME", ""))
    if "debian" in family:
        return Distribution("Debian", values.get("DEBIAN_CODENAME") or values.get("VERSION_CODENAME", ""))
    return None


def parse_sources(text: str, *, deb822: bool) -> list[Source]:
    """The enabled `deb` entries of one file. Lines that cannot be understood are left out."""
    return _parse_deb822(text) if deb822 else _parse_one_line(text)


def read_sources(main_file: Path, parts_dir: Path) -> list[Source]:
    """All enabled entries of the machine, in apt's order of files."""
    found: list[Source] = []
    parts = sorted(parts_dir.iterdir()) if parts_dir.is_dir() else []
    for path in [main_file, *parts]:
        if path != main_file and path.suffix not in (".list", ".sources"):
            continue
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        found += parse_sources(text, deb822=path.suffix == ".sources")
    return found


def own_sources(
    sources: Iterable[Source], system: Distribution, targets: Iterable[tuple[str, str, str]]
) -> list[Source]:
    """The entries that are the distribution's.

    `targets` are (origin, repository URI, release) of apt's index targets; the origin is empty where no Release
    file has been fetched yet.
    """
    origin_of = {(uri.rstrip("/"), release.rstrip("/")): origin for origin, uri, release in targets}

    def is_own(source: Source) -> bool:
        origins = {
            origin_of.get((uri.rstrip("/"), suite.rstrip("/")), "")
            for uri in source.uris
            for suite in source.suites
        } - {""}
        if origins:
            return system.origin in origins
        return any(_is_suite_of(suite, system) for suite in source.suites) and any(
            component in system.components for component in source.components
        )

    return [source for source in sources if is_own(source)]


def other_suites(sources: Iterable[Source], system: Distribution, suites: Sequence[str]) -> list[Source]:
    """One entry per mirror for `suites`; mirrors that hold only security updates are left out."""
    derived: dict[tuple[str, ...], Source] = {}
    for source in sources:
        if all(suite.split("/")[0].endswith("-security") for suite in source.suites):
            continue
        components = [name for name in system.components if name in source.components] or system.components[
            :1
        ]
        derived.setdefault(source.uris, source.with_suites(suites, components))
    return list(derived.values())


def newest_first(system: Distribution, series: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Suites to look through for the newest kernel; a later round counts only if the earlier ones gave nothing.

    Debian: experimental and sid together hold the newest of everything, testing and stable never more. `series`
    are the codenames of Ubuntu's releases, oldest first.
    """
    own = system.codename
    if system.origin == "Debian":
        return [("experimental", "sid"), ("testing", *_debian_own(own), "stable", "stable-backports")]
    return [("devel",), tuple(reversed(_ubuntu_later(own, series))), _ubuntu_own(own)]


def nearest_first(system: Distribution, series: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Suites to look through for a kernel of the distribution's own, those of the running release first."""
    own = system.codename
    if system.origin == "Debian":
        return [_debian_own(own), ("stable",), ("stable-backports",), ("testing", "sid")]
    return [_ubuntu_own(own), _ubuntu_later(own, series), ("devel",)]


def complete_sets(system: Distribution, series: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Sets of suites, each of which holds all that its packages need; those of the running release first."""
    own = system.codename
    if system.origin == "Debian":
        return [
            _debian_own(own),
            ("stable", "stable-updates", "stable-backports"),
            ("testing",),
            ("sid",),
        ]
    later = [(name, f"{name}-updates") for name in series[series.index(own) + 1 :]] if own in series else []
    return [_ubuntu_own(own), *later, ("devel",)]


def _debian_own(codename: str) -> tuple[str, ...]:
    return (codename, f"{codename}-updates", f"{codename}-backports") if codename else ()


def _ubuntu_own(codename: str) -> tuple[str, ...]:
    return tuple(f"{codename}{pocket}" for pocket in ("", "-updates", "-security")) if codename else ()


def _ubuntu_later(codename: str, series: Sequence[str]) -> tuple[str, ...]:
    later = series[series.index(codename) + 1 :] if codename in series else series
    return tuple(suite for name in later for suite in (name, f"{name}-updates"))


def ubuntu_series(table: str) -> list[str]:
    """The codenames in /usr/share/distro-info/ubuntu.csv, oldest first."""
    return [row["series"] for row in csv.DictReader(table.splitlines()) if row.get("series")]


def to_deb822(sources: Iterable[Source], architecture: str) -> str:
    """The text of a `.sources` file."""
    stanzas = []
    for source in sources:
        lines = [
            "Types: deb",
            f"URIs: {' '.join(source.uris)}",
            f"Suites: {' '.join(source.suites)}",
            f"Components: {' '.join(source.components)}",
            f"Architectures: {architecture}",
        ]
        lines += [f"{name.title()}: {value}" for name, value in source.options.items()]
        stanzas.append("\n".join(lines) + "\n")
    return "\n".join(stanzas)


def _is_suite_of(suite: str, system: Distribution) -> bool:
    name = suite.split("/")[0]
    for pocket in _POCKETS:
        name = name.removesuffix(pocket)
    if name == system.codename:
        return bool(name)
    return name in _DEBIAN_SUITES if system.origin == "Debian" else name == "devel"


def _parse_one_line(text: str) -> list[Source]:
    found = []
    for line in text.splitlines():
        words = line.split("#", 1)[0].strip()
        kind, _, rest = words.partition(" ")
        rest = rest.strip()
        if kind != "deb" or not rest:
            continue
        options: dict[str, str] = {}
        if rest.startswith("["):
            inside, closing, rest = rest[1:].partition("]")
            if not closing:
                continue
            for option in inside.split():
                name, equals, value = option.partition("=")
                if equals:
                    options[name.rstrip("+-").lower()] = value.replace(",", " ")
        fields = rest.split()
        if len(fields) >= 3:
            found.append(_source((fields[0],), (fields[1],), tuple(fields[2:]), options))
    return found


def _parse_deb822(text: str) -> list[Source]:
    found = []
    for stanza in _stanzas(text):
        kinds = stanza.get("types", "").split()
        uris, suites = stanza.get("uris", "").split(), stanza.get("suites", "").split()
        components = stanza.get("components", "").split()
        if "deb" not in kinds or not (uris and suites and components):
            continue
        if stanza.get("enabled", "yes").lower() in {"no", "false", "0", "off", "without", "disable"}:
            continue
        found.append(_source(tuple(uris), tuple(suites), tuple(components), stanza))
    return found


def _source(
    uris: tuple[str, ...], suites: tuple[str, ...], components: tuple[str, ...], options: dict[str, str]
) -> Source:
    return Source(
        uris, suites, components, {name: options[name] for name in options if name in _KEPT_OPTIONS}
    )


def _stanzas(text: str) -> list[dict[str, str]]:
    stanzas: list[dict[str, str]] = []
    current: dict[str, str] = {}
    name = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if current:
                stanzas.append(current)
            current, name = {}, ""
        elif line[0] in " \t":
            if name:
                current[name] += "\n" + line  # a key inside Signed-By goes on over lines; kept as it is
        else:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            current[name] = value.strip()
    return stanzas
