# SPDX-License-Identifier: Apache-2.0
"""Builds the `mshv` kernel: a small configuration with the driver of the root partition.

A build is known by the source version, the configuration and the compiler; an interrupted one goes on where it
stopped. From a source package only the package and the finished kernel stay (170 MB and 40 MB): the tree and the
objects (1.5 GB) can be made again without a network. A tree of the user's own is built outside of it, and its
objects stay, so that a change costs seconds.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from . import linux_source
from .cache import (
    kernel_in,
    kernels_dir,
    make_dir,
    need_space,
    no_space,
    publishing,
    read_record,
    remove_tree,
    storing,
    write_record,
)
from .image import extract
from .kernel import Kernel, KernelError, Progress
from .process import CommandFailed, clean_environment, read, run

NAME = "mshv"
LOCAL_NAME = "local"
FRAGMENT = Path(__file__).with_name("mshv.config")
"""The configuration: everything that is not in it is off (`make allnoconfig`)."""

_REQUIRED = "CONFIG_MSHV_ROOT"
_EXPECTED_OBJECTS = 1690  # lines that match below, in a build of Linux 7.3
_OBJECT_LINE = re.compile(r"^\s+(?:CC|AS|HOSTCC)(?: \[M\])?\s+\S+\.o\b")
_TOOLS = {
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "perl": "perl-base",
    "lz4": "lz4",
}
_HEADERS = {"gelf.h": "libelf-dev", "stdlib.h": "libc6-dev"}


def fragment_hash() -> str:
    """Names the configuration in cache keys; comments do not count."""
    options = "".join(f"{name}={value}\n" for name, value in sorted(_options(FRAGMENT.read_text())))
    return hashlib.sha256(options.encode()).hexdigest()[:12]


def build_newest(progress: Progress, refresh: bool) -> Kernel:
    """Build from the newest source package; with `refresh` the mirror is asked even if one is downloaded already.

    Raises `KernelError`.
    """
    check_tools()
    source = None if refresh else linux_source.downloaded()
    if source is None:
        source = linux_source.newest(progress)
    version = source.package.version
    key = _key(version)
    target = kernels_dir() / f"{NAME}-{_file_name(version)}-{key}"
    record = read_record(target)
    if record is not None:
        return record[0]
    tree = linux_source.unpack(source, progress)
    objects = source.folder / f"objects-{key}"
    _drop_other_objects(objects)
    origin = f"built from {source.package.name} {version}"
    _compile(tree, objects, f"building Linux {version}", progress)
    kernel = _publish(NAME, target, objects, origin, {"source_version": version})
    linux_source.keep_only_package(source)
    return kernel


def build_tree(tree: Path, progress: Progress) -> Kernel:
    """Build from a source tree of the user's, which stays as it is. Raises `KernelError`."""
    check_tools()
    tree = tree.resolve()
    if not (tree / "Kconfig").is_file() or not (tree / "Makefile").is_file():
        raise KernelError(
            f"{tree} is not a Linux source tree", "give the folder that holds Kconfig and Makefile"
        )
    name = f"{LOCAL_NAME}-{hashlib.sha256(str(tree).encode()).hexdigest()[:12]}"
    objects = linux_source.work_dir() / name / "objects"
    need_space(make_dir(objects), 1 << 30, "building a kernel")
    _compile(tree, objects, f"building {tree}", progress)
    return _publish(LOCAL_NAME, kernels_dir() / name, objects, f"built from {tree}", {})


