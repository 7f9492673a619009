# SPDX-License-Identifier: Apache-2.0
"""The initial ramdisk of a small guest: a shell script as /init, busybox, the modules that it loads, programs."""

from __future__ import annotations

from .cpio import CpioWriter
from .modules import ModuleTree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def archive(
    init: str,
    busybox: str,
    modules_dir: str | None = None,
    wanted: Sequence[str] = (),
    programs: Mapping[str, str] | None = None,
) -> bytes:
    """A cpio archive with the files ``init`` as /init and ``busybox`` as /bin/busybox.

    /modules/order names the modules ``wanted`` and what they need, a line each in the order to load them, and
    /modules/NAME.ko are the modules; without ``modules_dir`` (the kernel has all built in) there are none. ``programs``
    are files by their path in the guest. Raises :class:`.errors.InitramfsError` when the kernel lacks a module.
    """
    writer = CpioWriter()
    writer.directory("/dev")
    writer.character_device("/dev/console", 5, 1)
    for name, path in {"/init": init, "/bin/busybox": busybox, **(programs or {})}.items():
        with open(path, "rb") as file:
            writer.file(name, file.read(), 0o755)
    tree = None if modules_dir is None else ModuleTree(modules_dir)
    order = [] if tree is None else tree.load_order(wanted)
    writer.file("/modules/order", "".join(f"{name}\n" for name in order).encode())
    for name in order:
        assert tree is not None
        writer.file(f"/modules/{name}.ko", tree.read(name))
    return writer.finish()
