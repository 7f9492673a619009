# SPDX-License-Identifier: Apache-2.0
"""Trace of what the partitions ask of the hypervisor: hypercalls, synthetic MSRs, intercepts, events.

`sink` records while the machine runs (boot path: cheap imports only); `encode` is the process that turns
records into JSON lines; `decode` gives numbers their names; `lines` reads a trace file; `report` and
`perfetto` show it. docs/reference/trace.md describes the lines.
"""

from __future__ import annotations
