# SPDX-License-Identifier: Apache-2.0
"""The API's calls: path, method, body, what it does, and with which statuses it answers. Cloud Hypervisor's names.

`answer` carries a call out; the server (`api`) knows nothing of calls, and this module nothing of HTTP but its numbers.
"""

from __future__ import annotations

import os

import rootvisor

from . import api_tables, config
from .controller import ControlError
from .json_text import decoded
from .schema import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .controller import Controller
    from .schema import Document, Table

    #: What a call does with the checked body; the answer's body, None: it has none.
    Call = Callable[[Controller, Document], Document | None]

ROOT = "/api/v1/"

OK = 200
NO_CONTENT = 204
BAD_REQUEST = 400
NOT_FOUND = 404
METHOD_NOT_ALLOWED = 405
CONFLICT = 409
INTERNAL_ERROR = 500
NOT_IMPLEMENTED = 501

_NOT_CREATED = {NOT_FOUND: "There is no virtual machine."}
_WRONG_STATE = _NOT_CREATED | {METHOD_NOT_ALLOWED: "The virtual machine's state does not allow it."}
_FAILED = {INTERNAL_ERROR: "It failed; the state is as before."}


class Route:
    """One call.

    ``name``: the last part of the path. ``table``: describes the body, None: there is none. ``schema``: name of the
    answer's schema, with status 200; without one the answer is empty, status 204. ``both``: either can happen.
    ``errors``: statuses that it can end with, and when.
    """

    __slots__ = ("both", "call", "errors", "method", "name", "operation", "schema", "summary", "table")

    def __init__(
        self,
        method: str,
        name: str,
        operation: str,
        summary: str,
        call: Call,
        errors: dict[int, str],
        *,
        table: Table | None = None,
        schema: str = "",
        both: bool = False,
    ) -> None:
        self.method = method
        self.name = name
        self.operation = operation
        self.summary = summary
        self.call = call
        self.errors = errors
        self.table = table
        self.schema = schema
        self.both = both


def _ping(_controller: Controller, _body: Document) -> Document:
    return {
        "build_version": f"rootvisor-{rootvisor.__version__}",
        "version": rootvisor.__version__,
        "pid": os.getpid(),
        "features": ["mshv"],
    }


def _silent(act: Callable[[Controller], None]) -> Call:
    """A call without a body in either direction."""

    def call(controller: Controller, _body: Document) -> None:
        act(controller)

    return call


def _create(controller: Controller, body: Document) -> None:
    controller.create(body)


def _remove(controller: Controller, body: Document) -> None:
    controller.remove_device(body["id"])


def _resize(controller: Controller, body: Document) -> None:
    controller.resize(body)


def _snapshot(controller: Controller, body: Document) -> None:
    controller.snapshot(body["destination_url"])


def _restore(controller: Controller, body: Document) -> None:
    controller.restore(body)


def _adds(kind: str, name: str, what: str, table: Table) -> Route:
    def call(controller: Controller, body: Document) -> Document | None:
        return controller.add_device(kind, body)

    return Route(
        "PUT",
        name,
        "",
        f"Add {what}. The answer says where a running guest finds it; before the boot there is none.",
        call,
        _NOT_CREATED
        | {
            BAD_REQUEST: "The device cannot be.",
            CONFLICT: "The virtual machine has a device of that name, or no room for it.",
        }
        | _FAILED,
        table=table,
        schema="PciDeviceInfo",
        both=True,
    )


