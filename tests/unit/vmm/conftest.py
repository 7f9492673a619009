# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.vmm.fake_machine import FakeMachine


@pytest.fixture
def machines() -> Iterator[list[FakeMachine]]:
    """The fake machines that a test makes; all have to be stopped in the end."""
    FakeMachine.forget()
    yield FakeMachine.made
    alive = [machine.state for machine in FakeMachine.made if machine.state != "stopped"]
    FakeMachine.forget()
    assert not alive
