"""Words of the tenants' side as frozen structs: workspaces and keys. Pure data."""

from __future__ import annotations

from typing import Annotated, NewType

from msgspec import Meta, Struct

WorkspaceName = NewType("WorkspaceName", str)
KeyId = NewType("KeyId", str)  # the public part of a key, 12 characters

Name = Annotated[
    str, Meta(pattern=r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$(?!\n)")
]  # `$` alone would let a newline pass


class Workspace(Struct, frozen=True, kw_only=True):
    """A tenant."""

    name: WorkspaceName
    created_at: float
    disabled_at: float | None = None


class Key(Struct, frozen=True, kw_only=True):
    """An API key as stored; the secret itself is shown once and kept only as an HMAC."""

    id: KeyId
    workspace: WorkspaceName | None
    """Whose key it is; `None` for an operator's."""
    label: str
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None


class Caller(Struct, frozen=True):
    """Who a request comes from, once its key has been checked."""

    key: KeyId
    workspace: WorkspaceName | None
    """`None`: an operator (scope `admin`)."""
