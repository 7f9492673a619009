# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import pytest

from rootvisor.kernels.versions import kernel_series, version_key

ASCENDING = [
    "1.0~rc1-1",
    "1.0~rc1-1.1",
    "1.0~rc2-1",
    "1.0-1~bpo12+1",
    "1.0-1",
    "1.0-1+b1",
    "1.0a-1",
    "1.0+dfsg-1",
    "1.0.1-1",
    "1.2-1",
    "1.10-1",
    "6.12.101-1~deb12u1",
    "6.12.117-1~deb12u1",
    "7.2.13-1",
    "7.3~rc7-1~exp1",
    "7.3-1",
    "1:0.5-1",
]


@pytest.mark.parametrize(("lower", "higher"), list(itertools.pairwise(ASCENDING)))
def test_version_key_orders_as_dpkg(lower: str, higher: str) -> None:
    assert version_key(lower) < version_key(higher)


def test_version_key_same_version_is_equal() -> None:
    assert version_key("0:1.0-1") == version_key("1.0-1")


def test_version_key_odd_text_does_not_raise() -> None:
    for text in ("", "-", ":", "x:y-z", "6.12.117+deb12-cloud-amd64"):
        version_key(text)


@pytest.mark.parametrize(
    ("text", "series"),
    [
        ("linux-source-7.3", (7, 3)),
        ("linux-source-6.17.0", (6, 17)),
        ("linux-image-6.12.117+deb12-cloud-amd64", (6, 12)),
        ("6.12-cloud-amd64", (6, 12)),
        ("linux-source", None),
        ("linux-hwe-6.14-source-6.14.0", (6, 14)),
    ],
)
def test_kernel_series(text: str, series: tuple[int, int] | None) -> None:
    assert kernel_series(text) == series
