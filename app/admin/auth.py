"""The guard of all admin routes: an operator's key, or nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from app.admin.problems import NotAnOperator
from tenants.auth import Authenticator

Guard = Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], Awaitable[None]]


def operators_only(authenticator: Authenticator, clock: Callable[[], float]) -> Guard:
    """A guard that raises `KeyRefused` without a good key and `NotAnOperator` with a workspace's."""

    async def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        caller = await authenticator.authenticate(connection.headers.get("authorization"), now=clock())
        if caller.workspace is not None:
            raise NotAnOperator(f"this is a key of workspace {caller.workspace}; the admin API takes an operator's key")

    return guard
