"""Around every route of the tenants' side: the request's id, and a log line for what was not accepted or not asked.

Each response has `x-request-id`: a UUIDv7 of ours, also the engine's request id and the ledger's. What a client sends
under that name is not taken over: ids must be unique. Requests that generate tell of themselves (`account`).
"""

from __future__ import annotations

import time
from typing import Final, cast
from uuid import UUID

import structlog
from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils import uuid7

from tenants.usage import RequestId

_KEY: Final = "greenroom_request_id"
_QUIET: Final = frozenset({"/livez", "/readyz"})
"""Asked every few seconds by machines: in the log only if they fail."""
TELLS_ITSELF: Final = "tells_itself"
"""Key in a route's `opt`: it logs its requests itself."""

log = structlog.get_logger()


def request_id(scope: Scope) -> RequestId:
    """The id of a request, made when it is first asked for."""
    state = scope.setdefault("state", {})
    if _KEY not in state:
        state[_KEY] = RequestId(UUID(bytes=uuid7().bytes))
    return cast("RequestId", state[_KEY])


class Requests(ASGIMiddleware):
    """Names requests and logs those that don't generate."""

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        """Pass a request on."""
        name = str(request_id(scope)).encode()
        began = time.perf_counter()
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
            await send(message)

        await next_app(scope, receive, named)
        route = scope["path_template"]
        if not scope["route_handler"].opt.get(TELLS_ITSELF) and (route not in _QUIET or status >= 400):
            took_us = int((time.perf_counter() - began) * 1e6)
            log.info("request", request_id=name.decode(), route=route, status=status, duration_us=took_us)
