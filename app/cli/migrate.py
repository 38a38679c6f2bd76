"""`greenroom migrate`."""

from __future__ import annotations

import asyncio

import rich_click as click

from app import migrate as migrations
from app.cli import settings


@click.command()
def migrate() -> None:
    """Bring the database up to date; make pepper and first admin key if there are none.

    The embedded database is migrated by `greenroom up`.
    """
    tree = settings()
    done = asyncio.run(migrations.migrate(tree))
    for name in done.applied:
        click.echo(f"applied {name}")
    click.echo(f"installation {done.installation} is up to date")
    show_admin_key(done, str(tree.data_path / "admin-key"))


def show_admin_key(done: migrations.Migrated, path: str) -> None:
    """Print the first admin key, if it was made just now."""
    if done.admin_key:
        click.echo(f"admin key: {done.admin_key}  (shown once; also in {path})")
