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


@pytest.mark.parametrize("size", [1, 4, 100])
def test_extensions_and_trailers_mean_nothing(size: int) -> None:
    framed = b"1;name=value\r\na\r\n2 ; x\r\nbc\r\n0;last\r\nTrailer: x\r\n\r\n"
    chunks = Chunks()
    assert b"".join(chunks.feed(framed[place : place + size]) for place in range(0, len(framed), size)) == b"abc"
    assert chunks.ended and not chunks.broken


@pytest.mark.parametrize(
    "body", [b"data: a\n\n", b"-1\r\n", b"\r\n", b"123456789\r\n", b"1\r\nab\r\n", b";a\r\n", b"1;" + b"a" * 300]
)
def test_what_is_no_chunk_is_noticed(body: bytes) -> None:
    chunks = Chunks()
    assert chunks.feed(b"1\r\na\r\n" + body)[:1] == b"a" and chunks.broken
    chunks = Chunks()
    for place in range(len(body)):
        chunks.feed(body[place : place + 1])
    assert chunks.broken and not chunks.ended


def answers(raw: bytes, size: int = 1) -> bytes | None:
    """What `read` makes of an engine that sends these bytes in pieces and ends; None where it is not whole."""
    return answers_to([raw[place : place + size] for place in range(0, len(raw), size)])


def answers_to(pieces: list[bytes]) -> bytes | None:
    """The same of pieces as they are."""

    async def work() -> bytes | None:
        reply = Reply(b"")
        room = reply.get_buffer(-1)
        for piece in pieces:
            room[: len(piece)] = piece
            reply.buffer_updated(len(piece))
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
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n\r\n", b"abc"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n3\r\nabc\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabc", None),
        (b"HTTP/1.1 2000 OK\r\n\r\nabc", None),
        (b"HTTP/1.1 200 OK\r\nETag: a\nSet-Cookie: b\r\n\r\nabc", None),
        (b"HTTP/1.1 200 OK\r\n", None),
        (b"", None),
    ],
)
def test_an_answer_is_whole_or_none(raw: bytes, body: bytes | None) -> None:
    assert answers(raw) == answers(raw, 16384) == body


def test_a_chunk_behind_the_last_belongs_to_no_answer() -> None:
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    assert answers_to([whole, b"3\r\ndef\r\n"]) == b"abc"


def test_a_request_is_what_llama_server_reads() -> None:
    assert request_bytes("POST", "/completion", {"Content-Type": "application/json"}, b"{}") == (
        b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: 2\r\n\r\n{}"
    )
