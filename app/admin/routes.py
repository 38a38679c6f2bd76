"""All routes of the admin API under one router, behind one guard."""

from __future__ import annotations

from typing import Final

from litestar import Router
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.openapi.spec import Components, SecurityScheme

import engines.errors
import tenants.errors
from app.admin import auth, keys, models, problems, usage, variants, workspaces
from app.admin import engines as engine_routes
from app.admin.parts import AdminParts

PATH: Final = "/admin/v1"
MAX_BODY_BYTES: Final = 1 << 20
SECURITY_SCHEME: Final = "admin key"
COMPONENTS: Final = Components(
    security_schemes={
        SECURITY_SCHEME: SecurityScheme(type="http", scheme="bearer", description="An operator's key, `gra-…`.")
    }
)
"""For the app's `OpenAPIConfig`."""


def admin_routes(parts: AdminParts) -> Router:
    """The router of `/admin/v1`. Each call makes one for one app; `parts` stay the caller's."""
    return Router(
        path=PATH,
        route_handlers=[
            *workspaces.ROUTES,
            *keys.ROUTES,
            *models.ROUTES,
            *variants.ROUTES,
            *engine_routes.ROUTES,
            *usage.ROUTES,
        ],
        dependencies={"parts": Provide(lambda: parts, sync_to_thread=False)},
        guards=[auth.operators_only(parts.authenticator, parts.clock)],
        exception_handlers={
            HTTPException: problems.answer,
            tenants.errors.TenantsError: problems.answer,
            engines.errors.EnginesError: problems.answer,
            Exception: problems.answer,
        },
        request_max_body_size=MAX_BODY_BYTES,
        security=[{SECURITY_SCHEME: []}],
    )
