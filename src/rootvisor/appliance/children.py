# SPDX-License-Identifier: Apache-2.0
"""Child processes that cannot outlive us, and that see of the host only what they may change."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import IO

_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_MS_REC = 0x4000
_MS_BIND = 0x1000
_MS_PRIVATE = 1 << 18
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_SYS_MOUNT_SETATTR = 442  # Linux 5.12, the same number on every architecture
_MOUNT_ATTR_RDONLY = 1

#: What a child does between fork and exec.
Preparation = Callable[[], None]

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    """struct mount_attr of include/uapi/linux/mount.h."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def spawn(
    argv: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    output: int | IO[bytes] | None = None,
    prepare: Preparation | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``argv`` in a session of its own; the kernel kills it when the calling thread ends.

    Its standard output and error go to ``output``. ``prepare`` runs in the child just before the exec.
    """
    parent = os.getpid()

    def in_child() -> None:
        _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        if os.getppid() != parent:  # the parent died before the signal was asked for
            os.kill(os.getpid(), signal.SIGKILL)
        if prepare:
            prepare()

    return subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=tuple(pass_fds),
        start_new_session=True,
        preexec_fn=in_child,
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """End ``process`` and whatever it started, and reap it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def enter_user_namespace() -> None:
    """Become root of a new user namespace in which only our own user and group exist (user_namespaces(7))."""
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def make_host_read_only() -> None:
    """Make every mount read-only in a mount namespace of our own, without the host noticing.

    Raises OSError where the machine does not allow it (a container without CAP_SYS_ADMIN, Linux before 5.12).
    """
    if os.geteuid() == 0:
        _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "mount --make-rprivate")
    attributes = _MountAttr(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    _check(
        _libc.syscall(
            _SYS_MOUNT_SETATTR,
            _AT_FDCWD,
            b"/",
            _AT_RECURSIVE,
            ctypes.byref(attributes),
            ctypes.sizeof(attributes),
        ),
        "mount_setattr",
    )


def raise_open_files_limit() -> None:
    """Let the process have as many open files as it may: a file server has one per inode that the guest knows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def user_namespaces_work() -> bool:
    """Whether this user may create a user namespace (tried in a child, about a millisecond)."""
    child = os.fork()
    if not child:
        try:
            enter_user_namespace()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0
