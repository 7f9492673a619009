# SPDX-License-Identifier: Apache-2.0
"""The distribution's packaged kernel source: finds the newest, fetches it, unpacks what an x86-64 build needs.

"Newest" goes by the package version, over every suite of the mirror; a release candidate counts, because the
drivers of the root partition change from release to release and that is what one wants to look at.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from .apt import Apt, Package, has_content
from .cache import kernels_dir, make_dir, need_space, no_space, remove_tree, storing
from .kernel import KernelError, Progress
from .mirror import find_newest
from .process import captured, kill_group, popen, text_of
from .versions import kernel_series, version_key

MIN_SERIES = (6, 15)
"""First series with the driver of the root partition (`CONFIG_MSHV_ROOT`)."""

NEEDED_BYTES = 2 << 30
"""Disk space for package, tree and objects."""

_PREFIX = "linux-"
_PATTERN = r"linux-source-\d+\.\d+(?:\.\d+)?|linux-hwe-\d+\.\d+-source-\d+\.\d+\.\d+"
_TARBALL = re.compile(r"(?:.*/)?linux-source-[^/]*\.tar\.(xz|bz2|gz|zst)")
_CHUNK_BYTES = 1 << 20
_UNPACKERS = {"xz": "--xz", "bz2": "--bzip2", "gz": "--gzip", "zst": "--zstd"}

#: Two thirds of the tree, of which an x86-64 build with our configuration reads nothing but Kconfig files.
_LEFT_OUT = (
    "*/arch/[!x]*/*.[chS]",
    "*/arch/[!x]*/*.dts*",
    "*/arch/[!x]*/configs",
    "*/Documentation/*/*",
    "*/tools/testing/*",
    "*/tools/perf/*",
    "*/sound/*/*.[ch]",
    "*/drivers/gpu/drm/[ainmrx]*/*.[ch]",
    "*/drivers/media/*/*.[ch]",
    "*/drivers/staging/*/*.[ch]",
    "*/drivers/infiniband/*/*.[ch]",
    "*/drivers/net/wireless/*/*.[ch]",
)


@dataclass(frozen=True, slots=True)
class SourcePackage:
    """A source package in the cache's work folder: where its `.deb` and its tree are, or will be."""

    package: Package
    folder: Path

    @property
    def deb(self) -> Path:
        """The downloaded package."""
        return self.folder / "source.deb"

    @property
    def tree(self) -> Path:
        """The unpacked source, whole if it is there."""
        return self.folder / "tree"


def candidates(apt: Apt) -> list[Package]:
    """Source packages new enough, newest first."""
    return [
        package
        for package in apt.newest(_PATTERN, _PREFIX)
        if (kernel_series(package.name) or (0, 0)) >= MIN_SERIES
    ]


def newest(progress: Progress) -> SourcePackage:
    """The newest source package of the mirror, downloaded. Raises `KernelError`: no network, none offered, no space."""
    need_space(work_dir(), NEEDED_BYTES, "building a kernel")
    apt, packages = find_newest(candidates, progress)
    if not packages:
        raise KernelError(
            f"the package mirror offers no linux-source >= {MIN_SERIES[0]}.{MIN_SERIES[1]} in any suite",
            "give one with --kernel PATH, or build one with: rootvisor kernel build mshv --source DIR",
        )
    package = packages[0]
    source = SourcePackage(package, make_dir(work_dir() / package.file_stem))
    if not has_content(source.deb, package):
        file = apt.download(package, source.folder, progress)
        with storing():
            file.rename(source.deb)
            (source.folder / "package.json").write_text(json.dumps(asdict(package)))
    return source


def downloaded() -> SourcePackage | None:
    """The newest source package whose download is complete, without asking the mirror."""
    found = []
    for record in work_dir().glob("*/package.json"):
        try:
            source = SourcePackage(Package(**json.loads(record.read_text())), record.parent)
        except (OSError, ValueError, TypeError):
            continue
        if has_content(source.deb, source.package):
            found.append(source)
    return max(found, key=lambda source: version_key(source.package.version), default=None)


def work_dir() -> Path:
    """Where kernels are built."""
    return make_dir(kernels_dir() / "work")


def unpack(source: SourcePackage, progress: Progress) -> Path:
    """The source tree, unpacked if it is not there yet; it appears under its name only when it is whole."""
    if source.tree.is_dir():
        return source.tree
    need_space(source.folder, NEEDED_BYTES, f"building {source.package.name}")
    draft = source.folder / ".tree.new"
    remove_tree(draft)
    make_dir(draft)
    _unpack_tarball(source.deb, draft, f"unpacking {source.package.name}", progress)
    with storing():
        draft.rename(source.tree)
    return source.tree


def keep_only_package(source: SourcePackage) -> None:
    """Remove everything but the package itself, from which the rest can be had again without a network.

    Older packages go too.
    """
    for path in source.folder.iterdir():
        if path.is_dir():
            remove_tree(path)
    for record in work_dir().glob("*/package.json"):
        if record.parent != source.folder:
            remove_tree(record.parent)


def _unpack_tarball(deb: Path, target: Path, stage: str, progress: Progress) -> None:
    """Stream the tarball out of the package into tar; nothing of it touches the disk on the way."""
    progress(stage, 0, None)
    archive = popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stderr=subprocess.DEVNULL)
    assert archive.stdout is not None
    try:
        with tarfile.open(fileobj=archive.stdout, mode="r|", bufsize=_CHUNK_BYTES) as members:
            for member in members:
                match = _TARBALL.fullmatch(member.name)
                content = members.extractfile(member) if match and member.isreg() else None
                if match and content is not None:
                    _feed_tar(content, member.size, _UNPACKERS[match[1]], target, stage, progress)
                    return
    except tarfile.TarError as error:
        raise KernelError(f"{deb} is damaged: {error}", "remove it and try again") from error
    finally:
        kill_group(archive)
    raise KernelError(f"{deb} holds no kernel source", "report this as a bug of Rootvisor")


def _feed_tar(
    content: IO[bytes], size: int, unpacker: str, target: Path, stage: str, progress: Progress
) -> None:
    command = ["tar", "-x", unpacker, "-C", str(target), "--strip-components=1", "--no-same-owner"]
    command += [f"--exclude={pattern}" for pattern in _LEFT_OUT]
    with captured() as messages:
        tar = popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=messages.fileno())
        assert tar.stdin is not None
        try:
            done = 0
            while chunk := content.read(_CHUNK_BYTES):
                tar.stdin.write(chunk)
                done += len(chunk)
                progress(stage, done, size)
            tar.stdin.close()
            status = tar.wait()
        except BrokenPipeError:
            status = tar.wait()
        finally:
            kill_group(tar)
        text = text_of(messages)
    if "No space left on device" in text:
        raise no_space()
    if status != 0:
        tool = {"--xz": "xz-utils", "--bzip2": "bzip2", "--zstd": "zstd"}.get(unpacker)
        mend = f"apt-get install {tool}" if tool and shutil.which(unpacker[2:]) is None else "try again"
        reason = next(iter(text.splitlines()), f"status {status}")
        raise KernelError(f"tar cannot unpack the kernel source: {reason}", mend)
