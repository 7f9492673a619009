# SPDX-License-Identifier: Apache-2.0
"""Writes the archive that `archived_modules` reads: everything that a VMM in a root partition may import."""

from __future__ import annotations

import hashlib
import marshal
import os
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path

from rootvisor.boot.whole_file import write_whole
from rootvisor.cli import archived_modules
from rootvisor.cli.paths import cache_dir, source_root

_PACKAGES = (
    "boot", "bus", "chips", "daemons", "files", "mshv", "pci", "tlfs", "trace", "virtio", "vmm", "x86",
)  # fmt: skip
#: Of the standard library: what these import, and what the API's JSON needs. Submodules stand behind their package.
_STANDARD = (
    "bisect", "collections", "contextlib", "copyreg", "enum", "functools", "importlib", "importlib._abc",
    "importlib.machinery", "json", "json.decoder", "json.encoder", "json.scanner", "keyword", "operator", "re",
    "re._casefix", "re._compiler", "re._constants", "re._parser", "reprlib", "struct", "types", "warnings",
)  # fmt: skip
_KEEP_S = 7 * 24 * 3600  # an archive that nobody has used for this long is removed


def find_or_write() -> Path | None:
    """The archive of the modules as they are now, from the cache or new; None when it cannot be kept there."""
    folder = cache_dir() / "modules"
    sources = dict(_sources())
    digest = hashlib.sha256(repr(archived_modules.key()).encode())
    try:
        for name, path in sources.items():
            status = path.stat()
            digest.update(f"{name} {path} {status.st_mtime_ns} {status.st_size}\n".encode())
        target = folder / f"{digest.hexdigest()[:32]}.marshal"
        if target.exists():
            os.utime(target)
            return target
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(str(target), marshal.dumps({"key": archived_modules.key(), "modules": _modules(sources)}))
        _prune(folder)
    except (OSError, ValueError):
        return None
    return target


def _sources() -> Iterator[tuple[str, Path]]:
    """Name and path of each module."""
    root = source_root()
    for package in _PACKAGES:
        for path in sorted((root / "rootvisor" / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path
    for name in _STANDARD:
        try:
            found = find_spec(name)
        except ImportError:  # another Python's library is made up of other modules
            continue
        if found is not None and found.origin is not None and found.origin.endswith(".py"):
            yield name, Path(found.origin)


def _modules(sources: dict[str, Path]) -> dict[str, tuple[bool, str, bytes]]:
    found = {}
    for name, path in sources.items():
        code = SourceFileLoader(name, str(path)).get_code(name)
        found[name] = (path.name == "__init__.py", str(path), marshal.dumps(code))
    return found


def _prune(folder: Path) -> None:
    limit = time.time() - _KEEP_S
    for path in folder.iterdir():
        if path.stat().st_mtime < limit:
            path.unlink(missing_ok=True)
