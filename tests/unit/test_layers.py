# SPDX-License-Identifier: Apache-2.0
"""Holds every import under src/rootvisor against the layer table, and the boot path against slow imports.

The table is the one in docs/develop/architecture.md: change both.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
ROOT_PACKAGE = "rootvisor"

EVERYTHING = frozenset(
    {
        "appliance",
        "bench",
        "boot",
        "bus",
        "chips",
        "cli",
        "daemons",
        "files",
        "hypervisor",
        "kernels",
        "kvm",
        "machine",
        "mshv",
        "pci",
        "peers",
        "tlfs",
        "trace",
        "vfio",
        "virtio",
        "vmm",
        "x86",
    }
)

#: package -> the packages of ours that it may import (itself is always allowed)
LAYERS: dict[str, frozenset[str]] = {
    "tlfs": frozenset(),
    "kvm": frozenset(),
    "pci": frozenset(),
    "bus": frozenset(),
    "chips": frozenset(),
    "boot": frozenset(),
    "kernels": frozenset(),
    "files": frozenset(),
    "daemons": frozenset({"files"}),
    "trace": frozenset({"tlfs"}),
    "mshv": frozenset({"tlfs"}),
    "x86": frozenset(),
    "hypervisor": frozenset({"tlfs", "kvm", "bus", "trace", "x86"}),
    "virtio": frozenset({"pci", "trace"}),
    "vfio": frozenset({"pci"}),
    "machine": frozenset(
        {"hypervisor", "virtio", "vfio", "chips", "pci", "bus", "boot", "trace", "tlfs", "kvm"}
    ),
    "vmm": frozenset({"mshv", "virtio", "daemons", "chips", "pci", "bus", "boot", "trace", "x86", "tlfs"}),
    "appliance": frozenset({"kernels", "boot", "files"}),
    "peers": frozenset({"kernels", "boot", "kvm"}),
    "bench": EVERYTHING - {"cli"},
    "cli": EVERYTHING,
    "__main__": EVERYTHING,
}

#: Third-party modules, and the only packages that may import them.
THIRD_PARTY: dict[str, frozenset[str]] = {
    "click": frozenset({"cli", "__main__"}),
    "iced_x86": frozenset({"x86"}),
}

#: Standard modules that cost 20 to 200 ms each in the appliance (see docs/develop/architecture.md).
SLOW_MODULES = frozenset(
    {
        "asyncio",
        "ctypes",
        "dataclasses",
        "enum",
        "json",
        "logging",
        "pathlib",
        "re",
        "shutil",
        "subprocess",
        "tempfile",
        "typing",
    }
)

#: Packages whose modules all lie on the boot path. What they import from elsewhere is followed and joins it.
BOOT_PATH_PACKAGES = frozenset(
    {
        "tlfs",
        "kvm",
        "hypervisor",
        "bus",
        "pci",
        "vfio",
        "virtio",
        "chips",
        "machine",
        "mshv",
        "vmm",
        "daemons",
    }
)


@dataclass(frozen=True)
class Import:
    """One name that a module imports, `typing_only` under TYPE_CHECKING, `deferred` inside a function."""

    target: str
    line: int
    typing_only: bool
    deferred: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def package_of(name: str) -> str | None:
    """The layer that a dotted name belongs to; None for `rootvisor` itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports_of(source: str, name: str, is_package: bool) -> Iterator[Import]:
    """Every import statement of a module, relative names resolved."""
    package = name.split(".") if is_package else name.split(".")[:-1]

    def walk(nodes: list[ast.stmt], typing_only: bool, deferred: bool) -> Iterator[Import]:
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, node.lineno, typing_only, deferred)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                stem = ".".join([*base, *([node.module] if node.module else [])])
                # `from a import b` may name the module a.b: both are reported, the caller knows which exist
                yield Import(stem, node.lineno, typing_only, deferred)
                for alias in node.names:
                    yield Import(f"{stem}.{alias.name}", node.lineno, typing_only, deferred)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(node.body, typing_only, True)
            elif isinstance(node, ast.If):
                yield from walk(node.body, typing_only or is_type_checking(node.test), deferred)
                yield from walk(node.orelse, typing_only, deferred)
            else:
                for field in ("body", "orelse", "finalbody"):
                    yield from walk(getattr(node, field, []), typing_only, deferred)
                for handler in getattr(node, "handlers", []):
                    yield from walk(handler.body, typing_only, deferred)
                for case in getattr(node, "cases", []):
                    yield from walk(case.body, typing_only, deferred)

    yield from walk(ast.parse(source).body, False, False)


def load(name: str, path: Path) -> list[Import]:
    return list(imports_of(path.read_text(), name, path.name == "__init__.py"))


