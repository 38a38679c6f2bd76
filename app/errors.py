"""What the tenants' side answers when it can't do as asked: one table from errors to status, type, code and outcome.

The body is OpenAI's: `{"error": {"message": …, "type": …, "param": …, "code": …}}`, in a stream that has begun the same
as an event, followed by `[DONE]`. How clients behave decides the rest:

- `Retry-After` is never above 60 s: official clients ignore longer waits or give up at them.
- `x-should-retry: true` says that waiting helps, whatever the status.
- 408 and 409 are retried by clients, so they are never used for what stays wrong. A body that came too slowly may come
  quicker the next time: that is 408.
- An engine's own 4xx is passed on with its words; its 5xx are not, they are ours to explain.

`Outcome` is how the request is entered in the ledger; errors without one end a request before it was accepted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

import msgspec
from litestar.exceptions import HTTPException
from msgspec import Struct

from engines.errors import (
    AdmissionClosed,
    EngineLost,
    EngineUnreachable,
    HoldExpired,
    LoadFailed,
    NotAdmitted,
    QueueFull,
)
from engines.sse import EngineError
from tenants.errors import AuthUnavailable, KeyRefused, LedgerUnavailable
from tenants.usage import Outcome

INVALID: Final = "invalid_request_error"
SERVER: Final = "server_error"
NAMES_SHOWN: Final = 20
PASSED_ON: Final = frozenset({400, 413, 422})
"""What an engine may answer for a fault of the caller's; anything else is the engine's fault or ours."""


class GatewayError(Exception):
    """Root of what the tenants' side itself can't accept; the message is for the caller."""


class RequestInvalid(GatewayError):
    """A field of the body that can't be so."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BodyTooLarge(GatewayError):
    """A body over the limit."""


class BodyTooSlow(GatewayError):
    """A body that did not arrive in time."""


class MediaTypeUnsupported(GatewayError):
    """A content type or encoding that isn't taken."""


class KeyForbidden(GatewayError):
    """A good key that may not do this."""


class ModelUnknown(GatewayError):
    """No variant of that name in the caller's workspace."""

    def __init__(self, name: str, workspace: str, variants: Iterable[str]) -> None:
        names = sorted(variants)
        shown = ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")
        there = f"it has: {shown}" if names else "it has none yet"
        super().__init__(f"there is no model {name[:64]!r} in workspace {workspace}; {there}")
        self.param = "model"


class ShuttingDown(GatewayError):
    """The gateway takes nothing new."""


