# SPDX-License-Identifier: Apache-2.0
"""Assemble the initial ramdisk: a cached base, and a small archive behind it that says what this run is to
do.

The base holds, uncompressed (unpacking costs the guest more than reading)::

    /init                       agent/init, the first stage
    /rootvisor/busybox          static busybox; /rootvisor/bin/* link to it
    /rootvisor/main,run,...     the other agent scripts, described in agent/
    /rootvisor/modules.order    file names under /rootvisor/modules, one a line, in load order
    /rootvisor/modules/*.ko     kernel modules

The run's archive (:func:`request_archive`) holds::

    /rootvisor/request          shell assignments: control rootfs tag overlay writable streams tty hostname
    /rootvisor/command          shell: exports of the environment, the directory, and `set -- ARGUMENTS`
    /rootvisor/mounts           lines "TAG ro|rw PATH": further virtiofs mounts
    /rootvisor/tmpfs            lines "PATH": further tmpfs mounts
    /rootvisor/winsize          optional, "ROWS COLUMNS": size of a terminal whose device does not tell it
    /rootvisor/job              optional: bytes that the command finds in /run/rootvisor/job
    /rootvisor/python-modules   optional: path of an archive of Python modules, found in /run/rootvisor likewise

Lines on the port ``rootvisor.control``, guest to host: ``ready`` (the first sign of user space), ``error
TEXT`` (why the next line says 125), ``exit N`` (the command's status; absent when the command itself ended
the machine). Host to guest: ``signal NAME`` (INT, TERM, HUP, QUIT, KILL, USR1, USR2, PWR, TSTP, CONT or WINCH, to
the command's process group), ``winsize ROWS COLUMNS`` (of the terminal) and ``poweroff``.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .busybox import APPLETS
from .cpio import CpioWriter
from .errors import InitramfsError
from .modules import ModuleTree
from .whole_file import write_whole

STREAM_PORTS = ("rootvisor.stdin", "rootvisor.stdout", "rootvisor.stderr")
"""Names of the virtio ports that carry the command's streams."""
CONTROL_PORT = "rootvisor.control"
"""Name of the virtio port for the lines described above."""

ROOTFS_VIRTIOFS = "virtiofs"
"""The root file system is a virtiofs share."""
ROOTFS_NONE = "none"
"""The command runs in the initial ramdisk."""
STREAMS_PORTS = "ports"
"""The command's streams are pipes, carried by virtio ports."""
STREAMS_TTY = "tty"
"""The command's streams are a terminal device, which is its controlling terminal."""

_AGENT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "agent")
_SCRIPTS = ("main", "run", "end", "sweep", "linuxrc")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_WORD = re.compile(r"[A-Za-z0-9._-]+\Z")
# What the agent's shell makes itself, or would not let itself be given.
_SHELL_VARIABLES = frozenset(
    (
        "_",
        "EPOCHREALTIME",
        "EPOCHSECONDS",
        "IFS",
        "LINENO",
        "OLDPWD",
        "OPTIND",
        "PPID",
        "PWD",
        "RANDOM",
        "SHLVL",
    )
)
_KEEP_S = 7 * 24 * 3600  # a base nobody has used for this long is removed


@dataclass(frozen=True)
class Mount:
    """A further virtiofs share: ``tag`` is mounted at the absolute ``path`` of the root file system."""

    tag: str
    path: str
    writable: bool = False


@dataclass(frozen=True)
class InitRequest:
    """What the guest's user space is to do.

    ``rootfs``: :data:`ROOTFS_VIRTIOFS` (share ``tag``, read-only; with ``overlay`` a tmpfs over it takes
    writes) or :data:`ROOTFS_NONE`. ``tmpfs``: paths that get an empty tmpfs (/run and /dev/shm always do).
    ``argv``: the command, empty for a plain interactive shell. ``cwd``: where it starts, / if the root lacks it.
    ``environment``: all of it; names that no shell variable can have are left out. ``streams``:
    :data:`STREAMS_PORTS` or :data:`STREAMS_TTY`, then on the device ``tty``. ``control``: whether there is a
    control port; without one the same lines appear on the console behind ``rootvisor:``.
    """

    rootfs: str = ROOTFS_NONE
    tag: str = "root"
    overlay: bool = True
    mounts: tuple[Mount, ...] = ()
    tmpfs: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    cwd: str = "/"
    environment: tuple[tuple[str, str], ...] = ()
    streams: str = STREAMS_PORTS
    tty: str = "hvc0"
    control: bool = True
    hostname: str = "rootvisor"


