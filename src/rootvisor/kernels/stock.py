# SPDX-License-Identifier: Apache-2.0
"""The distribution's own kernel: its newest cloud kernel that boots as a root partition (6.12 or newer).

It is downloaded and unpacked into the cache, never installed. Debian puts everything in one package; Ubuntu has the
modules in a second one. When nothing can be fetched, a fitting kernel that is installed does as well.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from .apt import Apt, Package
from .cache import (
    kernel_in,
    kernels_dir,
    make_dir,
    need_space,
    no_space,
    publishing,
    read_record,
    storing,
    write_record,
)
from .image import extract, vmlinux_of
from .kernel import DiskFullError, Kernel, KernelError, OfflineError, Progress
from .mirror import find_configured, fresh_configured
from .process import CommandFailed, run
from .versions import kernel_series, version_key

NAME = "stock"
MIN_SERIES = (6, 12)
"""Oldest series whose unmodified kernel boots as a root partition."""

_NEEDED_BYTES = 400 << 20
_RELEASE = r"\d+\.\d+[\w.+~-]*"
#: Package names, the better one first where the versions are the same.
_FLAVOURS = (
    rf"linux-image-(?P<release>{_RELEASE}-cloud-amd64)(?:-unsigned)?",
    rf"linux-image-(?P<release>{_RELEASE}-(?:generic|virtual))",
    rf"linux-image-unsigned-(?P<release>{_RELEASE}-generic)",
)
_PATTERN = "|".join(re.sub(r"\?P<release>", "?:", flavour) for flavour in _FLAVOURS)
_PREFIX = "linux-image-"
_METAPACKAGE_BYTES = 1 << 20  # what is smaller holds no kernel, it depends on the package that does
_INSTALLED_NEED = re.compile(r"^CONFIG_HYPERV=[ym]$", re.MULTILINE)


def candidates(apt: Apt) -> list[Package]:
    """Fitting kernel packages that apt offers, the best first."""
    found = [
        package
        for package in apt.newest(_PATTERN, _PREFIX)
        if (kernel_series(package.name) or (0, 0)) >= MIN_SERIES and package.size_bytes > _METAPACKAGE_BYTES
    ]
    return sorted(
        found, key=lambda package: (version_key(package.version), -_rank(package.name)), reverse=True
    )


def release_of(package: str) -> str:
    """What `uname -r` says under the kernel of a package."""
    for flavour in _FLAVOURS:
        match = re.fullmatch(flavour, package)
        if match:
            return match["release"]
    raise ValueError(package)


def fetch(progress: Progress, refresh: bool = False) -> Kernel:
    """Download and unpack the newest stock kernel, unless it is in the cache already.

    With `refresh` the package lists are fetched anew first. Raises `KernelError`: no network, nothing fitting
    offered, no space.
    """
    try:
        return _fetch(progress, refresh)
    except KernelError as error:
        kernel = installed()
        if kernel is None:
            raise
        progress(f"using the installed kernel {kernel.version} ({error.message})", 0, None)
        return kernel


def _fetch(progress: Progress, refresh: bool) -> Kernel:
    need_space(kernels_dir(), _NEEDED_BYTES, "fetching the stock kernel")
    apt, packages = find_configured(candidates, progress, refresh)
    if not packages:
        raise KernelError(
            f"no kernel package >= {MIN_SERIES[0]}.{MIN_SERIES[1]} is offered here",
            "give a kernel of your own with --kernel PATH",
        )
    try:
        return _obtain(apt, packages[0], progress)
    except (DiskFullError, OfflineError):
        raise
    except KernelError:
        # The system's lists may name a package that the mirror has replaced since.
        apt = fresh_configured(progress)
        packages = candidates(apt)
        if not packages:
            raise
        return _obtain(apt, packages[0], progress)


def installed(pattern: str = "*") -> Kernel | None:
    """The newest fitting kernel that is installed on this machine and whose release matches; None if there is none."""
    for image in sorted(
        Path("/boot").glob(f"vmlinuz-{pattern}"), key=lambda path: version_key(path.name), reverse=True
    ):
        release = image.name.removeprefix("vmlinuz-")
        config, modules = Path(f"/boot/config-{release}"), Path(f"/lib/modules/{release}")
        if (
            (kernel_series(release) or (0, 0)) < MIN_SERIES
            or not os.access(image, os.R_OK)
            or not modules.is_dir()
        ):
            continue
        try:
            if not _INSTALLED_NEED.search(config.read_text()):
                continue
            return Kernel(
                NAME, release, image, vmlinux_of(image), modules, config, "installed on this machine"
            )
        except (OSError, KernelError):
            continue
    return None


def _obtain(apt: Apt, package: Package, progress: Progress) -> Kernel:
    release = release_of(package.name)
    target = kernels_dir() / f"{NAME}-{release}"
    record = read_record(target)
    if record is not None and record[1].get("package_version") == package.version:
        return record[0]
    downloads = make_dir(kernels_dir() / "downloads")
    wanted = [package, *_modules_package(apt, release)]
    files = [apt.download(one, downloads, progress) for one in wanted]
    stage = f"unpacking {package.name}"
    progress(stage, 0, None)
    with publishing(target) as draft:
        unpacked = draft / "unpacked"
        for file in files:
            _unpack(file, unpacked)
        kernel = _arrange(unpacked, draft, release, f"{package.name} {package.version}")
        shutil.rmtree(unpacked)
        write_record(draft, kernel, package=package.name, package_version=package.version)
    for file in files:
        file.unlink(missing_ok=True)
    return kernel_in(target)


def _arrange(unpacked: Path, draft: Path, release: str, origin: str) -> Kernel:
    """Move the parts of unpacked packages to where they stay; modules get their `modules.dep`."""
    for part in ("vmlinuz", "config", "System.map"):
        found = next(iter(unpacked.glob(f"boot/{part}-{release}")), None)
        if found is not None:
            found.rename(draft / part)
    image = draft / "vmlinuz"
    if not image.exists():
        raise KernelError(f"{origin} holds no boot/vmlinuz-{release}", "report this as a bug of Rootvisor")
    modules = draft / "lib" / "modules" / release
    for folder in (unpacked / "lib" / "modules" / release, unpacked / "usr" / "lib" / "modules" / release):
        if folder.is_dir():
            modules.parent.mkdir(parents=True)
            folder.rename(modules)
            # depmod of merged-/usr systems looks in usr/lib
            (draft / "usr").mkdir()
            (draft / "usr" / "lib").symlink_to("../lib")
            _run_depmod(draft, release)
            break
    vmlinux = draft / "vmlinux"
    has_vmlinux = extract(image.read_bytes(), vmlinux)
    config = draft / "config"
    return Kernel(
        NAME,
        release,
        image,
        vmlinux if has_vmlinux else None,
        modules if modules.is_dir() else None,
        config if config.exists() else None,
        origin,
    )


def _modules_package(apt: Apt, release: str) -> Iterator[Package]:
    """Ubuntu's package of modules for a kernel; none on Debian."""
    yield from apt.newest(re.escape(f"linux-modules-{release}"), f"linux-modules-{release}")[:1]


def _unpack(package: Path, folder: Path) -> None:
    try:
        with storing():
            run(["dpkg-deb", "--extract", str(package), str(folder)])
    except CommandFailed as error:
        if "No space left on device" in error.output:
            raise no_space() from error
        raise KernelError(f"cannot unpack {package.name}: {_one_line(error.output)}", "try again") from error


def _run_depmod(root: Path, release: str) -> None:
    depmod = shutil.which("depmod", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if depmod is None:
        raise KernelError("depmod is missing", "apt-get install kmod")
    try:
        run([depmod, "-b", str(root), release])
    except CommandFailed as error:
        raise KernelError(f"depmod failed: {_one_line(error.output)}", "try again") from error


def _one_line(output: str) -> str:
    return " ".join(output.split())[:200]


def _rank(name: str) -> int:
    return next(rank for rank, flavour in enumerate(_FLAVOURS) if re.fullmatch(flavour, name))
