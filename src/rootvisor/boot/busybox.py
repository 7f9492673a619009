# SPDX-License-Identifier: Apache-2.0
"""Find a static busybox: the userland of the initial ramdisk, and process 1 of everything that boots from
it."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile

from .errors import InitramfsError

PACKAGE = "busybox-static"
"""Debian's and Ubuntu's package with the program."""

APPLETS = (
    "cat",
    "cp",
    "dd",
    "dmesg",
    "env",
    "ifconfig",
    "insmod",
    "ln",
    "mkdir",
    "mkfifo",
    "mount",
    "poweroff",
    "reboot",
    "rm",
    "setsid",
    "sh",
    "sleep",
    "stty",
    "switch_root",
    "sync",
    "usleep",
)
"""What the scripts in ``agent/`` call; each becomes a link in /rootvisor/bin."""

_MEND = "apt-get install busybox-static"
_PT_INTERP = 3
_TIMEOUT_S = 120


def find_busybox(cache_dir: str) -> str:
    """Path of a static busybox with all of :data:`APPLETS`.

    Looks in ``cache_dir``, then on the PATH, and else downloads the distribution's package into the cache,
    which needs no privileges. Raises :class:`InitramfsError`.
    """
    cached = os.path.join(cache_dir, "busybox")
    if os.path.exists(cached) and not _complaint(cached):
        return cached
    installed = shutil.which("busybox")
    if installed is not None and not _complaint(installed):
        return installed
    _download(cache_dir, cached)
    complaint = _complaint(cached)
    if complaint:
        raise InitramfsError(f"{cached}: {complaint}; {_MEND}")
    return cached


def _complaint(path: str) -> str | None:
    """Why this busybox will not do, or None."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
        if _is_dynamic(head):
            return "is not a static x86-64 program"
        done = subprocess.run(
            [path, "--list"], capture_output=True, stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S, check=False
        )
    except OSError as error:
        return f"cannot run: {error.strerror}"
    except subprocess.TimeoutExpired:
        return "does not answer"
    missing = sorted(set(APPLETS) - set(done.stdout.decode("ascii", "replace").split()))
    return f"lacks {', '.join(missing)}" if missing else None


def _is_dynamic(head: bytes) -> bool:
    """Whether an ELF file's head shows another processor, or asks for a dynamic loader."""
    if head[:6] != b"\x7fELF\x02\x01" or head[18:20] != b"\x3e\x00":
        return True
    try:
        (table,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        kinds = [struct.unpack_from("<I", head, table + index * size)[0] for index in range(count)]
    except struct.error:
        return True
    return _PT_INTERP in kinds


def _download(cache_dir: str, target: str) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise InitramfsError(
                f"no static busybox on the PATH, and no {tool} to fetch one; install {PACKAGE}, "
                f"or put a static busybox at {target}"
            )
    try:
        os.makedirs(cache_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".busybox-") as work:
            # The system's package lists first; where there are none yet, lists of our own.
            if not _fetch(work, []):
                options = _private_lists(work)
                if not _run(["apt-get", *options, "update", "-qq"], work) or not _fetch(work, options):
                    raise InitramfsError(f"cannot download {PACKAGE}: check the network, or {_MEND}")
            (package,) = [name for name in os.listdir(work) if name.endswith(".deb")]
            unpacked = os.path.join(work, "unpacked")
            if not _run(["dpkg-deb", "-x", os.path.join(work, package), unpacked], work):
                raise InitramfsError(
                    f"cannot unpack {PACKAGE}: the download is damaged; try again, or {_MEND}"
                )
            for place in ("bin/busybox", "usr/bin/busybox"):
                program = os.path.join(unpacked, place)
                if os.path.isfile(program):
                    os.replace(program, target)
                    return
            raise InitramfsError(f"the package {PACKAGE} holds no busybox; {_MEND}")
    except OSError as error:
        raise InitramfsError(
            f"{cache_dir}: cannot keep busybox there: {error.strerror}; make room, or set ROOTVISOR_CACHE"
        ) from error


def _private_lists(work: str) -> list[str]:
    state, cache = os.path.join(work, "lists"), os.path.join(work, "apt")
    os.makedirs(os.path.join(state, "partial"))
    os.makedirs(os.path.join(cache, "archives", "partial"))
    return ["-o", f"Dir::State::lists={state}", "-o", f"Dir::Cache={cache}", "-o", "APT::Sandbox::User="]


def _fetch(work: str, options: list[str]) -> bool:
    return _run(["apt-get", *options, "-o", "APT::Sandbox::User=", "download", "-qq", PACKAGE], work) and any(
        name.endswith(".deb") for name in os.listdir(work)
    )


def _run(command: list[str], directory: str) -> bool:
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
