"""What the gateway tells by itself: its health, its models, their settings, and the files of llama.cpp's page."""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from localmix.serving.admission import LOGGED_PATH
from localmix.serving.api_errors import RETRY_SECONDS, ApiError
from localmix.serving.engine_client import Engine, ask, ask_json
from localmix.serving.model_names import find_named

PASSED_HEADERS = ("Content-Type", "Content-Encoding", "Cache-Control", "ETag", "X-Accel-Buffering")
PAGE_HEADERS = ("Cross-Origin-Embedder-Policy", "Cross-Origin-Opener-Policy")
# The page's own scripts and styles, and nothing of anybody else's: a reply that smuggles an image or a script into
# the page cannot tell a stranger what was said.
CONTENT_SECURITY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' blob:; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:;"
    " worker-src 'self' blob:; frame-src 'self' blob: data:; object-src 'none'; base-uri 'self'; form-action 'self';"
    " frame-ancestors 'none'"
)
_TAG = re.compile(r"[ -~]{1,256}")  # that a browser knows a file by


def json_response(document: Any, status: int = 200) -> web.Response:
    """A document that nobody keeps."""
    text = json.dumps(document, ensure_ascii=False)
    return web.Response(
        status=status, text=text, content_type="application/json", headers={"Cache-Control": "no-store"}
    )


def passed_headers(headers: Mapping[str, str], names: Sequence[str] = PASSED_HEADERS) -> dict[str, str]:
    """Those of an engine's headers that its client gets."""
    return {name: headers[name.lower()] for name in names if name.lower() in headers}


def find_engine(engines: Sequence[Engine], name: str | None, vectors: bool | None = None) -> Engine:
    """The engine of that name; without one the first, or the first that makes what is wanted.

    Raises:
        ApiError: there is none.
    """
    able = [engine for engine in engines if vectors is None or engine.embeddings == vectors]
    engine = find_named(engines, name) if name else (able or engines)[0]
    if engine is None:
        known = ", ".join(engine.name for engine in engines)
        raise ApiError(
            404, f"There is no model {name!r:.200} here, but {known}.", code="model_not_found", param="model"
        )
    return engine


def health(engines: Sequence[Engine], ending: bool) -> web.Response:
    """Whether everything answers."""
    states = [engine.state for engine in engines]
    if ending or any(state != "ready" for state in states):
        word = "ending" if ending else next(state for state in states if state != "ready")
        response = json_response({"status": word}, 503)
        response.headers["Retry-After"] = str(RETRY_SECONDS)
        return response
    return json_response({"status": "ok"})


async def list_models(engines: Sequence[Engine]) -> web.Response:
    """All models in OpenAI's list, and in the other one that llama.cpp's page reads."""
    found = await asyncio.gather(*(_told_models(engine) for engine in engines))
    return json_response(
        {
            "object": "list",
            "data": [data for data, _ in found],
            "models": [details for _, details in found if details],
        }
    )


async def show_model(engines: Sequence[Engine], name: str) -> web.Response:
    """OpenAI's entry of one model."""
    return json_response((await _told_models(find_engine(engines, name)))[0])


async def show_props(engine: Engine) -> web.Response:
    """llama-server's settings, without where the model's file lies and with what is closed said to be."""
    props = await ask_json(engine, "/props")
    closed = {name: False for name in ("endpoint_slots", "endpoint_props", "endpoint_metrics", "cors_proxy_enabled")}
    return json_response({**props, "model_path": Path(str(props.get("model_path", ""))).name, **closed})


async def page_file(engines: Sequence[Engine], path: str, asked: Mapping[str, str]) -> web.Response:
    """A file of the page, from any engine that answers.

    Args:
        asked: the headers of the request.
    """
    engine = next((engine for engine in engines if engine.state == "ready"), engines[0])
    # the page's files are compressed inside llama-server, which has nothing for who cannot unpack them
    wanted = {"Accept-Encoding": "gzip"}
    known = asked.get("If-None-Match", "")
    if _TAG.fullmatch(known):
        wanted["If-None-Match"] = known
    async with ask(engine, "GET", path, headers=wanted) as reply:
        body = await reply.read()
        if reply.status >= 400:
            raise ApiError(404, f"There is no GET {path[:LOGGED_PATH]} here.", code="not_found")
        headers = passed_headers(reply.headers, (*PASSED_HEADERS, *PAGE_HEADERS))
    if body and "gzip" in headers.get("Content-Encoding", "") and not _takes_gzip(asked):
        body = zlib.decompress(body, zlib.MAX_WBITS | 16)
        del headers["Content-Encoding"]
    headers |= {"Content-Security-Policy": CONTENT_SECURITY, "Vary": "Accept-Encoding, Origin"}
    return web.Response(status=reply.status, body=body, headers=headers)


async def _told_models(engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    """OpenAI's entry of one model and llama.cpp's; the latter is empty while the engine does not answer."""
    own = {"id": engine.name, "object": "model", "owned_by": "localmix"}
    if engine.state != "ready":
        return {**own, "created": 0, "status": engine.state}, {}
    try:
        told = await ask_json(engine, "/v1/models")
    except ApiError:
        return {**own, "created": 0, "status": "restarting"}, {}
    details = {**told["models"][0], "name": engine.name, "model": engine.name}
    return {**told["data"][0], **own, "status": "ready"}, details


def _takes_gzip(headers: Mapping[str, str]) -> bool:
    """Whether Accept-Encoding names it, and not with weight 0."""
    for entry in headers.get("Accept-Encoding", "").lower().split(","):
        coding, _, weight = entry.partition(";")
        if coding.strip() in ("gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
