"""`/admin/v1/workspaces/{workspace}/variants`: what a workspace names in `"model"`.

What can't be served is refused here, before anybody asks for it: an engine larger than every device, a context beyond
the model's, a KV cache too small for one request, provisioned concurrency that can't be kept beside what others were
promised.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, TypeVar

import msgspec
from litestar import Response, delete, get, patch, post
from litestar.params import FromPath, JSONBody
from msgspec import UNSET, Struct, UnsetType

from app.admin.models import find
from app.admin.pages import After, Limit, Page, moment, page, position
from app.admin.parts import AdminParts, Parts
from app.admin.problems import PROBLEMS, FieldInvalid, NotNow, field_invalid
from engines import footprint, placement, promises, queries
from engines.commands import Prewarm
from engines.errors import Conflict, NotFound
from engines.model import Model, Name, RequestDefaults, RuntimeArguments, Scaling, Variant
from engines.packaging import check_arguments
from tenants.queries import get_workspace

T = TypeVar("T", bound=Struct)


class VariantCreate(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A variant to make."""

    name: Name
    model: Name
    defaults: RequestDefaults = RequestDefaults()
    scaling: Scaling = Scaling()
    arguments: RuntimeArguments = RuntimeArguments()
    dedicated: bool = False
    """Engines of its workspace's own, shared with nobody."""


