"""`greenroom usage`: requests and tokens, summed from the ledger."""

from __future__ import annotations

from typing import Any

import rich_click as click

from app.cli import http
from app.cli.output import json_option, number, print_json, table

_GROUPS = ("start", "workspace", "variant", "key")
_NUMBERS = ("requests", "completed", "cold", "prompt_tokens", "cached_tokens", "completion_tokens")


@click.command()
@click.option("--by", default="workspace,variant,day", show_default=True, help="workspace, variant, key, hour or day.")
@click.option("--from", "since", help="Begin, inclusive: a date or time (UTC); the month's begin if not given.")
@click.option("--to", "until", help="End, exclusive; now if not given.")
@click.option("--workspace", help="Only this one's.")
@click.option("--variant", help="Only this one's.")
@click.option("--key", help="Only this one's, by its id.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
def usage(since: str | None, until: str | None, as_csv: bool, as_json: bool, **given: Any) -> None:
    """Sum requests and tokens. Days and hours are UTC."""
    if as_csv and as_json:
        raise click.UsageError("--csv or --json, not both")
    query = {**given, "from": since, "to": until}
    if as_csv:
        click.echo(http.run(lambda admin: admin.text("/usage", format="csv", **query)), nl=False)
        return

    async def work(admin: http.AdminClient) -> Any:
        first = await admin.get("/usage", limit=500, **query)
        page = first
        while page["next"] is not None:
            # The end is fixed by the first page, so that what happens meanwhile is in none of the others either.
            fixed = {**query, "from": first["from"], "to": first["to"]}
            page = await admin.get("/usage", limit=500, after=page["next"], **fixed)
            first["data"] += page["data"]
        return first

    found = http.run(work)
    if as_json:
        found.pop("next")
        print_json(found)
        return
    columns = [
        name for name in _GROUPS if name in found["by"] or (name == "start" and {"hour", "day"} & {*found["by"]})
    ]
    rows = [[_cell(entry, name) for name in (*columns, *_NUMBERS)] for entry in found["data"]]
    table([*columns, *(name.replace("_", " ") for name in _NUMBERS)], rows)


def _cell(entry: dict[str, Any], name: str) -> str:
    if name in _NUMBERS:
        return number(entry[name])
    return entry[name][:16].replace("T", " ") if name == "start" else str(entry[name])
