# SPDX-License-Identifier: Apache-2.0
"""The appliance's initial ramdisk: that of every guest of ours, behind it the modules for KVM, and the request."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

from rootvisor.boot.busybox import find_busybox
from rootvisor.boot.cpio import CpioWriter
from rootvisor.boot.errors import InitramfsError
from rootvisor.boot.initramfs import (
    STREAMS_PORTS,
    STREAMS_TTY,
    InitRequest,
    Mount,
    build_base,
    request_archive,
)
from rootvisor.kernels import KernelError, cache_dir

from . import cache
from .command_lines import FIRST_STAGE, ROOT_TAG
from .errors import ApplianceError
from .holder import holder_program
from .modules import WANTED, module_files, module_name, read_module
from .request import Request

#: Goes into the name of the modules' archive in the cache; change it when the archive changes its form.
_FORMAT = 3
_FOLDER = os.path.dirname(FIRST_STAGE)
_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: Runs before the init of `boot`: what a host of virtual machines needs and other guests of ours do not.
#: Modules and the machine of `holder` first, while there is one processor (see command_lines.KERNEL_ARGS); the
#: others come up while the init goes on. Guest memory is shmem, which gets huge pages only where this is allowed,
#: and far exceeds what is used. For a root with devices that watches its deposits, VFIO maps every page by itself.
_FIRST_STAGE = rf"""#!/rootvisor/busybox sh
cd {_FOLDER}
b=/rootvisor/busybox
$b mkdir proc sys
$b mount -t proc proc proc
$b mount -t sysfs sys sys
while read -r module; do
    $b insmod $module || {{ echo "cannot load the kernel module $module"; $b poweroff -f; }}
done <order
$b mknod kvm c 10 232
./hold &
tries=0
until $b ls -l proc/$!/fd | $b grep -q kvm-vcpu || [ $tries -ge 400 ]; do
    tries=$((tries + 1))
    $b usleep 5000
done
echo $! >/rootvisor/spared
(for cpu in sys/devices/system/cpu/cpu[1-9]*/online; do echo 1 >$cpu; done) 2>/dev/null &
echo advise >sys/kernel/mm/transparent_hugepage/shmem_enabled
echo 1 >proc/sys/vm/overcommit_memory
echo 1048576 >proc/sys/vm/max_map_count
mappings=sys/module/vfio_iommu_type1/parameters/dma_entry_limit
[ ! -e $mappings ] || echo 4294967295 >$mappings
cd /
exec /init
"""


def ramdisk(
    request: Request, modules: str, shares: Mapping[str, str], terminal_size: tuple[int, int] | None
) -> list[bytes]:
    """The archives to be laid behind each other. ``modules``: the kernel's folder of modules; ``shares``: tag and
    folder of every share. Raises :class:`ApplianceError`: a part is missing, the cache cannot be written."""
    environment = {"PATH": _SEARCH_PATH, **request.env}
    mounts = [Mount(tag, path, writable=True) for tag, path in shares.items() if tag != ROOT_TAG]
    try:
        folder = str(cache_dir() / "initramfs")
        base = build_base(find_busybox(folder), None, (), folder)
        with open(base, "rb") as file:
            parts = [file.read(), _modules_archive(modules, tuple(request.modules))]
        init = InitRequest(
            rootfs="virtiofs",
            tag=ROOT_TAG,
            mounts=tuple(mounts),
            argv=tuple(request.argv),
            cwd=request.cwd,
            environment=tuple(environment.items()),
            streams=STREAMS_TTY if request.tty else STREAMS_PORTS,
            hostname="appliance",
        )
        files = {}
        if request.tty:
            rows, columns = terminal_size or (24, 80)
            files["/rootvisor/winsize"] = f"{rows} {columns}\n".encode()
        parts.append(request_archive(init, files))
    except (InitramfsError, KernelError) as error:
        raise ApplianceError(str(error)) from error
    except OSError as error:
        raise ApplianceError(f"{error.filename}: {error.strerror}; try again") from error
    return parts


def _modules_archive(folder: str, more: tuple[str, ...] = ()) -> bytes:
    """First stage and modules; kept in the cache, because unpacking the modules takes half a second."""
    files = module_files(folder, WANTED + more)
    key = hashlib.sha256(repr((_FORMAT, _FIRST_STAGE, holder_program())).encode())
    for path in files:
        status = os.stat(path)
        key.update(repr((path, status.st_size, status.st_mtime_ns)).encode())
    name = f"modules-{key.hexdigest()[:32]}.cpio"
    data = cache.load(name)
    if data is not None:
        return data
    archive = CpioWriter()
    archive.character_device("/dev/null", 1, 3, 0o666)
    archive.file(FIRST_STAGE, _FIRST_STAGE.encode(), 0o755)
    archive.file(f"{_FOLDER}/hold", holder_program(), 0o755)
    archive.file(f"{_FOLDER}/order", "".join(f"{module_name(path)}\n" for path in files).encode())
    for path in files:
        archive.file(f"{_FOLDER}/{module_name(path)}", read_module(path))
    data = archive.finish()
    cache.store(name, data)
    return data