def request_archive(request: InitRequest, files: Mapping[str, bytes] | None = None) -> bytes:
    """The run's archive, to be loaded behind the base. ``files`` adds further files by absolute path.

    Raises :class:`InitramfsError` for what cannot be passed on: zero bytes, line ends in paths, odd names.
    """
    for word in (request.tag, request.tty, request.hostname, *(mount.tag for mount in request.mounts)):
        if not _WORD.match(word):
            raise InitramfsError(f"{word!r} is not a name of letters, digits, dots, dashes and underscores")
    for path in (*request.tmpfs, *(mount.path for mount in request.mounts)):
        if not path.startswith("/") or "\n" in path:
            raise InitramfsError(f"{path!r} cannot be a mount point: not an absolute path in one line")
    writable = request.rootfs == ROOTFS_NONE or request.overlay
    settings = {
        "control": "port" if request.control else "none",
        "rootfs": request.rootfs,
        "tag": request.tag,
        "overlay": "yes" if request.overlay else "no",
        "writable": "yes" if writable else "no",
        "streams": request.streams,
        "tty": request.tty,
        "hostname": request.hostname,
    }
    archive = CpioWriter()
    archive.file("/rootvisor/request", _lines(f"{key}={value}" for key, value in settings.items()))
    archive.file("/rootvisor/command", _command(request))
    archive.file(
        "/rootvisor/mounts",
        _lines(f"{mount.tag} {'rw' if mount.writable else 'ro'} {mount.path}" for mount in request.mounts),
    )
    archive.file("/rootvisor/tmpfs", _lines(request.tmpfs))
    for path, content in (files or {}).items():
        archive.file(path, content)
    return archive.finish()


def build_base(busybox: str, modules_dir: str | None, modules: Sequence[str], cache_dir: str) -> str:
    """Path of the base archive with ``modules`` and what they depend on; taken from ``cache_dir`` if it is
    there.

    ``busybox`` comes from :func:`rootvisor.boot.busybox.find_busybox`; ``modules_dir`` is the kernel's
    ``lib/modules/RELEASE``, or None for a kernel with everything built in. The cache is keyed by the content
    of all inputs. Raises :class:`InitramfsError`.
    """
    tree = ModuleTree(modules_dir) if modules_dir is not None else None
    order = tree.load_order(modules) if tree is not None else []
    archive = CpioWriter()
    archive.directory("/dev")
    archive.character_device("/dev/console", 5, 1)
    for directory in ("/proc", "/sys", "/run", "/root"):
        archive.directory(directory)
    archive.directory("/tmp", 0o1777)
    archive.file("/init", _read(os.path.join(_AGENT, "init")), 0o755)
    archive.file("/rootvisor/busybox", _read(busybox), 0o755)
    for applet in APPLETS:
        archive.symlink(f"/rootvisor/bin/{applet}", "../busybox")
    for script in _SCRIPTS:
        archive.file(f"/rootvisor/{script}", _read(os.path.join(_AGENT, script)), 0o755)
    archive.file("/rootvisor/modules.order", _lines(f"{name}.ko" for name in order))
    for name in order:
        assert tree is not None
        archive.file(f"/rootvisor/modules/{name}.ko", tree.read(name))
    content = archive.finish()
    path = os.path.join(cache_dir, f"base-{hashlib.sha256(content).hexdigest()[:32]}.cpio")
    try:
        _keep(path, content)
        _prune(cache_dir, path)
    except OSError as error:
        raise InitramfsError(
            f"{cache_dir}: cannot keep the initial ramdisk there: {error.strerror}; "
            "make room, or set ROOTVISOR_CACHE"
        ) from error
    return path


def _keep(path: str, content: bytes) -> None:
    try:
        if os.path.getsize(path) == len(content):
            os.utime(path)
            return
    except OSError:
        pass
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    write_whole(path, content)


def _prune(directory: str, path: str) -> None:
    limit = time.time() - _KEEP_S
    for entry in os.scandir(directory):
        if (
            entry.name.startswith(("base-", ".base-"))
            and entry.path != path
            and entry.stat().st_mtime < limit
        ):
            os.unlink(entry.path)


def _command(request: InitRequest) -> bytes:
    lines = [
        b"export " + name.encode("ascii") + b"=" + _quote(value)
        for name, value in request.environment
        if _VARIABLE.match(name) and name not in _SHELL_VARIABLES
    ]
    lines.append(b"_rv_directory=" + _quote(request.cwd))
    lines.append(b" ".join([b"set --", *(_quote(argument) for argument in request.argv)]))
    return b"\n".join(lines) + b"\n"


def _quote(text: str) -> bytes:
    """A shell word; bytes that are not UTF-8 travel as they came (surrogateescape)."""
    raw = os.fsencode(text)
    if b"\0" in raw:
        raise InitramfsError(f"{text!r} holds a zero byte, which no argument can")
    return b"'" + raw.replace(b"'", b"'\\''") + b"'"


def _lines(items: Iterable[str]) -> bytes:
    return b"".join(os.fsencode(item) + b"\n" for item in items)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InitramfsError(f"{path}: cannot read it: {error.strerror}") from error
