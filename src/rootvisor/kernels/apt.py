# SPDX-License-Identifier: Apache-2.0
"""apt with a private state: finds and downloads packages as any user, and leaves the system's apt as it is.

Lists and locks live in the cache; proxies, credentials and keys stay the machine's (its configuration is read first,
then ours on top). Nothing is ever installed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cache import make_dir, no_space, remove_tree, storing
from .kernel import KernelError, OfflineError, Progress
from .process import CommandFailed, captured, kill_group, popen, read, run, text_of
from .sources import Distribution, Source, to_deb822
from .versions import version_key

ARCHITECTURE = "amd64"
_SYSTEM_LISTS = Path("/var/lib/apt/lists")
_POLL_S = 0.2
_NO_NETWORK = re.compile(
    r"Temporary failure resolving|Could not resolve|Could not connect|Unable to connect|Cannot initiate the connection"
    r"|Connection timed out|connection timed out|Network is unreachable|Connection failed|Connection refused"
    r"|No route to host"
)

#: A line of `apt-get --simulate install`: name and version.
_INSTALLED = re.compile(r"^Inst (\S+) .*?\(([^\s)]+)", re.MULTILINE)

_CONFIGURATION = """\
Dir::State "{root}/state/";
Dir::State::lists "{lists}/";
Dir::State::status "{root}/status";
Dir::State::extended_states "{root}/extended_states";
Dir::Cache "{root}/cache/";
Dir::Cache::archives "archives/";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Log "{root}/log/";
#clear APT::Architectures;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "root";
APT::Color "false";
Debug::NoLocking "true";
Quiet "2";
Acquire::Languages "none";
Acquire::PDiffs "false";
Acquire::GzipIndexes "true";
Acquire::Retries "2";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons-hidpi::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Acquire::IndexTargets::deb::CNF::DefaultEnabled "false";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


@dataclass(frozen=True, slots=True)
class Package:
    """A package that apt offers."""

    name: str
    version: str
    size_bytes: int
    sha256: str
    depends: str = ""

    @property
    def file_stem(self) -> str:
        """Name and version, fit for a file name."""
        return f"{self.name}_{self.version.replace(':', '%3a')}"


