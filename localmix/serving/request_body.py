"""The body of a request: complete, small enough, in time, and a JSON object."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, NoReturn

from aiohttp import HttpVersion11, web

from localmix.serving.api_errors import ApiError
from localmix.serving.policy import Policy

NESTING = 64  # deeper JSON means no request; llama-server walks it by recursion


async def read_object(
    request: web.BaseRequest, policy: Policy, count: Callable[[int], None]
) -> tuple[bytes, dict[str, Any]]:
    """The body's bytes, and the JSON object they are.

    Args:
        count: told the bytes of each piece that comes.

    Raises:
        ApiError: it is none, or too large, or too slow.
    """
    _check_head(request, policy.body_limit_bytes)
    if request.headers.get("Expect") and request.version >= HttpVersion11 and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        body = await asyncio.wait_for(_read(request, policy.body_limit_bytes, count), policy.body_seconds)
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise ApiError(
            408, "The body of the request did not come in time.", code="request_timeout", close=True
        ) from error
    except web.RequestPayloadError as error:
        raise ApiError(400, "The body is not valid HTTP.", code="bad_http", close=True) from error
    return body, _parse(body)


def _check_head(request: web.BaseRequest, limit: int) -> None:
    """Refuse what the head tells already."""
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "The body has to come uncompressed.", code="unsupported_encoding")
    if request.content_type.startswith("multipart/"):
        raise ApiError(415, "The body has to be JSON.", code="unsupported_media_type")
    if request.headers.get("Expect", "100-continue").lower() != "100-continue":
        raise ApiError(417, "Only `Expect: 100-continue` is understood.", close=True)


async def _read(request: web.BaseRequest, limit: int, count: Callable[[int], None]) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while piece := await request.content.readany():
        count(len(piece))
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        pieces.append(piece)
    return b"".join(pieces)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"{error.msg}, line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"The body is no JSON: {place}.", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "The body is no JSON.", code="invalid_json") from error
    if not isinstance(asked, dict):
        raise ApiError(400, "The body has to be a JSON object.", code="invalid_json")
    if _nests_deeper(asked, NESTING):
        raise ApiError(400, f"The body nests deeper than {NESTING} levels.", code="invalid_json")
    return asked


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit:,} bytes.", code="request_too_large", close=True)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _nests_deeper(document: Any, levels: int) -> bool:
    layer = [document]
    for _ in range(levels):
        layer = [
            child
            for node in layer
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not layer:
            return False
    return True
