# SPDX-License-Identifier: Apache-2.0
"""tests/integration/inner_suite.py: what is told of the tests that failed in the appliance."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from tests.integration.inner_suite import MESSAGE_LIMIT, failures


def test_failures_and_errors_have_name_and_the_end_of_their_message() -> None:
    long = "x" * MESSAGE_LIMIT
    suite = ET.fromstring(
        f"""<testsuite>
        <testcase classname="a.b" name="passes"/>
        <testcase classname="a.b" name="skipped"><skipped message="no"/></testcase>
        <testcase classname="a.b" name="test_c[1]">
        <failure message="AssertionError: lost{long}end">...</failure></testcase>
        <testcase classname="a.d" name="test_e"><error/></testcase>
        </testsuite>"""
    )
    first, second = failures(suite)
    assert first == f"a.b::test_c[1]: {long[3:]}end"
    assert second == "a.d::test_e: "