class Apt:
    """One private apt state under `root`.

    With `sources` it has lists of its own, fetched by `update`; without, it sees the lists that the system's last
    `apt-get update` left.
    """

    def __init__(self, root: Path, sources: Iterable[Source] | None = None) -> None:
        if shutil.which("apt-get") is None:
            raise KernelError(
                "this machine has no apt to fetch a kernel with",
                "give one with --kernel PATH, or build one with: rootvisor kernel build mshv --source DIR",
            )
        self._root = root
        lists = _SYSTEM_LISTS if sources is None else root / "state" / "lists"
        with storing():
            for folder in ("state/lists/partial", "cache/archives/partial", "sources", "log"):
                make_dir(root / folder)
            (root / "status").touch()
            text = _CONFIGURATION.format(root=root, lists=lists, architecture=ARCHITECTURE)
            if sources is not None:
                (root / "sources" / "mirror.sources").write_text(to_deb822(sources, ARCHITECTURE))
                text += f'Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "{root}/sources/";\n'
            self._conf = root / "apt.conf"
            self._conf.write_text(text)

    def update(self, progress: Progress, stage: str) -> None:
        """Fetch the lists. Suites that the mirror does not have are no error; raises `OfflineError` if none is."""
        progress(stage, 0, None)
        try:
            output = run([*self._apt_get(), "-q", "update"])
        except CommandFailed as error:
            output = error.output
        self._raise_disk_full(output)
        if not any((self._root / "state" / "lists").glob("*_Packages*")):
            raise _fetch_error("the package lists", output)

    def targets(self) -> list[tuple[str, str, str]]:
        """(origin, repository URI, release) of every index; the origin is empty before its Release file is there."""
        rows = self._read(["apt-get", "indextargets", "--format", "$(ORIGIN)|$(REPO_URI)|$(RELEASE)"])
        found = set()
        for line in rows.splitlines():
            fields = line.split("|")
            if len(fields) == 3:
                # apt leaves a name that it has no value for as it stands
                found.add(("" if fields[0].startswith("$(") else fields[0], fields[1], fields[2]))
        return sorted(found)

    def newest(self, pattern: str, prefix: str) -> list[Package]:
        """Packages whose whole name matches `pattern` and starts with `prefix`, newest version first."""
        matches = re.compile(pattern)
        names = sorted(
            name for name in self._read(["apt-cache", "pkgnames", prefix]).split() if matches.fullmatch(name)
        )
        if not names:
            return []
        try:
            text = self._read(["apt-cache", "show", "--no-all-versions", *names])
        except KernelError:
            return []  # known by name only: another package mentions it, none offers it
        packages = parse_packages(text)
        return sorted(packages, key=lambda package: version_key(package.version), reverse=True)

    def versions(self, name: str) -> list[tuple[str, str]]:
        """(version, suite) of every version of a package that is offered, in apt's order; empty for an unknown name."""
        found = []
        for line in self._read(["apt-cache", "madison", name]).splitlines():
            fields = [field.strip() for field in line.split("|")]
            words = fields[2].split() if len(fields) == 3 else []
            if len(words) >= 2 and words[-1] == "Packages":
                found.append((fields[1], words[1].split("/")[0]))
        return found

    def closure(self, name: str, version: str, suite: str) -> list[Package]:
        """A package and all that it needs, as for a system without any package; `suite` goes before others.

        Raises `KernelError` where something that it needs is not offered.
        """
        wanted = f"{name}={version}"
        options = ["--simulate", "--no-install-recommends", f"--target-release={suite}"]
        text = self._read(["apt-get", *options, "install", wanted])
        chosen = [f"{found[1]}={found[2]}" for found in _INSTALLED.finditer(text)]
        return parse_packages(self._read(["apt-cache", "show", *chosen]))

    def download_all(
        self, packages: Sequence[Package], folder: Path, progress: Progress, stage: str
    ) -> list[Path]:
        """Fetch packages into `folder`, those that are not there yet, with one call of apt; checks sizes and hashes."""
        total = sum(package.size_bytes for package in packages)
        targets = {package: folder / f"{package.file_stem}.deb" for package in packages}
        missing = [package for package in packages if not has_content(targets[package], package)]
        if not missing:
            return list(targets.values())
        partial = make_dir(folder / ".partial")
        stage = f"{stage} ({total / 1e6:.0f} MB)"
        progress(stage, 0, total)
        output = self._download_into(partial, missing, stage, progress)
        by_size: dict[int, list[Path]] = {}
        for file in partial.glob("*.deb"):
            by_size.setdefault(_size(file), []).append(file)
        with storing():
            for package in missing:
                # apt's file names escape other characters than ours: the content says which package a file is
                for file in by_size.get(package.size_bytes, []):
                    if has_content(file, package):
                        file.rename(targets[package])
                        break
                else:
                    self._raise_disk_full(output)
                    raise _fetch_error(package.name, output)
        remove_tree(partial)
        return list(targets.values())

    def download(self, package: Package, folder: Path, progress: Progress) -> Path:
        """Fetch a package into `folder`; goes on where an interrupted download stopped, checks size and hash."""
        target = folder / f"{package.file_stem}_{ARCHITECTURE}.deb"
        if target.exists() and has_content(target, package):
            return target
        stage = f"downloading {package.name} ({package.size_bytes / 1e6:.0f} MB)"
        partial = make_dir(folder / f".{package.file_stem}.partial")
        progress(stage, 0, package.size_bytes)
        output = self._download_into(partial, [package], stage, progress)
        with storing():
            for file in partial.glob("*.deb"):
                if has_content(file, package):
                    file.rename(target)
                    partial.rmdir()
                    return target
        self._raise_disk_full(output)
        raise _fetch_error(package.name, output)

    def _download_into(
        self, partial: Path, packages: Sequence[Package], stage: str, progress: Progress
    ) -> str:
        total = sum(package.size_bytes for package in packages)
        wanted = [f"{package.name}={package.version}" for package in packages]
        with captured() as messages:
            process = popen(
                [*self._apt_get(), "-q", "download", *wanted],
                cwd=partial,
                stdout=messages.fileno(),
            )
            try:
                while process.poll() is None:
                    progress(stage, min(sum(_size(file) for file in partial.iterdir()), total), total)
                    _wait(process)
            finally:
                kill_group(process)
            return text_of(messages)

    def _apt_get(self) -> list[str]:
        return ["apt-get", "-c", str(self._conf)]

    def _read(self, argv: Sequence[str]) -> str:
        try:
            return read([argv[0], "-c", str(self._conf), *argv[1:]])
        except CommandFailed as error:
            reason = _first_message(error.output) or f"status {error.status}"
            raise KernelError(
                f"{argv[0]} {argv[1]} failed: {reason}", "run apt-get update and try again"
            ) from error

    def _raise_disk_full(self, output: str) -> None:
        if "No space left on device" in output:
            raise no_space()


def parse_packages(text: str) -> list[Package]:
    """The stanzas of `apt-cache show`; what cannot be downloaded (no file, no hash) is left out."""
    packages = []
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in stanza.splitlines():
            name, colon, value = line.partition(": ")
            if colon and name and not name[0].isspace():
                fields.setdefault(name, value.strip())
        if {"Package", "Version", "Filename", "SHA256"} <= fields.keys() and fields.get("Size", "").isdigit():
            packages.append(
                Package(
                    fields["Package"],
                    fields["Version"],
                    int(fields["Size"]),
                    fields["SHA256"],
                    fields.get("Depends", ""),
                )
            )
    return packages


def system_distribution() -> Distribution:
    """The distribution that runs here. Raises `KernelError` for one that this package knows nothing of."""
    from .sources import distribution

    try:
        found = distribution(Path("/etc/os-release").read_text())
    except OSError:
        found = None
    if found is None:
        raise KernelError(
            "this is neither Debian nor Ubuntu, so there is no package to take a kernel from",
            "give one with --kernel PATH, or build one with: rootvisor kernel build mshv --source DIR",
        )
    return found


def has_content(path: Path, package: Package) -> bool:
    """Whether a file is the package, by its size and SHA-256."""
    try:
        if path.stat().st_size != package.size_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256
    except OSError:
        return False


def _fetch_error(what: str, output: str) -> KernelError:
    reason = next((line.strip() for line in output.splitlines() if _NO_NETWORK.search(line)), "")
    if reason:
        reason = re.sub(r"^[EW]: Failed to fetch \S+\s+", "", reason)
        return OfflineError(
            f"cannot fetch {what}: {reason}",
            "connect this machine to the network, or see: rootvisor kernel list",
        )
    message = _first_message(output) or "apt-get gave no reason"
    return KernelError(f"cannot fetch {what}: {message}", "see what is wrong with: apt-get update")


def _first_message(output: str) -> str:
    for mark in ("E: ", "Err:", "W: "):
        for line in output.splitlines():
            if line.startswith(mark):
                return line.removeprefix("E: ").removeprefix("W: ").strip()
    return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        pass
