# SPDX-License-Identifier: Apache-2.0
"""The demo's guest: what is made for it (kernel, ramdisk, disk, page, shared file), and the VMM's command line."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rootvisor.boot.errors import BootError
from rootvisor.boot.initramfs import ROOTFS_NONE, STREAMS_TTY, InitRequest, request_archive
from rootvisor.cli.description import KernelImage
from rootvisor.cli.errors import UserError
from rootvisor.cli.evidence import SCRIPT
from rootvisor.cli.ramdisk import base_archive

MEMORY_MIB = 128
DOCUMENT = "demo.json"
"""Name of the document for `demo_root` in the run's folder."""
_DISK_BYTES = 4 << 20
_PORT = 8080
_HOST = "10.0.2.2"
_ADDRESS = "10.0.2.15"
_TAG = "shared"
_FILE = "greeting"
_API = "/run/rootvisor-demo.sock"
_TIMEOUT_S = 240.0

_GUEST = f"""
part() {{ echo "demo: $1"; shift; "$@" 2>&1; }}
part uname uname -a
part dmesg dmesg
part nproc nproc
part disk sha256sum /dev/vda
ifconfig eth0 {_ADDRESS} netmask 255.255.255.0 up
part web timeout 60 wget -q -O - http://{_HOST}:{_PORT}/
mkdir -p /mnt && mount -t virtiofs {_TAG} /mnt
part file cat /mnt/{_FILE}
echo "demo: end"
read -r line
poweroff
"""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the guest is to find; made anew for every demo, so that nothing can know it before."""

    disk_sha256: str
    page: str
    file: str


def prepare_guest(folder: Path, kernel: KernelImage) -> tuple[dict[str, Any], Expected]:
    """Put everything into `folder`, which the root partition sees at the same path; the document for `demo_root`."""
    disk = os.urandom(_DISK_BYTES)
    expected = Expected(
        hashlib.sha256(disk).hexdigest(),
        f"a page of the root partition's web server: {secrets.token_hex(8)}",
        f"a file of the root partition: {secrets.token_hex(8)}",
    )
    shared = folder / _TAG
    try:
        shared.mkdir()
        (shared / _FILE).write_text(f"{expected.file}\n")
        (folder / "disk.img").write_bytes(disk)
        (folder / "initrd.img").write_bytes(_ramdisk(kernel))
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {(error.strerror or str(error)).lower()}",
            "make room there, or set ROOTVISOR_CACHE",
        ) from error
    return {
        "script": SCRIPT,
        "argv": vmm_command(folder, kernel),
        "api": _API,
        "page": f"{expected.page}\n",
        "port": _PORT,
        "timeout_s": _TIMEOUT_S,
    }, expected


def vmm_command(folder: Path, kernel: KernelImage) -> list[str]:
    """`rootvisor vmm` as anybody would type it."""
    return [
        *(sys.executable, "-m", "rootvisor", "vmm"),
        *("--kernel", kernel.vmlinux or kernel.image),
        *("--initramfs", str(folder / "initrd.img")),
        *("--cmdline", "rdinit=/init console=hvc0 quiet panic=-1"),
        *("--memory", f"size={MEMORY_MIB}M"),
        *("--disk", f"path={folder / 'disk.img'},readonly=on"),
        *("--net", "default"),
        *("--fs", f"tag={_TAG},path={folder / _TAG}"),
        *("--console", "tty", "--serial", "off"),
        *("--api-socket", f"path={_API}"),
    ]


def root_alone() -> dict[str, Any]:
    """The document for a root partition without a guest."""
    return {"script": SCRIPT, "argv": []}


def write_document(folder: Path, document: dict[str, Any]) -> None:
    """Write the document where `demo_root` finds it."""
    (folder / DOCUMENT).write_text(json.dumps(document), encoding="utf-8")


def _ramdisk(kernel: KernelImage) -> bytes:
    """The base that a root partition boots from, and what this guest does; the console is its terminal."""
    request = InitRequest(
        rootfs=ROOTFS_NONE,
        argv=("/bin/sh", "-c", _GUEST),
        environment=(("PATH", "/bin:/sbin"),),
        streams=STREAMS_TTY,
        control=False,
        hostname="guest",
    )
    base = Path(base_archive(kernel, ("console", "rng", "disk", "fs", "net")))
    try:
        return base.read_bytes() + request_archive(request)
    except BootError as error:
        raise UserError(str(error)) from error
