"""Clients that are slow, many or gone, and engines that die, before a real llama-server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from localmix.serving.policy import Policy
from tests.gateways import (
    ENDLESS,
    SLOTS,
    Front,
    Server,
    events,
    post,
    read_all,
    running_gateway,
    running_server,
    tinymix_q8_0,
)

__all__ = ["tinymix_q8_0"]
pytestmark = pytest.mark.upstream

SHORT = Policy(port=0, head_seconds=0.5, body_seconds=0.5, idle_seconds=1.0, stall_seconds=1.0)


@pytest.fixture(scope="module")
def server(upstream: Path, tinymix_q8_0: Path) -> Iterator[Server]:
    with running_server(upstream, tinymix_q8_0, "tinymix:Q8_0") as running:
        yield running


@pytest.fixture
def mortal(upstream: Path, tinymix_q8_0: Path) -> Iterator[Server]:
    """One that may be killed."""
    with running_server(upstream, tinymix_q8_0, "tinymix:Q8_0") as running:
        yield running


@pytest.fixture
def front(server: Server) -> Iterator[Front]:
    server.wait_until_idle()
    with running_gateway([server], SHORT) as running:
        yield running


def wait_for_records(front: Front, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(front.records) < count:
        assert time.monotonic() < deadline, front.records
        time.sleep(0.02)


# ------- many


def test_of_200_requests_from_32_clients_none_is_lost(server: Server) -> None:
    with running_gateway([server], Policy(port=0)) as front:

        def ask(number: int) -> str:
            # half of them streamed, each with a length of its own
            body = {"prompt": f"{number} ", "max_tokens": 1 + number % 7, "ignore_eos": True, "temperature": 0}
            answer = front.ask("POST", "/v1/completions", {**body, "stream": number % 2 == 0})
            assert answer.status == 200, answer.body
            if number % 2:
                assert answer.json["usage"]["completion_tokens"] == body["max_tokens"]
                return str(answer.json["choices"][0]["text"])
            *parts, done = events(answer.body)
            assert done == "[DONE]" and parts[-1]["choices"][0]["finish_reason"] == "length"
            return "".join(part["choices"][0]["text"] for part in parts)

        with concurrent.futures.ThreadPoolExecutor(32) as clients:
            replies = list(clients.map(ask, range(200)))
        assert len(replies) == 200 and all(replies)
        wait_for_records(front, 200)
        assert {(record.status, record.end) for record in front.records} == {(200, "done")}
    server.wait_until_idle()


def test_50_disconnects_in_mid_stream_leave_no_slot_busy(front: Front, server: Server) -> None:
    def leave(number: int) -> None:
        client = front.begin_stream(ENDLESS)
        if number % 2:  # with a reset, as of a client that was killed
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        list(clients.map(leave, range(50)))
    server.wait_until_idle(5)
    wait_for_records(front, 50)
    assert {record.end for record in front.records} == {"client left"}


def test_clients_that_leave_before_an_answer_free_their_slot_and_their_place_in_the_queue(
    front: Front, server: Server
) -> None:
    body = {"prompt": "a", "ignore_eos": True, "n_predict": -1}  # never answered
    clients = [front.open() for _ in range(SLOTS + 3)]
    for client in clients:
        client.sendall(post("/completion", body))
    deadline = time.monotonic() + 10
    while server.busy_slots() < SLOTS:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for client in clients:
        client.close()
    # while it answers others, llama-server forgets to look whether who waits for a whole reply is still there
    server.wait_until_idle(10, pause=2)
    wait_for_records(front, len(clients))
    assert {(record.status, record.end) for record in front.records} == {(0, "client left")}


# ------- slow


@pytest.mark.parametrize("sent", [b"GET", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"\r\n"])
def test_a_head_that_does_not_end_is_given_up(front: Front, sent: bytes) -> None:
    started = time.monotonic()
    answer = front.send(sent)
    assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer
    assert time.monotonic() - started < 3
    assert front.ask("GET", "/health").status == 200


def test_a_head_that_comes_byte_by_byte_is_given_up(front: Front) -> None:
    with front.open() as client:
        began = time.monotonic()
        try:
            while time.monotonic() - began < 5:
                client.sendall(b"G")
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() - began < 3


def test_a_second_head_has_the_same_deadline(front: Front) -> None:
    with front.open() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /health HTTP/1.1\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 408")


def test_an_idle_connection_is_closed_in_silence(front: Front) -> None:
    with front.open() as fresh, front.open() as used:
        used.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert used.recv(65536).startswith(b"HTTP/1.1 200")
        assert read_all(fresh) == read_all(used) == b""


def test_a_body_that_does_not_come_is_given_up(front: Front, server: Server) -> None:
    whole = post("/v1/completions", {"prompt": "a"})
    answer = front.send(whole[:-5])
    assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert front.send(chunked + b"1\r\n{\r\n").startswith(b"HTTP/1.1 408")
    assert server.busy_slots() == 0


def test_half_a_body_and_a_client_that_is_gone_are_no_request(front: Front, server: Server) -> None:
    with front.open() as client:
        client.sendall(post("/v1/completions", ENDLESS)[:-3])
    wait_for_records(front, 1)
    assert front.records[0].status == 0 and front.records[0].model == ""
    assert server.busy_slots() == 0


def test_a_client_that_does_not_read_its_stream_is_dropped(front: Front, server: Server) -> None:
    # some replies are larger than what the kernel holds for a client
    with front.begin_stream({**ENDLESS, "n_probs": 20}, receive_buffer=4096) as client:
        server.wait_until_idle(30)
        wait_for_records(front, 1)
        assert front.records[0].end == "client stalled"
        assert front.ask("GET", "/health").status == 200
        assert not read_all(client).endswith(b"0\r\n\r\n")


def test_a_client_that_does_not_read_its_answers_is_dropped(front: Front) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((front.host, front.port))
        client.settimeout(10)
        try:
            while True:
                client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
                time.sleep(0.01)
        except OSError:
            pass
    deadline = time.monotonic() + 10
    while front.gateway._server is not None and front.gateway._server.connections:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_client_that_reads_slowly_is_not_dropped(front: Front, server: Server) -> None:
    with front.begin_stream({**ENDLESS, "n_probs": 20}, receive_buffer=4096) as client:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert client.recv(16384)
            time.sleep(0.1)
        assert server.busy_slots() == 1
    server.wait_until_idle()
    wait_for_records(front, 1)
    assert front.records[0].end == "client left"


# ------- engines that die


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", ENDLESS),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 10**6}),
    ],
)
def test_an_engine_that_dies_in_mid_stream_is_told_as_the_last_event(
    mortal: Server, path: str, body: dict[str, object]
) -> None:
    with running_gateway([mortal], SHORT) as front, front.open() as client:
        client.sendall(post(path, {**body, "ignore_eos": True}))
        head = client.recv(1024)
        assert head.startswith(b"HTTP/1.1 200")
        mortal.process.kill()
        rest = b""
        while not rest.endswith(b"0\r\n\r\n"):  # the stream ends as a whole one does, and the connection stays
            piece = client.recv(65536)
            assert piece
            rest += piece
        last = rest.split(b"\n\n")[-2]
        assert ("messages" in path) == (b"event: error" in last)
        (error,) = (data["error"] for data in events(last))
        assert error["code"] == "engine_unavailable" and error["message"] and b"[DONE]" not in rest
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        wait_for_records(front, 1)
        assert front.records[0].end == "engine lost"


def test_an_engine_that_dies_before_an_answer_is_told(mortal: Server) -> None:
    with running_gateway([mortal], SHORT) as front:
        body = {"prompt": "a", "ignore_eos": True, "n_predict": -1}
        with concurrent.futures.ThreadPoolExecutor(1) as clients:
            waiting = clients.submit(front.ask, "POST", "/completion", body)
            while mortal.busy_slots() == 0:
                time.sleep(0.02)
            mortal.process.kill()
            answers = [waiting.result(10)]
        mortal.process.wait()
        answers.append(front.ask("POST", "/completion", body))  # nobody listens any more
        for answer in answers:
            assert answer.status == 503 and int(answer.headers["Retry-After"]) > 0
            assert answer.error["code"] == "engine_unavailable"
        assert front.ask("GET", "/v1/models").json["data"][0]["status"] == "restarting"
        assert front.ask("GET", "/").status == 503


# ------- the end


def test_what_runs_may_end_and_nothing_new_begins(server: Server) -> None:
    server.wait_until_idle()
    with running_gateway([server], Policy(port=0)) as front:
        idle = front.open()
        client = front.begin_stream({**ENDLESS, "n_predict": 400})
        draining = asyncio.run_coroutine_threadsafe(front.gateway.drain(20), front.loop)
        assert idle.recv(10) == b""
        with pytest.raises(OSError):
            front.open()
        rest = read_all(client)  # a drained connection closes behind its reply
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert draining.result(20) == 0
        client.close()
        idle.close()


def test_what_does_not_end_in_time_is_cut_with_a_word(server: Server) -> None:
    server.wait_until_idle()
    with running_gateway([server], Policy(port=0)) as front:
        stream = front.begin_stream(ENDLESS)
        whole = front.open()
        whole.sendall(post("/completion", {**ENDLESS, "stream": False}))
        with front.open() as uploading:
            uploading.sendall(post("/completion", ENDLESS)[:-3])
            while server.busy_slots() < 2:
                time.sleep(0.02)
            assert front.run(front.gateway.drain(0.3)) == 3
        last = read_all(stream).split(b"\n\n")[-2]
        assert events(last)[0]["error"]["code"] == "shutting_down"
        assert read_all(whole).startswith(b"HTTP/1.1 503")
        assert {record.end for record in front.records} == {"cut"}
        stream.close()
        whole.close()
    server.wait_until_idle(pause=2)


def test_nothing_is_left_open(server: Server) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    threads = threading.active_count()
    with running_gateway([server], Policy(port=0)) as front:
        front.ask("GET", "/v1/models")
        before = count()
        for _ in range(20):
            front.begin_stream(ENDLESS).close()
            front.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})
        server.wait_until_idle()
        deadline = time.monotonic() + 5
        while count() > before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert threading.active_count() == threads
