"""Answers of an engine, however they are cut on their way."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from localmix.serving.engine_reply import Chunks, EngineGone, Reply, request_bytes

PIECES = [b"data: one\n\n", b"a", b"\r\n0\r\n\r\n", b"x" * 70_000, "data: 苹果院\n\n".encode()]
FRAMED = b"".join(b"%X\r\n%b\r\n" % (len(piece), piece) for piece in PIECES) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16384, 10**6])
def test_chunks_are_read_however_they_are_cut(size: int) -> None:
    chunks = Chunks()
    found = []
    for place in range(0, len(FRAMED), size):
        assert not chunks.ended
        found.append(chunks.feed(FRAMED[place : place + size]))
    assert b"".join(found) == b"".join(PIECES) and chunks.ended


def test_chunks_cut_anywhere_give_the_same() -> None:
    chance = random.Random(7)
    body = FRAMED.replace(b"x" * 70_000, b"x" * 40).replace(b"11170", b"28")
    for _ in range(500):
        cuts = [0, *sorted(chance.sample(range(1, len(body)), chance.randrange(1, 12))), len(body)]
        chunks = Chunks()
        found = b"".join(chunks.feed(body[start:end]) for start, end in itertools.pairwise(cuts))
        assert found == b"".join(PIECES).replace(b"x" * 70_000, b"x" * 40) and chunks.ended


def test_a_chunk_is_handed_on_before_it_is_whole() -> None:
    chunks = Chunks()
    assert [chunks.feed(part) for part in (b"a\r", b"\n01", b"234", b"56789\r", b"\n")] == [
        b"", b"01", b"234", b"56789", b"",
    ]  # fmt: skip
    assert not chunks.ended


@pytest.mark.parametrize("body", [b"data: a\n\n", b"-1\r\n", b"\r\n", b"123456789\r\n", b"1\r\nab\r\n"])
def test_what_is_no_chunk_is_noticed(body: bytes) -> None:
    chunks = Chunks()
    assert chunks.feed(b"1\r\na\r\n" + body)[:1] == b"a" and chunks.broken
    chunks = Chunks()
    for place in range(len(body)):
        chunks.feed(body[place : place + 1])
    assert chunks.broken and not chunks.ended


def answers(raw: bytes) -> bytes | None:
    """What `read` makes of an engine that sends these bytes one by one and ends; None where it is not whole."""

    async def work() -> bytes | None:
        reply = Reply(b"")
        room = reply.get_buffer(-1)
        for place in range(len(raw)):
            room[:1] = raw[place : place + 1]
            reply.buffer_updated(1)
        reply.connection_lost(None)
        try:
            await reply.wait_until_begun()
            return await reply.read()
        except EngineGone:
            return None

    return asyncio.run(work())


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", b"abc"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n", None),
        (b"HTTP/1.1 200 OK\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\n", None),
        (b"", None),
    ],
)
def test_an_answer_is_whole_or_none(raw: bytes, body: bytes | None) -> None:
    assert answers(raw) == body


def test_a_request_is_what_llama_server_reads() -> None:
    assert request_bytes("POST", "/completion", {"Content-Type": "application/json"}, b"{}") == (
        b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: 2\r\n\r\n{}"
    )
