# SPDX-License-Identifier: Apache-2.0
"""Kernel modules for the initial ramdisk: which files, in which order, decompressed.

A module tree is the directory ``lib/modules/RELEASE`` of a kernel. Dependencies come from ``modules.dep``
where depmod has run; in a freshly unpacked kernel package it has not, and then every module's own
``.modinfo`` section is read (``depends=``, ``softdep=pre:``; kernel ``include/linux/module.h``).
"""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import struct
import subprocess
from collections.abc import Iterable

from .errors import InitramfsError

_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")
_ELF_SECTION = struct.Struct("<IIQQQQIIQQ")


class ModuleTree:
    """The modules under ``directory``; reads as little of it as a question needs."""

    def __init__(self, directory: str) -> None:
        if not os.path.isdir(directory):
            raise InitramfsError(
                f"{directory}: no such directory of kernel modules; install the kernel again"
            )
        self.directory = directory
        self._paths: dict[str, str] = {}
        self._dependencies: dict[str, list[str]] | None = None
        self._content: dict[str, bytes] = {}
        lines = self._lines("modules.dep")
        if lines:
            self._dependencies = {}
            for line in lines:
                path, _, rest = line.partition(":")
                name = _name(path)
                self._paths[name] = path
                self._dependencies[name] = [_name(item) for item in rest.split()]
        else:
            for folder, _, files in os.walk(directory):
                for file in files:
                    if file.endswith(_SUFFIXES):
                        self._paths[_name(file)] = os.path.relpath(os.path.join(folder, file), directory)
        self._builtin = {_name(line) for line in self._lines("modules.builtin")}

    def load_order(self, names: Iterable[str]) -> list[str]:
        """Names of the modules to load, each behind what it needs; built-in ones are left out.

        Raises :class:`InitramfsError` for a name that is neither a module nor built in.
        """
        order: list[str] = []
        for name in names:
            self._visit(_normal(name), order, [])
        return order

    def read(self, name: str) -> bytes:
        """The ELF object of a module, decompressed."""
        name = _normal(name)
        if name not in self._content:
            self._content[name] = _decompress(os.path.join(self.directory, self._paths[name]))
        return self._content[name]

    def _visit(self, name: str, order: list[str], path: list[str]) -> None:
        if name in order or name in path:
            return
        if name not in self._paths:
            if name in self._builtin:
                return
            raise InitramfsError(
                f"{self.directory}: the kernel has no module {name}, neither as a file nor built in; "
                "use another kernel, or one with this driver"
            )
        for other in self._needs(name):
            self._visit(other, order, [*path, name])
        order.append(name)

    def _needs(self, name: str) -> list[str]:
        if self._dependencies is not None:
            # modules.dep lists the whole closure, last to be loaded first.
            return list(reversed(self._dependencies[name]))
        needs = []
        for item in _modinfo(self.read(name)):
            key, _, value = item.partition("=")
            if key == "depends":
                needs += [_normal(other) for other in value.split(",") if other]
            elif key == "softdep" and value.startswith("pre:"):
                wanted = value[4:].split("post:")[0].split()
                needs += [other for other in map(_normal, wanted) if other in self._paths]
        return needs

    def _lines(self, file: str) -> list[str]:
        try:
            with open(os.path.join(self.directory, file), encoding="utf-8", errors="replace") as lines:
                return [line.strip() for line in lines if line.strip()]
        except OSError:
            return []


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _name(path: str) -> str:
    return _normal(os.path.basename(path).split(".ko")[0])


def _decompress(path: str) -> bytes:
    try:
        if path.endswith(".xz"):
            with lzma.open(path) as stream:
                return stream.read()
        if path.endswith(".gz"):
            with gzip.open(path) as stream:
                return stream.read()
        if path.endswith(".zst"):
            if shutil.which("zstd") is None:
                raise InitramfsError(f"{path}: cannot decompress it, zstd is missing; apt-get install zstd")
            done = subprocess.run(["zstd", "-dcq", path], capture_output=True, check=False)
            if done.returncode:
                raise InitramfsError(f"{path}: is damaged; install the kernel again")
            return done.stdout
        with open(path, "rb") as file:
            return file.read()
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise InitramfsError(f"{path}: is damaged; install the kernel again") from error
    except OSError as error:
        raise InitramfsError(f"{path}: cannot read the kernel module: {error.strerror}") from error


def _modinfo(module: bytes) -> list[str]:
    """The ``key=value`` strings of an ELF-64 object's .modinfo section; nothing for what is not one."""
    try:
        (table,) = struct.unpack_from("<Q", module, 0x28)
        size, count, names_index = struct.unpack_from("<HHH", module, 0x3A)
        if module[:5] != b"\x7fELF\x02" or size != _ELF_SECTION.size:
            return []
        sections = [_ELF_SECTION.unpack_from(module, table + index * size) for index in range(count)]
        names = sections[names_index][4]
        for section in sections:
            start = names + section[0]
            if module[start : start + 9] == b".modinfo\0":
                content = module[section[4] : section[4] + section[5]]
                return [item.decode("utf-8", "replace") for item in content.split(b"\0") if item]
    except (struct.error, IndexError):
        pass
    return []
