# SPDX-License-Identifier: Apache-2.0
"""What a process gives up before it serves files: writing to the host, being somebody, its groups."""

from __future__ import annotations

import ctypes
import os
import resource
import struct

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_MS_REC = 0x4000
_MS_PRIVATE = 1 << 18
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_SYS_MOUNT_SETATTR = 442  # Linux 5.12, the same number on every architecture
_MOUNT_ATTR_RDONLY = 1

#: struct sock_filter: load arch, other than x86-64 passes; load number; getgroups and setgroups give 0, others pass.
_GROUPS_FILTER = (
    (0x20, 0, 0, 4),
    (0x15, 0, 4, 0xC000003E),
    (0x20, 0, 0, 0),
    (0x15, 1, 0, 115),
    (0x15, 0, 1, 116),
    (0x06, 0, 0, 0x00050000),
    (0x06, 0, 0, 0x7FFF0000),
)

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


def raise_open_files_limit() -> None:
    """As many open files as this user may have: a file server has one per inode that the guest knows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def enter_user_namespace() -> None:
    """Become root of a new user namespace in which only our own user and group exist (user_namespaces(7))."""
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def hide_groups() -> None:
    """Make this process believe that it has no supplementary groups.

    A namespace of our own does not let them be dropped, and QEMU's virtiofsd ends when it cannot drop them.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in _GROUPS_FILTER))
    filter_ = ctypes.create_string_buffer(
        struct.pack("<H6xQ", len(_GROUPS_FILTER), ctypes.addressof(program)), 16
    )
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filter_, 0, 0), "prctl")


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
