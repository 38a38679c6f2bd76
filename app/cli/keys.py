"""`greenroom keys`: a workspace's API keys."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime

import rich_click as click

from app.cli import http
from app.cli.output import Columns, json_option, moment, show, show_list

_COLUMNS: Columns = {
    "id": lambda key: key["id"],
    "label": lambda key: key["label"],
    "created": lambda key: moment(key["created_at"]),
    "expires": lambda key: moment(key["expires_at"]),
    "revoked": lambda key: moment(key["revoked_at"]),
}


@click.group()
def group() -> None:
    """Make, list and revoke a workspace's keys."""


@group.command()
@click.argument("workspace")
@click.option("--label", default="", help="What it is for.")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="It expires after so many days.")
@json_option
def create(workspace: str, label: str, days: float | None, as_json: bool) -> None:
    """Make a key and print it, once. In a pipe only the key is printed."""
    body: dict[str, object] = {"label": label}
    if days is not None:
        body["expires_at"] = datetime.fromtimestamp(time.time() + days * 86_400, UTC)
    key = http.run(lambda admin: admin.post(f"/workspaces/{http.part(workspace)}/keys", body))
    show(key, as_json=as_json, says=key["key"])
    if not as_json and sys.stdout.isatty():
        click.echo("It is not shown again.", err=True)


@group.command("list")
@click.argument("workspace")
@json_option
def list_(workspace: str, as_json: bool) -> None:
    """List a workspace's keys, revoked ones too; not the keys themselves."""
    found = http.run(lambda admin: admin.all(f"/workspaces/{http.part(workspace)}/keys"))
    show_list(found, _COLUMNS, as_json=as_json)


@group.command()
@click.argument("workspace")
@click.argument("key_id")
@json_option
def revoke(workspace: str, key_id: str, as_json: bool) -> None:
    """Refuse a key from now on; KEY_ID is its public part."""
    revoked = http.run(lambda admin: admin.delete(f"/workspaces/{http.part(workspace)}/keys/{http.part(key_id)}"))
    show(revoked, as_json=as_json, says=f"key {key_id} is revoked; gateways refuse it within two seconds")
