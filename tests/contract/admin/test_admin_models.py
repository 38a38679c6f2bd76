from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from httpx import AsyncClient as Client
from tiny_model import write_model

from app.admin.parts import AdminParts
from engines import modelstore
from engines.model import Model

MODELS = "/admin/v1/models"


def put(parts: AdminParts, folder: Path, name: str = "other", **over: Any) -> Model:
    package = modelstore.inspect(write_model(folder, **over))
    return modelstore.put(package, parts.models_path, name=name, source="/from", progress=lambda *_: None)


async def test_a_model_is_registered_by_its_digest_and_again_changes_nothing(admin: Client, stored: Model) -> None:
    body = {"name": "tiny", "digest": stored.digest}
    made, again = await admin.post(MODELS, json=body), await admin.post(MODELS, json=body)
    assert (made.status_code, again.status_code) == (201, 200)
    assert made.json() == again.json() == (await admin.get(f"{MODELS}/tiny")).json()
    assert made.json() == {
        "name": "tiny",
        "digest": stored.digest,
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "parameters": 52,
        "weights_bytes": 104,
        "max_model_len": 4096,
        "kv_bytes_per_token": 256,
        "source": "/from",
        "created_at": made.json()["created_at"],
        "files": [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in stored.files],
    }


async def test_a_name_with_other_content_is_a_conflict(
    admin: Client, stored: Model, parts: AdminParts, tmp_path: Path
) -> None:
    other = put(parts, tmp_path / "other", fill=1)
    await admin.post(MODELS, json={"name": "tiny", "digest": stored.digest})
    response = await admin.post(MODELS, json={"name": "tiny", "digest": other.digest})
    assert response.status_code == 409
    assert response.json()["detail"] == (f"model tiny has other content (digest {stored.digest}); choose another name")
    assert (await admin.get(f"{MODELS}/tiny")).json()["digest"] == stored.digest


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"name": "tiny", "digest": "0" * 64}, 404, f"model {'0' * 64} is not in the store"),
        ({"name": "tiny", "digest": "../../etc"}, 400, "digest: Expected `str` matching regex"),
        ({"name": "Tiny!", "digest": "0" * 64}, 400, "name: Expected `str` matching regex"),
        ({"name": "tiny"}, 400, "digest: missing"),
        ({"name": "tiny", "digest": "0" * 64, "path": "/etc"}, 400, "path: unknown field"),
    ],
)
async def test_what_is_not_in_the_store_is_not_registered(
    body: dict[str, str], status: int, detail: str, admin: Client
) -> None:
    response = await admin.post(MODELS, json=body)
    assert (response.status_code, response.json()["detail"][: len(detail)]) == (status, detail)
    assert (await admin.get(f"{MODELS}/tiny")).status_code == 404


async def test_a_model_that_lost_bytes_is_not_registered(admin: Client, stored: Model, parts: AdminParts) -> None:
    weights = parts.models_path / stored.digest / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"")
    response = await admin.post(MODELS, json={"name": "tiny", "digest": stored.digest})
    assert response.status_code == 404
    assert "missing from the store or cut short" in response.json()["detail"]


async def test_models_come_by_name_without_their_files(admin: Client, stored: Model) -> None:
    for name in ("b", "a"):
        await admin.post(MODELS, json={"name": name, "digest": stored.digest, "source": f"for {name}"})
    first = (await admin.get(f"{MODELS}?limit=1")).json()
    second = (await admin.get(f"{MODELS}?limit=1&after={first['next']}")).json()
    assert [(model["name"], model["source"]) for model in first["data"] + second["data"]] == [
        ("a", "for a"),
        ("b", "for b"),
    ]
    assert "files" not in first["data"][0]
    assert second["next"] is None


async def test_files_go_with_the_last_model_that_has_them(admin: Client, stored: Model, parts: AdminParts) -> None:
    folder = parts.models_path / stored.digest
    for name in ("a", "b"):
        await admin.post(MODELS, json={"name": name, "digest": stored.digest})
    assert (await admin.delete(f"{MODELS}/a")).status_code == 204
    assert folder.exists()
    assert (await admin.delete(f"{MODELS}/b")).status_code == 204
    assert not folder.exists()
    assert list(parts.models_path.iterdir()) == []
    response = await admin.delete(f"{MODELS}/b")
    assert (response.status_code, response.json()["detail"]) == (404, "model b does not exist")


async def test_a_model_that_a_variant_names_stays(tiny: Client, parts: AdminParts, stored: Model) -> None:
    await tiny.post("/admin/v1/workspaces/acme/variants", json={"name": "bot", "model": "tiny"})
    response = await tiny.delete(f"{MODELS}/tiny")
    assert response.status_code == 409
    assert response.json()["detail"] == "model tiny is in use: variants name it; remove them first"
    assert (parts.models_path / stored.digest).exists()
