# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rootvisor.vmm import api as server_module
from rootvisor.vmm.api import ApiError, ApiServer, Listener
from rootvisor.vmm.api_routes import ABSENT, BY_PATH, ROOT
from tests.unit.vmm.client import Client
from tests.unit.vmm.fake_machine import FakeMachine

VM = {"payload": {"kernel": "/boot/vmlinuz"}}
PING = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def client(api: str) -> Iterator[Client]:
    with Client(api) as made:
        yield made


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def eventually(connect: Callable[[], Client]) -> None:
    """The server answers somebody, within a while."""
    with connect() as client:
        assert client.call("GET", "vmm.ping")[0] == 200


# --- calls ------------------------------------------------------------------------------------------------------------
def test_ping_names_version_and_process(client: Client) -> None:
    status, document = client.call("GET", "vmm.ping")
    assert status == 200
    assert document["pid"] == os.getpid()
    assert set(document) == {"build_version", "version", "pid", "features"}


def test_life_of_a_virtual_machine_by_calls(client: Client, tmp_path: Any) -> None:
    assert client.call("GET", "vm.info") == (
        404,
        ["vm.info failed", "there is no virtual machine; create it first"],
    )
    assert client.call("PUT", "vm.create", VM) == (204, None)
    assert client.call("PUT", "vm.add-disk", {"path": "/cold"}) == (204, None)
    assert client.call("PUT", "vm.boot") == (204, None)
    assert client.call("GET", "vm.info")[1]["state"] == "Running"
    assert client.call("PUT", "vm.add-disk", {"path": "/hot", "id": "hot"}) == (
        200,
        {"id": "hot", "bdf": "0000:00:02.0"},
    )
    assert client.call("PUT", "vm.add-net", {})[0] == 200
    assert client.call("PUT", "vm.add-fs", {"tag": "t", "path": "/srv"})[0] == 200
    assert client.call("PUT", "vm.add-vsock", {"cid": 3})[0] == 200
    assert set(client.call("GET", "vm.counters")[1]) == {"_disk0", "hot", "_net0", "_fs0", "_vsock0"}
    assert client.call("PUT", "vm.remove-device", {"id": "hot"}) == (204, None)
    assert client.call("PUT", "vm.power-button") == (204, None)
    assert client.call("PUT", "vm.nmi") == (204, None)
    assert client.call("PUT", "vm.resize", {"desired_vcpus": 1}) == (204, None)
    assert client.call("PUT", "vm.pause") == (204, None)
    assert client.call("PUT", "vm.snapshot", {"destination_url": f"file://{tmp_path}/s"}) == (204, None)
    assert client.call("PUT", "vm.resume") == (204, None)
    assert client.call("PUT", "vm.reboot") == (204, None)
    assert client.call("PUT", "vm.shutdown") == (204, None)
    assert client.call("GET", "vm.info")[1]["state"] == "Shutdown"
    assert client.call("PUT", "vm.delete") == (204, None)
    assert client.call("PUT", "vm.restore", {"source_url": f"file://{tmp_path}/s", "resume": True}) == (
        204,
        None,
    )
    assert client.call("GET", "vm.info")[1]["state"] == "Running"
    assert client.call("PUT", "vmm.shutdown") == (204, None)
    assert client.call("GET", "vm.info")[0] == 404


def test_info_config_is_accepted_by_create(client: Client) -> None:
    client.call("PUT", "vm.create", VM | {"disks": [{"path": "a"}], "balloon": {"size": 0}})
    config = client.call("GET", "vm.info")[1]["config"]
    client.call("PUT", "vm.delete")
    assert client.call("PUT", "vm.create", config) == (204, None)
    assert client.call("GET", "vm.info")[1]["config"] == config


