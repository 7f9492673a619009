# SPDX-License-Identifier: Apache-2.0
"""What the tests' guests need of Debian 12, made once and kept in the cache: its own kernel (6.1), and a root file
system with systemd and ssh. `Unavailable` says why one is not to be had on this machine.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rootvisor.kernels import Kernel, KernelError, cache_dir, stock
from rootvisor.kernels.kernel import Progress
from rootvisor.kernels.mirror import find_configured

SUITE = "bookworm"
PASSWORD = "guest"
ROOT_ADDRESS, GUEST_ADDRESS = "192.168.77.1", "192.168.77.2"
#: One level-1 entry of a qcow2 image reaches so far: what is written on top of the image is an image of that kind.
IMAGE_BYTES = 512 << 20
_PACKAGES = "systemd-sysv,udev,dbus,openssh-server,iproute2,fio,iperf3"
_OLD_KERNEL = re.compile(r"linux-image-(6\.1\.\d[\w.+~-]*-cloud-amd64)")

#: In the new system: who may log in and how, its address, patience (systemd's minute and a half is not enough where
#: processors are emulated), nothing that only large systems need.
_SET_UP = f"""\
set -e
echo 'root:{PASSWORD}' | chpasswd
echo guest >/etc/hostname
mkdir -p /root/.ssh /etc/systemd/network
cp /key.pub /root/.ssh/authorized_keys && rm /key.pub
printf '[Match]\\nType=ether\\n[Network]\\nAddress={GUEST_ADDRESS}/24\\nLinkLocalAddressing=no\\n' \\
    >/etc/systemd/network/10-wire.network
mkdir -p /etc/systemd/system.conf.d
printf '[Manager]\\nDefaultTimeoutStartSec=1800\\nDefaultDeviceTimeoutSec=1800\\nShowStatus=no\\n' \\
    >/etc/systemd/system.conf.d/slow-machine.conf
systemctl enable systemd-networkd
systemctl mask systemd-networkd-wait-online e2scrub_reap apt-daily.timer apt-daily-upgrade.timer
apt-get clean
rm -rf /var/lib/apt/lists/* /usr/share/doc/* /usr/share/man/* /usr/share/locale/* /var/log/*.log
"""


class Unavailable(Exception):
    """One line."""


def old_kernel(progress: Progress) -> Kernel:
    """Debian's cloud kernel of the series 6.1, unmodified."""
    try:
        apt, packages = find_configured(
            lambda apt: apt.newest(_OLD_KERNEL.pattern, "linux-image-6.1."), progress, False
        )
        if not packages:
            raise Unavailable("no cloud kernel 6.1 is offered here; Debian 12 has one")
        package = packages[0]
        match = _OLD_KERNEL.fullmatch(package.name)
        assert match is not None
        target = _folder() / f"{match[1]}_{package.version}"
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=_folder()) as name:
                draft = Path(name) / "kernel"
                draft.mkdir()
                file = apt.download(package, Path(name), progress)
                _run(["dpkg-deb", "--extract", str(file), str(draft / "unpacked")])
                stock._arrange(draft / "unpacked", draft, match[1], package.name)
                shutil.rmtree(draft / "unpacked")
                draft.rename(target)
    except KernelError as error:
        raise Unavailable(str(error)) from error
    vmlinux = target / "vmlinux"
    return Kernel(
        "debian-6.1",
        match[1],
        target / "vmlinuz",
        vmlinux if vmlinux.exists() else None,
        target / "lib" / "modules" / match[1],
    )


def root_image(progress: Progress) -> tuple[Path, Path]:
    """An ext4 image with Debian, and the key that opens it by ssh. Building it takes minutes, and root."""
    recipe = f"{SUITE} {_PACKAGES} {_SET_UP} {IMAGE_BYTES}"
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    target = _folder() / f"{SUITE}-{digest}"
    if not target.is_dir():
        for tool in ("debootstrap", "mkfs.ext4", "ssh-keygen", "ssh", "ip"):
            if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
                raise Unavailable(
                    f"{tool} is missing; apt-get install debootstrap e2fsprogs openssh-client iproute2"
                )
        if os.geteuid():
            raise Unavailable("only root can build a root file system with debootstrap")
        with tempfile.TemporaryDirectory(dir=_folder()) as name:
            draft = Path(name) / "image"
            draft.mkdir()
            _build(draft, Path(name) / "root", progress)
            draft.rename(target)
    return target / "root.ext4", target / "key"


def _build(draft: Path, root: Path, progress: Progress) -> None:
    stage = f"Debian {SUITE} by debootstrap"
    progress(stage, 0, None)
    _run(["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", SUITE, str(root)], stage, progress)
    _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(draft / "key")])
    shutil.copy(draft / "key.pub", root / "key.pub")
    _run(["chroot", str(root), "/bin/sh", "-c", _SET_UP])
    progress("file system for a guest", 0, None)
    image = draft / "root.ext4"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    _run(["mkfs.ext4", "-q", "-O", "^has_journal", "-d", str(root), str(image)])


def _run(argv: Sequence[str], stage: str = "", progress: Progress | None = None) -> None:
    """Runs a program to its end; what it prints counts as progress. Unavailable with its last line."""
    environment = {
        **os.environ,
        "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        "DEBIAN_FRONTEND": "noninteractive",
    }
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    assert process.stdout is not None
    last = b""
    with process:
        for count, line in enumerate(process.stdout):
            last = line.strip() or last
            if progress is not None:
                progress(stage, count, None)
    if process.returncode:
        raise Unavailable(f"{argv[0]} failed: {last.decode(errors='replace')}")


def _folder() -> Path:
    path = cache_dir() / "tests"
    path.mkdir(parents=True, exist_ok=True)
    return path
