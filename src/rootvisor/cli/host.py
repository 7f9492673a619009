# SPDX-License-Identifier: Apache-2.0
"""The checks of `rootvisor doctor`: one function each, none of them changes anything on the machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rootvisor.cli.engine import kvm_verdict
from rootvisor.cli.kernel_choice import found_kernel
from rootvisor.cli.output import format_bytes
from rootvisor.cli.paths import cache_dir
from rootvisor.files import virtiofsd

OK, WARNING, MISSING = "ok", "warning", "missing"

BUILD_SPACE_BYTES = 6 << 30
"""Room that building the mshv kernel takes for a while: source tree, objects, result."""

KEEP_SPACE_BYTES = 512 << 20
"""Room that ramdisks, the appliance's files and a stock kernel take."""

NEEDED_MEMORY_BYTES = 3 << 30
"""Memory of a machine on which the appliance and a small root partition are comfortable."""

_BUILD_TOOLS = ("gcc", "make", "flex", "bison", "bc", "perl", "cpio", "xz")
_BUILD_PACKAGES = "gcc libc6-dev make flex bison bc libelf-dev libssl-dev cpio kmod perl xz-utils"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: `state` is ok, warning or missing; `mend` is the command or the step that helps."""

    name: str
    state: str
    what: str
    mend: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def examine(fresh: bool = False) -> list[Check]:
    """Run every check, in the order in which they are shown."""
    kvm = check_kvm(fresh)
    needed = kvm.state != OK
    checks: list[Callable[[], Check]] = [
        check_processor,
        check_memory,
        lambda: check_qemu(needed),
        check_virtiofsd,
        check_namespaces,
        check_busybox,
        lambda: check_kernel("mshv"),
        lambda: check_kernel("stock"),
        check_build_tools,
        check_apt,
        check_cache,
        check_mappings,
    ]
    return [kvm, *(check() for check in checks)]


def check_kvm(fresh: bool = False) -> Check:
    """Whether KVM runs unmodified kernels here; without it the appliance is used."""
    verdict = kvm_verdict(use_cache=not fresh)
    facts = {"capabilities": verdict.capabilities} if verdict.capabilities else {}
    if verdict.usable:
        return Check("kvm", OK, f"engine kvm: {verdict.reason}", facts=facts)
    return Check("kvm", WARNING, f"engine appliance, for {verdict.reason}", verdict.mend, facts)


def check_processor() -> Check:
    """The architecture and how many processors there are."""
    machine, count = platform.machine(), len(os.sched_getaffinity(0))
    if machine != "x86_64":
        return Check("processor", MISSING, f"{machine}", "Rootvisor runs on x86-64 Linux only")
    return Check(
        "processor", OK, f"{machine}, {count} processor{'s' if count > 1 else ''}", facts={"count": count}
    )


def check_memory() -> Check:
    """Whether the machine is large enough."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    what = f"{format_bytes(total)} in all"
    if total < NEEDED_MEMORY_BYTES:
        mend = f"{format_bytes(NEEDED_MEMORY_BYTES)} are comfortable; use a smaller --memory"
        return Check("memory", WARNING, what, mend, {"bytes": total})
    return Check("memory", OK, what, facts={"bytes": total})


def check_qemu(needed: bool) -> Check:
    """QEMU, which the appliance and the bench use."""
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        mend = "sudo apt-get install qemu-system-x86"
        why = "the appliance needs it" if needed else "only the appliance and the bench need it"
        return Check("qemu", MISSING if needed else WARNING, f"no qemu-system-x86_64; {why}", mend)
    return Check("qemu", OK, f"{_version(path, 'unknown version')} ({path})")


def check_virtiofsd() -> Check:
    """The file server behind --rootfs."""
    try:
        server = virtiofsd.find()
    except virtiofsd.FileServerError as error:
        return Check(
            "virtiofsd", MISSING, f"{error.what}; --rootfs host and DIR need it", f"sudo {error.mend}"
        )
    kind = _version(server.path, "unknown version") if server.rust else "QEMU's own"
    return Check("virtiofsd", OK, f"{kind} ({server.path})")


