# SPDX-License-Identifier: Apache-2.0
"""The appliance's initial ramdisk: one that every run shares, from the cache, and a small one per request."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Mapping

from . import cache
from .errors import ApplianceError
from .modules import module_files, module_name, read_module
from .request import Request

_FORMAT = 1  # goes into the name in the cache; change it when the contents of the shared ramdisk change


def base_ramdisk(modules: str, busybox: str) -> bytes:
    """The archive with busybox, the init and the kernel's modules, built when the cache does not have it.

    Raises :class:`ApplianceError`: module missing, cache cannot be written.
    """
    files = module_files(modules)
    key = hashlib.sha256(repr((_FORMAT, _INIT, _AGENT)).encode())
    for path in (busybox, *files):
        try:
            status = os.stat(path)
        except OSError as error:
            raise ApplianceError(f"{path}: {error.strerror}; install its package anew") from error
        key.update(repr((path, status.st_size, status.st_mtime_ns)).encode())
    name = f"ramdisk-{key.hexdigest()[:16]}.cpio"
    try:
        with open(os.path.join(cache.folder(), name), "rb") as file:
            return file.read()
    except OSError:
        pass
    with open(busybox, "rb") as file:
        archive = _Archive({"bin/busybox": (0o755, file.read()), "init": (0o755, _INIT.encode())})
    archive.add("rootvisor/agent", 0o755, _AGENT.encode())
    archive.add("rootvisor/modules", 0o644, "".join(f"{module_name(path)}\n" for path in files).encode())
    for path in files:
        archive.add(f"lib/{module_name(path)}", 0o644, read_module(path))
    data = archive.finish()
    cache.store(name, data)
    return data


def request_ramdisk(request: Request, shares: Mapping[str, str], size: tuple[int, int] | None) -> bytes:
    """The archive with the request. ``shares``: folder per tag; ``size``: rows and columns of the terminal."""
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **request.env}
    words = ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), *request.argv]
    script = f"cd {shlex.quote(request.cwd)} || exit 125\nexec {shlex.join(words)}\n"
    archive = _Archive({"rootvisor/command": (0o644, os.fsencode(script))})
    lines = "".join(f"{tag} {folder}\n" for tag, folder in shares.items())
    archive.add("rootvisor/shares", 0o644, os.fsencode(lines))
    if request.tty:
        rows, columns = size or (24, 80)
        archive.add("rootvisor/terminal", 0o644, f"{rows} {columns}\n".encode())
    return archive.finish()


class _Archive:
    """A cpio archive in the kernel's newc format (Documentation/driver-api/early-userspace)."""

    def __init__(self, files: Mapping[str, tuple[int, bytes]]) -> None:
        self._parts: list[bytes] = []
        self._folders: set[str] = set()
        self._inode = 0
        for name, (mode, data) in files.items():
            self.add(name, mode, data)

    def add(self, name: str, mode: int, data: bytes) -> None:
        """Add a file, and the folders it lies in."""
        folder = os.path.dirname(name)
        if folder and folder not in self._folders:
            self._folders.add(folder)
            self._entry(folder, 0o040755, b"")
        self._entry(name, 0o100000 | mode, data)

    def _entry(self, name: str, mode: int, data: bytes) -> None:
        self._inode += 1
        raw = os.fsencode(name) + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]

    def finish(self) -> bytes:
        """The whole archive."""
        self._entry("TRAILER!!!", 0, b"")
        return b"".join(self._parts)


_INIT = r"""#!/bin/busybox sh
# First program of the appliance: modules, file systems, then /rootvisor/agent on the host's files.
export PATH=/bin
B=/bin/busybox
$B mkdir -p /dev /proc /sys /run /lower /newroot
$B mount -t devtmpfs dev /dev; $B mount -t proc proc /proc; $B mount -t sysfs sys /sys
$B mount -t tmpfs -o mode=755 run /run
while read -r module; do $B insmod /lib/$module || echo "insmod $module failed" >/dev/console; done </rootvisor/modules
(for cpu in /sys/devices/system/cpu/cpu[1-9]*/online; do echo 1 >$cpu; done) 2>/dev/null &
cpus=$!
$B mount -t virtiofs -o ro root /lower || { echo "cannot mount the host's files" >/dev/console; $B poweroff -f; }
$B mkdir -p /run/rootvisor/upper /run/rootvisor/work
$B mount -t overlay -o lowerdir=/lower,upperdir=/run/rootvisor/upper,workdir=/run/rootvisor/work root /newroot ||
    { echo "cannot mount the overlay" >/dev/console; $B poweroff -f; }
$B cp -a /bin/busybox /rootvisor/* /run/rootvisor/
while read -r tag folder; do
    $B mkdir -p "/newroot$folder"; $B mount -t virtiofs "$tag" "/newroot$folder" || $B poweroff -f
done </rootvisor/shares
for m in dev proc sys run; do $B mkdir -p /newroot/$m; $B mount --move /$m /newroot/$m; done
wait $cpus
exec $B switch_root /newroot /run/rootvisor/busybox sh /run/rootvisor/agent
"""

_AGENT = r"""# Runs the command with the host's streams, and powers off.
B=/run/rootvisor/busybox
R=/run/rootvisor
$B mkdir -p /dev/shm /dev/pts
$B mount -t tmpfs -o mode=1777 shm /dev/shm; $B mount -t devpts -o mode=620,gid=5 pts /dev/pts
$B ln -sfn /proc/self/fd /dev/fd; $B ln -sfn fd/0 /dev/stdin; $B ln -sfn fd/1 /dev/stdout; $B ln -sfn fd/2 /dev/stderr
$B ip link set lo up
$B chmod 666 /dev/kvm
echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled
echo 1 >/proc/sys/vm/overcommit_memory
echo 1048576 >/proc/sys/vm/max_map_count
for name in /sys/class/virtio-ports/*/name; do
    read -r port <$name; device=${name%/name}; device=/dev/${device##*/}
    case $port in
    rootvisor.control) control=$device;; rootvisor.stdin) in=$device;;
    rootvisor.stdout) out=$device;; rootvisor.stderr) err=$device;;
    esac
done
exec 3<>$control
echo ready >&3
if [ -f $R/terminal ]; then
    read -r rows columns <$R/terminal
    $B stty -F /dev/hvc0 rows $rows cols $columns
    $B setsid -c $B sh $R/command </dev/hvc0 >/dev/hvc0 2>&1 3>&- &
    pid=$!
else
    $B mkfifo $R/in $R/out $R/err
    $B cat $in >$R/in 3>&- & input=$!
    $B cat $R/out >$out 3>&- & output=$!
    $B cat $R/err >$err 3>&- & errors=$!
    $B setsid $B sh $R/command <$R/in >$R/out 2>$R/err 3>&- &
    pid=$!
fi
while read -r word one two; do
    case $word in
    signal) kill -$one -$pid || kill -$one $pid;;
    winsize) $B stty -F /dev/hvc0 rows $one cols $two;;
    esac
done <&3 3>&- &
wait $pid
status=$?
[ -n "$output" ] && wait $output $errors
$B sync
echo "exit $status" >&3
$B poweroff -f
"""
