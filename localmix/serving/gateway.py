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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import quote, unquote

from aiohttp import HttpVersion11, web

from localmix.errors import UsageError
from localmix.serving import own_answers, routes
from localmix.serving.admission import LOGGED_PATH, Origin, judge_origin, judge_way, preflight
from localmix.serving.api_errors import RETRY_SECONDS, SERVER, ApiError, engine_error
from localmix.serving.connection import Connection, error_response
from localmix.serving.conversations import Conversations
from localmix.serving.engine_client import ENGINE_LOST, Engine, ask, engine_lost
from localmix.serving.engine_reply import Reply
from localmix.serving.piping import Ending, Pipe
from localmix.serving.policy import Policy
from localmix.serving.request_body import read_object
from localmix.serving.request_limits import check_limits

End = Ending | Literal["cut"]

STOP_SECONDS = 2.0
_LOOK_SECONDS = 0.05  # between two looks whether clients have read the last of their answers
CONVERSATION = "X-Conversation-Id"
KEPT_SECONDS = 30.0  # how long a reply goes on when its page is gone
SECURITY_HEADERS = {
    "Server": "localmix",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}

_NAME = re.compile(r"[!-~]{8,256}")  # of a conversation
_PLACE = re.compile(r"[0-9]{1,18}")  # in its reply


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
    connection: Connection
    path: str
    origin: Origin = field(default_factory=Origin)
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
                has_too_many=lambda: len(server.connections) >= self._policy.connections,
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
        """Accept nothing more, and let what is running end and be read; returns how many requests had to be cut."""
        now = asyncio.get_running_loop().time
        deadline = now() + seconds
        self._ending = True
        if self._listener is not None:
            self._listener.close()
        transports = [connection.transport for connection in self._connections() if connection.transport]
        self._close_idle()
        if self._running:
            await asyncio.wait(set(self._running), timeout=seconds)
        cut = await self._cut()
        while now() < deadline and any(transport.get_write_buffer_size() for transport in transports):
            await asyncio.sleep(_LOOK_SECONDS)
        return cut

    async def stop(self) -> None:
        """Cut what is running and close; harmless when it never started."""
        await self.drain(0)
        if self._server is not None:
            await self._server.shutdown(STOP_SECONDS)
        self._conversations.close()

    def _connections(self) -> list[Connection]:
        known = self._server.connections if self._server is not None else []
        return [connection for connection in known if isinstance(connection, Connection)]

    def _close_idle(self) -> None:
        for connection in self._connections():
            if not connection.is_busy:  # what comes of a request's body is still read
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
        call = _Call(request, connection, request.raw_path.partition("?")[0])
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
            response.headers.update({**SECURITY_HEADERS, **call.origin.cors})
        if self._ending:
            response.force_close()
        return response

    async def _answer(self, call: _Call) -> web.StreamResponse:
        request = call.request
        place = routes.find_place(call.path)
        call.origin = judge_origin(request, place, self._policy)
        if request.method == "OPTIONS":
            return preflight(request, place, call.origin)
        refusal = judge_way(request, place, self._policy)
        if refusal is not None:
            return refusal
        if self._ending:
            raise _shutting_down()
        return await self._serve(call, place)

    async def _serve(self, call: _Call, place: routes.Place) -> web.StreamResponse:
        if place == "api":
            return await self._ask(call)
        if place == "page":
            return await own_answers.page_file(self._engines, call.path, call.request.headers)
        if place == "health":
            return own_answers.health(self._engines, self._ending)
        if place == "models":
            return await own_answers.list_models(self._engines)
        if place == "model":
            return await own_answers.show_model(self._engines, unquote(call.path.partition("models/")[2]))
        if place == "props":
            engine = own_answers.find_engine(self._engines, call.request.query.get("model"), vectors=False)
            call.model = engine.name
            return await own_answers.show_props(engine)
        if place == "lookup":
            return own_answers.json_response(await self._look_up(call))
        return await self._take_up(call)

    # ------- what an engine answers

    async def _ask(self, call: _Call) -> web.StreamResponse:
        body, asked = await self._read_object(call)
        model = asked.get("model")
        if not isinstance(model, str | None):
            raise ApiError(400, "`model` has to be a name.", param="model")
        if not isinstance(asked.get("messages", []), list):  # /v1/messages takes anything for none
            raise ApiError(400, "`messages` has to be a list.", param="messages")
        check_limits(asked)
        engine = own_answers.find_engine(self._engines, model, routes.wants_vectors(call.path))
        call.model = engine.name
        _check_ability(engine, call.path)
        conversation = call.request.headers.get(CONVERSATION, "")
        if not call.origin.is_own or asked.get("stream") is not True or not _NAME.fullmatch(conversation):
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
        asked: frozenset[str],
        conversation: Mapping[str, str] = MappingProxyType({}),
    ) -> web.StreamResponse:
        headers = {"Content-Type": "application/json", **conversation}
        async with ask(engine, "POST", call.path, headers=headers, body=body) as reply:
            if reply.status == 200 and reply.content_type == "text/event-stream":
                return await self._stream(call, reply)
            text = await reply.read()
            if reply.status >= 400:
                raise engine_error(reply.status, text, asked)
            kept = own_answers.passed_headers(reply.headers)
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
        path = f"{call.path}?conv_id={quote(name, safe='')}" + (f"&from={start}" if _PLACE.fullmatch(start) else "")
        self._conversations.join(name, engine)
        try:
            async with ask(engine, "GET", path) as reply:
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
                async with ask(engine, "POST", call.path, headers=headers, body=body) as reply:
                    text = await reply.read()
                    if reply.status == 200:
                        found += json.loads(text)
        return found

    async def _stop_conversation(self, engine: Engine, name: str) -> None:
        path = f"{routes.STREAM}?conv_id={quote(name, safe='')}"
        with contextlib.suppress(ApiError):  # gone with its replies
            async with ask(engine, "DELETE", path) as reply:
                await reply.read()

    async def _stream(self, call: _Call, reply: Reply) -> web.StreamResponse:
        """Hand over each piece as it comes; what breaks in the middle becomes the stream's last event."""
        call.status = 200
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        response = web.StreamResponse(headers={**headers, **SECURITY_HEADERS, **call.origin.cors})
        chunked = call.request.version >= HttpVersion11
        if self._ending or not chunked:  # without chunks the connection's end is the stream's
            response.force_close()
        await response.prepare(call.request)
        if call.connection.transport is None:
            raise ConnectionResetError
        pipe = Pipe(reply, call.connection, chunked, self._policy.stall_seconds)
        try:
            call.end = await pipe.run()
        except asyncio.CancelledError:
            if not self._cutting:
                raise
            call.end = "cut"
        finally:
            call.bytes_out = pipe.size
        error = _shutting_down() if call.end == "cut" else engine_lost(call.model)
        if call.end in ("cut", "engine lost"):
            pipe.write(error.event(call.path in routes.ANTHROPIC))
        elif call.end == "client stalled":
            call.connection.abort()
        return response

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


def _check_ability(engine: Engine, path: str) -> None:
    """Say what a model is for, which llama-server would say in words of its own command line."""
    wanted = routes.wants_vectors(path)
    if wanted is None or wanted == engine.embeddings:
        return
    makes = "vectors (/v1/embeddings), not text" if engine.embeddings else "text, not vectors"
    hint = "" if engine.embeddings else " Name an embedding model, or start localmix with `--embeddings`."
    raise ApiError(400, f"{engine.name} makes {makes}.{hint}", code="unsupported", param="model")


def _shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", SERVER, code="shutting_down", retry_after=10, close=True)
