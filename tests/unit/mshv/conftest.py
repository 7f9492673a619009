# SPDX-License-Identifier: Apache-2.0
"""A partition whose driver is a fake."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rootvisor.mshv import Mshv, Partition, Vp, handle, vp
from tests.unit.mshv.fake_driver import FakeDriver


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(handle, "ioctl", fake.ioctl)
    monkeypatch.setattr(vp, "ioctl", fake.ioctl)
    return fake


@pytest.fixture
def mshv(driver: FakeDriver) -> Iterator[Mshv]:
    with Mshv("/dev/null") as device:
        yield device


@pytest.fixture
def partition(mshv: Mshv) -> Iterator[Partition]:
    with mshv.create_partition() as child:
        yield child


@pytest.fixture
def processor(partition: Partition) -> Iterator[Vp]:
    with partition.create_vp(3) as one:
        yield one
