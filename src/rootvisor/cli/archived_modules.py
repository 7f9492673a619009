# SPDX-License-Identifier: Apache-2.0
"""Imports modules from one file (`module_archive` wrote it): in a root partition each file that is opened is a journey
to the machine outside, and a hundred modules are two thirds of a VMM's start.

The archive is marshal data: {"key": `key()` of the program that wrote it, "modules": {name: (is a package, path of its
source, marshal data of its code)}}.
"""

from __future__ import annotations

import marshal
import sys
from _frozen_importlib import ModuleSpec  # type: ignore[import-not-found, unused-ignore]
from _frozen_importlib_external import MAGIC_NUMBER  # type: ignore[import-not-found, unused-ignore]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

POINTER = "/run/rootvisor/python-modules"
"""In a root partition: a file that holds the archive's path."""


def key() -> tuple[bytes, str, str]:
    """Who can use an archive: the same interpreter, with the package in the same place."""
    return MAGIC_NUMBER, sys.version, __file__.rsplit("/", 3)[0]


def use(pointer: str = POINTER) -> bool:
    """Import from the archive that ``pointer`` names, from now on; False: there is none for this program."""
    try:
        with open(pointer, "rb") as file:
            path = file.read()
        with open(path, "rb") as file:
            archive = marshal.loads(file.read())
        if archive["key"] != key():
            return False
        sys.meta_path.insert(0, _Finder(archive["modules"]))
    except (OSError, ValueError, EOFError, TypeError, KeyError):
        return False
    return True


class _Finder:
    """Finds what is in the archive, and loads it."""

    __slots__ = ("_modules",)

    def __init__(self, modules: dict[str, tuple[bool, str, bytes]]) -> None:
        self._modules = modules

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        """Where a module comes from; None: not from here."""
        found = self._modules.get(name)
        if found is None:
            return None
        loader: Any = self
        spec = ModuleSpec(name, loader, origin=found[1], is_package=found[0])
        if found[0]:
            spec.submodule_search_locations = [found[1].rpartition("/")[0]]
        spec.has_location = True
        return spec

    def create_module(self, spec: object) -> None:
        """An ordinary one."""

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module's code."""
        exec(marshal.loads(self._modules[module.__name__][2]), module.__dict__)