ROUTES = (
    Route("GET", "vmm.ping", "", "Whether the VMM is there, and which.", _ping, {}, schema="VmmPingResponse"),
    Route(
        "PUT",
        "vmm.shutdown",
        "shutdownVMM",
        "End the guest and the VMM.",
        _silent(lambda controller: controller.vmm_shutdown()),
        {},
    ),
    Route(
        "GET",
        "vm.info",
        "",
        "Configuration and state.",
        lambda controller, body: controller.info(),
        _NOT_CREATED,
        schema="VmInfo",
    ),
    Route(
        "GET",
        "vm.counters",
        "",
        "What the devices have done.",
        lambda controller, body: controller.counters(),
        _WRONG_STATE | _FAILED,
        schema="VmCounters",
    ),
    Route(
        "PUT",
        "vm.create",
        "createVM",
        "Take the configuration of a virtual machine; nothing is opened or started yet.",
        _create,
        {BAD_REQUEST: "The configuration cannot be.", CONFLICT: "There is one already."},
        table=config.VM,
    ),
    Route(
        "PUT",
        "vm.delete",
        "deleteVM",
        "End the virtual machine if it runs, and forget its configuration.",
        _silent(lambda controller: controller.delete()),
        {},
    ),
    Route(
        "PUT",
        "vm.boot",
        "bootVM",
        "Start the guest.",
        _silent(lambda controller: controller.boot()),
        _WRONG_STATE | _FAILED,
    ),
    Route(
        "PUT",
        "vm.pause",
        "pauseVM",
        "Stop a running guest where it is.",
        _silent(lambda controller: controller.pause()),
        _WRONG_STATE | _FAILED,
    ),
    Route(
        "PUT",
        "vm.resume",
        "resumeVM",
        "Let a paused guest go on.",
        _silent(lambda controller: controller.resume()),
        _WRONG_STATE | _FAILED,
    ),
    Route(
        "PUT",
        "vm.shutdown",
        "shutdownVM",
        "End the guest at once, without asking it.",
        _silent(lambda controller: controller.shutdown()),
        _WRONG_STATE,
    ),
    Route(
        "PUT",
        "vm.reboot",
        "rebootVM",
        "End the guest at once, and start it from the kernel again.",
        _silent(lambda controller: controller.reboot()),
        _WRONG_STATE | {INTERNAL_ERROR: "It failed; the virtual machine is shut down."},
    ),
    Route(
        "PUT",
        "vm.power-button",
        "power-buttonVM",
        "Press the guest's power button.",
        _silent(lambda controller: controller.power_button()),
        _WRONG_STATE | _FAILED,
    ),
    Route(
        "PUT",
        "vm.nmi",
        "",
        "Give every processor of the guest a non-maskable interrupt.",
        _silent(lambda controller: controller.nmi()),
        _WRONG_STATE | _FAILED,
    ),
    Route(
        "PUT",
        "vm.resize",
        "",
        "Another size of the balloon; before the boot also of memory, and another number of processors.",
        _resize,
        _NOT_CREATED | {BAD_REQUEST: "The size cannot be."} | _FAILED,
        table=api_tables.RESIZE,
    ),
    _adds("disks", "vm.add-disk", "a disk", config.DISK),
    _adds("net", "vm.add-net", "a network device", config.NET),
    _adds("fs", "vm.add-fs", "a virtio-fs device", config.FS),
    _adds("vsock", "vm.add-vsock", "the vsock device", config.VSOCK),
    Route(
        "PUT",
        "vm.remove-device",
        "",
        "Take a device away. A running guest is asked, and may take its time.",
        _remove,
        {
            BAD_REQUEST: "The device cannot be removed.",
            NOT_FOUND: "There is no virtual machine, or no such device.",
        }
        | _FAILED,
        table=api_tables.REMOVE_DEVICE,
    ),
    Route(
        "PUT",
        "vm.snapshot",
        "",
        "Write a paused guest to a folder.",
        _snapshot,
        _WRONG_STATE | {BAD_REQUEST: "The folder cannot be written, or holds a snapshot."} | _FAILED,
        table=api_tables.SNAPSHOT,
    ),
    Route(
        "PUT",
        "vm.restore",
        "",
        "Make the virtual machine of a snapshot; it is paused unless `resume` is true.",
        _restore,
        {
            BAD_REQUEST: "There is no snapshot, or it is damaged.",
            CONFLICT: "There is a virtual machine already.",
            INTERNAL_ERROR: "It failed; there is no virtual machine.",
        },
        table=api_tables.RESTORE,
    ),
)
BY_PATH = {ROOT + route.name: route for route in ROUTES}

_ABSENT = {
    "vm.add-device": "devices",
    "vm.add-user-device": "user_devices",
    "vm.add-pmem": "pmem",
    "vm.add-vdpa": "vdpa",
    "vm.add-generic-vhost-user": "generic_vhost_user",
}
ABSENT = {ROOT + name: config.VM.by_name[field].refusal for name, field in _ABSENT.items()} | {
    ROOT + "vm.resize-disk": "shut the guest down and resize the image",
    ROOT + "vm.resize-zone": config.MEMORY.by_name["zones"].refusal,
    ROOT + "vm.coredump": "take a snapshot",
    ROOT + "vm.send-migration": "take a snapshot and restore it elsewhere",
    ROOT + "vm.receive-migration": "take a snapshot and restore it elsewhere",
}
"""Calls of Cloud Hypervisor's that there are not, and what to do instead."""


def answer(
    controller: Controller, method: str, path: str, body: bytes
) -> tuple[int, object, tuple[tuple[str, str], ...]]:
    """Carry out a call: status, body (None: none), more headers. What is wrong is said in a list of lines."""
    route = BY_PATH.get(path)
    if route is None:
        if path in ABSENT and method == "PUT":
            return NOT_IMPLEMENTED, [f"{path.removeprefix(ROOT)} is not supported", ABSENT[path]], ()
        if path in ABSENT:
            return METHOD_NOT_ALLOWED, [f"{path.removeprefix(ROOT)} is called with PUT"], (("Allow", "PUT"),)
        return NOT_FOUND, [f"there is no {method} {path[:100]}", f"calls are {ROOT}vmm.ping and the like"], ()
    if method != route.method:
        return METHOD_NOT_ALLOWED, [f"{route.name} is called with {route.method}"], (("Allow", route.method),)
    failure = f"{route.name} failed"
    try:
        document = _body(route, body)
        result = route.call(controller, document)
    except ConfigError as error:
        return BAD_REQUEST, [failure, str(error)], ()
    except ControlError as error:
        headers = (("Allow", route.method),) if error.status == METHOD_NOT_ALLOWED else ()
        return error.status, [failure, str(error)], headers
    return (NO_CONTENT if result is None else OK), result, ()


def _body(route: Route, body: bytes) -> Document:
    """The checked body of a call. ConfigError."""
    if route.table is None:
        if body:
            raise ConfigError("", "the call takes no body")
        return {}
    if not body:
        raise ConfigError("", f"the call needs a body: {route.table.name} as JSON")
    return route.table.check(decoded(body))
