# SPDX-License-Identifier: Apache-2.0
"""Small stand-ins: an apt that serves packages from a folder, `.deb` files, kernel images, a source tree."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

from rootvisor.kernels.apt import Package

_APT_GET = """\
#!/bin/sh
# apt-get -c CONF [-q] COMMAND [ARGUMENT]
state=$(sed -n 's/^Dir::State "\\(.*\\)";$/\\1/p' "$2")
shift 2
[ "$1" = -q ] && shift
echo "apt-get $*" >>"{root}/calls"
case $1 in
update)
    if [ -e "{root}/offline" ]; then
        echo "W: Failed to fetch http://mirror.test/dists/sid/InRelease  Temporary failure resolving 'mirror.test'"
        exit 0
    fi
    if [ -e "{root}/nosuites" ]; then
        echo "E: The repository 'http://mirror.test sid Release' does not have a Release file."
        exit 100
    fi
    : >"$state/lists/mirror.test_Packages"
    ;;
indextargets) cat "{root}/targets" ;;
download)
    name=${{2%%=*}}
    if [ -e "{root}/offline" ]; then
        echo "Err:1 http://mirror.test $name"
        echo "  Could not connect to mirror.test:80"
        echo "E: Failed to fetch http://mirror.test/$name.deb  Could not connect to mirror.test:80"
        exit 100
    fi
    if [ -e "{root}/full" ]; then
        echo "E: Failed to fetch x  Error writing to file - write (28: No space left on device)"
        exit 100
    fi
    shift
    for name; do cp "{root}/pool/${{name%%=*}}.deb" .; done
    ;;
--simulate)
    for stanza in "{root}"/pool/*.stanza; do
        sed -n 's/^Package: //p; s/^Version: //p' "$stanza" | {{
            read -r name
            read -r version
            echo "Inst $name ($version Debian:13/stable [amd64]) []"
        }}
    done
    ;;
esac
"""

_APT_CACHE = """\
#!/bin/sh
shift 2
case $1 in
pkgnames) ls "{root}/pool" | sed -n "s/^\\($2.*\\)\\.deb$/\\1/p" ;;
show)
    shift
    [ "$1" = --no-all-versions ] && shift
    for name; do cat "{root}/pool/${{name%%=*}}.stanza"; echo; done
    ;;
madison)
    version=$(sed -n 's/^Version: //p' "{root}/pool/$2.stanza" 2>/dev/null) || exit 0
    echo " $2 | $version | http://mirror.test/debian sid/main amd64 Packages"
    ;;
esac
"""


class FakeApt:
    """`apt-get` and `apt-cache` in a folder for PATH; they offer what `add` put into the pool."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.pool = root / "pool"
        self.bin.mkdir(parents=True)
        self.pool.mkdir()
        (root / "targets").write_text("Debian|http://mirror.test/debian/|bookworm\n")
        for name, text in (("apt-get", _APT_GET), ("apt-cache", _APT_CACHE)):
            script(self.bin / name, text.format(root=root))

    def add(self, name: str, version: str, deb: Path) -> Package:
        data = deb.read_bytes()
        package = Package(name, version, len(data), hashlib.sha256(data).hexdigest())
        (self.pool / f"{name}.deb").write_bytes(data)
        (self.pool / f"{name}.stanza").write_text(
            f"Package: {name}\nVersion: {version}\nFilename: pool/{name}.deb\n"
            f"Size: {package.size_bytes}\nSHA256: {package.sha256}\n"
        )
        return package

    def switch(self, state: str, on: bool = True) -> None:
        """`offline`, `nosuites` (the mirror has none of them) or `full` (no disk space)."""
        if on:
            (self.root / state).touch()
        else:
            (self.root / state).unlink()

    def calls(self) -> list[str]:
        try:
            return (self.root / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make_deb(target: Path, files: dict[str, bytes], symlinks: dict[str, str] | None = None) -> Path:
    """A binary package with the given files, padded so that it does not look like a metapackage."""
    folder = target.with_suffix(".files")
    (folder / "DEBIAN").mkdir(parents=True)
    (folder / "DEBIAN" / "control").write_text(
        "Package: fake\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: fake\n"
    )
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for name, points_to in (symlinks or {}).items():
        (folder / name).symlink_to(points_to)
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(folder), str(target)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    return target


def make_tarball(files: dict[str, bytes], mode: str = "w:xz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(f"linux-source-7.3/{name}")
            member.size = len(data)
            member.mode = 0o755 if name.startswith("scripts/") else 0o644
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def make_elf(text: bytes = b"kernel text", machine: int = 62) -> bytes:
    """An ELF-64 file with one loadable segment behind its program header."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, machine, 1, 0x1000000, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 120, 0x1000000, 0x1000000, len(text), len(text), 4096)
    return header + segment + text


def make_bzimage(
    kernel: bytes,
    compress: Callable[[bytes], bytes] = gzip.compress,
    *,
    version: str = "6.12.1-test-cloud-amd64",
) -> bytes:
    """A bzImage with a payload, as far as the set-up header tells: 4 set-up sectors, payload 64 bytes behind them."""
    payload = compress(kernel)
    if compress is not gzip.compress:
        payload += struct.pack("<I", len(kernel))
    image = bytearray(5 * 512 + 64)
    image[0x1F1] = 4
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    struct.pack_into("<H", image, 0x20E, 0x400)  # the version text lies at 0x600
    text = f"{version} (someone@somewhere) #1 SMP".encode() + b"\0"
    image[0x600 : 0x600 + len(text)] = text
    struct.pack_into("<II", image, 0x248, 64, len(payload))
    return bytes(image) + payload


_MAKEFILE = """\
# A kernel build in miniature: two objects, an option that depends on another.
allnoconfig:
\t@mkdir -p $(O)
\t@cp $(KCONFIG_ALLCONFIG) $(O)/.config
\t@echo configured >>$(O)/steps
bzImage: $(O)/a.o $(O)/b.o
\t@mkdir -p $(O)/arch/x86/boot $(O)/include/config
\t@cp $(CURDIR)/bzImage.sample $(O)/arch/x86/boot/bzImage
\t@echo 7.3.0-mshv >$(O)/include/config/kernel.release
\t@touch $(O)/System.map
$(O)/a.o:
\t@echo "  CC      a.o"; echo a >>$(O)/steps; touch $@
$(O)/b.o: $(O)/a.o $(wildcard $(CURDIR)/broken)
\t@if [ -e $(CURDIR)/broken ]; then cat $(CURDIR)/broken; exit 1; fi
\t@echo "  CC      b.o"; echo b >>$(O)/steps; touch $@
"""


def source_files() -> dict[str, bytes]:
    """A source tree whose Makefile acts like kbuild's."""
    return {
        "Makefile": _MAKEFILE.encode(),
        "Kconfig": b"config MSHV_ROOT\n\tbool\n",
        "bzImage.sample": make_bzimage(make_elf(), version="7.3.0-mshv"),
        "arch/x86/Kconfig": b"",
        "arch/arm64/kernel/entry.S": b"left out",
        "arch/arm64/Kconfig": b"",
        "Documentation/Kconfig": b"",
        "Documentation/mm/page.rst": b"left out",
        "drivers/gpu/drm/amd/amdgpu.c": b"left out",
        "drivers/gpu/drm/tiny/bochs.c": b"",
        "drivers/gpu/drm/Kconfig": b"",
        "include/sound/core.h": b"",
        "sound/core/init.c": b"left out",
        "scripts/run.sh": b"#!/bin/sh\n",
    }


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def environment_path(first: Path) -> str:
    return f"{first}{os.pathsep}{os.environ['PATH']}"