class VariantPatch(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to change of a variant; of `defaults`, `scaling`, `arguments` only the fields named; null resets one."""

    model: Name | UnsetType = UNSET
    defaults: dict[str, Any] | UnsetType = UNSET
    scaling: dict[str, Any] | UnsetType = UNSET
    arguments: dict[str, Any] | UnsetType = UNSET
    dedicated: bool | UnsetType = UNSET


class FootprintView(Struct, frozen=True):
    """Estimated device memory of one engine, in bytes."""

    weights: int
    kv_cache: int
    overhead: int
    total: int


class VariantView(Struct, frozen=True, kw_only=True):
    """A variant as it is. Variants with an equal `pool` share engines."""

    workspace: str
    name: str
    model: str
    defaults: RequestDefaults
    scaling: Scaling
    arguments: RuntimeArguments
    dedicated: bool
    pool: str
    footprint: FootprintView
    created_at: datetime


def view(variant: Variant) -> VariantView:
    """A variant as the API shows it."""
    size = footprint.estimate(variant.model, variant.arguments)
    return VariantView(
        workspace=variant.workspace,
        name=variant.name,
        model=variant.model.name,
        defaults=variant.defaults,
        scaling=variant.scaling,
        arguments=variant.arguments,
        dedicated=variant.dedicated,
        pool=variant.spec.pool,
        footprint=FootprintView(size.weights, size.kv_cache, size.overhead, size.total),
        created_at=moment(variant.created_at),
    )


@get("/workspaces/{workspace:str}/variants", tags=["variants"], responses=PROBLEMS)
async def list_variants(
    workspace: FromPath[str], parts: Parts, limit: Limit = 100, after: After = None
) -> Page[VariantView]:
    """A workspace's variants by name."""
    await get_workspace(parts.pool, workspace)
    found = await queries.variants(parts.pool, workspace, after=position(after) or "", limit=limit + 1)
    return page(found, limit, lambda variant: variant.name, view)


@post("/workspaces/{workspace:str}/variants", tags=["variants"], responses=PROBLEMS)
async def create_variant(
    workspace: FromPath[str], data: JSONBody[VariantCreate], parts: Parts
) -> Response[VariantView]:
    """Make a variant; 200 if there is an equal one of that name already, 409 if a different one."""
    model = await _model(parts, data.model)
    wanted = Variant(
        workspace=workspace,
        name=data.name,
        model=model,
        defaults=data.defaults,
        scaling=data.scaling,
        arguments=data.arguments,
        dedicated=data.dedicated,
    )
    async with parts.pool.acquire() as connection, connection.transaction():
        await queries.lock_catalog(connection)
        there = await queries.variant(connection, workspace, data.name)
        if there is not None:
            _same_or_conflict(there, wanted)
            return Response(view(there), status_code=200)
        await _check(parts, connection, wanted)
        await queries.create_variant(connection, workspace, wanted)
    return Response(view(await _variant(parts.pool, workspace, data.name)), status_code=201)


@get("/workspaces/{workspace:str}/variants/{name:str}", tags=["variants"], responses=PROBLEMS)
async def get_variant(workspace: FromPath[str], name: FromPath[str], parts: Parts) -> VariantView:
    """One variant."""
    return view(await _variant(parts.pool, workspace, name))


@patch("/workspaces/{workspace:str}/variants/{name:str}", tags=["variants"], responses=PROBLEMS)
async def patch_variant(
    workspace: FromPath[str], name: FromPath[str], data: JSONBody[VariantPatch], parts: Parts
) -> VariantView:
    """Change a variant. Engines that no variant wants any more finish what they have and leave."""
    model = None if data.model is UNSET else await _model(parts, data.model)
    async with parts.pool.acquire() as connection, connection.transaction():
        await queries.lock_catalog(connection)
        before = await _variant(connection, workspace, name)
        changed = msgspec.structs.replace(
            before,
            model=before.model if model is None else model,
            defaults=_merged(before.defaults, data.defaults, "defaults"),
            scaling=_merged(before.scaling, data.scaling, "scaling"),
            arguments=_merged(before.arguments, data.arguments, "arguments"),
            dedicated=before.dedicated if data.dedicated is UNSET else data.dedicated,
        )
        if changed != before:
            await _check(parts, connection, changed)
            await queries.update_variant(connection, workspace, changed)
    return view(changed)


@delete("/workspaces/{workspace:str}/variants/{name:str}", tags=["variants"], responses=PROBLEMS)
async def delete_variant(workspace: FromPath[str], name: FromPath[str], parts: Parts) -> None:
    """Forget a variant. Requests that name it get 404 from now on; those under way are finished."""
    await queries.delete_variant(parts.pool, workspace, name)


@post("/workspaces/{workspace:str}/variants/{name:str}/prewarm", status_code=202, tags=["variants"], responses=PROBLEMS)
async def prewarm_variant(workspace: FromPath[str], name: FromPath[str], parts: Parts) -> VariantView:
    """Have an engine ready for the variant; counts as use, so its keep-alive begins anew. `/engines` shows it."""
    variant = await _variant(parts.pool, workspace, name)
    await queries.send_command(parts.pool, Prewarm(workspace, name))
    return view(variant)


async def _variant(database: queries.Database, workspace: str, name: str) -> Variant:
    found = await queries.variant(database, workspace, name)
    if found is None:
        await get_workspace(database, workspace)
        raise NotFound(f"workspace {workspace} has no variant {name}")
    return found


async def _model(parts: AdminParts, name: str) -> Model:
    try:
        return (await find(parts, name)).model
    except NotFound as error:
        raise FieldInvalid("model", str(error)) from None


async def _check(parts: AdminParts, connection: queries.Connection, wanted: Variant) -> None:
    """Refuse what could never be served, in the transaction that would store it."""
    await get_workspace(connection, wanted.workspace)
    check_arguments(wanted.model, wanted.arguments)
    devices = parts.devices
    if not devices:
        raise NotNow("it isn't known yet which devices there are; is the controller running?")
    placement.check_fits(footprint.estimate(wanted.model, wanted.arguments), devices)
    me = (wanted.workspace, wanted.name)
    others = [other for other in await queries.all_variants(connection) if (other.workspace, other.name) != me]
    promises.check_promises(others, wanted, devices, parts.max_engines_per_pool)


def _same_or_conflict(there: Variant, wanted: Variant) -> None:
    fields = ("defaults", "scaling", "arguments", "dedicated")
    different = ["model"] if there.model.name != wanted.model.name else []
    different += [field for field in fields if getattr(there, field) != getattr(wanted, field)]
    if different:
        reason = f"workspace {there.workspace} has a variant {there.name} with other {', '.join(different)}"
        raise Conflict(f"{reason}; change it with PATCH")


def _merged(before: T, change: dict[str, Any] | UnsetType, field: str) -> T:
    """A part with the named fields changed; null gives a field its default back."""
    if change is UNSET:
        return before
    tree = msgspec.to_builtins(before) | change
    try:
        return msgspec.convert({name: value for name, value in tree.items() if value is not None}, type(before))
    except msgspec.ValidationError as error:
        raise field_invalid(error, field) from None


ROUTES = [list_variants, create_variant, get_variant, patch_variant, delete_variant, prewarm_variant]
