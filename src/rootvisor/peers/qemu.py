# SPDX-License-Identifier: Apache-2.0
"""An unmodified QEMU with `-accel mshv`: the machine's own if it is new enough, else the distribution's newest.

The packages (QEMU, firmware, every library down to the C library) are unpacked into the cache and never installed. A
script beside them runs QEMU with that C library's own loader, so that it does not matter which release runs here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rootvisor.kernels import KernelError, Progress, cache_dir, no_progress
from rootvisor.kernels.apt import Apt, Package
from rootvisor.kernels.cache import locked, make_dir, need_space, publishing, storing
from rootvisor.kernels.mirror import find_complete
from rootvisor.kernels.process import CommandFailed, run
from rootvisor.kernels.versions import version_key

from .errors import PeerError

PACKAGE = "qemu-system-x86"
PROGRAM = "qemu-system-x86_64"
MIN_VERSION = (10, 2)
"""The first release with `-accel mshv`."""
ACCELERATOR = "mshv"

_NEEDED_BYTES = 600 << 20
_RECORD = "peer.json"
_LOADER = "ld-linux-x86-64.so.2"
_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
#: Everything else of the packages is of no use to QEMU: documentation, services, other programs.
_KEPT = (
    f"usr/bin/{PROGRAM}",
    "usr/share/qemu",
    "usr/share/seabios",
    "usr/lib/ipxe",
    *_LIBRARIES,
)
_FIRMWARE = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")
_MODULES = "usr/lib/x86_64-linux-gnu/qemu"
_TIMEOUT_S = 60

_WRAPPER = """\
#!/bin/sh
# QEMU as the distribution built it, with the libraries and the firmware beside this script.
tree=${{0%/*}}/tree
export QEMU_MODULE_DIR="$tree/{modules}"
exec "$tree/{loader}" --library-path "{libraries}" --argv0 "$0" "$tree/usr/bin/{program}" {firmware} "$@"
"""


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU that can use `/dev/mshv`: `program` is what to run, `origin` says in words where it comes from."""

    version: str
    program: Path
    origin: str


def find() -> Qemu | None:
    """The newest fitting QEMU in the cache, else the installed one if it fits; None if there is none."""
    found = [qemu for folder in _folders() if (qemu := _read_record(folder)) is not None]
    if found:
        return max(found, key=lambda qemu: version_key(qemu.version))
    return _installed()


def ensure(progress: Progress = no_progress, refresh: bool = False) -> Qemu:
    """`find`, and else fetch the distribution's newest; with `refresh` the mirror is asked in any case.

    Raises :class:`PeerError`: no apt, no network, nothing fitting is offered, no space.
    """
    if not refresh:
        qemu = find()
        if qemu is not None:
            return qemu
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise PeerError(
            "this machine has no apt to fetch QEMU with",
            f"put a {PROGRAM} >= {_series(MIN_VERSION)} into PATH",
        )
    try:
        need_space(make_dir(_root()), _NEEDED_BYTES, "fetching QEMU")
        with locked("qemu", progress, "fetching QEMU"):
            return (None if refresh else find()) or _fetch(progress)
    except KernelError as error:
        raise PeerError(error.message, error.mend) from error


def accelerators(program: Path | str) -> frozenset[str]:
    """What `-accel help` of a QEMU lists; empty for a program that does not answer."""
    return frozenset(_answer(program, "-accel", "help").split())


def version_of(program: Path | str) -> str:
    """A QEMU's version, like "11.1.3"; empty for a program that does not answer."""
    found = re.search(r"version (\d+(?:\.\d+)+)", _answer(program, "--version"))
    return found[1] if found else ""


def candidates(offered: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of (version, suite) as apt lists them, those with the accelerator, the newest first."""
    fitting = [(version, suite) for version, suite in offered if _numbers(version) >= MIN_VERSION]
    return sorted(fitting, key=lambda entry: version_key(entry[0]), reverse=True)


def _fetch(progress: Progress) -> Qemu:
    chosen: list[str] = []

    def choose(apt: Apt) -> list[Package]:
        for version, suite in candidates(apt.versions(PACKAGE)):
            try:
                packages = apt.closure(PACKAGE, version, suite)
            except KernelError:
                continue  # something that it needs is not offered at the moment
            chosen[:] = [version, suite]
            return packages
        return []

    apt, packages = find_complete(choose, progress, "QEMU")
    if not packages:
        raise PeerError(
            f"no {PACKAGE} >= {_series(MIN_VERSION)} is offered here",
            f"put a {PROGRAM} >= {_series(MIN_VERSION)} with `-accel {ACCELERATOR}` into PATH",
        )
    version, suite = chosen
    target = _root() / f"qemu-{_upstream(version)}"
    downloads = make_dir(_root() / "downloads")
    files = apt.download_all(packages, downloads, progress, f"downloading QEMU {_upstream(version)}")
    progress("unpacking QEMU", 0, len(files))
    with publishing(target) as draft:
        unpacked = draft / "unpacked"
        for number, file in enumerate(files):
            _unpack(file, unpacked)
            progress("unpacking QEMU", number + 1, len(files))
        _arrange(unpacked, draft / "tree")
        shutil.rmtree(unpacked)
        _write_wrapper(draft)
        listed = accelerators(draft / PROGRAM)
        if ACCELERATOR not in listed:
            what = f"lacks the accelerator {ACCELERATOR}" if listed else "does not run here"
            raise PeerError(f"{PACKAGE} {version} {what}", f"put a {PROGRAM} with it into PATH")
        record = {"version": _upstream(version), "origin": f"{PACKAGE} {version} of {suite}"}
        (draft / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(downloads, ignore_errors=True)
    qemu = _read_record(target)
    if qemu is None:
        raise PeerError(f"{target} vanished from the cache", "try again")
    return qemu


def _unpack(package: Path, folder: Path) -> None:
    try:
        with storing():
            run(["dpkg-deb", "--extract", str(package), str(folder)])
    except CommandFailed as error:
        raise PeerError(
            f"cannot unpack {package.name}: {' '.join(error.output.split())[:200]}", "try again"
        ) from error


def _arrange(unpacked: Path, tree: Path) -> None:
    """Move what QEMU needs from the unpacked packages to the tree that stays."""
    for name in _KEPT:
        source = unpacked / name
        if source.exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            source.rename(tree / name)
    for library in _LIBRARIES:
        for entry in (tree / library).glob("*"):
            # folders of plug-ins of the libraries; QEMU's own modules stay
            if entry.is_dir() and not entry.is_symlink() and entry != tree / _MODULES:
                shutil.rmtree(entry)


def _write_wrapper(folder: Path) -> None:
    tree = folder / "tree"
    libraries = [name for name in _LIBRARIES if (tree / name).is_dir()]
    loader = next((f"{name}/{_LOADER}" for name in libraries if (tree / name / _LOADER).exists()), "")
    if not loader:
        raise PeerError(f"QEMU's packages hold no {_LOADER}", "report this as a bug of Rootvisor")
    text = _WRAPPER.format(
        loader=loader,
        libraries=":".join(f"$tree/{name}" for name in libraries),
        program=PROGRAM,
        modules=_MODULES,
        firmware=" ".join(f'-L "$tree/{name}"' for name in _FIRMWARE if (tree / name).is_dir()),
    )
    path = folder / PROGRAM
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def _installed() -> Qemu | None:
    program = shutil.which(PROGRAM)
    if program is None:
        return None
    version = version_of(program)
    if _numbers(version) < MIN_VERSION or ACCELERATOR not in accelerators(program):
        return None
    return Qemu(version, Path(program), "installed on this machine")


def _read_record(folder: Path) -> Qemu | None:
    program = folder / PROGRAM
    try:
        record = json.loads((folder / _RECORD).read_text())
        qemu = Qemu(str(record["version"]), program, str(record["origin"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return qemu if os.access(program, os.X_OK) else None


def _root() -> Path:
    return cache_dir() / "peers"


def _folders() -> list[Path]:
    try:
        return [path for path in _root().iterdir() if path.name.startswith("qemu-")]
    except OSError:
        return []


def _answer(program: Path | str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [str(program), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def _upstream(version: str) -> str:
    """The upstream part of a package version, without repacking marks: 1:11.1.3+ds-1~bpo13+1 is 11.1.3."""
    found = re.match(r"(?:\d+:)?(\d+(?:\.\d+)*)", version)
    return found[1] if found else version


def _numbers(version: str) -> tuple[int, int]:
    numbers = [int(part) for part in re.findall(r"\d+", _upstream(version))]
    return (numbers[0], numbers[1]) if len(numbers) > 1 else (0, 0)


def _series(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"
