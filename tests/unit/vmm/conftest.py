# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from rootvisor.vmm.api import ApiServer, Listener
from rootvisor.vmm.api_routes import answer
from rootvisor.vmm.controller import Controller
from tests.unit.vmm.fake_machine import FakeMachine


@pytest.fixture
def machines() -> Iterator[list[FakeMachine]]:
    """The fake machines that a test makes; all have to be stopped in the end."""
    FakeMachine.forget()
    yield FakeMachine.made
    alive = [machine.state for machine in FakeMachine.made if machine.state != "stopped"]
    FakeMachine.forget()
    assert not alive


@pytest.fixture
def controller(machines: list[FakeMachine]) -> Iterator[Controller]:
    """A controller of fake machines; what it made is gone in the end."""
    made = Controller(FakeMachine)
    yield made
    made.close()


@pytest.fixture
def socket_path() -> Iterator[str]:
    """A path for a socket, short enough for one."""
    folder = tempfile.mkdtemp(prefix="api-")
    yield f"{folder}/s"
    shutil.rmtree(folder)


@pytest.fixture
def api(controller: Controller, socket_path: str) -> Iterator[str]:
    """A server with a controller of fake machines; the path of its socket."""

    def call(method: str, path: str, body: bytes) -> tuple[int, object, tuple[tuple[str, str], ...]]:
        return answer(controller, method, path, body)

    server = ApiServer(Listener({"path": socket_path}), call, request_seconds=0.5)
    server.start()
    yield socket_path
    server.stop()
    assert not os.path.exists(socket_path)
