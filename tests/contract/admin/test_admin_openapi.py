from __future__ import annotations

from litestar import Litestar
from litestar.openapi import OpenAPIConfig

from app.admin.parts import AdminParts
from app.admin.routes import COMPONENTS, SECURITY_SCHEME, admin_routes


def test_every_route_is_described_with_its_problems_and_its_key(parts: AdminParts) -> None:
    config = OpenAPIConfig(title="Greenroom", version="1", components=COMPONENTS, use_handler_docstrings=True)
    schema = Litestar([admin_routes(parts)], openapi_config=config).openapi_schema.to_schema()
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    assert len(operations) == 23
    for operation in operations:
        assert operation["security"] == [{SECURITY_SCHEME: []}]
        assert operation["description"]
        for status in ("400", "401", "403", "404", "409", "413", "503"):
            assert list(operation["responses"][status]["content"]) == ["application/problem+json"]
    assert {"Problem", "UsagePage", "VariantView"} <= set(schema["components"]["schemas"])
