# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import marshal

from rootvisor.cli.description import CommandRequest, Disk, KernelImage, RunDescription
from rootvisor.cli.launch import encode

_DESCRIPTION = RunDescription(
    kernel=KernelImage("/k/bzImage", "/k/vmlinux", "mshv", "7.3.0", modules="/k/lib/modules/7.3.0"),
    initrds=("/i/a", "/i/b"),
    append="quiet",
    vps=2,
    memory_bytes=1 << 30,
    rootfs="host",
    rootfs_path="/",
    command=CommandRequest(("ls", "-l"), "/tmp", {"PATH": "/bin"}, tty=False),
    tty=False,
    disks=(Disk("/d.img", readonly=True),),
    devices=("console", "rng", "fs", "disk"),
    scheduler="hypervisor",
    trace=None,
    timeout_s=2.5,
    console_log="stderr",
    on_reboot="exit",
    file_server=("/v", "--fd={fd}"),
)


def test_document_has_exactly_the_documented_fields() -> None:
    assert _DESCRIPTION.document() == {
        "version": 1,
        "kernel": {
            "image": "/k/bzImage",
            "vmlinux": "/k/vmlinux",
            "name": "mshv",
            "version": "7.3.0",
            "multiboot": False,
        },
        "role": "root",
        "hide": [],
        "initrds": ["/i/a", "/i/b"],
        "append": "quiet",
        "vps": 2,
        "memory_bytes": 1 << 30,
        "rootfs": "host",
        "rootfs_path": "/",
        "file_server": ["/v", "--fd={fd}"],
        "command": {"argv": ["ls", "-l"], "cwd": "/tmp", "env": {"PATH": "/bin"}, "tty": False},
        "tty": False,
        "disks": [{"path": "/d.img", "readonly": True}],
        "devices": ["console", "rng", "fs", "disk"],
        "assigned": [],
        "screen_port": None,
        "display": False,
        "scheduler": "hypervisor",
        "trace": None,
        "timeout_s": 2.5,
        "console_log": "stderr",
        "on_reboot": "exit",
        "report": None,
        "watch_deposits": False,
        "child_timers": False,
        "verbose": False,
    }


def test_document_survives_json_and_the_description_file() -> None:
    document = _DESCRIPTION.document()
    assert json.loads(json.dumps(document)) == document
    assert marshal.loads(encode(_DESCRIPTION)) == document


def test_undecodable_argument_survives_the_description_file() -> None:
    text = b"caf\xe9".decode("utf-8", "surrogateescape")
    command = CommandRequest((text,), "/", {}, tty=False)
    from dataclasses import replace

    document = marshal.loads(encode(replace(_DESCRIPTION, command=command)))
    assert document["command"]["argv"] == [text]