def check_tools() -> None:
    """Refuse to begin without what a build needs; names every missing package at once."""
    missing = [package for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    missing += [package for header, package in _HEADERS.items() if not _has_header(header)]
    if missing:
        raise KernelError(
            f"building a kernel needs {', '.join(missing)}",
            f"apt-get install {' '.join(missing)} (or: make setup)",
        )


def missing_options(fragment: str, config: str, is_known: Callable[[str], bool]) -> list[str]:
    """Options of the fragment that the configuration does not have as asked.

    Options that this version of Linux does not know (`is_known`) are passed over, except the one that the kernel
    is built for.
    """
    have = dict(_options(config))
    missing = []
    for name, wanted in _options(fragment):
        got = have.get(name, "n")
        if got != wanted and (name == _REQUIRED or is_known(name)):
            missing.append(f"{name}={wanted}")
    return missing


def _options(text: str) -> list[tuple[str, str]]:
    found = []
    for line in text.splitlines():
        if match := re.match(r"(CONFIG_\w+)=(.*)", line):
            found.append((match[1], match[2].strip()))
        elif match := re.match(r"# (CONFIG_\w+) is not set", line):
            found.append((match[1], "n"))
    return found


def _compile(tree: Path, objects: Path, stage: str, progress: Progress) -> None:
    make_dir(objects)
    log_path = objects.with_name("build.log")
    command = ["make", "-C", str(tree), f"O={objects}"]
    _configure(command, tree, objects, log_path)
    total = _EXPECTED_OBJECTS
    done = _count_objects(objects)
    with storing():
        log = log_path.open("w", buffering=1)
    with log:

        def on_line(line: str) -> None:
            nonlocal done
            with storing():
                log.write(line + "\n")
            if _OBJECT_LINE.match(line):
                done += 1
                progress(stage, min(done, total), total)

        progress(stage, min(done, total), total)
        # One job more than processors, for those that wait for the disk.
        jobs = f"-j{len(os.sched_getaffinity(0)) + 1}"
        try:
            run([*command, jobs, "bzImage"], env=_make_environment(), on_line=on_line)
        except CommandFailed as error:
            raise _build_error(error, log_path) from error


def _configure(command: list[str], tree: Path, objects: Path, log_path: Path) -> None:
    """`allnoconfig` with the fragment; leaves an unchanged `.config` alone, so that make has nothing to redo."""
    config = objects / ".config"
    stamp = objects / ".rootvisor-fragment"
    if config.exists() and stamp.exists() and stamp.read_text() == fragment_hash():
        return
    try:
        run([*command, f"KCONFIG_ALLCONFIG={FRAGMENT}", "allnoconfig"], env=_make_environment())
    except CommandFailed as error:
        with storing():
            log_path.write_text(error.output)
        raise _build_error(error, log_path) from error
    missing = missing_options(FRAGMENT.read_text(), config.read_text(), _KnownOptions(tree))
    if missing:
        config.unlink()
        raise KernelError(
            f"this Linux does not take {', '.join(missing)} of {FRAGMENT.name}",
            "another option that it depends on is off: add that one to the fragment",
        )
    with storing():
        stamp.write_text(fragment_hash())


class _KnownOptions:
    """Whether a source tree has an option; reads the Kconfig files when first asked."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._names: frozenset[str] | None = None

    def __call__(self, option: str) -> bool:
        if self._names is None:
            definition = re.compile(r"^\s*(?:menu)?config\s+(\w+)\s*$", re.MULTILINE)
            self._names = frozenset(
                name
                for path in self._tree.rglob("Kconfig*")
                if path.is_file()
                for name in definition.findall(path.read_text(errors="replace"))
            )
        return option.removeprefix("CONFIG_") in self._names


def _publish(name: str, target: Path, objects: Path, origin: str, facts: dict[str, str]) -> Kernel:
    with publishing(target) as draft:
        shutil.copy2(objects / "arch/x86/boot/bzImage", draft / "bzImage")
        shutil.copy2(objects / "System.map", draft / "System.map")
        shutil.copy2(objects / ".config", draft / "config")
        image = draft / "bzImage"
        vmlinux = draft / "vmlinux" if extract(image.read_bytes(), draft / "vmlinux") else None
        kernel = Kernel(
            name,
            (objects / "include/config/kernel.release").read_text().strip(),
            image,
            vmlinux,
            None,
            draft / "config",
            origin,
        )
        write_record(draft, kernel, fragment=fragment_hash(), **facts)
    return kernel_in(target)


def _build_error(error: CommandFailed, log_path: Path) -> KernelError:
    if "No space left on device" in error.output:
        return no_space()
    lines = [line.strip() for line in error.output.splitlines() if line.strip()]
    reason = next((line for line in lines if re.search(r"\berror: |\bfatal error\b|\*\*\* ", line)), "")
    return KernelError(
        f"the kernel does not build: {reason or (lines or ['no output'])[-1]}",
        f"the whole output is in {log_path}",
    )


def _make_environment() -> dict[str, str]:
    # Nothing of this machine goes into the image.
    return {
        **clean_environment(),
        "KBUILD_BUILD_USER": "rootvisor",
        "KBUILD_BUILD_HOST": "rootvisor",
    }


def _key(version: str) -> str:
    compiler = read(["gcc", "--version"]).splitlines()[0]
    return hashlib.sha256(f"{version}\n{fragment_hash()}\n{compiler}".encode()).hexdigest()[:12]


def _file_name(version: str) -> str:
    return re.sub(r"[^\w.+~-]", "_", version)


def _drop_other_objects(keep: Path) -> None:
    for path in keep.parent.glob("objects-*"):
        if path != keep:
            remove_tree(path)


def _count_objects(objects: Path) -> int:
    return sum(1 for _ in objects.rglob("*.o")) if objects.is_dir() else 0


def _has_header(name: str) -> bool:
    return any((Path(folder) / name).exists() for folder in ("/usr/include", "/usr/local/include"))
