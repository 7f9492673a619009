# SPDX-License-Identifier: Apache-2.0
"""What the tests in the root partition need, made on the host: initial ramdisks, the guest's tool, a web page."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

import pytest

from rootvisor import bench
from rootvisor.boot.busybox import find_busybox
from rootvisor.boot.busybox_guest import archive
from rootvisor.cli.output import Progress
from rootvisor.kernels import cache_dir, find
from rootvisor.peers.guest import filler, md5
from tests.vmm import debian

HERE = Path(__file__).resolve().parent
PORT = 8098
PAGE_BYTES = 300_000
#: Of a kernel that has them as modules.
MODULES = (
    "virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_balloon", "virtiofs",
    "vmw_vsock_virtio_transport",
)  # fmt: skip
KERNELS = ("mshv", "stock")


def _libraries() -> str:
    """Where the instruction decoder is: the runner starts without site packages."""
    found = find_spec("iced_x86")
    assert found is not None and found.origin is not None
    return str(Path(found.origin).parents[1])


def compile_tool(folder: Path) -> Path:
    """The static program for the guests."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.fail("there is no gcc; run make dev")
    path = folder / "tool"
    subprocess.run(
        [
            compiler,
            "-O2",
            "-static",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{Path(bench.__file__).parent}",
            "-o",
            path,
            HERE.parent / "guests" / "tool.c",
        ],
        check=True,
        timeout=120,
    )
    return path


def write(folder: Path, groups: Collection[str] = ()) -> Path:
    """Everything into ``folder``, with what the named groups of tests alone need; the job file."""
    tool = compile_tool(folder)
    page = filler(PAGE_BYTES, 5)
    (folder / "page").write_bytes(page)
    kernels = {}
    chosen = [(name, find(name)) for name in KERNELS]
    more = {}
    if "debian" in groups:
        with Progress() as progress:
            old = debian.old_kernel(progress)
            image, key = debian.root_image(progress)
        chosen.append((old.name, old))
        more["debian"] = {
            "image": str(image),
            "bytes": debian.IMAGE_BYTES,
            "key": str(key),
            "password": debian.PASSWORD,
            "root_address": debian.ROOT_ADDRESS,
            "guest_address": debian.GUEST_ADDRESS,
        }
    for name, kernel in chosen:
        if kernel is None:
            pytest.fail(f"kernel {name} is not in the cache; run make kernels")
        path = folder / f"initramfs-{name}"
        path.write_bytes(initramfs(None if kernel.modules is None else str(kernel.modules), tool))
        kernels[name] = {"image": str(kernel.image), "initramfs": str(path), "version": kernel.version}
        if kernel.vmlinux is not None:
            kernels[f"{name}-elf"] = {**kernels[name], "image": str(kernel.vmlinux)}
    job = {
        "kernels": kernels,
        "page": str(folder / "page"),
        "page_md5": md5(page),
        "port": PORT,
        "tool": str(tool),
        "folder": str(folder),
        "libraries": _libraries(),
        **more,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def initramfs(modules: str | None, tool: Path) -> bytes:
    """busybox, the tool, the init script, the modules that the kernel has not built in."""
    busybox = find_busybox(str(cache_dir() / "initramfs"))
    return archive(str(HERE / "guest_init"), busybox, modules, MODULES, {"/bin/tool": str(tool)})
