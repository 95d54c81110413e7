"""The only door to the engines: an HTTP server that judges every request before a llama-server sees it.

llama-server by itself takes any Host and Origin that reach it, shows everybody's prompts, and waits for slow clients
as long as they like. Here a request has to name this server, come from nobody's page but ours, show the key, be small,
complete and in time, and go to an endpoint that harms no one else (`localmix.serving.routes`); only then it is carried
over, and its client's going away is carried over too, so that no slot works for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, Protocol
from urllib.parse import quote, unquote

import aiohttp
from aiohttp import web

from localmix.errors import UsageError
from localmix.serving import routes
from localmix.serving.api_errors import PERMISSION, RETRY_SECONDS, SERVER, ApiError, engine_error
from localmix.serving.connection import Connection, Stalled, Unread, error_response, socket_address
from localmix.serving.conversations import Conversations
from localmix.serving.model_names import find_named
from localmix.serving.policy import Policy, allowed_cors_headers
from localmix.serving.request_body import read_object
from localmix.serving.request_limits import check_limits

EngineState = Literal["loading", "ready", "restarting", "failed"]
End = Literal["done", "client left", "client stalled", "engine lost", "cut"]

CONNECT_SECONDS = 5.0
STOP_SECONDS = 2.0
LOGGED_PATH = 200
ENGINE_LOST = "engine_unavailable"
CONVERSATION = "X-Conversation-Id"
KEPT_SECONDS = 30.0  # how long a reply goes on when its page is gone
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
SECURITY_HEADERS = {
    "Server": "localmix",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}

_NAME = re.compile(r"[!-~]{8,256}")  # of a conversation


@dataclass(frozen=True)
class EngineAddress:
    """Where a llama-server listens: a Unix socket, or (where there are none) a port of the loopback with a key."""

    socket: Path | None = None
    port: int = 0
    key: str = field(default="", repr=False)


class Engine(Protocol):
    """What the gateway has to know of a running llama-server."""

    @property
    def name(self) -> str:
        """What clients call the model, as the library does: `tinymix:Q8_0`."""

    @property
    def address(self) -> EngineAddress:
        """Read before each request: a restarted engine may listen elsewhere."""

    @property
    def state(self) -> EngineState:
        """Whether it answers."""

    @property
    def failure(self) -> str | None:
        """Why it does not."""

    @property
    def embeddings(self) -> bool:
        """Whether it makes vectors instead of text."""


@dataclass(frozen=True)
class Access:
    """A request that was answered, or not: never its text nor a key.

    Attributes:
        method: empty where what came was no request.
        path: without the query, cut to 200 characters.
        status: of the answer; 0 where the client left before there was one.
        model: the engine it went to, empty where it went to none.
        end: how it ended.
    """

    client: str
    method: str
    path: str
    status: int
    milliseconds: float
    bytes_in: int
    bytes_out: int
    model: str
    end: End


@dataclass
class _Call:
    """What is known of a request on its way."""

    request: web.BaseRequest
    path: str
    cors: dict[str, str] = field(default_factory=dict)
    from_page: bool = False
    model: str = ""
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    end: End = "done"


class Gateway:
    """Listens for clients and carries their requests to the engines.

    Args:
        engines: the models, the first of which answers where a request names none.
        policy: the rules.
        log: gets a record of every request.
    """

    def __init__(self, engines: Sequence[Engine], policy: Policy, log: Callable[[Access], None]) -> None:
        self._engines = engines
        self._policy = policy
        self._log = log
        self._listener: asyncio.Server | None = None
        self._server: web.Server | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._conversations = Conversations[Engine](self._stop_conversation, KEPT_SECONDS)
        self._sessions: dict[EngineAddress, aiohttp.ClientSession] = {}
        self._bodies = 0  # bytes of all that is being asked now
        self._ending = False
        self._cutting = False

    async def start(self) -> tuple[str, int]:
        """Listen, and return the address and port.

        Raises:
            UsageError: the port is taken, or the address is none of this machine's.
        """
        server = web.Server(self._handle, handler_cancellation=True)

        def connect() -> Connection:
            return Connection(
                server,
                head_seconds=self._policy.head_seconds,
                idle_seconds=self._policy.idle_seconds,
                is_full=lambda: len(server.connections) >= self._policy.connections,
                refused=self._note_refusal,
                stall_seconds=self._policy.stall_seconds,
            )

        host, port = self._policy.host, self._policy.port
        try:
            self._listener = await asyncio.get_running_loop().create_server(connect, host, port)
        except OSError as error:
            reason = (error.strerror or str(error)).rpartition(":")[2].strip()
            raise UsageError(
                f"Nothing can listen on {host}, port {port}: {reason}.",
                "Choose another port with `--port`, or `--port 0` for any free one.",
            ) from error
        self._server = server
        address = self._listener.sockets[0].getsockname()
        return str(address[0]), int(address[1])

    async def drain(self, seconds: float) -> int:
        """Accept nothing more, and let what is running end; returns how many requests had to be cut."""
        self._ending = True
        if self._listener is not None:
            self._listener.close()
        self._close_idle()
        if self._running:
            await asyncio.wait(set(self._running), timeout=seconds)
        return await self._cut()

    async def stop(self) -> None:
        """Cut what is running and close; harmless when it never started."""
        await self.drain(0)
        if self._server is not None:
            await self._server.shutdown(STOP_SECONDS)
        self._conversations.close()
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    def _close_idle(self) -> None:
        for connection in self._server.connections if self._server is not None else ():
            assert isinstance(connection, Connection)
            if connection.is_busy:
                connection.close()
            else:
                connection.force_close()

    async def _cut(self) -> int:
        cut = set(self._running)
        self._cutting = True
        for task in cut:
            task.cancel()
        if cut:
            await asyncio.wait(cut, timeout=STOP_SECONDS)
        return len(cut)

    # ------- one request

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        task = asyncio.current_task()
        assert isinstance(connection, Connection) and task is not None
        call = _Call(request, request.raw_path.partition("?")[0])
        started = time.perf_counter()
        connection.begin()
        self._running.add(task)
        try:
            response = await self._respond(call)
            call.status = response.status
            if isinstance(response, web.Response) and isinstance(response.body, bytes) and request.method != "HEAD":
                call.bytes_out = len(response.body)
            return response
        except (asyncio.CancelledError, ConnectionError) as error:  # whichever tells it first
            call.end = "client left"
            raise asyncio.CancelledError from error
        except Exception:
            call.status = 500
            raise
        finally:
            self._running.discard(task)
            self._bodies -= call.bytes_in
            connection.end()
            milliseconds = (time.perf_counter() - started) * 1000
            path, client = call.path[:LOGGED_PATH], connection.client()
            counts = (round(milliseconds, 1), call.bytes_in, call.bytes_out)
            self._log(Access(client, request.method, path, call.status, *counts, call.model, call.end))

    async def _respond(self, call: _Call) -> web.StreamResponse:
        try:
            response = await self._answer(call)
        except ApiError as error:
            response = error_response(error)
        except asyncio.CancelledError:
            if not self._cutting:
                raise
            call.end = "cut"
            response = error_response(_shutting_down())
        if not response.prepared:
            response.headers.update({**SECURITY_HEADERS, **call.cors})
            if self._ending:
                response.force_close()
        return response

    async def _answer(self, call: _Call) -> web.StreamResponse:
        request = call.request
        place = routes.find_place(call.path)
        self._judge_source(call, place)
        if request.method == "OPTIONS":
            return self._preflight(call, place)
        if place not in routes.OPEN_WITHOUT_KEY and not self._policy.knows_key(request.headers):
            raise ApiError(
                401,
                "This server asks for a key: `Authorization: Bearer KEY`; the one shown is missing or wrong.",
                code="invalid_api_key",
            )
        if place == "unknown":
            raise ApiError(404, f"There is no {request.method} {call.path[:LOGGED_PATH]} here.", code="not_found")
        if place == "closed":
            raise ApiError(
                403, f"{call.path} is closed. {routes.closed_reason(call.path)}", PERMISSION, code="endpoint_closed"
            )
        methods = routes.METHODS[place]
        if request.method not in methods:
            response = error_response(
                ApiError(405, f"{call.path} takes {' and '.join(sorted(methods))}.", code="method_not_allowed")
            )
            response.headers["Allow"] = ", ".join(sorted({*methods, "OPTIONS"}))
            return response
        if self._ending:
            raise _shutting_down()
        return await self._serve(call, place)

    async def _serve(self, call: _Call, place: routes.Place) -> web.StreamResponse:
        if place == "api":
            return await self._ask(call)
        if place == "page":
            return await self._page_file(call)
        if place == "health":
            return self._health()
        if place == "models":
            return _json(await self._models())
        if place == "model":
            return _json(await self._model(unquote(call.path.partition("models/")[2])))
        if place == "props":
            return _json(await self._props(call))
        if place == "lookup":
            return _json(await self._look_up(call))
        return await self._take_up(call)

    def _judge_source(self, call: _Call, place: routes.Place) -> None:
        """Refuse what came under a foreign name or from a foreign page, and note what CORS allows."""
        headers = call.request.headers
        hosts = headers.getall("Host", [])
        if len(hosts) != 1 or not call.path.startswith("/"):
            raise ApiError(400, "A request needs one Host header and a path.", code="bad_http", close=True)
        if not self._policy.knows_host(hosts[0], socket_address(call.request)):
            raise ApiError(
                403,
                "The Host header names another server. Start localmix with `--allow-host NAME` if it should answer"
                " under that name.",
                PERMISSION,
                code="host_not_allowed",
            )
        origins = headers.getall("Origin", [])
        if origins and all(self._policy.is_own_page(origin, hosts[0]) for origin in origins):
            call.from_page = True
            return
        if len(origins) == 1 and self._policy.allows_origin(origins[0]):
            allowed = "*" if "*" in self._policy.cors_origins else origins[0]
            call.cors = {"Access-Control-Allow-Origin": allowed, "Vary": "Origin"}
            return
        # an image or a script of a foreign page is fetched without an Origin
        site = headers.get("Sec-Fetch-Site", "none")
        if origins or (site not in ("none", "same-origin") and place != "page"):
            raise ApiError(
                403,
                "Pages of other origins may not use this server. Start localmix with `--cors ORIGIN` to let one in.",
                PERMISSION,
                code="origin_not_allowed",
            )

    def _preflight(self, call: _Call, place: routes.Place) -> web.Response:
        """What a browser asks before it sends a foreign page's request: the origin is judged by now."""
        methods = ", ".join(sorted({*routes.METHODS.get(place, ()), "OPTIONS"}))
        response = web.Response(status=204, headers={"Allow": methods})
        if call.cors:
            asked = call.request.headers
            response.headers["Access-Control-Allow-Methods"] = methods
            wanted = allowed_cors_headers(asked.get("Access-Control-Request-Headers", ""))
            response.headers["Access-Control-Allow-Headers"] = ", ".join(wanted)
            response.headers["Access-Control-Max-Age"] = "600"
            if asked.get("Access-Control-Request-Private-Network") == "true":
                response.headers["Access-Control-Allow-Private-Network"] = "true"
        return response

    # ------- what the gateway answers by itself

    def _health(self) -> web.Response:
        states = [engine.state for engine in self._engines]
        if self._ending or any(state != "ready" for state in states):
            word = "ending" if self._ending else next(state for state in states if state != "ready")
            response = _json({"status": word}, 503)
            response.headers["Retry-After"] = str(RETRY_SECONDS)
            return response
        return _json({"status": "ok"})

    async def _models(self) -> dict[str, Any]:
        """All models in OpenAI's list, and in the other one that llama.cpp's page reads."""
        found = await asyncio.gather(*(self._told_models(engine) for engine in self._engines))
        return {
            "object": "list",
            "data": [data for data, _ in found],
            "models": [details for _, details in found if details],
        }

    async def _model(self, name: str) -> dict[str, Any]:
        return (await self._told_models(self._find_engine(name)))[0]

    async def _told_models(self, engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
        """OpenAI's entry of one model and llama.cpp's; the latter is empty while the engine does not answer."""
        own = {"id": engine.name, "object": "model", "owned_by": "localmix"}
        if engine.state != "ready":
            return {**own, "created": 0, "status": engine.state}, {}
        try:
            told = await self._get_json(engine, "/v1/models")
        except ApiError:
            return {**own, "created": 0, "status": "restarting"}, {}
        details = {**told["models"][0], "name": engine.name, "model": engine.name}
        return {**told["data"][0], **own, "status": "ready"}, details

    async def _props(self, call: _Call) -> dict[str, Any]:
        """llama-server's settings, without where the model's file lies and with what is closed said to be."""
        engine = self._find_engine(call.request.query.get("model"), vectors=False)
        call.model = engine.name
        props = await self._get_json(engine, "/props")
        closed = {
            name: False for name in ("endpoint_slots", "endpoint_props", "endpoint_metrics", "cors_proxy_enabled")
        }
        return {**props, "model_path": Path(str(props.get("model_path", ""))).name, **closed}

    async def _page_file(self, call: _Call) -> web.Response:
        engine = next((engine for engine in self._engines if engine.state == "ready"), self._engines[0])
        # the page's files are compressed inside llama-server, which has nothing for who cannot unpack them
        wanted = {"Accept-Encoding": "gzip"}
        known = call.request.headers.get("If-None-Match")
        if known:
            wanted["If-None-Match"] = known
        async with self._request(engine, "GET", call.path, headers=wanted) as reply:
            body = await reply.read()
            if reply.status >= 400:
                raise ApiError(404, f"There is no GET {call.path[:LOGGED_PATH]} here.", code="not_found")
            headers = {name: reply.headers[name] for name in (*PASSED_HEADERS, *PAGE_HEADERS) if name in reply.headers}
        if body and "gzip" in headers.get("Content-Encoding", "") and not _takes_gzip(call.request.headers):
            body = zlib.decompress(body, zlib.MAX_WBITS | 16)
            del headers["Content-Encoding"]
        headers |= {"Content-Security-Policy": CONTENT_SECURITY, "Vary": "Accept-Encoding, Origin"}
        return web.Response(status=reply.status, body=body, headers=headers)

    # ------- what an engine answers

    async def _ask(self, call: _Call) -> web.StreamResponse:
        body, asked = await self._read_object(call)
        model = asked.get("model")
        if not isinstance(model, str | None):
            raise ApiError(400, "`model` has to be a name.", param="model")
        if not isinstance(asked.get("messages", []), list):  # /v1/messages takes anything for none
            raise ApiError(400, "`messages` has to be a list.", param="messages")
        check_limits(asked)
        engine = self._find_engine(model, routes.wants_vectors(call.path))
        call.model = engine.name
        _check_ability(engine, call.path)
        conversation = call.request.headers.get(CONVERSATION, "")
        if not call.from_page or asked.get("stream") is not True or not _NAME.fullmatch(conversation):
            conversation = ""
        names = frozenset(asked)
        del asked  # many times as large as the body, while it waits for its turn
        try:
            if not conversation:
                return await self._carry(call, engine, body, names)
            self._conversations.join(conversation, engine)
            try:
                return await self._carry(call, engine, body, names, {CONVERSATION: conversation})
            finally:
                self._conversations.leave(conversation)
        except ApiError as error:
            if error.code == ENGINE_LOST:
                call.end = "engine lost"
            raise

    async def _carry(
        self,
        call: _Call,
        engine: Engine,
        body: bytes,
        asked: Collection[str],
        conversation: Mapping[str, str] = MappingProxyType({}),
    ) -> web.StreamResponse:
        headers = {"Content-Type": "application/json", **conversation}
        async with self._request(engine, "POST", call.path, data=body, headers=headers) as reply:
            if reply.status == 200 and reply.content_type == "text/event-stream":
                return await self._stream(call, reply)
            text = await reply.read()
            if reply.status >= 400:
                raise engine_error(reply.status, text, asked)
            kept = {name: reply.headers[name] for name in PASSED_HEADERS if name in reply.headers}
            return web.Response(status=reply.status, body=text, headers={**kept, "Cache-Control": "no-store"})

    # ------- replies of the page that wait for a reload

    async def _take_up(self, call: _Call) -> web.StreamResponse:
        """Follow a conversation's reply from where its reader left, or end it."""
        name, start = call.request.query.get("conv_id", ""), call.request.query.get("from", "")
        engine = self._conversations.find(name)
        if call.request.method == "DELETE":
            if engine is not None:
                await self._stop_conversation(engine, name)
            return web.Response(status=204)
        if engine is None:
            raise ApiError(404, "There is no reply to take up.", code="not_found")
        call.model = engine.name
        path = f"{call.path}?conv_id={quote(name, safe='')}" + (f"&from={start}" if start.isdecimal() else "")
        self._conversations.join(name, engine)
        try:
            async with self._request(engine, "GET", path, headers={}) as reply:
                if reply.status >= 400:
                    raise engine_error(reply.status, await reply.read())
                return await self._stream(call, reply)
        finally:
            self._conversations.leave(name)

    async def _look_up(self, call: _Call) -> list[Any]:
        """Which of the conversations that the page asks for have a reply in the making."""
        body, asked = await self._read_object(call)
        names = asked.get("conversation_ids")
        if not isinstance(names, list):
            raise ApiError(400, "`conversation_ids` has to be a list.", param="conversation_ids")
        if not self._conversations:
            return []
        found = []
        for engine in self._engines:
            if engine.state == "ready":
                headers = {"Content-Type": "application/json"}
                async with self._request(engine, "POST", call.path, data=body, headers=headers) as reply:
                    text = await reply.read()
                    if reply.status == 200:
                        found += json.loads(text)
        return found

    async def _stop_conversation(self, engine: Engine, name: str) -> None:
        path = f"{routes.STREAM}?conv_id={quote(name, safe='')}"
        with contextlib.suppress(ApiError):  # gone with its replies
            async with self._request(engine, "DELETE", path, headers={}) as reply:
                await reply.read()

    async def _stream(self, call: _Call, reply: aiohttp.ClientResponse) -> web.StreamResponse:
        """Hand over each piece as it comes; what breaks in the middle becomes the stream's last event."""
        call.status = 200
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        response = web.StreamResponse(headers={**headers, **SECURITY_HEADERS, **call.cors})
        if self._ending:
            response.force_close()
        try:
            await self._hand_over(call, reply, response)
        except ConnectionResetError:  # told by a write, sooner than by the loop
            call.end = "client left"
        except Stalled:
            call.end = "client stalled"
            if call.request.transport is not None:
                call.request.transport.abort()  # a close would wait for the unread rest
        return response

    async def _hand_over(self, call: _Call, reply: aiohttp.ClientResponse, response: web.StreamResponse) -> None:
        await response.prepare(call.request)
        unread = Unread(call.request, self._policy.stall_seconds)
        try:
            while piece := await _next_piece(reply, call.model):
                await response.write(piece)
                call.bytes_out += len(piece)
                await unread.check(call.bytes_out)
        except ApiError as error:
            call.end = "engine lost"
            await response.write(error.event(call.path in routes.ANTHROPIC))
        except asyncio.CancelledError:
            if not self._cutting:
                raise
            call.end = "cut"
            await response.write(_shutting_down().event(call.path in routes.ANTHROPIC))

    @contextlib.asynccontextmanager
    async def _request(
        self, engine: Engine, method: str, path: str, *, data: bytes | None = None, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An engine's answer; leaving the block closes the connection, which frees the slot.

        Raises:
            ApiError: the engine is not there, or went away.
        """
        if engine.state != "ready":
            _refuse_unready(engine)
        address = engine.address
        key = {"Authorization": f"Bearer {address.key}"} if address.key else {}
        url = f"http://localhost:{address.port}{path}" if address.socket is None else f"http://localhost{path}"
        try:
            async with self._session(address).request(
                method, url, data=data, headers={**headers, **key}, allow_redirects=False
            ) as reply:
                yield reply
        except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError) as error:
            raise _engine_lost(engine.name) from error

    async def _get_json(self, engine: Engine, path: str) -> dict[str, Any]:
        async with self._request(engine, "GET", path, headers={}) as reply:
            text = await reply.read()
            if reply.status >= 400:
                raise engine_error(reply.status, text)
        told = json.loads(text)
        assert isinstance(told, dict)
        return told

    def _session(self, address: EngineAddress) -> aiohttp.ClientSession:
        """One for each place; a new connection for each request, as llama-server closes old ones when it likes."""
        if address not in self._sessions:
            connector: aiohttp.BaseConnector
            if address.socket is not None:
                connector = aiohttp.UnixConnector(path=str(address.socket), force_close=True, limit=0)
            else:
                connector = aiohttp.TCPConnector(force_close=True, limit=0)
            self._sessions[address] = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
            )
        return self._sessions[address]

    def _find_engine(self, name: str | None, vectors: bool | None = None) -> Engine:
        """The engine of that name; without one the first, or the first that makes what is wanted."""
        able = [engine for engine in self._engines if vectors is None or engine.embeddings == vectors]
        engine = find_named(self._engines, name) if name else (able or self._engines)[0]
        if engine is None:
            known = ", ".join(engine.name for engine in self._engines)
            raise ApiError(
                404, f"There is no model {name!r:.200} here, but {known}.", code="model_not_found", param="model"
            )
        return engine

    async def _read_object(self, call: _Call) -> tuple[bytes, dict[str, Any]]:
        def count(size: int) -> None:
            call.bytes_in += size
            self._bodies += size
            if self._bodies > self._policy.bodies_limit_bytes:
                raise ApiError(
                    503,
                    "Too much is asked at once; try again soon.",
                    SERVER,
                    code="too_many_requests",
                    retry_after=RETRY_SECONDS,
                    close=True,
                )

        return await read_object(call.request, self._policy, count)

    def _note_refusal(self, client: str, status: int) -> None:
        self._log(Access(client, "", "", status, 0.0, 0, 0, "", "done"))


async def _next_piece(reply: aiohttp.ClientResponse, model: str) -> bytes:
    """What has come of a reply, empty at its end."""
    try:
        return await reply.content.readany()
    except aiohttp.ClientError as error:
        raise _engine_lost(model) from error


def _refuse_unready(engine: Engine) -> NoReturn:
    if engine.state == "failed":
        raise ApiError(
            503, f"The engine of {engine.name} has failed, and was given up; the server's log says why.", SERVER,
            code="engine_failed",
        )  # fmt: skip
    word = "loading" if engine.state == "loading" else "restarting"
    raise ApiError(
        503, f"{engine.name} is {word}; try again soon.", SERVER, code=f"engine_{word}", retry_after=RETRY_SECONDS
    )


def _check_ability(engine: Engine, path: str) -> None:
    """Say what a model is for, which llama-server would say in words of its own command line."""
    wanted = routes.wants_vectors(path)
    if wanted is None or wanted == engine.embeddings:
        return
    makes = "vectors (/v1/embeddings), not text" if engine.embeddings else "text, not vectors"
    hint = "" if engine.embeddings else " Name an embedding model, or start localmix with `--embeddings`."
    raise ApiError(400, f"{engine.name} makes {makes}.{hint}", code="unsupported", param="model")


def _engine_lost(name: str) -> ApiError:
    return ApiError(
        503, f"The engine of {name} is gone, and is started again; try again soon.", SERVER,
        code=ENGINE_LOST, retry_after=RETRY_SECONDS,
    )  # fmt: skip


def _shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", SERVER, code="shutting_down", retry_after=10, close=True)


def _json(document: Any, status: int = 200) -> web.Response:
    text = json.dumps(document, ensure_ascii=False)
    return web.Response(
        status=status, text=text, content_type="application/json", headers={"Cache-Control": "no-store"}
    )


def _takes_gzip(headers: Mapping[str, str]) -> bool:
    """Whether Accept-Encoding names it, and not with weight 0."""
    for entry in headers.get("Accept-Encoding", "").lower().split(","):
        coding, _, weight = entry.partition(";")
        if coding.strip() in ("gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
