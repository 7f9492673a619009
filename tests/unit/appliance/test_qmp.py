# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import socket

from rootvisor.appliance.qmp import PortOpened, Qmp, Shutdown


def test_received_shutdown_event_gives_reason() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        qmp = Qmp(ours)
        assert b"qmp_capabilities" in theirs.recv(1000)
        assert qmp.received(b'{"QMP": {}}\n{"event": "SHUTDOWN", "data": {"guest": true, "rea') == []
        assert qmp.received(b'son": "guest-reset"}}\n') == [Shutdown("guest-reset")]


def test_received_opened_port_is_told_and_closed_port_is_not() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        event = b'{"event": "VSERPORT_CHANGE", "data": {"open": %s, "id": "one"}}\n'
        assert Qmp(ours).received(event % b"true" + event % b"false") == [PortOpened("one")]


def test_idle_only_when_all_is_answered() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        qmp = Qmp(ours)
        qmp.sync()
        qmp.received(b'{"return": {}}\n')
        assert not qmp.idle
        qmp.received(b'{"return": {}}\nnot json\n')
        assert qmp.idle


def test_sync_gone_qemu_is_silent() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        Qmp(ours).sync()


def test_a_picture_is_asked_for_and_its_answer_told_in_its_turn() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        qmp = Qmp(ours)
        said: list[str] = []
        qmp.picture("hardware0", "/tmp/a b.png", said.append)
        qmp.sync()
        asked = [json.loads(line) for line in theirs.recv(4000).splitlines()]
        assert asked[1] == {
            "execute": "screendump",
            "arguments": {"filename": "/tmp/a b.png", "device": "hardware0", "format": "png"},
        }
        qmp.received(b'{"return": {}}\n')
        assert said == []
        qmp.received(b'{"return": {}}\n{"return": {}}\n')
        assert said == [""] and qmp.idle
        qmp.picture("hardware0", "/x", said.append)
        qmp.received(b'{"error": {"class": "GenericError", "desc": "no such device"}}\n')
        assert said == ["", "no such device"]
