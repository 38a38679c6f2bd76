"""What the admin API answers when it can't do as asked: `application/problem+json` (RFC 9457), field and reason named.

    {"type": "about:blank", "title": "Bad Request", "status": 400, "detail": "scaling.provisioned: Expected `int` >= 0",
     "errors": [{"field": "scaling.provisioned", "reason": "Expected `int` >= 0"}]}

| error | status |
|---|---|
| no key, or one that is not good (`KeyRefused`) | 401 |
| a workspace's key (`NotAnOperator`) | 403 |
| something named that isn't there (`NotFound`) | 404 |
| a name that is taken by something else, a thing in use (`Conflict`) | 409 |
| a field that can't be so (`SpecInvalid`, `NameInvalid`, `FieldInvalid`), a body or query of wrong types | 400 |
| Postgres or the fleet can't be asked now | 503 |
| anything else | 500, logged; the answer says nothing of it |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

import asyncpg
import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi import ResponseSpec
from msgspec import UNSET, Struct, UnsetType

import engines.errors
import tenants.errors

MEDIA_TYPE: Final = "application/problem+json"
_RETRY_S: Final = 2

log = structlog.get_logger()


class Fault(Struct, frozen=True):
    """One field and why it can't be so."""

    field: str
    reason: str


class Problem(Struct, frozen=True, kw_only=True):
    """The body of every answer that isn't a success."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: tuple[Fault, ...] | UnsetType = UNSET
    """Where the fault is one of fields."""


class NotAnOperator(Exception):
    """A good key of a workspace, where an operator's is needed."""


class FieldInvalid(Exception):
    """A field of the request that can't be so."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.fault = Fault(field, reason)


class NotNow(Exception):
    """Something that this gateway needs for an answer isn't there yet."""


_POSTGRES_AWAY: Final = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
)
_STATUS: Final[tuple[tuple[tuple[type[Exception], ...], HTTPStatus], ...]] = (
    ((tenants.errors.KeyRefused,), HTTPStatus.UNAUTHORIZED),
    ((NotAnOperator,), HTTPStatus.FORBIDDEN),
    ((tenants.errors.NotFound, engines.errors.NotFound), HTTPStatus.NOT_FOUND),
    ((tenants.errors.Conflict, engines.errors.Conflict), HTTPStatus.CONFLICT),
    ((tenants.errors.NameInvalid, engines.errors.SpecInvalid, FieldInvalid), HTTPStatus.BAD_REQUEST),
    ((UnicodeDecodeError, asyncpg.DataError, RecursionError), HTTPStatus.BAD_REQUEST),
    ((NotNow, tenants.errors.AuthUnavailable, *_POSTGRES_AWAY), HTTPStatus.SERVICE_UNAVAILABLE),
)


PROBLEMS: Final = {
    int(status): ResponseSpec(Problem, description=status.phrase, media_type=MEDIA_TYPE, generate_examples=False)
    for status in (*(status for _, status in _STATUS), HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
}
"""What every route may answer, for the OpenAPI description."""


def field_invalid(error: msgspec.ValidationError, prefix: str) -> FieldInvalid:
    """Turn msgspec's error on a part of a body into one that names the field from the body's root."""
    reason, _, path = str(error).partition(" - at `$")
    return FieldInvalid(*_named(f"{prefix}{path.rstrip('`')}", reason))


def answer(request: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    """The exception handler of all admin routes."""
    if isinstance(error, HTTPException):
        return _http(error)
    status = next((status for kinds, status in _STATUS if isinstance(error, kinds)), None)
    if status is None:
        log.error("admin_failed", path=request.scope["path"], error=type(error).__name__, exc_info=error)
        return _response(HTTPStatus.INTERNAL_SERVER_ERROR, "this is a fault of Greenroom's; its log has the details")
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        return _unavailable(request, error)
    if status is HTTPStatus.UNAUTHORIZED:
        return _response(status, str(error), headers={"WWW-Authenticate": "Bearer"})
    if isinstance(error, UnicodeDecodeError | asyncpg.DataError | RecursionError):
        return _response(status, "the request has text that is not UTF-8, a null character, or JSON nested too deeply")
    return _response(status, str(error), _faults(error))


def _unavailable(request: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    known = isinstance(error, NotNow | tenants.errors.AuthUnavailable)
    if not known:
        log.warning("admin_unavailable", path=request.scope["path"], error=type(error).__name__)
    detail = str(error) if known else f"the database can't be asked just now ({type(error).__name__}); try again"
    return _response(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers={"Retry-After": str(_RETRY_S)})


def _faults(error: Exception) -> Sequence[Fault]:
    if isinstance(error, FieldInvalid):
        return (error.fault,)
    if isinstance(error, tenants.errors.NameInvalid):
        return (Fault("name", str(error)),)
    if isinstance(error, engines.errors.SpecInvalid) and error.field:
        return (Fault(error.field, str(error)),)
    return ()


def _http(error: HTTPException) -> Response[Problem]:
    """Litestar's own errors: a body or query that doesn't fit, a wrong method, a body too large."""
    status = HTTPStatus(error.status_code)
    if isinstance(error, ValidationException) and isinstance(error.extra, list):
        faults = [_fault(entry) for entry in error.extra]
        return _response(status, "; ".join(f"{f.field}: {f.reason}" if f.field else f.reason for f in faults), faults)
    if status is HTTPStatus.BAD_REQUEST:
        return _response(status, f"the body is not JSON: {error.detail}")
    return _response(status, error.detail, headers=error.headers)


def _fault(entry: Any) -> Fault:
    field, reason = str(entry.get("key", "")), str(entry.get("message", ""))
    if field == "data" and entry.get("source") == "body":
        field = ""
        if reason == "'data'":
            return Fault("", "a JSON body is needed")
    return Fault(*_named(field, reason))


def _named(field: str, reason: str) -> tuple[str, str]:
    """In msgspec an unknown or missing field is named in the reason; here it is the field."""
    if found := re.match(r"Object (contains unknown|missing required) field `(.+)`$", reason):
        return f"{field}.{found[2]}".strip("."), "unknown field" if "unknown" in found[1] else "missing"
    return field, reason


def _response(
    status: HTTPStatus, detail: str, faults: Sequence[Fault] = (), headers: dict[str, str] | None = None
) -> Response[Problem]:
    problem = Problem(title=status.phrase, status=status, detail=detail, errors=tuple(faults) or UNSET)
    return Response(problem, status_code=status, media_type=MEDIA_TYPE, headers=headers)
