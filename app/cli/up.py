"""`greenroom up`."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import rich_click as click

from app import migrate as migrations
from app.cli import settings
from app.cli.migrate import show_admin_key
from app.supervisor import Supervisor


@click.command()
@click.option(
    "--gateways", "gateway__count", type=click.IntRange(1, 64), help="How many gateways share the tenants' port."
)
@click.option("--host", "gateway__host", help="Tenants' address.")
@click.option("--port", "gateway__port", type=click.IntRange(0, 65_535), help="Tenants' port; 0: any free one.")
@click.option(
    "--operator-port",
    "gateway__operator_port",
    type=click.IntRange(0, 65_535),
    help="Operators' port of the first gateway.",
)
@click.option("--demo-model", type=click.Path(path_type=Path, exists=True), help="Set up workspace `demo` with it.")
@click.option("--logs", type=click.Choice(["files", "here"]), help="Where processes log; on a terminal: files.")
def up(demo_model: Path | None, logs: str | None, **flags: Any) -> None:
    """Run everything on this machine until Ctrl-C: stores, engine host, controller, gateways."""
    to_files = logs == "files" or (logs is None and sys.stdout.isatty())
    supervisor = Supervisor(
        settings(flags),
        environ=os.environ,
        migrate=lambda tree: asyncio.run(migrations.migrate(tree)),
        say=lambda line: click.echo(f"· {line}"),
        logs_to_files=to_files,
    )

    def ready(done: migrations.Migrated) -> None:
        tree = supervisor.settings
        click.echo(f"Greenroom is up: http://{tree.gateway.host}:{tree.gateway.port}/v1")
        click.echo(f"operators: http://{tree.gateway.operator_host}:{tree.gateway.operator_port}/admin/v1")
        if to_files:
            click.echo(f"logs: {tree.data_path / 'logs'}")
        show_admin_key(done, str(tree.data_path / "admin-key"))
        if demo_model:
            from app.cli.demo import set_up

            set_up(tree, demo_model)
        click.echo("Ctrl-C stops it.")

    supervisor.run(ready)
