"""Who may talk to the gateway, and how much of it one client may take."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# what a page of a named origin may send along; OpenAI's own client adds the x-stainless ones
CORS_HEADERS = frozenset({"accept", "authorization", "content-type", "x-api-key", "anthropic-version"})
CORS_HEADER_PREFIXES = ("x-stainless-", "openai-", "anthropic-")
_HEADER_NAME = re.compile(r"[a-z0-9-]{1,64}")


@dataclass(frozen=True)
class Policy:
    """The rules of one gateway; everything that is not named here is refused.

    Attributes:
        host: the address to listen on, without brackets.
        port: 0 for any free one.
        api_key: what every client has to show, empty for none.
        allowed_hosts: further names that a Host header may carry, without a port.
        cors_origins: pages of other origins that may use the API (`https://chat.example`), or `*` for all.
        body_limit_bytes: of one request.
        bodies_limit_bytes: of all requests that are being answered.
        head_seconds: how long a client may take over a request's head.
        body_seconds: how long it may take over the body.
        idle_seconds: how long a connection is kept between two requests.
        stall_seconds: how long a client may leave a reply unread.
        connections: how many clients may be connected at once.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str = ""
    allowed_hosts: frozenset[str] = frozenset()
    cors_origins: frozenset[str] = frozenset()
    body_limit_bytes: int = 16 << 20
    bodies_limit_bytes: int = 256 << 20
    head_seconds: float = 15.0
    body_seconds: float = 60.0
    idle_seconds: float = 75.0
    stall_seconds: float = 30.0
    connections: int = 512

    def __repr__(self) -> str:
        return f"Policy({self.host}:{self.port}{', with a key' if self.api_key else ''})"

    def knows_host(self, header: str, arrived_at: str) -> bool:
        """Whether a Host header names this server, so that no foreign name was bent to this address.

        Args:
            header: the name with or without a port.
            arrived_at: the address of this machine that the client connected to. A page cannot have an address for
                its name unless it comes from there, so it is as good as a name.
        """
        name = host_name(header)
        if name is None:
            return False
        names = {entry.strip("[]").lower() for entry in (self.host, arrived_at, *self.allowed_hosts)} | LOOPBACK_NAMES
        return _same_spelling(name) in {_same_spelling(entry) for entry in names}

    def is_own_page(self, origin: str, host: str) -> bool:
        """Whether an Origin header is that of the page this gateway serves under the Host header's name."""
        parts = _split_origin(origin)
        # a proxy that adds TLS in front keeps the name, so the scheme says nothing
        return parts is not None and parts[1] == host.lower()

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of this other origin were named."""
        return "*" in self.cors_origins or (origin != "null" and origin.lower() in self.cors_origins)

    def knows_key(self, headers: Mapping[str, str]) -> bool:
        """Whether the key is there (`Authorization: Bearer KEY` or `x-api-key: KEY`), or none is asked for."""
        if not self.api_key:
            return True
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        shown = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # digests have one length, so that the time of the comparison tells nothing about the key
        return hmac.compare_digest(_digest(shown), _digest(self.api_key))


def host_name(header: str) -> str | None:
    """The name in a Host header, lower case and without port and brackets; None where it is none."""
    try:
        parts = urlsplit(f"//{header}")
        parts.port  # noqa: B018 - raises for what is no port
    except ValueError:
        return None
    if not parts.hostname or "@" in header or parts.path or parts.query or parts.fragment:
        return None
    return parts.hostname.removesuffix(".")


def allowed_cors_headers(asked: str) -> list[str]:
    """Of the headers that a preflight asks for, those that a client of the API needs."""
    names = [name for name in (part.strip().lower() for part in asked.split(",")) if _HEADER_NAME.fullmatch(name)]
    return [name for name in names if name in CORS_HEADERS or name.startswith(CORS_HEADER_PREFIXES)]


def _same_spelling(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name.partition("%")[0]))
    except ValueError:
        return name


def _split_origin(origin: str) -> tuple[str, str] | None:
    scheme, separator, rest = origin.lower().partition("://")
    return (scheme, rest) if separator and scheme in ("http", "https") and rest else None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
