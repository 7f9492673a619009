# SPDX-License-Identifier: Apache-2.0
"""Network, shared files, sockets, entropy, balloon."""

from __future__ import annotations

import os
import socket
import time

from tests.vmm.guest import FOLDER, PATIENCE_S, Guest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Job = dict[str, Any]


def _url(job: Job) -> str:
    return f"http://10.0.2.2:{job['port']}/page"


def test_net_fetches_a_page_from_the_root(job: Job) -> None:
    work = f"""\
network
sum=$(timeout {PATIENCE_S:.0f} wget -q -O - {_url(job)} | md5sum); echo "guest: page ${{sum%% *}}"
read -r mac </sys/class/net/eth0/address; echo "guest: mac $mac"
"""
    with Guest(job, work, "--net", "mac=52:54:00:aa:bb:cc", kernel="mshv-elf") as guest:
        assert guest.hears("page") == job["page_md5"]
        assert guest.hears("mac") == "52:54:00:aa:bb:cc"
        guest.ends()


def test_net_gives_an_address_by_dhcp(job: Job) -> None:
    work = """\
await /sys/class/net/eth0
ifconfig eth0 up
printf '#!/bin/sh\\n[ "$1" = bound ] && echo "guest: lease $ip $router" >/dev/console\\ntrue\\n' >/lease
chmod +x /lease
udhcpc -i eth0 -n -q -t 20 -s /lease >/dev/null 2>&1 || echo "guest: problem no lease"
"""
    with Guest(job, work, "--net", "default", kernel="mshv-elf") as guest:
        assert guest.hears("lease") == "10.0.2.15 10.0.2.2"
        guest.ends()


def test_shared_folder_is_read_and_written(job: Job) -> None:
    folder = f"{FOLDER}/shared"
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/from-root", "w") as file:
        file.write("written in the root\n")
    work = """\
mount -t virtiofs share /mnt && read -r line </mnt/from-root && echo "guest: read $line"
echo "written in the guest" >/mnt/from-guest && sync && echo "guest: wrote"
dd if=/dev/urandom of=/mnt/large bs=64k count=16 2>/dev/null; sum=$(md5sum /mnt/large); echo "guest: large ${sum%% *}"
umount /mnt
"""
    with Guest(job, work, "--fs", f"tag=share,path={folder}", kernel="mshv-elf", memory="192M") as guest:
        assert guest.hears("read") == "written in the root"
        guest.hears("wrote")
        large = guest.hears("large")
        guest.ends()
    from hashlib import md5

    with open(f"{folder}/from-guest") as file:
        assert file.read() == "written in the guest\n"
    with open(f"{folder}/large", "rb") as data:
        assert md5(data.read(), usedforsecurity=False).hexdigest() == large


def test_vsock_connects_both_ways(job: Job) -> None:
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    with listener:
        listener.bind((socket.VMADDR_CID_ANY, 5001))
        listener.listen(1)
        listener.settimeout(PATIENCE_S)
        work = """\
tool vsock-connect 2 5001 "from the guest"
tool vsock-listen 5002
echo "guest: served"
"""
        with Guest(job, work, "--vsock", "cid=17", kernel="mshv-elf") as guest:
            guest.hears("up")
            connection, address = listener.accept()
            with connection:
                assert address[0] == 17, address
                assert connection.recv(100) == b"from the guest"
                connection.sendall(b"from the root")
                assert guest.hears("answer") == "from the root"
            assert guest.hears("listening") == "5002"
            client = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            with client:
                client.settimeout(PATIENCE_S)
                client.connect((17, 5002))
                client.sendall(b"in capitals")
                assert client.recv(100) == b"IN CAPITALS"
            guest.hears("served")
            guest.ends()


def test_rng_gives_bytes(job: Job) -> None:
    work = """\
read -r name </sys/class/misc/hw_random/rng_current; echo "guest: rng $name"
dd if=/dev/hwrng bs=512 count=8 2>/dev/null | gzip -c | wc -c | while read -r n; do echo "guest: bytes $n"; done
"""
    with Guest(job, work, kernel="mshv-elf") as guest:
        assert guest.hears("rng").startswith("virtio_rng")
        assert int(guest.hears("bytes")) >= 4096  # what is random does not become smaller
        guest.ends()


def test_balloon_gives_memory_back_and_takes_it_again(job: Job) -> None:
    work = """\
tool touch 160
echo "guest: ready"
read -r word
tool touch 160
"""
    with Guest(job, work, "--balloon", "size=0", kernel="mshv-elf", memory="256M", api=True) as guest:
        guest.hears("ready")
        before = guest.memory_blocks()
        assert before > 160 << 20, before
        guest.calls("PUT", "vm.resize", {"desired_balloon": 128 << 20})
        _await(guest, lambda: guest.calls("GET", "vm.info")["memory_actual_size"] == 128 << 20)
        less = guest.memory_blocks()
        assert less < before - (80 << 20), (before, less)
        guest.calls("PUT", "vm.resize", {"desired_balloon": 0})
        _await(guest, lambda: guest.calls("GET", "vm.info")["memory_actual_size"] == 256 << 20)
        guest.types(b"go\n")
        assert guest.hears("touched") == "160"
        guest.ends()
        print("note", f"balloon of 128 MiB: {before >> 20} MiB became {less >> 20} MiB")


def _await(guest: Guest, condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise guest.error("it does not become so")
        guest.pump(0.2)
