# SPDX-License-Identifier: Apache-2.0
"""virtiofsd: where it is, which of the two programs of that name it is, and how it is called."""

from __future__ import annotations

import os
import sys

from .program import find_on_path, output_of

PLACES = (
    "/usr/libexec/virtiofsd",  # Rust: Ubuntu, Debian 13, Fedora
    "/usr/lib/virtiofsd",  # Rust: Arch
    "/usr/lib/qemu/virtiofsd",  # C: Debian 12
)
#: Stands for the number of the listening socket where that is not known yet.
SOCKET = "{fd}"

_START = os.path.join(os.path.dirname(os.path.abspath(__file__)), "start.py")


class FileServerError(Exception):
    """``what`` keeps files from being served, and the ``mend``."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"{what}; {mend}")
        self.what = what
        self.mend = mend


class Virtiofsd:
    """The program. ``rust``: the one of the virtiofsd project, otherwise QEMU's own up to release 7.
    ``namespace``: it has to be root of a user namespace, because it insists on being root."""

    __slots__ = ("namespace", "path", "rust")

    def __init__(self, path: str, rust: bool, namespace: bool) -> None:
        self.path = path
        self.rust = rust
        self.namespace = namespace

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Virtiofsd) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Virtiofsd{self._key()!r}"

    def _key(self) -> tuple[str, bool, bool]:
        return self.path, self.rust, self.namespace


def find() -> Virtiofsd:
    """The program that this user can run. Raises :class:`FileServerError`."""
    on_path = find_on_path("virtiofsd")
    found = [place for place in ((on_path,) if on_path else ()) + PLACES if os.access(place, os.X_OK)]
    if not found:
        package = "virtiofsd" if _has_package() else "qemu-system-common"
        raise FileServerError("virtiofsd is missing", f"apt-get install {package}")
    for path in found:
        rust = _is_rust(path)
        if rust or os.geteuid() == 0:
            return Virtiofsd(path, rust, namespace=False)
        if user_namespaces_work():
            return Virtiofsd(path, rust, namespace=True)
    raise FileServerError(
        f"{found[0]} works only as root, and this user may not create user namespaces",
        "sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000, "
        "install the Rust virtiofsd, or run as root",
    )


def command(
    server: Virtiofsd, folder: str, fd: int | str, *, writable: bool = False, root: bool | None = None
) -> list[str]:
    """Serve ``folder`` on the listening socket ``fd`` to one client, then end.

    What is read-only may be cached for ever (as far as this run goes, nobody changes it); a writable folder is looked
    at anew after a second, because the host may write there too. ``root``: whether it is root who runs this, by
    default whether we are.
    """
    if root is None:
        root = os.geteuid() == 0
    cache = "auto" if writable else "always"
    limit = [] if root else ["--rlimit-nofile=0"]  # which only root may raise
    if server.rust:
        sandbox = "chroot" if root else "none"
        options = [f"--shared-dir={folder}", f"--cache={cache}", f"--sandbox={sandbox}", "--log-level=error"]
        return [server.path, f"--fd={fd}", *options, *limit]
    options = [f"source={folder}", f"cache={cache}", "sandbox=chroot", "log_level=err"]
    return [server.path, "-f", f"--fd={fd}", *(word for one in options for word in ("-o", one)), *limit]


def confined(server: Virtiofsd, argv: list[str], *, writable: bool = False) -> list[str]:
    """The command line that runs ``argv`` (see :func:`command`) so that it sees of the host only what it should, and
    so that an ordinary user's server answers what a guest asks of it (:mod:`.start`)."""
    words = [] if writable else ["read-only"]
    if server.namespace:
        words.append("namespace")
    return [sys.executable, "-I", "-S", _START, ",".join(words) or "-", *argv]


def _has_package() -> bool:
    """Whether the distribution ships virtiofsd on its own, as all do since they have QEMU 8."""
    try:
        with open("/etc/os-release") as file:
            return 'VERSION_ID="12"' not in file.read()
    except OSError:
        return True


def _is_rust(path: str) -> bool:
    """QEMU's own takes other options. It names a copyright, or fails before that when an ordinary user asks."""
    result = output_of([path, "--version"])
    if result is None or result[0] or b"Copyright" in result[1]:
        return False
    _, found, version = result[1].partition(b"virtiofsd ")
    return bool(found) and version.removeprefix(b"v")[:1].isdigit()


def user_namespaces_work() -> bool:
    """Whether this user may create a user namespace."""
    from . import confine  # needs ctypes, which is slow to import

    return confine.user_namespaces_work()