class EngineRefused(GatewayError):
    """An engine's own word that the request can't be done."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(error.message)
        self.param = error.param
        self.status = HTTPStatus(error.status) if error.status in PASSED_ON else HTTPStatus.BAD_REQUEST


class EngineFailed(GatewayError):
    """An engine that failed with an error of its own; `detail` is for operators."""

    def __init__(self, detail: str) -> None:
        super().__init__("the engine failed while it worked for this request")
        self.detail = detail


class Row(Struct, frozen=True):
    """One line of the table."""

    status: HTTPStatus
    type: str
    code: str | None
    outcome: Outcome | None = None
    retry_s: float | None = None
    """What `Retry-After` says if the error itself knows no better."""
    should_retry: bool = False


_S: Final = HTTPStatus
_UNAVAILABLE: Final = _S.SERVICE_UNAVAILABLE
_ENGINE_FAILED: Final = Row(_UNAVAILABLE, SERVER, "engine_failed", Outcome.ENGINE_FAILED, 1.0)

TABLE: Final[dict[type[Exception], Row]] = {
    KeyRefused: Row(_S.UNAUTHORIZED, INVALID, "invalid_api_key"),
    KeyForbidden: Row(_S.FORBIDDEN, INVALID, "key_not_allowed"),
    AuthUnavailable: Row(_UNAVAILABLE, SERVER, "auth_unavailable", retry_s=2.0, should_retry=True),
    RequestInvalid: Row(_S.BAD_REQUEST, INVALID, None),
    BodyTooLarge: Row(_S.REQUEST_ENTITY_TOO_LARGE, INVALID, "request_too_large"),
    BodyTooSlow: Row(_S.REQUEST_TIMEOUT, INVALID, "request_timeout"),
    MediaTypeUnsupported: Row(_S.UNSUPPORTED_MEDIA_TYPE, INVALID, "unsupported_media_type"),
    ModelUnknown: Row(_S.NOT_FOUND, INVALID, "model_not_found"),
    ShuttingDown: Row(_UNAVAILABLE, SERVER, "shutting_down", retry_s=1.0, should_retry=True),
    AdmissionClosed: Row(_UNAVAILABLE, SERVER, "shutting_down", Outcome.DRAINED, should_retry=True),
    QueueFull: Row(_UNAVAILABLE, SERVER, "overloaded", Outcome.OVERLOADED),
    HoldExpired: Row(_UNAVAILABLE, SERVER, "overloaded", Outcome.HOLD_EXPIRED, should_retry=True),
    LoadFailed: Row(_UNAVAILABLE, SERVER, "model_load_failed", Outcome.LOAD_FAILED),
    LedgerUnavailable: Row(_UNAVAILABLE, SERVER, "ledger_unavailable", retry_s=2.0, should_retry=True),
    EngineRefused: Row(_S.BAD_REQUEST, INVALID, None, Outcome.ENGINE_REFUSED),
    EngineFailed: _ENGINE_FAILED,
    EngineUnreachable: _ENGINE_FAILED,
    EngineLost: _ENGINE_FAILED,
}
_LOADING: Final = Row(_UNAVAILABLE, SERVER, "model_loading", Outcome.HOLD_EXPIRED, should_retry=True)
_ROUTES: Final = {
    _S.NOT_FOUND: Row(_S.NOT_FOUND, INVALID, "unknown_url"),
    _S.METHOD_NOT_ALLOWED: Row(_S.METHOD_NOT_ALLOWED, INVALID, "method_not_allowed"),
}
_BUG: Final = Row(_S.INTERNAL_SERVER_ERROR, SERVER, "internal_error", Outcome.ENGINE_FAILED)
_TOO_LONG: Final = ("maximum context length", "maximum model length", "max_model_len")


class Answer(Struct, frozen=True):
    """A response that says no."""

    status: int
    code: str | None
    headers: list[tuple[bytes, bytes]]
    body: bytes


class _Error(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


def row(error: Exception) -> Row:
    """The table's line for an error; what isn't in it is a fault of ours."""
    if isinstance(error, HoldExpired) and error.loading:
        return _LOADING
    if isinstance(error, HTTPException):
        status = HTTPStatus(error.status_code)
        return _ROUTES.get(status) or (Row(status, INVALID, None) if status < 500 else _BUG)
    if isinstance(error, EngineRefused):
        code = "context_length_exceeded" if any(words in str(error) for words in _TOO_LONG) else None
        return Row(error.status, INVALID, code, Outcome.ENGINE_REFUSED)
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), _BUG)


def is_bug(error: Exception) -> bool:
    """Nobody thought of it: it belongs in the log with its stack."""
    return row(error) is _BUG


def answer(error: Exception) -> Answer:
    """The response for an error that comes before anything was sent."""
    line = row(error)
    headers = [(b"content-type", b"application/json")]
    retry_s = error.retry_s if isinstance(error, NotAdmitted) else line.retry_s
    if retry_s is not None:
        headers.append((b"retry-after", str(min(60, math.ceil(retry_s))).encode()))
    if line.should_retry:
        headers.append((b"x-should-retry", b"true"))
    if line.status is HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    if line.code == "shutting_down":
        headers.append((b"connection", b"close"))  # the next connection may reach another gateway
    if isinstance(error, HTTPException):
        headers += [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
    body = _body(error, line)
    headers.append((b"content-length", str(len(body)).encode()))
    return Answer(int(line.status), line.code, headers, body)


def frame(error: Exception) -> bytes:
    """The event for an error in a stream that has begun; `[DONE]` comes after it."""
    return b"data: " + _body(error, row(error)) + b"\n\n"


def detail(error: Exception) -> str:
    """What operators are told of it, in log and ledger; never what a caller sent."""
    if isinstance(error, EngineFailed):
        return error.detail
    if isinstance(error, EngineRefused):
        return f"the engine answered {error.status:d}"
    return str(error) if row(error) is not _BUG else type(error).__name__


def _body(error: Exception, line: Row) -> bytes:
    param = error.param if isinstance(error, RequestInvalid | ModelUnknown | EngineRefused) else None
    return msgspec.json.encode({"error": _Error(_message(error, line), line.type, param, line.code)})


def _message(error: Exception, line: Row) -> str:
    if isinstance(error, HTTPException):
        return error.detail or line.status.phrase
    if line is _BUG:
        return "this is a fault of Greenroom's; its log has the details"
    if isinstance(error, EngineUnreachable | EngineLost):
        return "the engine failed while it worked for this request"
    return str(error)
