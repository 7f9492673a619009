# SPDX-License-Identifier: Apache-2.0
"""Seeded fuzz of the API: every call, in every state, with bodies that its own description allows and such that it does
not; and requests that are no HTTP. ROOTVISOR_API_CALLS makes it longer.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from rootvisor.vmm import openapi
from rootvisor.vmm.controller import MachineError
from tests.unit.vmm.client import Client
from tests.unit.vmm.fake_machine import FakeMachine
from tests.unit.vmm.openapi_check import Schemas

CALLS = int(os.environ.get("ROOTVISOR_API_CALLS", "4000"))
DOCUMENT = openapi.document()
SCHEMAS = Schemas(DOCUMENT)
OPERATIONS = {
    (method.upper(), path[1:]): operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
VM = {"payload": {"kernel": "k"}, "balloon": {"size": 0}, "disks": [{"path": "a"}]}


def body_schema(operation: dict[str, Any]) -> dict[str, Any] | None:
    content = operation.get("requestBody", {}).get("content", {})
    schema: dict[str, Any] | None = content.get("application/json", {}).get("schema")
    return schema


def check_answer(operation: dict[str, Any], status: int, document: object) -> None:
    """The answer is one that the description has."""
    described = operation["responses"][str(status)]
    content = described.get("content")
    if content is None:
        assert document is None
    else:
        assert not list(SCHEMAS.faults(document, content["application/json"]["schema"])), document


@pytest.mark.parametrize("seed", range(4))
def test_calls_are_answered_as_the_description_says(
    api: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # snapshots go to folders with odd names
    chance = random.Random(seed)
    seen: set[int] = set()
    refused = accepted = 0
    with Client(api) as client:
        for _ in range(CALLS // 4):
            (method, name), operation = chance.choice(list(OPERATIONS.items()))
            if chance.random() < 0.3:
                method, name, operation = "PUT", "vm.boot", OPERATIONS["PUT", "vm.boot"]
                client.call("PUT", "vm.create", VM)
            FakeMachine.failing.clear()
            if chance.random() < 0.1:
                place = chance.choice(["make", "start", "pause", "resume", "add_disk", "snapshot", "restore"])
                FakeMachine.failing[place] = chance.choice(
                    [MachineError("no"), OSError(12, "no"), KeyError("no")]
                )
            schema = body_schema(operation)
            body = None if schema is None else SCHEMAS.example(schema, chance)
            if chance.random() < (0.02 if schema is None else 0.5):
                body = SCHEMAS.spoilt(body, chance)
            status, document = client.call(method, name, body)
            seen.add(status)
            note = f"{method} {name} {body!r}: {status} {document}"
            try:
                check_answer(operation, status, document)
            except (AssertionError, KeyError) as error:
                raise AssertionError(note) from error
            if status == 500:
                assert FakeMachine.failing, note
            if schema is not None:
                # null as a whole body is no body at all for this client
                wrong = body is None or bool(list(SCHEMAS.faults(body, schema)))
                assert not wrong or status == 400, note
                refused += status == 400
                accepted += status in (200, 204)
        assert client.call("GET", "vmm.ping")[0] == 200
    assert refused > CALLS // 40
    assert (
        accepted > CALLS // 200
    )  # most that the description allows fails on what fields have to do with each other
    assert seen == {200, 204, 400, 404, 405, 409, 500}


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_are_no_http_leave_the_server_alone(api: str, seed: int) -> None:
    chance = random.Random(seed)
    body = json.dumps(VM).encode()
    good = (
        f"PUT /api/v1/vm.create HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    statuses = set()
    for _ in range(CALLS // 16):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    del data[at : at + chance.randrange(1, 30)]
                case 2:
                    data[at:at] = chance.randbytes(chance.randrange(1, 30))
                case _:
                    data[at:at] = chance.choice(
                        [b"\r\n", b"\r\n\r\n", b"\0", b":", b" ", b"Content-Length: 9\r\n"]
                    )
        with Client(api) as client:
            client.send(bytes(data))
            client.socket.shutdown(1)
            try:
                while True:
                    statuses.add(client.response()[0])
            except (EOFError, ConnectionResetError):
                pass
    assert statuses <= {204, 400, 404, 405, 409, 411, 413, 417, 431, 501, 505}
    assert {204, 400} <= statuses | {204}
    with Client(api) as client:
        assert client.call("GET", "vmm.ping")[0] == 200
