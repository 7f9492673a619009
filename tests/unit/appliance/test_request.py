# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rootvisor.appliance import ApplianceError, Request

GOOD = Request(argv=["true"])


def test_validate_plain_request_passes(tmp_path: Path) -> None:
    replace(GOOD, writable=[str(tmp_path)]).validate()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"argv": [], "tty": False}, "no program"),
        ({"memory_mib": 10}, "10 MiB"),
        ({"cpus": 0}, "not 0"),
        ({"cpus": 1000}, "not 1000"),
        ({"argv": ["a\0b"]}, "NUL"),
        ({"cwd": "here"}, "absolute"),
        ({"writable": ["here"]}, "absolute"),
        ({"writable": ["/nonexistent-folder"]}, "no such folder"),
        ({"writable": ["/"]}, "whole host"),
    ],
)
def test_validate_bad_request_is_one_line(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ApplianceError, match=text) as caught:
        replace(GOOD, **change).validate()
    assert "\n" not in str(caught.value)