@pytest.mark.parametrize(
    ("method", "name", "body", "status", "message"),
    [
        ("GET", "vm.zork", None, 404, "there is no GET /api/v1/vm.zork"),
        ("POST", "vm.boot", None, 405, "vm.boot is called with PUT"),
        ("PUT", "vm.info", None, 405, "vm.info is called with GET"),
        ("PUT", "vm.boot", {}, 400, "the call takes no body"),
        ("PUT", "vm.create", None, 400, "the call needs a body: VmConfig as JSON"),
        ("PUT", "vm.create", b"{", 400, "the body is not a JSON document"),
        ("PUT", "vm.create", b"\xff", 400, "the body is not UTF-8 text"),
        ("PUT", "vm.create", b"[" * 100000, 400, "nested too deeply"),
        ("PUT", "vm.create", b'{"a": NaN}', 400, "NaN is no number"),
        ("PUT", "vm.create", b'{"payload": {"kernel": "a", "kernel": "b"}}', 400, "kernel: is given twice"),
        (
            "PUT",
            "vm.create",
            b'{"memory": {"size": ' + b"9" * 5000 + b"}}",
            400,
            "the body is not a JSON document",
        ),
        ("PUT", "vm.create", {"payload": {"kernel": 1}}, 400, "payload.kernel: 1 is not a string"),
        ("PUT", "vm.create", [], 400, "a list is not an object"),
        ("PUT", "vm.add-device", {"path": "/sys"}, 501, "devices of the machine are not passed to guests"),
        ("PUT", "vm.boot", None, 404, "there is no virtual machine"),
    ],
)
def test_call_that_is_wrong_says_so(
    client: Client, method: str, name: str, body: object, status: int, message: str
) -> None:
    answered, document = client.call(method, name, body)
    assert answered == status
    assert message in document[-1] or message in document[0]
    assert client.call("GET", "vmm.ping")[0] == 200  # on the same connection


def test_call_in_the_wrong_state_is_405(client: Client) -> None:
    client.call("PUT", "vm.create", VM)
    assert client.call("PUT", "vm.pause") == (
        405,
        ["vm.pause failed", "the virtual machine is Created; boot it first"],
    )


def test_call_for_a_second_device_of_a_name_is_409(client: Client) -> None:
    client.call("PUT", "vm.create", VM | {"disks": [{"path": "a", "id": "x"}]})
    assert client.call("PUT", "vm.add-net", {"id": "x"})[0] == 409


def test_call_that_raises_something_unforeseen_is_answered(client: Client) -> None:
    client.call("PUT", "vm.create", VM)
    FakeMachine.failing["start"] = ZeroDivisionError("zork")
    status, document = client.call("PUT", "vm.boot")
    assert (status, "internal error: ZeroDivisionError: zork" in document[1]) == (500, True)


def test_routes_are_those_of_cloud_hypervisor() -> None:
    """Every path of its API description (0.3.0) has an answer that says more than 404."""
    names = (
        "vmm.ping vmm.shutdown vm.info vm.counters vm.create vm.delete vm.boot vm.pause vm.resume vm.shutdown "
        "vm.reboot vm.power-button vm.resize vm.resize-disk vm.resize-zone vm.add-device vm.remove-device "
        "vm.add-disk vm.add-fs "
        "vm.add-generic-vhost-user vm.add-pmem vm.add-net vm.add-vsock vm.add-vdpa vm.add-user-device vm.snapshot "
        "vm.coredump vm.nmi vm.restore vm.receive-migration vm.send-migration"
    )
    assert {ROOT + name for name in names.split()} == set(BY_PATH) | set(ABSENT)


# --- HTTP -------------------------------------------------------------------------------------------------------------
def test_connection_serves_many_requests_and_pieces_of_them(client: Client) -> None:
    client.send(PING * 3)
    assert [client.response()[0] for _ in range(3)] == [200, 200, 200]
    for index in range(len(PING)):
        client.send(PING[index : index + 1])
    assert client.response()[0] == 200
    client.send(b"\r\n" + PING)
    assert client.response()[0] == 200