def check_namespaces() -> Check:
    """User namespaces, without which an ordinary user cannot run the file server in its sandbox."""
    if os.geteuid() == 0:
        return Check("namespaces", OK, "running as root, user namespaces are not needed")
    probe = shutil.which("unshare")
    if probe is None:
        return Check("namespaces", WARNING, "cannot tell: no unshare", "sudo apt-get install util-linux")
    done = subprocess.run(
        [probe, "--user", "--map-root-user", "true"], capture_output=True, check=False, timeout=10
    )
    if done.returncode == 0:
        return Check("namespaces", OK, "an ordinary user may create user namespaces")
    mend = "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    if not Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").exists():
        mend = "sudo sysctl kernel.unprivileged_userns_clone=1"
    return Check("namespaces", WARNING, "an ordinary user may not create user namespaces here", mend)


def check_busybox() -> Check:
    """The busybox of the initial ramdisk (whether it is static is looked at when it is used)."""
    cached = cache_dir() / "initramfs" / "busybox"
    path = str(cached) if cached.exists() else shutil.which("busybox")
    if path is None:
        what = "no busybox; the initial ramdisk's is fetched on first use"
        return Check("busybox", WARNING, what, "sudo apt-get install busybox-static")
    return Check("busybox", OK, path)


def check_kernel(name: str) -> Check:
    """Whether a named kernel is in the cache."""
    kernel = found_kernel(name)
    if kernel is None:
        how = "about 5 minutes on 2 processors" if name == "mshv" else "a download of about 30 MiB"
        what = f"not in the cache; made on first use ({how})"
        return Check(f"kernel {name}", WARNING, what, f"rootvisor kernel build {name}")
    return Check(f"kernel {name}", OK, f"Linux {kernel.version}", facts={"image": kernel.image})


def check_build_tools() -> Check:
    """What building the mshv kernel takes."""
    lacking = [tool for tool in _BUILD_TOOLS if shutil.which(tool) is None]
    if not lacking:
        return Check("build tools", OK, "complete")
    state = WARNING if found_kernel("mshv") is not None else MISSING
    what = f"no {', '.join(lacking)}; the mshv kernel is built with them"
    return Check("build tools", state, what, f"sudo apt-get install {_BUILD_PACKAGES}")


def check_apt() -> Check:
    """Where kernels come from: the package sources of this machine."""
    if shutil.which("apt-get") is None:
        what = "no apt; kernels cannot be fetched here"
        return Check("packages", WARNING, what, "give a kernel of your own with --kernel PATH")
    if not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        return Check("packages", WARNING, "apt has no package lists", "sudo apt-get update")
    return Check("packages", OK, f"apt, {_distribution()}")


def check_cache() -> Check:
    """Whether the cache can be written and has room."""
    folder = cache_dir()
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        mend = "set ROOTVISOR_CACHE to a folder that you can write"
        return Check("cache", MISSING, f"{folder} cannot be written", mend)
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    facts = {"path": str(folder), "free_bytes": free}
    needed = KEEP_SPACE_BYTES if found_kernel("mshv") is not None else BUILD_SPACE_BYTES
    what = f"{folder}, {format_bytes(free)} free"
    if free < needed:
        mend = f"{format_bytes(needed)} are needed: free some, or set ROOTVISOR_CACHE to a folder on a larger disk"
        return Check("cache", MISSING, what, mend, facts)
    return Check("cache", OK, what, facts=facts)


def check_mappings() -> Check:
    """`vm.max_map_count`: child partitions' memory is made of many small mappings."""
    try:
        count = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return Check("mappings", WARNING, "cannot read vm.max_map_count")
    if count < 262144:
        mend = "only large child partitions need more: sudo sysctl vm.max_map_count=1048576"
        return Check("mappings", WARNING, f"vm.max_map_count is {count}", mend)
    return Check("mappings", OK, f"vm.max_map_count is {count}")


def _distribution() -> str:
    try:
        facts = platform.freedesktop_os_release()
    except OSError:
        return "unknown distribution"
    return facts.get("PRETTY_NAME", facts.get("ID", "unknown distribution"))


def _version(path: str, unknown: str) -> str:
    """The first line of what `path --version` prints."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return unknown
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0].partition(" (")[0].strip() if lines else unknown
