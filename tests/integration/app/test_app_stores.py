"""Embedded stores as a machine treats them: killed, orphaned, started twice, started after a reused pid."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from app.installs import SYSTEM_HOME, postgres_install
from app.ownership import AlreadyOwned, DirectoryLock
from app.stores import EmbeddedPostgres, EmbeddedValkey, StoreRefused

OWNER = """
import sys, time
from pathlib import Path
from app.stores import EmbeddedPostgres, EmbeddedValkey
directory = Path(sys.argv[1])
postgres = EmbeddedPostgres(directory / "postgres", directory / "pg", durable=False)
postgres.start()
valkey = EmbeddedValkey(directory / "valkey.sock")
valkey.start()
print(postgres.process.pid, valkey.process.pid, flush=True)
time.sleep(600)
"""


def made_by(directory: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(directory / "postgres", directory / "pg", durable=False)


@contextlib.contextmanager
def owner_of(directory: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Another process that owns stores in `directory`, and their pids; killed at the end."""
    with subprocess.Popen([sys.executable, "-c", OWNER, str(directory)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        yield owner, [int(pid) for pid in owner.stdout.readline().split()]
        owner.kill()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_gone(*pids: int) -> None:
    give_up = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < give_up, pids
        time.sleep(0.01)


async def write(server: EmbeddedPostgres, value: int) -> None:
    connection = await asyncpg.connect(server.url("postgres"))
    await connection.execute("CREATE TABLE IF NOT EXISTS kept (n int)")
    await connection.execute("INSERT INTO kept VALUES ($1)", value)
    await connection.close()


async def kept(server: EmbeddedPostgres) -> list[int]:
    connection = await asyncpg.connect(server.url("postgres"))
    rows = await connection.fetch("SELECT n FROM kept ORDER BY n")
    await connection.close()
    return [row[0] for row in rows]


async def test_what_was_written_is_there_after_a_stop_and_after_a_kill(short_dir: Path) -> None:
    server = made_by(short_dir)
    server.start()
    await write(server, 1)
    server.stop()
    server.start()
    await write(server, 2)
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    server.launch()  # as the supervisor does: the lock is still its own
    server.wait_ready(timeout_s=30)
    assert await kept(server) == [1, 2]
    server.stop()
    assert not (short_dir / "pg").is_symlink()


def test_it_listens_on_no_port_and_leaves_no_shared_memory(short_dir: Path) -> None:
    before = {path.name for path in Path("/dev/shm").iterdir()}
    server = made_by(short_dir)
    server.start()
    assert server.process is not None
    inodes = {link.readlink().name for link in Path(f"/proc/{server.process.pid}/fd").iterdir()}
    listening = {f"socket:[{line.split()[9]}]" for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
    server.stop()
    assert inodes & listening == set()
    assert {path.name for path in Path("/dev/shm").iterdir() if "Postgre" in path.name} <= before


def test_a_second_owner_is_refused_in_one_line_while_the_first_lives(short_dir: Path) -> None:
    with owner_of(short_dir) as (owner, pids):
        with pytest.raises(StoreRefused, match=rf"postgres is in use by another greenroom \(process {owner.pid}\)"):
            made_by(short_dir).start()
        assert all(is_running(pid) for pid in pids)
    wait_gone(*pids)


async def test_i10_stores_die_with_their_owner_and_start_again_at_once(short_dir: Path) -> None:
    with owner_of(short_dir) as (_, pids):
        pass
    server, valkey = made_by(short_dir), EmbeddedValkey(short_dir / "valkey.sock")
    server.start()
    valkey.start()
    await write(server, 3)
    wait_gone(*pids)
    assert await kept(server) == [3]
    valkey.stop()
    server.stop()


def test_a_reused_pid_in_the_old_pid_file_is_nobodys_rival(short_dir: Path) -> None:
    server = made_by(short_dir)
    server.start()
    assert server.process is not None
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    server.stop()
    stranger = subprocess.Popen(["sleep", "600"])
    file = short_dir / "postgres" / "data" / "postmaster.pid"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
    server.start()
    server.stop()
    file.write_text("")  # as a full disk leaves it
    server.start()
    server.stop()
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_cluster_of_another_version_is_refused_and_not_touched(short_dir: Path) -> None:
    cluster = short_dir / "postgres" / "data"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("17\n")
    with pytest.raises(StoreRefused, match="is of Postgres 17; this Greenroom brings Postgres 18"):
        made_by(short_dir).start()
    assert [path.name for path in cluster.iterdir()] == ["PG_VERSION"]


def test_a_server_that_cant_start_says_its_last_line(short_dir: Path) -> None:
    server = made_by(short_dir)
    server.start()
    server.stop()
    (short_dir / "postgres" / "data" / "postgresql.conf").write_text("nonsense = on\n")
    with pytest.raises(StoreRefused, match="postgres did not start"):
        server.start()
    assert server.process is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs Postgres as another user")
async def test_as_root_other_processes_of_nobody_are_not_let_in(short_dir: Path) -> None:
    server = made_by(short_dir)
    server.start()
    cluster = short_dir / "postgres" / "data"
    os.seteuid(pwd.getpwnam("nobody").pw_uid)  # the directory is nobody's own, so its socket can be opened
    try:
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError, match="Peer authentication failed"):
            await asyncpg.connect(f"postgresql://postgres:@/postgres?host={cluster}")
    finally:
        os.seteuid(0)
        server.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs Postgres as another user")
def test_as_root_what_nobody_cant_reach_is_put_elsewhere_and_no_directory_is_opened(short_dir: Path) -> None:
    private = short_dir / "private"
    private.mkdir(mode=0o700)
    package = postgres_install().parent
    shutil.copytree(postgres_install(), private / package.name / postgres_install().name, symlinks=True)
    shutil.copytree(package.with_name(f"{package.name}.libs"), private / f"{package.name}.libs")
    shutil.copy2(package / "__init__.py", private / package.name)
    code = (
        "import sys; from pathlib import Path; from app.stores import EmbeddedPostgres\n"
        "server = EmbeddedPostgres(Path(sys.argv[1]), Path(sys.argv[2]), durable=False, say=print)\n"
        "server.start(); print(Path(f'/proc/{server.process.pid}/exe').readlink()); server.stop()"
    )
    directory = private / "data" / "postgres"
    command = [sys.executable, "-c", code, str(directory), str(short_dir / "pg")]
    environ = os.environ | {"PYTHONPATH": str(private)}
    said = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.splitlines()
    home = directory.readlink()
    try:
        assert said[0] == f"postgres runs as `nobody`, which can't reach {directory}: the database lives in {home}"
        assert Path(said[1]).is_relative_to(home)
        assert home.parent == SYSTEM_HOME
        assert private.stat().st_mode & 0o777 == 0o700
        again = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.splitlines()
        assert again == said[1:]  # the same place, found by the link
    finally:
        shutil.rmtree(home)


def test_a_lock_waits_for_the_children_of_a_dead_owner(short_dir: Path) -> None:
    code = (
        "import subprocess,sys; from pathlib import Path; from app.ownership import DirectoryLock\n"
        "lock = DirectoryLock(Path(sys.argv[1]), 'it'); lock.acquire()\n"
        "print(subprocess.Popen(['sleep', '0.5'], pass_fds=(lock.fd,)).pid)"
    )
    subprocess.run([sys.executable, "-c", code, str(short_dir / "lock")], check=True, stdout=subprocess.DEVNULL)
    said: list[str] = []
    lock = DirectoryLock(short_dir / "lock", "the directory")
    lock.acquire(say=said.append)
    assert said == ["the directory was left by a process that is gone; waiting for its children to end"]
    with pytest.raises(AlreadyOwned, match=f"process {os.getpid()}"):
        DirectoryLock(short_dir / "lock", "the directory").acquire()
    lock.release()


def test_a_valkey_that_is_killed_starts_again_over_its_socket(short_dir: Path) -> None:
    server = EmbeddedValkey(short_dir / "valkey.sock")
    server.start()
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    server.launch()
    server.wait_ready(timeout_s=10)
    assert (short_dir / "valkey.sock").stat().st_mode & 0o077 == 0
    server.stop()
    assert not (short_dir / "valkey.sock").exists()