def test_connection_close_is_honoured(client: Client) -> None:
    client.send(PING.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    status, headers, _ = client.response()
    assert (status, headers["connection"]) == (200, "close")
    assert client.is_closed()


def test_connection_of_http_1_0_ends_unless_it_is_kept(client: Client, api: str) -> None:
    with Client(api) as kept:
        kept.send(PING.replace(b"1.1", b"1.0").replace(b"\r\n\r\n", b"\r\nConnection: Keep-Alive\r\n\r\n"))
        assert kept.response()[0] == 200
        assert kept.call("GET", "vmm.ping")[0] == 200
    client.send(PING.replace(b"1.1", b"1.0"))
    assert client.response()[0] == 200
    assert client.is_closed()


def test_request_absolute_form_and_query_are_understood(client: Client) -> None:
    client.send(b"GET http://localhost/api/v1/vmm.ping?x=1 HTTP/1.1\r\n\r\n")
    assert client.response()[0] == 200


def test_request_that_expects_100_gets_it(client: Client) -> None:
    client.send(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 39\r\nExpect: 100-continue\r\n\r\n")
    assert client.response()[0] == 100
    client.send(b'{"payload": {"kernel": "/boot/linux"} }')
    assert client.response()[0] == 204


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"zork\r\n\r\n", 400),
        (b"GET  /api/v1/vmm.ping HTTP/1.1\r\n\r\n", 400),
        (b"G(T /api/v1/vmm.ping HTTP/1.1\r\n\r\n", 400),
        (b"GET /api/v1/vmm.ping HTTP/2.0\r\n\r\n", 505),
        (b"GET /api/v1/vmm.ping FTP/1.1\r\n\r\n", 400),
        (b"GET /api/v1/vmm.ping HTTP/1.1\r\nzork\r\n\r\n", 400),
        (b"GET /api/v1/vmm.ping HTTP/1.1\r\n a: b\r\n\r\n", 400),
        (b"GET /api/v1/vmm.ping HTTP/1.1\r\na : b\r\n\r\n", 400),
        (b"GET /api/v1/vmm.ping HTTP/1.1\r\na: \x00\r\n\r\n", 400),
        (b"GET /api/v1/vmm.ping HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET /api/v1/vmm.ping HTTP/1.1\r\nContent-Length: +1\r\n\r\n", 400),
        (b"GET /api/v1/vmm.ping HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n", 400),
        (b"GET /api/v1/vmm.ping HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
        (b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 4194305\r\n\r\n", 413),
        (b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: " + b"9" * 100 + b"\r\n\r\n", 413),
        (b"PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 411),
        (b"PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n", 400),
        (b"PUT /api/v1/vm.create HTTP/1.1\r\nExpect: miracles\r\n\r\n", 417),
        (b"GET /api/v1/vmm.ping HTTP/1.1\r\nA: " + b"x" * 20000, 431),
        (b"GET /api/v1/vmm.ping HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
        (b"GET /api/v1/vmm", 408),
        (b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 5\r\n\r\nhell", 408),
    ],
)
def test_request_that_is_none_is_answered_and_ends_the_connection(
    client: Client, head: bytes, status: int
) -> None:
    client.send(head)
    answered, headers, document = client.response()
    assert (answered, headers["connection"]) == (status, "close")
    assert len(document) == 1
    assert client.is_closed()


def test_request_with_too_long_a_body_is_answered_while_it_is_sent(client: Client) -> None:
    head = b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 8388608\r\n\r\n"

    def send() -> None:
        try:
            client.send(head + bytes(8 << 20))
        except OSError:
            pass

    thread = threading.Thread(target=send)
    thread.start()
    assert client.response()[0] == 413
    thread.join(20)
    assert not thread.is_alive()


def test_request_as_long_as_possible_is_read(client: Client) -> None:
    body = b'{"payload": {"kernel": "k"}}'.ljust(4 << 20)
    assert client.call("PUT", "vm.create", body) == (204, None)


# --- clients ----------------------------------------------------------------------------------------------------------
def test_clients_slow_ones_do_not_hold_up_others(api: str) -> None:
    with ExitStack() as stack:
        for _ in range(server_module.MAX_REQUESTS + 4):
            stack.enter_context(Client(api)).send(b"GET /api")
        eventually(lambda: Client(api))


def test_clients_more_than_there_is_room_for_replace_the_idle_one(
    api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 4)
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(api)) for _ in range(4)]
        for client in clients:
            assert client.call("GET", "vmm.ping")[0] == 200
        eventually(lambda: Client(api))
        wait_for(lambda: bool(select.select([client.socket for client in clients], [], [], 0)[0]))
        (ended,) = select.select([client.socket for client in clients], [], [], 0)[0]
        for client in clients:
            if client.socket is ended:
                assert client.is_closed()
            else:
                assert client.call("GET", "vmm.ping")[0] == 200


def test_clients_many_at_a_time_get_their_answers(api: str) -> None:
    failures: list[object] = []

    def run(number: int) -> None:
        try:
            with Client(api) as client:
                for _ in range(30):
                    status, document = client.call("PUT", "vm.remove-device", {"id": f"x{number}"})
                    if status != 404 or "no virtual machine" not in document[1]:
                        failures.append(document)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_clients_that_go_away_leave_nothing_behind(api: str) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    eventually(lambda: Client(api))
    wait_for(lambda: open_files() == open_files())
    before = open_files()
    for number in range(50):
        with Client(api) as client:
            client.send(PING[: number * len(PING) // 50])
    wait_for(lambda: open_files() <= before)
    eventually(lambda: Client(api))


def test_clients_that_take_no_response_are_given_up(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "REQUEST_SECONDS", 0.3)
    with Client(api) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        client.socket.settimeout(5)
        with pytest.raises(OSError):
            while True:
                client.send(PING * 100)
    eventually(lambda: Client(api))


def test_stop_lets_the_call_that_ends_it_be_answered(socket_path: str) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(method: str, path: str, body: bytes) -> tuple[int, object, tuple[tuple[str, str], ...]]:
        entered.set()
        leave.wait(10)
        return 204, None, ()

    server = ApiServer(Listener({"path": socket_path}), slow)
    server.start()
    with Client(socket_path) as client, Client(socket_path) as idle:
        client.send(PING)
        entered.wait(10)
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        assert idle.is_closed()
        leave.set()
        status, headers, _ = client.response()
        assert (status, headers["connection"]) == (204, "close")
    stopper.join(10)
    assert not os.path.exists(socket_path)


# --- the socket -------------------------------------------------------------------------------------------------------
def test_listener_socket_is_the_users_alone(api: str) -> None:
    assert stat.S_IMODE(os.stat(api).st_mode) == 0o600


def test_listener_old_socket_is_replaced(socket_path: str) -> None:
    old = socket.socket(socket.AF_UNIX)
    old.bind(socket_path)
    old.listen()
    old.close()
    listener = Listener({"path": socket_path})
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(socket_path)
    listener.close()
    assert not os.path.exists(socket_path)


def test_listener_socket_in_use_is_left_alone(api: str) -> None:
    with pytest.raises(ApiError, match="another process does; choose another path"):
        Listener({"path": api})
    eventually(lambda: Client(api))


def test_listener_file_that_is_no_socket_is_left_alone(socket_path: str) -> None:
    Path(socket_path).write_text("precious")
    with pytest.raises(ApiError, match="there is a file that is no socket"):
        Listener({"path": socket_path})
    assert Path(socket_path).read_text() == "precious"


def test_listener_file_of_another_is_not_removed_at_the_end(socket_path: str) -> None:
    listener = Listener({"path": socket_path})
    os.unlink(socket_path)
    Path(socket_path).touch()
    listener.close()
    assert os.path.exists(socket_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [("x" * 200, "the path is too long for a socket"), ("/no/such/folder/s", os.strerror(errno.ENOENT))],
)
def test_listener_path_that_cannot_be_says_why(path: str, message: str) -> None:
    with pytest.raises(ApiError, match=message):
        Listener({"path": path})


def test_listener_inherited_socket_is_served(socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(socket_path)
        made.listen()
        server = ApiServer(Listener({"fd": made.fileno()}), lambda method, path, body: (200, [path], ()))
    server.start()
    with Client(socket_path) as client:
        assert client.call("GET", "x") == (200, ["/api/v1/x"])
    server.stop()
    assert os.path.exists(socket_path)


def test_listener_descriptor_that_is_no_listening_socket_is_refused() -> None:
    with open(os.devnull, encoding="utf-8") as file, pytest.raises(ApiError, match="is no socket"):
        Listener({"fd": file.fileno()})
    with (
        socket.socket(socket.AF_UNIX) as made,
        pytest.raises(ApiError, match="is no Unix socket that listens"),
    ):
        Listener({"fd": made.fileno()})
