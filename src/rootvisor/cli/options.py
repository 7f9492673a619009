# SPDX-License-Identifier: Apache-2.0
"""click parameter types over the parsers of `values`: one error line each, and shell completion where it
helps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from rootvisor.appliance.hardware import KINDS
from rootvisor.cli import values
from rootvisor.cli.hardware import parse_device
from rootvisor.cli.help import NamedType

if TYPE_CHECKING:
    _AnyType = click.ParamType[Any]
    _TextType = click.ParamType[str]
else:  # generic only in newer releases of click
    _AnyType = _TextType = click.ParamType


class ValueType(NamedType, _AnyType):
    """A parameter whose text goes through one function of `values`; `ValueError` becomes a usage error."""

    def __init__(self, name: str, parse: Callable[[str], object], completions: tuple[str, ...] = ()) -> None:
        self.name = name
        self._parse = parse
        self._completions = completions

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """Parse text; values that are no text (defaults) pass through."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer the usual values."""
        return [CompletionItem(text) for text in self._completions if text.startswith(incomplete)]


class NameOrPath(NamedType, _TextType):
    """One of a few names, or a path; completion offers the names first, then files (or folders)."""

    def __init__(self, names: tuple[str, ...], metavar: str, kind: str = "file") -> None:
        self.name = metavar
        self._names = names
        self._kind = kind

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Text as it is; only emptiness and NUL bytes are refused here, the file is looked at later."""
        text = str(value)
        if not text:
            self.fail("the value is empty", param, ctx)
        if "\0" in text:
            self.fail("a path cannot hold a NUL byte", param, ctx)
        return text

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer the names, then let the shell complete a path."""
        items = [CompletionItem(name) for name in self._names if name.startswith(incomplete)]
        return [*items, CompletionItem(incomplete, type=self._kind)]


MEMORY = ValueType("SIZE", values.parse_memory, ("512M", "1G", "2G", "4G"))
VPS = ValueType("N", values.parse_vps, ("1", "2", "4"))
SECONDS = ValueType("SECONDS", values.parse_seconds)
DISK = ValueType("path=FILE[,readonly=on]", values.parse_disk)
HARDWARE = ValueType(
    "pci:ADDRESS|emulated:KIND", parse_device, ("pci:", *(f"emulated:{name}" for name in KINDS))
)
DEVICES = ValueType("LIST", values.parse_devices, ("all", "none", *values.DEVICES))
APPEND = ValueType("STRING", values.parse_append)
KERNEL = NameOrPath(("mshv", "stock"), "mshv|stock|PATH")
ROOTFS = NameOrPath(("host", "none"), "host|DIR|none", kind="dir")
FILE = NameOrPath((), "FILE")
INITRD = NameOrPath(("none",), "FILE|none")
CONSOLE = NameOrPath(("stderr",), "stderr|FILE")
