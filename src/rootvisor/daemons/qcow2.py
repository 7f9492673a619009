# SPDX-License-Identifier: Apache-2.0
"""Which other files a qcow2 image stands on (QEMU docs/interop/qcow2.rst).

Who wrote the image says what its header names: any file of the host's. So a daemon is never left to follow a header:
either there is no other file, or every one was asked for, with its format.
"""

from __future__ import annotations

import os
import struct

MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQI")  # magic, version, offset and bytes of the backing file's name
_INCOMPATIBLE_FEATURES, _HEADER_LENGTH = 72, 100
_VERSION_2_BYTES, _VERSION_3_BYTES = 72, 104
_EXTERNAL_DATA = 1 << 2
_EXTENSION = struct.Struct(">II")  # type, bytes; padded to eight
_END, _BACKING_FORMAT = 0, 0xE2792ACA
_MAX_NAME_BYTES = 1023
#: All of the header and its extensions lies in the first cluster; the smallest cluster that tools make has 64 KiB.
_READ_BYTES = 1 << 16
_MAX_CHAIN = 16


class Qcow2Error(Exception):
    """The image is none, or stands on something that cannot be allowed; one line."""


class Header:
    """What an image says of other files: ``backing`` and ``backing_format`` are empty where there is none."""

    __slots__ = ("backing", "backing_format", "external_data")

    def __init__(self, backing: str, backing_format: str, external_data: bool) -> None:
        self.backing = backing
        self.backing_format = backing_format
        self.external_data = external_data


def read_header(path: str) -> Header:
    """The header of the image at `path`. Raises `Qcow2Error`."""
    try:
        with open(path, "rb", opener=_open) as file:
            data = file.read(_READ_BYTES)
    except OSError as error:
        raise Qcow2Error(f"cannot open disk image {path}: {os.strerror(error.errno or 0)}") from error
    if len(data) < _VERSION_2_BYTES or data[:4] != MAGIC:
        raise Qcow2Error(f"disk image {path} is not in qcow2 format")
    _, version, name_at, name_bytes = _HEADER.unpack_from(data)
    extensions, features = _VERSION_2_BYTES, 0
    if version >= 3:
        if len(data) < _VERSION_3_BYTES:
            raise Qcow2Error(f"disk image {path} is damaged: it ends in its header")
        features = int.from_bytes(data[_INCOMPATIBLE_FEATURES : _INCOMPATIBLE_FEATURES + 8], "big")
        extensions = int.from_bytes(data[_HEADER_LENGTH : _HEADER_LENGTH + 4], "big")
    name = b""
    if name_at:
        name = data[name_at : name_at + name_bytes]
        if not 0 < name_bytes <= _MAX_NAME_BYTES or len(name) != name_bytes:
            raise Qcow2Error(f"disk image {path} is damaged: the name of its backing file")
    return Header(os.fsdecode(name), _backing_format(data, extensions), bool(features & _EXTERNAL_DATA))


def chain(path: str, *, backing_files: bool) -> list[tuple[str, str]]:
    """Path and format (raw, qcow2) of the image and of the files behind it, the image first.

    Raises `Qcow2Error` when there are others and ``backing_files`` is false, or one of unknown format or kind.
    """
    found = [(path, "qcow2")]
    while found[-1][1] == "qcow2":
        image = found[-1][0]
        header = read_header(image)
        if header.external_data:
            raise Qcow2Error(
                f"disk image {image} keeps its data in another file, which is not opened; convert it with qemu-img"
            )
        if not header.backing:
            break
        if not backing_files:
            raise Qcow2Error(
                f"disk image {image} has a backing file ({header.backing}), which is opened with backing_files=on only"
            )
        if _is_no_path(header.backing):
            raise Qcow2Error(f"the backing file of disk image {image} is no file: {header.backing}")
        if header.backing_format not in ("raw", "qcow2"):
            kind = f"{header.backing_format}, not" if header.backing_format else "not said; it has to be"
            raise Qcow2Error(
                f"the format of {header.backing}, the backing file of disk image {image}, is {kind} raw or qcow2; "
                "mend it with qemu-img rebase -u -F FORMAT"
            )
        if len(found) == _MAX_CHAIN:
            raise Qcow2Error(f"disk image {path} has more than {_MAX_CHAIN - 1} backing files")
        found.append((os.path.join(os.path.dirname(image), header.backing), header.backing_format))
    return found


def _backing_format(data: bytes, at: int) -> str:
    while at + _EXTENSION.size <= len(data):
        kind, size = _EXTENSION.unpack_from(data, at)
        at += _EXTENSION.size
        if kind == _END:
            break
        if kind == _BACKING_FORMAT:
            return data[at : at + min(size, _MAX_NAME_BYTES)].decode("ascii", "replace")
        at += size + 7 & ~7
    return ""


def _is_no_path(name: str) -> bool:
    """As QEMU tells `nbd:...` and `json:...` from files: a colon before any slash."""
    return ":" in name.partition("/")[0]


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
