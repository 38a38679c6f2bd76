"""`/admin/v1/workspaces`: the tenants."""

from __future__ import annotations

from datetime import datetime

from litestar import Response, get, post
from litestar.params import FromPath, JSONBody
from msgspec import Struct

from app.admin.pages import After, Limit, Page, moment, moment_or_none, page, position
from app.admin.parts import Parts
from app.admin.problems import PROBLEMS
from engines.queries import notify_catalog
from tenants import queries
from tenants.errors import Conflict
from tenants.model import Name, Workspace


class WorkspaceCreate(Struct, frozen=True, forbid_unknown_fields=True):
    """A workspace to make."""

    name: Name


class WorkspaceView(Struct, frozen=True):
    """A workspace as it is."""

    name: str
    created_at: datetime
    disabled_at: datetime | None


def view(workspace: Workspace) -> WorkspaceView:
    """A workspace as the API shows it."""
    return WorkspaceView(workspace.name, moment(workspace.created_at), moment_or_none(workspace.disabled_at))


@get("/workspaces", tags=["workspaces"], responses=PROBLEMS)
async def list_workspaces(parts: Parts, limit: Limit = 100, after: After = None) -> Page[WorkspaceView]:
    """Workspaces by name."""
    found = await queries.all_workspaces(parts.pool, after=position(after), limit=limit + 1)
    return page(found, limit, lambda workspace: workspace.name, view)


@post("/workspaces", tags=["workspaces"], responses=PROBLEMS)
async def create_workspace(data: JSONBody[WorkspaceCreate], parts: Parts) -> Response[WorkspaceView]:
    """Make a workspace; 200 if it is there already."""
    try:
        return Response(view(await queries.create_workspace(parts.pool, data.name)), status_code=201)
    except Conflict:
        return Response(view(await queries.get_workspace(parts.pool, data.name)), status_code=200)


@get("/workspaces/{workspace:str}", tags=["workspaces"], responses=PROBLEMS)
async def get_workspace(workspace: FromPath[str], parts: Parts) -> WorkspaceView:
    """One workspace."""
    return view(await queries.get_workspace(parts.pool, workspace))


@post("/workspaces/{workspace:str}/disable", status_code=200, tags=["workspaces"], responses=PROBLEMS)
async def disable_workspace(workspace: FromPath[str], parts: Parts) -> WorkspaceView:
    """Refuse its keys from now on and keep nothing provisioned for it; what it used stays in the ledger."""
    async with parts.pool.acquire() as connection, connection.transaction():
        disabled = await queries.disable_workspace(connection, workspace)
        await notify_catalog(connection)
    return view(disabled)


ROUTES = [list_workspaces, create_workspace, get_workspace, disable_workspace]
