"""The gateway before a real llama-server with TinyMix, over real sockets."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localmix.errors import UsageError
from localmix.serving import gateway
from localmix.serving.gateway import Gateway
from localmix.serving.policy import Policy
from tests.gateways import (
    ENDLESS,
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

MODEL = "tinymix:Q8_0"
KEY = "k3y-öf-the-tests"
CHAT = {"messages": [{"role": "user", "content": "Where is Pausa's house?"}], "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def server(upstream: Path, tinymix_q8_0: Path) -> Iterator[Server]:
    with running_server(upstream, tinymix_q8_0, MODEL) as running:
        yield running


@pytest.fixture(scope="module")
def front(server: Server) -> Iterator[Front]:
    with running_gateway([server], Policy(port=0, body_limit_bytes=100_000)) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(server: Server) -> Iterator[Front]:
    """With a key, another name, and another origin."""
    policy = Policy(
        port=0,
        api_key=KEY,
        allowed_hosts=frozenset({"models.example"}),
        cors_origins=frozenset({"https://chat.example"}),
    )
    with running_gateway([server], policy) as running:
        yield running


# ------- what it is there for


def test_a_chat_is_answered_whole_and_as_a_stream(front: Front) -> None:
    whole = front.ask("POST", "/v1/chat/completions", CHAT)
    assert whole.status == 200 and whole.json["model"] == MODEL
    text = whole.json["choices"][0]["message"]["content"]
    assert text.strip()

    streamed = front.ask("POST", "/v1/chat/completions", {**CHAT, "stream": True, "model": MODEL})
    assert streamed.headers["Content-Type"] == "text/event-stream"
    *parts, done = events(streamed.body)
    assert done == "[DONE]"
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == text


def test_every_token_comes_when_it_is_made(front: Front) -> None:
    with front.begin_stream(ENDLESS) as client:
        counts = [client.recv(65536).count(b"data: ") for _ in range(40)]
    # an event in each piece, not ten events in every tenth; a few may meet on a busy machine
    assert sorted(counts)[len(counts) // 2] == 1


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}, "choices"),
        ("/completion", {"prompt": "a", "n_predict": 1}, "content"),
        ("/v1/messages", {"messages": CHAT["messages"], "max_tokens": 1}, "content"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 1}, "output"),
        ("/tokenize", {"content": "a b"}, "tokens"),
        ("/detokenize", {"tokens": [5]}, "content"),
        ("/apply-template", {"messages": CHAT["messages"]}, "prompt"),
        ("/v1/messages/count_tokens", {"messages": CHAT["messages"]}, "input_tokens"),
    ],
)
def test_the_api_is_open(front: Front, path: str, body: Any, key: str) -> None:
    answer = front.ask("POST", path, body)
    assert answer.status == 200 and key in answer.json


def test_models_are_listed_and_found(front: Front, server: Server) -> None:
    listed = front.ask("GET", "/v1/models").json
    assert listed["object"] == "list" and [entry["id"] for entry in listed["data"]] == [MODEL]
    assert listed["data"][0]["meta"]["n_ctx_train"] == 1024
    assert front.ask("GET", "/v1/models/tinymix").json == listed["data"][0]
    assert front.ask("GET", "/v1/models/tinymix%3AQ8_0").json["id"] == MODEL
    assert front.ask("GET", "/v1/models/gpt-4").error["code"] == "model_not_found"


def test_requests_go_to_the_model_they_name(upstream: Path, server: Server, random_model: Path) -> None:
    with (
        running_server(upstream, random_model, "random:F32") as other,
        running_gateway([server, other], Policy(port=0)) as front,
    ):
        for asked, expected in ((None, MODEL), ("random", "random:F32"), ("tinymix-q8_0.gguf", MODEL)):
            answer = front.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1, "model": asked})
            assert answer.json["model"] == expected
        assert {entry["id"] for entry in front.ask("GET", "/v1/models").json["data"]} == {MODEL, "random:F32"}
        assert front.ask("GET", "/props?model=random").json["model_alias"] == "random:F32"

        other.state = "restarting"
        answer = front.ask("POST", "/v1/completions", {"prompt": "a", "model": "random"})
        assert answer.status == 503 and answer.headers["Retry-After"] and answer.error["code"] == "engine_restarting"
        assert front.ask("GET", "/health").json == {"status": "restarting"}
        statuses = {entry["id"]: entry["status"] for entry in front.ask("GET", "/v1/models").json["data"]}
        assert statuses == {MODEL: "ready", "random:F32": "restarting"}
        assert front.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}).status == 200
        other.state = "failed"
        answer = front.ask("POST", "/v1/completions", {"prompt": "a", "model": "random"})
        assert answer.error["code"] == "engine_failed" and "Retry-After" not in answer.headers


def test_a_request_without_a_name_goes_to_who_can_answer_it(upstream: Path, server: Server, random_model: Path) -> None:
    pooled = ("--embeddings", "--pooling", "mean")
    with running_server(upstream, random_model, "vectors:F32", *pooled) as vectors:
        vectors.embeddings = True
        with running_gateway([vectors, server], Policy(port=0)) as front:
            made = front.ask("POST", "/v1/embeddings", {"input": "a"})
            assert len(made.json["data"][0]["embedding"]) == 256
            assert front.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}).json["model"] == MODEL
            assert front.ask("GET", "/props").json["model_alias"] == MODEL
            for path, body in (("/v1/completions", {"prompt": "a", "model": "vectors"}),
                               ("/v1/embeddings", {"input": "a", "model": MODEL})):  # fmt: skip
                error = front.ask("POST", path, body).error
                assert (error["code"], error["param"]) == ("unsupported", "model") and "makes" in error["message"]


# ------- who may ask


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8080", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("models.example", 200),
        ("models.example.:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example:8080@localhost", 403),
        ("127.0.0.2", 403),
        ("0x7f.1", 403),
        ("localhost:port", 403),
        ("localhost/", 403),
        ("", 403),
    ],
)
def test_foreign_names_are_refused(guarded: Front, host: str, status: int) -> None:
    answer = guarded.ask("GET", "/health", headers={"Host": host})
    assert answer.status == status
    assert status == 200 or answer.error["code"] == "host_not_allowed"


@pytest.mark.parametrize("head", [b"", b"Host: localhost\r\nHost: evil.example\r\n"])
def test_a_request_has_one_name(front: Front, head: bytes) -> None:
    raw = front.send(b"GET /health HTTP/1.1\r\n" + head + b"Connection: close\r\n\r\n")
    assert b" 400 " in raw.partition(b"\r\n")[0]


@pytest.mark.parametrize(
    ("headers", "status", "allowed"),
    [
        ({"Origin": "http://localhost:1234", "Host": "localhost:1234"}, 200, None),
        ({"Origin": "https://models.example", "Host": "models.example"}, 200, None),
        ({"Origin": "https://chat.example"}, 200, "https://chat.example"),
        ({"Origin": "http://chat.example"}, 403, None),
        ({"Origin": "https://chat.example.evil.example"}, 403, None),
        ({"Origin": "http://localhost:1235", "Host": "localhost:1234"}, 403, None),
        ({"Origin": "null"}, 403, None),
        ({"Origin": ""}, 403, None),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403, None),
        ({"Sec-Fetch-Site": "same-site"}, 403, None),
        ({"Sec-Fetch-Site": "same-origin"}, 200, None),
    ],
)
def test_foreign_pages_are_refused(guarded: Front, headers: dict[str, str], status: int, allowed: str | None) -> None:
    answer = guarded.ask("GET", "/v1/models", headers={"x-api-key": KEY.encode().decode("latin-1"), **headers})
    assert answer.status == status
    assert answer.headers.get("Access-Control-Allow-Origin") == allowed
    assert status == 200 or answer.error["code"] == "origin_not_allowed"


def test_cors_headers_come_with_streams_and_errors_too(guarded: Front) -> None:
    headers = {"Origin": "https://chat.example", "Authorization": f"Bearer {KEY}".encode().decode("latin-1")}
    stream = guarded.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True}, headers)
    refused = guarded.ask("POST", "/v1/completions", {"prompt": "a", "model": "none"}, headers)
    assert (stream.status, refused.status) == (200, 404)
    for answer in (stream, refused):
        assert answer.headers.get_all("Access-Control-Allow-Origin") == ["https://chat.example"]
        assert "Origin" in answer.headers["Vary"]


def test_preflights_are_answered_here(guarded: Front) -> None:
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "Authorization, x-stainless-os, cookie",
    }
    answer = guarded.ask("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://chat.example", **asked})
    assert answer.status == 204 and answer.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    assert answer.headers["Access-Control-Allow-Methods"] == "OPTIONS, POST"
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization, x-stainless-os"
    assert "Access-Control-Allow-Credentials" not in answer.headers
    assert guarded.ask("OPTIONS", "/v1/models", headers={"Origin": "https://evil.example", **asked}).status == 403


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", {}, 401),
        ("/v1/models", {"Authorization": "Bearer wrong"}, 401),
        ("/v1/models", {"Authorization": f"Basic {KEY}"}, 401),
        ("/v1/models", {"Authorization": "Bearer "}, 401),
        ("/v1/models", {"x-api-key": KEY[:-1]}, 401),
        ("/v1/models", {"x-api-key": KEY}, 200),
        ("/v1/models", {"Authorization": f"bearer {KEY}"}, 200),
        ("/props", {}, 401),
        ("/slots", {}, 401),
        ("/nothing", {}, 401),
        ("/health", {}, 200),
        ("/", {}, 200),
        ("/_app/version.json", {}, 200),
    ],
)
def test_only_the_page_and_health_need_no_key(guarded: Front, path: str, headers: dict[str, str], status: int) -> None:
    sent = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    answer = guarded.ask("GET", path, headers=sent)
    assert answer.status == status
    if status == 401:
        assert answer.error["code"] == "invalid_api_key" and answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/slots", 403, "endpoint_closed"),
        ("POST", "/slots/0?action=erase", 403, "endpoint_closed"),
        ("GET", "/metrics", 403, "endpoint_closed"),
        ("GET", "/lora-adapters", 403, "endpoint_closed"),
        ("POST", "/lora-adapters", 403, "endpoint_closed"),
        ("GET", "/tools", 403, "endpoint_closed"),
        ("GET", "/cors-proxy?url=http://localhost", 403, "endpoint_closed"),
        ("POST", "/models/load", 403, "endpoint_closed"),
        ("POST", "/props", 405, "method_not_allowed"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("PATCH", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "//slots", 404, "not_found"),
        ("GET", "/%73lots", 404, "not_found"),
        ("GET", "/v1/../slots", 404, "not_found"),
        ("GET", "/_app/../slots", 404, "not_found"),
        ("GET", "/nothing.js", 404, "not_found"),
        ("GET", "/v1/stream?conv_id=x", 404, "not_found"),
    ],
)
def test_what_is_closed_stays_closed(front: Front, method: str, path: str, status: int, code: str) -> None:
    answer = front.ask(method, path, {} if method == "POST" else None)
    assert answer.status == status and answer.error["code"] == code
    assert status != 405 or "OPTIONS" in answer.headers["Allow"]


NAME = "0b5c6f0e-5f3e-4d43-9f68-conversation"


def test_the_page_takes_its_reply_up_again(front: Front, server: Server) -> None:
    own = {"Origin": f"http://localhost:{front.port}", "Host": f"localhost:{front.port}", "X-Conversation-Id": NAME}
    lines = [f"{name}: {value}" for name, value in own.items() if name != "Host"]
    with front.open() as client:
        client.sendall(post("/v1/completions", ENDLESS, *lines, host=own["Host"]))
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
    time.sleep(0.2)
    assert server.busy_slots() == 1  # goes on for a while without a reader

    (found,) = front.ask("POST", "/v1/streams/lookup", {"conversation_ids": [NAME, "another"]}).json
    assert found["conversation_id"] == NAME and found["is_done"] is False
    with front.open() as client:  # from a number that only people read
        client.sendall(f"GET /v1/stream?conv_id={NAME}&from=%D9%A3 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
    with front.open() as client:
        client.sendall(f"GET /v1/stream?conv_id={NAME}&from=0 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        seen = b""
        while seen.count(b"data: ") < 5:
            seen += client.recv(65536)
        assert front.ask("DELETE", f"/v1/stream?conv_id={NAME}").status == 204
        server.wait_until_idle(5)
    assert front.ask("GET", "/v1/stream?conv_id=another").status == 404
    assert front.ask("POST", "/v1/streams/lookup", {"conversation_ids": NAME}).error["param"] == "conversation_ids"


def test_a_reply_that_nobody_takes_up_is_stopped(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "KEPT_SECONDS", 0.3)
    with running_gateway([server], Policy(port=0)) as front, front.open() as client:
        own = f"localhost:{front.port}"
        client.sendall(
            post("/v1/completions", ENDLESS, f"Origin: http://{own}", f"X-Conversation-Id: {NAME}", host=own)
        )
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.close()
        server.wait_until_idle(5)
        assert front.ask("POST", "/v1/streams/lookup", {"conversation_ids": [NAME]}).json == []


def test_only_the_page_may_leave_a_reply_behind(front: Front, server: Server) -> None:
    with front.open() as client:
        client.sendall(post("/v1/completions", ENDLESS, f"X-Conversation-Id: {NAME}"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
    server.wait_until_idle(2)


def test_props_say_nothing_of_the_file_system(front: Front, tinymix_q8_0: Path) -> None:
    answer = front.ask("GET", "/props")
    assert answer.json["model_path"] == tinymix_q8_0.name and str(tinymix_q8_0.parent) not in answer.body.decode()
    assert answer.json["endpoint_slots"] is False


def test_every_page_may_come_in_where_that_was_asked_for(server: Server) -> None:
    with running_gateway([server], Policy(port=0, cors_origins=frozenset({"*"}))) as front:
        answer = front.ask("GET", "/v1/models", headers={"Origin": "https://chat.example"})
        assert answer.status == 200 and answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in answer.headers
        raw = front.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: http://\xff\r\nConnection: close\r\n\r\n")
        assert raw.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_other_addresses_of_this_machine(server: Server, host: str) -> None:
    with running_gateway([server], Policy(host=host, port=0)) as front:
        assert front.ask("GET", "/v1/models").status == 200
        assert front.ask("GET", "/health", headers={"Host": "evil.example"}).status == 403


@pytest.mark.parametrize("host", ["", "192.0.2.1", "no.such.host.invalid", "a b"])
def test_where_nothing_can_listen(front: Front, host: str) -> None:
    gateway = Gateway([], Policy(host=host or front.host, port=0 if host else front.port), lambda record: None)
    with pytest.raises(UsageError, match="Nothing can listen on") as told:
        asyncio.run(gateway.start())
    assert "--port" in told.value.hint
    asyncio.run(gateway.stop())


# ------- bad input


def test_a_body_over_the_limit_is_refused_before_it_is_read(front: Front) -> None:
    with front.open() as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100001\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 413")
    answer = front.ask("POST", "/v1/completions", {"prompt": "a" * 100_000})
    assert answer.status == 413 and answer.error["code"] == "request_too_large"


def test_a_body_in_chunks_is_counted(front: Front) -> None:
    chunk = b"2710\r\n" + b" " * 10_000 + b"\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with front.open() as client:
        client.sendall(head + chunk * 11)
        assert client.recv(65536).startswith(b"HTTP/1.1 413")
    fine = b"26\r\n" + b'{"prompt": "a", "max_tokens": 1}      ' + b"\r\n0\r\n\r\n"
    with front.open() as client:
        client.sendall(head + fine)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_client_that_waits_for_a_nod_gets_one(front: Front) -> None:
    head, _, body = post("/v1/completions", {"prompt": "a", "max_tokens": 1}, "Expect: 100-continue").partition(
        b"\r\n\r\n"
    )
    with front.open() as client:
        client.sendall(head + b"\r\n\r\n")
        assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{bad",
        b'{"prompt": NaN}',
        b'{"prompt": "\xff"}',
        b"[]",
        b'"text"',
        b"null",
        b'{"prompt": ' + b"[" * 100_0 + b"]" * 100_0 + b"}",
        b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
        b'{"a": ' + b"9" * 50_000 + b"}",
    ],
)
def test_broken_json_is_told(front: Front, body: bytes) -> None:
    answer = front.ask("POST", "/v1/completions", body)
    assert answer.status == 400 and answer.error["code"] == "invalid_json"
    assert answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("/v1/chat/completions", {"temperature": "hot"}, "temperature"),
        ("/v1/chat/completions", {"max_tokens": "many"}, "max_tokens"),
        ("/v1/chat/completions", {"max_tokens": 1e30}, "max_tokens"),
        ("/v1/chat/completions", {"n": 99}, "n"),
        ("/v1/chat/completions", {"messages": "hello"}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        ("/v1/chat/completions", {"tools": 5}, "tools"),
        ("/v1/chat/completions", {"model": 5}, "model"),
        ("/v1/chat/completions", {"grammar": "root ::= root"}, None),
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": 5}, "prompt"),
        ("/v1/completions", {"prompt": "\ud800"}, None),
        ("/v1/messages", {"messages": None}, "messages"),
        ("/v1/responses", {}, "input"),
        ("/detokenize", {"tokens": [-5]}, None),
        ("/tokenize", {"content": 5}, None),
    ],
)
def test_wrong_types_are_told_with_their_field(front: Front, path: str, change: Any, param: str | None) -> None:
    answer = front.ask("POST", path, {**(CHAT if "chat" in path else {}), **change})
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param and answer.error["type"] == "invalid_request_error"
    assert "json.exception" not in answer.error["message"]


PATTERN = {"type": "string", "pattern": "(" * 50_000 + "a" + ")" * 50_000}
PICTURE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/picture.png"}}
SOURCE = {"type": "image", "source": {"type": "url", "url": "https://a.example/"}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        # these end llama-server, or keep it from everybody
        ({"grammar": "root ::= " + "(" * 40_000 + '"a"' + ")" * 40_000}, "grammar"),
        (
            {"grammar": "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(5000)) + "# " * 200_000},
            "grammar",
        ),
        ({"grammar_triggers": [{"type": 99, "value": "("}], "grammar_lazy": True}, "grammar_"),
        ({"chat_parser": "{}"}, "chat_parser"),
        ({"json_schema": PATTERN}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": PATTERN}}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": PATTERN}}]}, "tools"),
        ({"json_schema": {"enum": list(range(6000))}}, "json_schema"),
        ({"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}}, "json_schema"),
        ({"json_schema": {"type": "array", "items": {}, "minItems": 5, "maxItems": 2}}, "json_schema"),
        ({"json_schema": {"type": "string", "pattern": "^a{5,2}$"}}, "json_schema"),
        ({"json_schema": {"type": "string", "pattern": "^a{+5,2}$"}}, "json_schema"),
        ({"json_schema": {"type": "string", "pattern": "^a{5,2x}$"}}, "json_schema"),
        ({"json_schema": {"type": "string", "pattern": "^a{5," + "0" * 30 + "2}$"}}, "json_schema"),
        ({"grammar": 'root ::= "a"{5,' + "0" * 30 + "2}"}, "grammar"),
        ({"grammar": 'root ::= <"> "a"{5,2} <">'}, "grammar"),
        ({"grammar": 'root ::= "#" "a"{5 # "\n,\t2}'}, "grammar"),
        ({"json_schema": {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(6000)}}}, "json_schema"),
        ({"repeat_last_n": 2**31 - 1}, "repeat_last_n"),
        ({"dry_penalty_last_n": 2**28}, "dry_penalty_last_n"),
        ({"top_logprobs": 10**6, "logprobs": True}, "top_logprobs"),
        ({"prompt": ["a"] * 3000}, "prompt"),
        ({"stop": [f"z{i}" for i in range(100)]}, "stop"),
        ({"samplers": "k" * 100}, "samplers"),
        ({"logit_bias": {str(i): 1 for i in range(20_001)}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [SOURCE]}]}, "messages"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///a.png"}]}]}, "input"),
    ],
)
def test_what_one_client_may_not_have(server: Server, change: Any, param: str) -> None:
    with running_gateway([server], Policy(port=0)) as front:
        answer = front.ask("POST", "/v1/chat/completions", {**CHAT, **change})
        assert (answer.status, answer.error["code"]) == (400, "too_much")
        assert answer.error["param"].startswith(param)


def test_all_bodies_together_have_a_limit(server: Server) -> None:
    policy = Policy(port=0, body_limit_bytes=100_000, bodies_limit_bytes=150_000)
    with running_gateway([server], policy) as front:
        for _ in range(3):  # what was answered counts no more
            assert front.ask("POST", "/tokenize", {"content": "a" * 80_000}).status == 200
        head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90000\r\n\r\n"
        with socket.create_connection((front.host, front.port), timeout=10) as waiting:
            waiting.sendall(head + b"a" * 80_000)
            time.sleep(0.2)
            answer = front.ask("POST", "/tokenize", {"content": "a" * 80_000})
            assert (answer.status, answer.error["code"]) == (503, "too_many_requests")
            assert answer.headers["Retry-After"]
        time.sleep(0.2)
        assert front.ask("POST", "/tokenize", {"content": "a" * 80_000}).status == 200


def test_what_one_client_may_have(server: Server) -> None:
    tokens = {"prompt": [5] * 400, "max_tokens": 1, "logit_bias": {str(i): 1 for i in range(2000)}, "n_probs": 100}
    texts = {"prompt": ["a"] * 20, "max_tokens": 1, "grammar": "root ::= " + "(" * 100 + '"a"{2,5} "{5,2}"' + ")" * 100}
    pattern = {"type": "string", "pattern": r"^\{a{2}b{1,3}c{1,}d{,2}\}$"}
    schema = {"prompt": "a", "max_tokens": 1, "json_schema": pattern}
    with running_gateway([server], Policy(port=0)) as front:
        for asked in (tokens, texts, schema):
            assert front.ask("POST", "/v1/completions", asked).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_above_the_context_is_told(front: Front, stream: bool) -> None:
    messages = [{"role": "user", "content": "word " * 3000}]
    answer = front.ask("POST", "/v1/chat/completions", {"messages": messages, "stream": stream})
    assert answer.status == 400
    assert answer.error["code"] == "context_length_exceeded" and answer.error["param"] == "messages"
    assert answer.error["n_ctx"] == 512 < answer.error["n_prompt_tokens"]


def test_an_unknown_model_is_told(front: Front) -> None:
    answer = front.ask("POST", "/v1/completions", {"prompt": "a", "model": "gpt-4"})
    assert answer.status == 404
    assert (answer.error["code"], answer.error["param"]) == ("model_not_found", "model")
    assert MODEL in answer.error["message"]


@pytest.mark.parametrize("header", ["Content-Encoding: gzip", "Content-Type: multipart/form-data; boundary=x"])
def test_other_encodings_are_refused(front: Front, header: str) -> None:
    raw = front.send(post("/v1/completions", {"prompt": "a"}, header, "Connection: close"))
    assert raw.startswith(b"HTTP/1.1 415")


# ------- HTTP itself


def test_a_connection_serves_many_requests_and_those_sent_ahead_in_order(front: Front) -> None:
    one = post("/tokenize", {"content": "one"})
    bad = post("/v1/nothing", {})
    last = post("/tokenize", {"content": "one two three"}, "Connection: close")
    raw = front.send(one + bad + one + last)
    statuses = [int(part[:3]) for part in raw.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 404, 200, 200]
    counts = [found.count(b",") for found in re.findall(rb'"tokens":\[[^]]*', raw)]
    assert counts[:2] == [0, 0] and counts[2] > 0


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n",
        b"Content-Length: +0\r\n\r\n",
        b"Content-Length: 0x0\r\n\r\n",
        b"Content-Length: 0, 0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0\n\n",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n",
        b"X: a\rGET\r\n\r\n",
        b"X: a\nContent-Length: 0\r\n\r\n",
        b" X: folded\r\n\r\n",
        b"X\0: a\r\n\r\n",
    ],
)
def test_nothing_is_smuggled(front: Front, framing: bytes) -> None:
    before = len(front.records)
    raw = front.send(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n" + framing + SMUGGLED)
    assert b" 400 " in raw.partition(b"\r\n")[0], raw
    assert raw.count(b"HTTP/1.") == 1, raw
    assert all(record.path != "/smuggled" for record in front.records[before:])


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 200 + b"\r\n", 431),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"CONNECT evil.example:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ],
)
def test_heads_that_are_no_heads(front: Front, raw: bytes, status: int) -> None:
    answer = front.send(raw)
    assert answer.partition(b"\r\n")[0].split()[1] == str(status).encode(), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_client_too_many_is_told(server: Server) -> None:
    with running_gateway([server], Policy(port=0, connections=2)) as front:
        with front.open() as one, front.open() as two:
            for client in (one, two):
                client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert client.recv(65536).startswith(b"HTTP/1.1 200")
            with front.open() as three:
                refused = read_all(three)
            assert refused.startswith(b"HTTP/1.1 503") and b"Retry-After: 1" in refused
        deadline = time.monotonic() + 5
        while front.ask("GET", "/health").status != 200:
            assert time.monotonic() < deadline


# ------- the page


def test_the_page_comes_with_a_policy_and_in_both_encodings(front: Front) -> None:
    plain = front.ask("GET", "/")
    if plain.status == 404:
        pytest.skip("llama-server was built without its page")
    assert b"<!doctype html" in plain.body.lower() and "Content-Encoding" not in plain.headers
    policy = plain.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert plain.headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in plain.headers and plain.headers["Server"] == "localmix"

    packed = front.ask("GET", "/", headers={"Accept-Encoding": "br, gzip"})
    assert packed.headers["Content-Encoding"] == "gzip" and len(packed.body) < len(plain.body)
    assert front.ask("GET", "/", headers={"If-None-Match": plain.headers["ETag"]}).status == 304
    head = front.ask("HEAD", "/")
    assert head.status == 200 and head.body == b"" and int(head.headers["Content-Length"]) == len(plain.body)


def test_every_file_of_the_page_comes(front: Front) -> None:
    worker = front.ask("GET", "/sw.js")
    if worker.status == 404:
        pytest.skip("llama-server was built without its page")
    files = set(re.findall(r'url:"([^"]+)"', worker.body.decode())) | {"index.html", "favicon.ico", "build.json"}
    assert len(files) > 10
    for name in sorted(files):
        assert front.ask("GET", f"/{name.lstrip('./')}").status == 200, name


# ------- the log


def test_the_log_tells_what_was_done_and_nothing_that_was_said(guarded: Front) -> None:
    guarded.records.clear()
    headers = {"Authorization": f"Bearer {KEY}".encode().decode("latin-1")}
    body = {"prompt": "a secret prompt", "max_tokens": 3, "stream": True}
    answer = guarded.ask("POST", "/v1/completions?key=hidden", body, headers)
    guarded.ask("GET", "/v1/models")
    done, refused = guarded.records
    assert (done.method, done.path, done.status, done.model, done.end) == (
        "POST", "/v1/completions", 200, MODEL, "done",
    )  # fmt: skip
    assert done.bytes_in == len(json.dumps(body)) and done.bytes_out == len(answer.body) and done.milliseconds > 0
    assert done.client == "127.0.0.1" and (refused.status, refused.model) == (401, "")
    written = repr(guarded.records) + repr(guarded.gateway._policy)
    assert "secret" not in written and "hidden" not in written and KEY not in written