def layer_errors(name: str, found: list[Import]) -> Iterator[str]:
    """What a module imports against the table."""
    own = package_of(name)
    if own is not None and own not in LAYERS:
        yield f"{name}: package {own!r} is not in the layer table"
        return
    allowed: frozenset[str] = LAYERS[own] | {own} if own is not None else frozenset()
    for entry in found:
        top = entry.target.split(".")[0]
        if top == ROOT_PACKAGE:
            target = package_of(entry.target)
            if target is None or target in allowed or target == "__version__":
                continue
            yield f"{name}:{entry.line}: {own} may not import {target}"
        elif top in THIRD_PARTY:
            if own not in THIRD_PARTY[top]:
                yield f"{name}:{entry.line}: only {sorted(THIRD_PARTY[top])} may import {top}"
        elif top not in sys.stdlib_module_names:
            yield f"{name}:{entry.line}: {top} is neither ours nor the standard library's"


def boot_path(graph: dict[str, list[Import]]) -> dict[str, str]:
    """The modules that are loaded before the root partition runs, each with the module that pulled it in."""
    reached = {name: "boot path" for name in graph if package_of(name) in BOOT_PATH_PACKAGES}
    queue = list(reached)
    while queue:
        name = queue.pop()
        for entry in graph[name]:
            if entry.typing_only or entry.deferred:
                continue
            parts = entry.target.split(".")
            for end in range(1, len(parts) + 1):  # importing a.b.c runs a and a.b too
                target = ".".join(parts[:end])
                if target in graph and target not in reached:
                    reached[target] = name
                    queue.append(target)
    return reached


def slow_import_errors(graph: dict[str, list[Import]]) -> Iterator[str]:
    for name, via in sorted(boot_path(graph).items()):
        for entry in graph[name]:
            top = entry.target.split(".")[0]
            if top in SLOW_MODULES and not entry.typing_only and not entry.deferred:
                yield f"{name}:{entry.line}: {top} is too slow for the boot path (reached from {via})"


@pytest.mark.parametrize("name", modules())
def test_imports_respect_layers(name: str) -> None:
    assert not list(layer_errors(name, load(name, modules()[name])))


def test_boot_path_imports_nothing_slow() -> None:
    errors = sorted(set(slow_import_errors({name: load(name, path) for name, path in modules().items()})))
    assert not errors, "\n".join(errors)


def test_boot_path_loads_nothing_slow() -> None:
    """The same with the interpreter's own eyes: what the standard library pulls in counts too."""
    program = "import sys, rootvisor.machine.main; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(SOURCE)!r}); {program}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "rootvisor.machine.main" in loaded
    assert not SLOW_MODULES & set(loaded)


def test_table_names_only_known_packages() -> None:
    assert set(LAYERS) - {"__main__"} == EVERYTHING
    for allowed in LAYERS.values():
        assert allowed <= EVERYTHING


def check(name: str, source: str, is_package: bool = False) -> list[str]:
    return list(dict.fromkeys(layer_errors(name, list(imports_of(source, name, is_package)))))


def test_layers_forbidden_import_is_reported() -> None:
    assert check("rootvisor.tlfs.msr", "from rootvisor.kvm import vm")
    assert check("rootvisor.tlfs.msr", "from ..kvm import vm")
    assert check("rootvisor.tlfs", "from ..kvm.vm import Vm", is_package=True)
    assert check("rootvisor.tlfs.msr", "def f():\n    import rootvisor.kvm.vm")
    assert check("rootvisor.tlfs.msr", "if TYPE_CHECKING:\n    from rootvisor.kvm import vm")
    assert check("rootvisor.tlfs.msr", "try:\n    pass\nexcept OSError:\n    import rootvisor.kvm")
    assert check("rootvisor.machine.x", "import click")
    assert check("rootvisor.cli.x", "import requests")
    assert check("rootvisor.unheard.x", "import os")


def test_layers_allowed_import_is_accepted() -> None:
    assert not check(
        "rootvisor.hypervisor.msr", "import os\nfrom rootvisor.tlfs import msr\nfrom . import vp"
    )
    assert not check("rootvisor.cli.run", "import click\nfrom rootvisor import __version__")


def test_slow_import_behind_a_function_or_type_checking_is_accepted() -> None:
    source = "if TYPE_CHECKING:\n    import typing\ndef f():\n    import json"
    graph = {"rootvisor.kvm.vm": list(imports_of(source, "rootvisor.kvm.vm", False))}
    assert not list(slow_import_errors(graph))


def test_slow_import_is_followed_through_other_packages() -> None:
    graph = {
        name: list(imports_of(source, name, False))
        for name, source in {
            "rootvisor.machine.x": "from rootvisor.boot import kernel",
            "rootvisor.boot.kernel": "import re",
            "rootvisor.boot.initramfs": "import subprocess",
        }.items()
    }
    errors = list(dict.fromkeys(slow_import_errors(graph)))
    assert len(errors) == 1
    assert errors[0].startswith("rootvisor.boot.kernel:1: re")
