"""`greenroom engines`: what runs, what ran, and what it said."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import rich_click as click

from app.cli import http
from app.cli.output import Columns, json_option, moment, show, show_list, size
from app.refusal import Refused

FOLLOW_S: Final = 0.5
"""Between two looks at a log that is followed."""
_LENGTH: Final = 36

_COLUMNS: Columns = {
    "id": lambda engine: engine["id"],
    "state": lambda engine: engine["state"],
    "since": lambda engine: moment(engine["since"]),
    "pool": lambda engine: engine["pool"],
    "device": lambda engine: engine["device"],
    "memory": lambda engine: size(engine["memory_bytes"]),
    "start": lambda engine: "" if engine["start_s"] is None else f"{engine['start_s']:.1f} s",
    "caused by": lambda engine: engine["caused_by"],
    "failure": lambda engine: engine["failure"] or "",
}


@click.group()
def group() -> None:
    """List and stop engines, read their logs. An engine may be named by the end of its id."""


@group.command("list")
@click.option("--all", "stopped", is_flag=True, help="With those that are over.")
@json_option
def list_(stopped: bool, as_json: bool) -> None:
    """List engines, newest first."""
    found = http.run(lambda admin: admin.all("/engines", stopped=str(stopped).lower()))
    show_list(found, _COLUMNS, as_json=as_json)


@group.command()
@click.argument("engine")
@click.option("--force", is_flag=True, help="Without waiting for its requests to end.")
@json_option
def stop(engine: str, force: bool, as_json: bool) -> None:
    """Have an engine finish what it has and stop."""

    async def work(admin: http.AdminClient) -> Any:
        return await admin.post(f"/engines/{await _find(admin, engine)}/stop", {"force": force})

    stopped = http.run(work)
    over = stopped["state"] == "stopped"
    show(stopped, as_json=as_json, says="it is stopped already" if over else "the controller was asked to stop it")


@group.command()
@click.argument("engine")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C or the engine's end.")
@click.option("-n", "--lines", type=click.IntRange(0, 10_000), default=100, show_default=True, help="Of the end.")
@json_option
def logs(engine: str, follow: bool, lines: int, as_json: bool) -> None:
    """Print an engine's log."""

    async def work(admin: http.AdminClient) -> Any:
        found = await _find(admin, engine)
        part = await admin.get(f"/engines/{found}/logs", lines=lines)
        if as_json:
            return part
        _print(part)
        while follow:
            over = (await admin.get(f"/engines/{found}"))["state"] == "stopped"
            part = await admin.get(f"/engines/{found}/logs", after=part["position"])
            _print(part)
            if over and not part["lines"]:
                break
            if not part["lines"]:
                await asyncio.sleep(FOLLOW_S)
        return None

    if as_json and follow:
        raise click.UsageError("--json prints one document; it can't follow")
    part = http.run(work)
    if as_json:
        show(part, as_json=True)


async def stop_pool(admin: http.AdminClient, pool: str, *, force: bool) -> list[Any]:
    """Ask for all living engines of a pool to be stopped, and return them."""
    found = [engine for engine in await admin.all("/engines") if engine["pool"] == pool]
    return [await admin.post(f"/engines/{engine['id']}/stop", {"force": force}) for engine in found]


async def _find(admin: http.AdminClient, text: str) -> str:
    """The id that ends with `text`; raises `Refused` unless exactly one does."""
    if len(text) == _LENGTH:
        return http.part(text)
    for stopped in ("false", "true"):
        found = [str(engine["id"]) for engine in await admin.all("/engines", stopped=stopped)]
        found = [engine for engine in found if engine.endswith(text)]
        if len(found) > 1:
            raise Refused(f"{len(found)} engines have an id that ends with {text}; say more of it")
        if found:
            return found[0]
    raise Refused(f"no engine has an id that ends with {text}; `greenroom engines list --all` shows all")


def _print(part: Any) -> None:
    for line in part["lines"]:
        click.echo(line)
