"""`/admin/v1/models`: what variants can be made of.

Weights don't come this way: `greenroom models add` puts them into the store, then registers their digest here.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated

import msgspec
from litestar import Response, delete, get, post
from litestar.params import FromPath, JSONBody
from msgspec import UNSET, Meta, Struct, UnsetType

from app.admin.pages import After, Limit, Page, moment, page, position
from app.admin.parts import AdminParts, Parts
from app.admin.problems import PROBLEMS
from engines import modelstore, queries
from engines.errors import Conflict, NotFound
from engines.model import ModelDigest, ModelFile, Name
from engines.queries import ModelRecord


class ModelCreate(Struct, frozen=True, forbid_unknown_fields=True):
    """A model to register: its files are in the store under the digest."""

    name: Name
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    source: Annotated[str, Meta(max_length=1000)] | None = None
    """Where it came from, for people; as `models add` recorded it if not said."""


class ModelView(Struct, frozen=True, kw_only=True):
    """A model as it is. `files` only where one model is asked for."""

    name: str
    digest: str
    architecture: str
    dtype: str
    parameters: int
    weights_bytes: int
    max_model_len: int
    kv_bytes_per_token: int
    source: str
    created_at: datetime
    files: tuple[ModelFile, ...] | UnsetType = UNSET


def view(record: ModelRecord, *, files: bool = True) -> ModelView:
    """A model as the API shows it."""
    model = record.model
    return ModelView(
        name=model.name,
        digest=model.digest,
        architecture=model.architecture,
        dtype=model.dtype,
        parameters=model.parameters,
        weights_bytes=model.weights_bytes,
        max_model_len=model.max_model_len,
        kv_bytes_per_token=model.kv_bytes_per_token,
        source=model.source,
        created_at=moment(record.created_at),
        files=model.files if files else UNSET,
    )


async def find(parts: AdminParts, name: str) -> ModelRecord:
    """The model of that name; raises `NotFound`."""
    record = await queries.model_record(parts.pool, name)
    if record is None:
        raise NotFound(f"model {name} does not exist")
    return record


@get("/models", tags=["models"], responses=PROBLEMS)
async def list_models(parts: Parts, limit: Limit = 100, after: After = None) -> Page[ModelView]:
    """Models by name."""
    found = await queries.model_records(parts.pool, after=position(after) or "", limit=limit + 1)
    return page(found, limit, lambda record: record.model.name, lambda record: view(record, files=False))


@post("/models", tags=["models"], responses=PROBLEMS)
async def create_model(data: JSONBody[ModelCreate], parts: Parts) -> Response[ModelView]:
    """Register what is in the store; 200 if this name has this content already, 409 if it has other content."""
    async with parts.pool.acquire() as connection, connection.transaction():
        await queries.lock_catalog(connection)
        digest = ModelDigest(data.digest)
        model = await asyncio.to_thread(modelstore.read, parts.models_path, digest, name=data.name)
        if data.source is not None:
            model = msgspec.structs.replace(model, source=data.source)
        created = await queries.create_model(connection, model)
    record = await find(parts, data.name)
    if record.model.digest != data.digest:
        raise Conflict(f"model {data.name} has other content (digest {record.model.digest}); choose another name")
    return Response(view(record), status_code=201 if created else 200)


@get("/models/{name:str}", tags=["models"], responses=PROBLEMS)
async def get_model(name: FromPath[str], parts: Parts) -> ModelView:
    """One model with its files."""
    return view(await find(parts, name))


@delete("/models/{name:str}", tags=["models"], responses=PROBLEMS)
async def delete_model(name: FromPath[str], parts: Parts) -> None:
    """Forget a model that no variant names and no engine runs, and its files unless another model has the same."""
    digest = await queries.delete_model(parts.pool, name)
    async with parts.pool.acquire() as connection, connection.transaction():
        await queries.lock_catalog(connection)
        if not await queries.digest_is_named(connection, digest):
            await asyncio.to_thread(modelstore.remove, parts.models_path, digest)


ROUTES = [list_models, create_model, get_model, delete_model]
