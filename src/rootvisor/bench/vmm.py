# SPDX-License-Identifier: Apache-2.0
"""Prepares the bench of our VMM on this machine (guest, disk, jobs); `vmm_inner` runs it in a root partition."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rootvisor.bench import outer, vmm_inner
from rootvisor.boot.busybox import find_busybox
from rootvisor.boot.busybox_guest import archive
from rootvisor.kernels import cache_dir

GUEST_MIB = 256
DISK_MIB = 64
LOAD_S = 4
"""Seconds of each kind of load."""
ROOT_MIB = 2048
PORT = 8097
"""TCP port on the loopback interface of the root, for the load on networks."""

_APPLIANCE_MIB = 1024
_DEADLINE_S = 2400.0


def measure(
    request: outer.RootRequest,
    vmm: Sequence[str],
    folder: Path,
    *,
    appliance: bool,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Run the bench: guests of each kind on each side. `vmm` is the command line of `rootvisor vmm` up to its options;
    `folder` is private, empty, and visible in the appliance and in the root partition.

    Gives the inner part's results, with `qemu`: None, or why that column is empty. Raises `outer.BenchError`, also
    when there is no C compiler.
    """
    load, problem = outer.compile_program(folder, "guest_load")
    if load is None:
        raise outer.BenchError(f"{problem}", "the load on guests is a program in C")
    (folder / "initramfs").write_bytes(initramfs(Path(load)))
    kernel = str(request.kernel.vmlinux or request.kernel.image)
    sides = {"rootvisor": [*vmm, *vmm_options(kernel, str(folder / "initramfs"))]}
    if request.qemu is not None:
        sides["qemu"] = qemu_argv(request.qemu, kernel, str(folder / "initramfs"))
    job = {
        "sides": sides,
        "restore_argv": list(vmm),
        "serve_argv": [load, "serve", str(PORT)],
        "disk_bytes": DISK_MIB << 20,
        "port": PORT,
        "load_s": LOAD_S,
        "runs": request.runs,
    }
    path = folder / "vmm.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    inner = str(Path(vmm_inner.__file__).resolve())
    results = folder / "results.json"
    around = folder / "around.json"
    command = [*request.python, inner, "root", str(path)]
    around.write_text(
        json.dumps({"root_argv": request.root_argv(command), "results": str(results)}), encoding="utf-8"
    )
    progress("starting the appliance" if appliance else "starting")
    found = outer.run_inner(
        [*request.python, inner, "engine", str(around)],
        folder,
        results,
        appliance=appliance,
        memory_mib=_APPLIANCE_MIB + ROOT_MIB,
        deadline_s=_DEADLINE_S,
        progress=progress,
    )
    return found | {"qemu": request.qemu_problem}


def initramfs(load: Path) -> bytes:
    """The guests' initial ramdisk, for a kernel that has its drivers built in."""
    init = str(Path(__file__).with_name("guest_init"))
    return archive(init, find_busybox(str(cache_dir() / "initramfs")), programs={"/bin/load": str(load)})


def vmm_options(kernel: str, initrd: str) -> list[str]:
    """Our guest, without what a load needs; a console is there by default."""
    return [
        "--kernel",
        kernel,
        "--initramfs",
        initrd,
        "--memory",
        f"size={GUEST_MIB}M",
        "--cmdline",
        vmm_inner.COMMAND_LINE,
    ]


def qemu_argv(program: str, kernel: str, initrd: str) -> list[str]:
    """The same guest under QEMU, in its machine for quick boots."""
    return [
        program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "mshv", "-cpu", "host",
        "-M", "microvm,rtc=on", "-smp", "1", "-m", f"{GUEST_MIB}M", "-kernel", kernel, "-initrd", initrd,
        "-chardev", "stdio,id=console,signal=off", "-device", "virtio-serial-device",
        "-device", "virtconsole,chardev=console", "-append", vmm_inner.COMMAND_LINE,
    ]  # fmt: skip


def command_of_vmm(python: str) -> list[str]:
    """How a user of the root partition starts the VMM: by the launcher next to this Python, where there is one."""
    launcher = Path(python).with_name("rootvisor")
    return [str(launcher), "vmm"] if launcher.is_file() else [python, "-m", "rootvisor", "vmm"]
