# SPDX-License-Identifier: Apache-2.0
"""Tap interfaces of the host (Documentation/networking/tuntap.rst), one queue, with virtio headers on every packet."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from .net import (
    F_GUEST_CSUM,
    F_GUEST_ECN,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    GUEST_OFFLOADS,
    HEADER_BYTES,
    HOST_OFFLOADS,
)

_TUNSETIFF = 0x400454CA
_TUNGETIFF = 0x800454D2
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_FLAGS = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
_IFREQ = struct.Struct("<16sH22x")
NAME_BYTES = 15

_OFFLOADS = ((F_GUEST_CSUM, 1), (F_GUEST_TSO4, 2), (F_GUEST_TSO6, 4), (F_GUEST_ECN, 8))


class TapError(Exception):
    """The interface cannot be used; one line that says why, and what mends it."""


def open_tap(name: str = "") -> int:
    """Open the tap interface `name`, or make a new one (root only). Raises `TapError`."""
    raw = name.encode()
    if len(raw) > NAME_BYTES or b"/" in raw or b"\0" in raw:
        raise TapError(f"not the name of an interface: {name!r}")
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        mend = "; modprobe tun" if error.errno in (errno.ENOENT, errno.ENODEV) else ""
        raise TapError(f"cannot open /dev/net/tun: {error.strerror}{mend}") from error
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(raw, _FLAGS))
    except OSError as error:
        os.close(fd)
        mend = ""
        if error.errno in (errno.EPERM, errno.EACCES):
            mend = f"; as root: ip tuntap add {name or 'tap0'} mode tap vnet_hdr user {os.geteuid()}"
        elif error.errno == errno.EBUSY:
            mend = "; somebody else uses it"
        elif error.errno == errno.EINVAL:
            mend = "; it is no tap interface with one queue, delete it or choose another name"
        raise TapError(f"cannot use tap interface {name or '(new)'}: {error.strerror}{mend}") from error
    return fd


class Tap:
    """An open tap interface. Owns the descriptor, which becomes non-blocking.

    `features` is what a network device on it can offer. Raises `TapError` for a descriptor that is no such interface.
    """

    __slots__ = ("fd", "features", "name")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        try:
            raw, flags = _IFREQ.unpack(fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size)))
        except OSError as error:
            raise TapError(f"descriptor {fd} is not a tap interface: {error.strerror}") from error
        self.name = raw.rstrip(b"\0").decode(errors="replace")
        if flags & _FLAGS != _FLAGS:
            raise TapError(
                f"interface {self.name} lacks what a virtual machine needs; open it with "
                "IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
            )
        os.set_blocking(fd, False)
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("<i", HEADER_BYTES))
        self.features = HOST_OFFLOADS | (GUEST_OFFLOADS if self.set_offloads(GUEST_OFFLOADS) else 0)
        self.set_offloads(0)

    def set_offloads(self, features: int) -> bool:
        """Which large or unfinished packets the driver takes; false when the kernel cannot."""
        try:
            fcntl.ioctl(
                self.fd, _TUNSETOFFLOAD, sum(flag for feature, flag in _OFFLOADS if features & feature)
            )
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the descriptor; an interface that is not persistent goes away."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
