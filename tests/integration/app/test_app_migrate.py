from __future__ import annotations

from pathlib import Path
from typing import Any

import asyncpg
import pytest

from app.migrate import DIRECTORY, Migration, MigrationRefused, apply, migrate, read_migrations
from app.pepper import PepperMissing
from app.settings import Settings


async def _tables(connection: asyncpg.Connection[Any]) -> list[str]:
    rows = await connection.fetch(
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace::regnamespace::text = 'public'"
    )
    return sorted(row[0] for row in rows)


async def test_an_empty_database_gets_every_migration_and_an_installation(empty_database: str, short_dir: Path) -> None:
    settings = Settings(data_dir=str(short_dir), database_url=empty_database)
    first = await migrate(settings)
    assert first.applied == tuple(m.name for m in read_migrations(DIRECTORY))
    assert len(first.installation) == 8
    assert int(first.installation, 16) >= 0
    second = await migrate(settings)
    assert second.applied == ()
    assert second.installation == first.installation


async def test_the_first_admin_key_is_made_once_and_kept_private(empty_database: str, short_dir: Path) -> None:
    settings = Settings(data_dir=str(short_dir), database_url=empty_database)
    first = await migrate(settings)
    file = short_dir / "admin-key"
    assert first.admin_key == file.read_text().strip()
    assert {path.name: path.stat().st_mode & 0o777 for path in short_dir.iterdir()} == {
        "admin-key": 0o600,
        "pepper": 0o600,
    }
    assert (await migrate(settings)).admin_key is None
    assert file.read_text().strip() == first.admin_key


async def test_a_lost_pepper_is_named_and_not_replaced(empty_database: str, short_dir: Path) -> None:
    settings = Settings(data_dir=str(short_dir), database_url=empty_database)
    await migrate(settings)
    (short_dir / "pepper").unlink()
    with pytest.raises(PepperMissing, match="no pepper in"):
        await migrate(settings)
    assert not (short_dir / "pepper").exists()


async def test_a_database_that_cant_be_reached_is_one_line_without_its_address(short_dir: Path) -> None:
    url = f"postgresql://me:secret@/greenroom?host={short_dir}"
    with pytest.raises(MigrationRefused, match="can't connect to GREENROOM_DATABASE_URL") as caught:
        await migrate(Settings(data_dir=str(short_dir), database_url=url))
    assert "secret" not in str(caught.value)


async def test_a_database_that_is_not_ours_is_refused_and_not_touched(empty_database: str, short_dir: Path) -> None:
    connection = await asyncpg.connect(empty_database)
    await connection.execute("CREATE TABLE customer (id int)")
    with pytest.raises(MigrationRefused, match=r"isn't Greenroom's \(public\.customer\)"):
        await migrate(Settings(data_dir=str(short_dir), database_url=empty_database))
    assert await _tables(connection) == ["customer"]
    assert list(short_dir.iterdir()) == []
    await connection.close()


async def test_an_edited_migration_is_refused(empty_database: str) -> None:
    connection = await asyncpg.connect(empty_database)
    await apply(connection, [Migration("0001_a", "aa", "CREATE TABLE a ()")])
    with pytest.raises(MigrationRefused, match="0001_a was applied with other contents"):
        await apply(
            connection, [Migration("0001_a", "bb", "CREATE TABLE a ()"), Migration("0002_b", "cc", "CREATE TABLE b ()")]
        )
    assert await _tables(connection) == ["a", "greenroom_migration"]
    await connection.close()


async def test_a_database_of_a_newer_version_is_refused(empty_database: str) -> None:
    connection = await asyncpg.connect(empty_database)
    await apply(
        connection, [Migration("0001_a", "aa", "CREATE TABLE a ()"), Migration("0002_b", "cc", "CREATE TABLE b ()")]
    )
    with pytest.raises(MigrationRefused, match="newer Greenroom: it has 0002_b"):
        await apply(connection, [Migration("0001_a", "aa", "CREATE TABLE a ()")])
    await connection.close()


async def test_a_failing_migration_leaves_nothing_of_itself(empty_database: str) -> None:
    connection = await asyncpg.connect(empty_database)
    good, bad = (
        Migration("0001_a", "aa", "CREATE TABLE a ()"),
        Migration("0002_b", "bb", "CREATE TABLE b (); SELECT 1/0"),
    )
    with pytest.raises(asyncpg.DivisionByZeroError):
        await apply(connection, [good, bad])
    assert await _tables(connection) == ["a", "greenroom_migration"]
    assert await apply(connection, [good, Migration("0002_b", "b2", "CREATE TABLE b ()")]) == ("0002_b",)
    await connection.close()


def test_migrations_are_numbered_without_gaps(tmp_path: Path) -> None:
    (tmp_path / "0001_a.sql").write_text("")
    (tmp_path / "0003_b.sql").write_text("")
    with pytest.raises(MigrationRefused, match=r"0003_b\.sql is not the migration number 0002"):
        read_migrations(tmp_path)
