"""Errors as OpenAI's API tells them, which every client of it understands.

{"error": {"message": "...", "type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded"}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

INVALID, PERMISSION, SERVER = "invalid_request_error", "permission_error", "server_error"
CONTEXT_EXCEEDED = "context_length_exceeded"
# llama-server names the field in words: "Field 'temperature': ...", "'messages' is required"
_QUOTED_FIELD = re.compile(r"""['"]([a-z][a-z0-9_]*)['"]""")
# nlohmann's exceptions, which llama-server passes on as errors of its own
_JSON_EXCEPTION = re.compile(r"\[json\.exception\.[^\]]*\] ?")
# of an embedding, whose text has to fit into one batch
_TOO_LARGE = re.compile(r"input \(\d+ tokens\) is too large to process")


class ApiError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: a sentence, and what to do.
        kind: OpenAI's `type`.
        code: OpenAI's word for it, empty for none.
        param: the field of the request, empty for none.
        retry_after: seconds after which it may work, 0 for no advice.
        close: whether the connection ends with it, because the rest of the request was not read.
        details: further entries of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        code: str = "",
        param: str = "",
        retry_after: int = 0,
        close: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.close = close
        self.details = details or {}

    def document(self) -> dict[str, Any]:
        """The body of the answer. `type` at the top is what Anthropic's clients look for."""
        error = {"message": self.message, "type": self.kind, "param": self.param or None, "code": self.code or None}
        return {"type": "error", "error": {**error, **self.details}}

    def body(self) -> bytes:
        """The same as JSON."""
        return json.dumps(self.document(), ensure_ascii=False).encode()

    def event(self, anthropic: bool) -> bytes:
        """The same as an event of a stream that has begun; the blank line ends an event that was cut."""
        name = b"event: error\n" if anthropic else b""
        return b"\n\n" + name + b"data: " + self.body() + b"\n\n"


def engine_error(status: int, body: bytes) -> ApiError:
    """llama-server's error in OpenAI's shape: with the field, and 400 where it blames itself for the request."""
    try:
        told = json.loads(body)["error"]
        message = str(told["message"])
    except (ValueError, KeyError, TypeError):
        return ApiError(502, "The engine gave an answer that is no JSON.", SERVER, code="engine_error")
    if told.get("type") == "exceed_context_size_error" or _TOO_LARGE.match(message):
        numbers = {name: told[name] for name in ("n_prompt_tokens", "n_ctx") if name in told}
        return ApiError(400, message, code=CONTEXT_EXCEEDED, details=numbers)
    from_json = _JSON_EXCEPTION.search(message) is not None
    message = _JSON_EXCEPTION.sub("", message)
    field = _QUOTED_FIELD.search(message)
    if status == 501:
        return ApiError(400, message, code="unsupported")
    if status < 500 or from_json:
        return ApiError(400 if from_json else status, message, param=field[1] if field else "")
    return ApiError(status, message, SERVER, code="engine_error")
