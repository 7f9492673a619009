# SPDX-License-Identifier: Apache-2.0
"""Under the root's scheduler a VP whose guest wrote to a device is blocked until the root has had its time."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any, cast

from rootvisor.hypervisor.root_scheduler import RootScheduler
from rootvisor.tlfs import intercepts as tlfs
from rootvisor.tlfs import messages


class Messages:
    def __init__(self) -> None:
        self.posted: list[int] = []

    def post(self, kind: int, sender: int, payload: bytes, preferred: object) -> None:
        self.posted.append(kind)


def machine(react: threading.Event) -> tuple[Any, Any, Messages]:
    """A scheduler, and a parked VP that may run and whose guest has written a byte to a device."""
    posted = Messages()
    hypervisor = SimpleNamespace(lock=threading.RLock(), messages=posted)
    vp = SimpleNamespace(
        partition=SimpleNamespace(id=2, held=0, hypervisor=hypervisor),
        index=0, explicit_suspend=False, intercept_suspend=True, lets_root_react=True, blocked=False, root_vp=None,
        stopping=False, stored=SimpleNamespace(dispatch_suspend=False, root_signals=0),
        let_root_react=lambda: react.wait(10.0),
    )  # fmt: skip
    return RootScheduler(cast(Any, hypervisor)), vp, posted


def test_the_first_dispatch_gives_the_root_its_vp_back_and_one_signal_follows() -> None:
    react = threading.Event()
    scheduler, vp, posted = machine(react)
    answer = scheduler.dispatch(SimpleNamespace(), vp, tlfs.DISPATCH_CLEAR_INTERCEPT_SUSPEND)
    assert answer == (tlfs.DISPATCH_STATE_BLOCKED, tlfs.DISPATCH_EVENT_OTHER)
    assert vp.blocked
    assert not vp.lets_root_react
    assert posted.posted == []
    react.set()
    deadline = time.monotonic() + 10.0
    while not posted.posted:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert posted.posted == [messages.SCHEDULER_VP_SIGNAL_PAIR]
    assert (vp.blocked, vp.stored.root_signals) == (False, 1)


def test_no_signal_follows_when_the_vp_has_gone_meanwhile() -> None:
    react = threading.Event()
    scheduler, vp, posted = machine(react)
    scheduler.dispatch(SimpleNamespace(), vp, tlfs.DISPATCH_CLEAR_INTERCEPT_SUSPEND)
    scheduler.forget(vp)
    before = threading.active_count()
    react.set()
    deadline = time.monotonic() + 1.0
    while threading.active_count() >= before and time.monotonic() < deadline and not posted.posted:
        time.sleep(0.001)
    assert posted.posted == []
