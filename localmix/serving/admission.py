"""Whether a request may come in: the name it calls this server by, whose page it is from, its key, and its method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aiohttp import web

from localmix.serving import routes
from localmix.serving.api_errors import PERMISSION, ApiError
from localmix.serving.connection import error_response, socket_address
from localmix.serving.policy import Policy, allowed_cors_headers

LOGGED_PATH = 200


@dataclass(frozen=True)
class Origin:
    """Whose page a request comes from.

    Attributes:
        is_own: the gateway's own.
        cors: headers that let the page of another origin, which was allowed, read the answer.
    """

    is_own: bool = False
    cors: Mapping[str, str] = field(default_factory=dict)


def judge_origin(request: web.BaseRequest, place: routes.Place, policy: Policy) -> Origin:
    """Refuse what came under a foreign name or from a foreign page.

    Raises:
        ApiError: it did.
    """
    headers = request.headers
    hosts = headers.getall("Host", [])
    if len(hosts) != 1 or not request.raw_path.startswith("/"):
        raise ApiError(400, "A request needs one Host header and a path.", code="bad_http", close=True)
    if not policy.knows_host(hosts[0], socket_address(request)):
        raise ApiError(
            403,
            "The Host header names another server. Start localmix with `--allow-host NAME` if it should answer"
            " under that name.",
            PERMISSION,
            code="host_not_allowed",
        )
    origins = headers.getall("Origin", [])
    if origins and all(policy.is_own_page(origin, hosts[0]) for origin in origins):
        return Origin(is_own=True)
    if len(origins) == 1 and policy.allows_origin(origins[0]):
        allowed = "*" if "*" in policy.cors_origins else origins[0]
        return Origin(cors={"Access-Control-Allow-Origin": allowed, "Vary": "Origin"})
    # an image or a script of a foreign page is fetched without an Origin
    site = headers.get("Sec-Fetch-Site", "none")
    if origins or (site not in ("none", "same-origin") and place != "page"):
        raise ApiError(
            403,
            "Pages of other origins may not use this server. Start localmix with `--cors ORIGIN` to let one in.",
            PERMISSION,
            code="origin_not_allowed",
        )
    return Origin()


def preflight(request: web.BaseRequest, place: routes.Place, origin: Origin) -> web.Response:
    """What a browser asks before it sends a foreign page's request."""
    methods = ", ".join(sorted({*routes.METHODS.get(place, ()), "OPTIONS"}))
    response = web.Response(status=204, headers={"Allow": methods})
    if origin.cors:
        asked = request.headers
        response.headers["Access-Control-Allow-Methods"] = methods
        wanted = allowed_cors_headers(asked.get("Access-Control-Request-Headers", ""))
        response.headers["Access-Control-Allow-Headers"] = ", ".join(wanted)
        response.headers["Access-Control-Max-Age"] = "600"
        if asked.get("Access-Control-Request-Private-Network") == "true":
            response.headers["Access-Control-Allow-Private-Network"] = "true"
    return response


def judge_way(request: web.BaseRequest, place: routes.Place, policy: Policy) -> web.Response | None:
    """Refuse what has no key and what is no open endpoint; an answer where only the method is wrong.

    Raises:
        ApiError: it may not come in.
    """
    path = request.raw_path.partition("?")[0]
    if place not in routes.OPEN_WITHOUT_KEY and not policy.knows_key(request.headers):
        raise ApiError(
            401,
            "This server asks for a key: `Authorization: Bearer KEY`; the one shown is missing or wrong.",
            code="invalid_api_key",
        )
    if place == "unknown":
        raise ApiError(404, f"There is no {request.method} {path[:LOGGED_PATH]} here.", code="not_found")
    if place == "closed":
        raise ApiError(403, f"{path} is closed. {routes.closed_reason(path)}", PERMISSION, code="endpoint_closed")
    methods = routes.METHODS[place]
    if request.method in methods:
        return None
    response = error_response(
        ApiError(405, f"{path} takes {' and '.join(sorted(methods))}.", code="method_not_allowed")
    )
    response.headers["Allow"] = ", ".join(sorted({*methods, "OPTIONS"}))
    return response
