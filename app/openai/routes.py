"""The tenants' routes. Those that generate are plain ASGI functions: every layer less is a token sooner.

A request is checked in this order, each refusal cheaper than what comes after: key, drain, body, variant. Only then is
it accepted, entered in the ledger and worked for (`stream`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec
import structlog
from litestar import Litestar, Request, Response, asgi, get
from litestar.exceptions import HTTPException, MethodNotAllowedException
from litestar.handlers import ASGIRouteHandler
from litestar.params import FromPath
from litestar.types import HTTPScope, Receive, Scope, Send

from app import errors, health, middleware
from app.errors import KeyForbidden, ModelUnknown, ShuttingDown
from app.openai import body
from app.openai.body import ClientGone, Endpoint
from app.openai.chat import CHAT
from app.openai.completions import COMPLETIONS
from app.parts import GatewayParts
from app.stream import Accepted, Generation
from app.telemetry import trace_id
from engines.model import Variant
from tenants.model import Caller, WorkspaceName
from tenants.usage import RequestId, UsageOpen

_MAX_RETRIES: Final = 1000

log = structlog.get_logger()


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A variant as OpenAI clients list models, with what to expect of it."""

    id: str
    object: str = "model"
    created: int
    owned_by: str
    status: str
    """`ready`, `loading`, `cold` or `failed`."""
    eta_seconds: float | None
    """In how many seconds it may be ready; null: can't be said."""


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """A workspace's variants."""

    object: str = "list"
    data: list[ModelView]


def tenant_app(parts: GatewayParts) -> Litestar:
    """The tenants' side of a gateway."""
    return Litestar(
        route_handlers=[
            _generating(parts, CHAT),
            _generating(parts, COMPLETIONS),
            *_models(parts),
            *health.routes(parts),
        ],
        middleware=[middleware.Requests()],
        exception_handlers={HTTPException: _refused, Exception: _refused},
        openapi_config=None,
        logging_config=None,
    )


def _generating(parts: GatewayParts, endpoint: Endpoint) -> ASGIRouteHandler:
    @asgi(endpoint.path, copy_scope=False, opt={middleware.TELLS_ITSELF: True})
    async def generate(scope: Scope, receive: Receive, send: Send) -> None:
        http = cast("HTTPScope", scope)  # (uvicorn takes no WebSockets)
        request_id = middleware.request_id(scope)
        try:
            if http["method"] != "POST":
                raise MethodNotAllowedException(headers={"Allow": "POST"})
            accepted = await _accept(parts, endpoint, request_id, body.header_map(http), receive)
        except ClientGone:
            return
        except Exception as error:
            await _say_no(parts, error, request_id, send)
        else:
            await Generation(parts, accepted, send).run(receive)

    return generate


async def _accept(
    parts: GatewayParts, endpoint: Endpoint, request_id: RequestId, headers: dict[bytes, bytes], receive: Receive
) -> Accepted:
    received_at, began = parts.clock(), time.perf_counter()
    caller, workspace = await _caller(parts, headers.get(b"authorization"))
    if parts.drain.began:
        raise ShuttingDown("this gateway is shutting down; ask again")
    body.check_media_type(headers)
    settings = parts.settings
    text = await body.read(receive, headers, most=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    asked = body.parse(endpoint, text)
    variant = await _variant(parts, workspace, asked.model)
    composed = body.compose(asked, variant)
    span = parts.telemetry.begin(f"POST {endpoint.path}", received_at)
    opening = UsageOpen(
        request_id=request_id,
        attempt=1,
        workspace=workspace,
        key=caller.key,
        variant=variant.name,
        model=variant.model.name,
        endpoint=endpoint.name,
        stream=asked.stream,
        sequences=asked.sequences,
        gateway=parts.gateway,
        received_at=received_at,
        trace_id=trace_id(span),
        retry_count=_retries(headers.get(b"x-stainless-retry-count", b"")),
    )
    hold_s = settings.stream_hold_s if asked.stream else _hold_s(settings.hold_s, headers)
    return Accepted(open=opening, began=began, variant=variant, asked=asked, body=composed, hold_s=hold_s, span=span)


async def _caller(parts: GatewayParts, authorization: bytes | str | None) -> tuple[Caller, WorkspaceName]:
    text = authorization.decode("latin-1") if isinstance(authorization, bytes) else authorization
    caller = await parts.authenticator.authenticate(text, now=parts.clock())
    if caller.workspace is None:
        raise KeyForbidden("this is an operator's key; chats need a workspace's")
    return caller, caller.workspace


async def _variant(parts: GatewayParts, workspace: str, name: str) -> Variant:
    variant = await parts.catalog.find(workspace, name)
    if variant is None:
        raise ModelUnknown(name, workspace, (variant.name for variant in parts.catalog.of(workspace)))
    return variant


def _retries(text: bytes) -> int:
    return min(int(text[:8]), _MAX_RETRIES) if text.isdigit() else 0


def _hold_s(most: float, headers: Mapping[bytes, bytes]) -> float:
    """How long an answer that isn't streamed may be held: not beyond half of what the client says that it waits."""
    for name in (b"x-stainless-read-timeout", b"x-stainless-timeout"):
        try:
            stated = float(headers.get(name, b""))
        except ValueError:
            continue
        if stated > 0:
            return min(most, stated / 2)
    return most


async def _say_no(parts: GatewayParts, error: Exception, request_id: RequestId, send: Send) -> None:
    answer = errors.answer(error)
    if errors.is_bug(error):
        log.exception("request_broke", request_id=str(request_id), error=type(error).__name__)
    else:
        log.info("refused", request_id=str(request_id), status=answer.status, code=answer.code)
    parts.metrics.refused(answer.status)
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": False})


def _models(parts: GatewayParts) -> list[Any]:
    def view(variant: Variant) -> ModelView:
        status, eta_s = parts.admission.availability(variant.spec.pool)
        return ModelView(
            id=variant.name,
            created=int(variant.created_at),
            owned_by=variant.workspace,
            status=status,
            eta_seconds=eta_s,
        )

    @get("/v1/models")
    async def list_models(request: Request[Any, Any, Any]) -> ModelList:
        _, workspace = await _caller(parts, request.headers.get("authorization"))
        return ModelList(data=[view(variant) for variant in parts.catalog.of(workspace)])

    @get("/v1/models/{name:str}")
    async def get_model(request: Request[Any, Any, Any], name: FromPath[str]) -> ModelView:
        _, workspace = await _caller(parts, request.headers.get("authorization"))
        return view(await _variant(parts, workspace, name))

    return [list_models, get_model]


def _refused(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """What no route has, and what a route of Litestar's kind raises."""
    answer, name = errors.answer(error), str(middleware.request_id(request.scope))
    if errors.is_bug(error):
        log.error("request_broke", request_id=name, error=type(error).__name__, exc_info=error)
    headers = {name.decode(): value.decode() for name, value in answer.headers if name != b"content-length"}
    kind = headers.pop("content-type")
    if "route_handler" not in cast("dict[str, Any]", request.scope):  # no middleware has seen it
        log.info("refused", request_id=name, status=answer.status, code=answer.code)
        headers["x-request-id"] = name
    return Response(answer.body, status_code=answer.status, headers=headers, media_type=kind)
