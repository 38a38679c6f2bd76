"""`greenroom workspaces`: the tenants."""

from __future__ import annotations

import rich_click as click

from app.cli import http
from app.cli.output import Columns, json_option, moment, show, show_list

_COLUMNS: Columns = {
    "name": lambda workspace: workspace["name"],
    "created": lambda workspace: moment(workspace["created_at"]),
    "disabled": lambda workspace: moment(workspace["disabled_at"]),
}


@click.group()
def group() -> None:
    """Make, list and disable workspaces."""


@group.command()
@click.argument("name")
@json_option
def create(name: str, as_json: bool) -> None:
    """Make a workspace; one that is there already is fine."""
    made = http.run(lambda admin: admin.post("/workspaces", {"name": name}))
    show(made, as_json=as_json, says=f"workspace {name} is there; `greenroom keys create {name}` makes a key for it")


@group.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the workspaces."""
    show_list(http.run(lambda admin: admin.all("/workspaces")), _COLUMNS, as_json=as_json)


@group.command("show")
@click.argument("name")
@json_option
def show_(name: str, as_json: bool) -> None:
    """Show one workspace."""
    show(http.run(lambda admin: admin.get(f"/workspaces/{http.part(name)}")), as_json=as_json)


@group.command()
@click.argument("name")
@json_option
def disable(name: str, as_json: bool) -> None:
    """Refuse a workspace's keys from now on. What it used stays in the ledger."""
    disabled = http.run(lambda admin: admin.post(f"/workspaces/{http.part(name)}/disable"))
    show(disabled, as_json=as_json, says=f"workspace {name} is disabled; its keys are refused")
