"""`greenroom up`: one machine's processes, started in order, kept running, stopped in order.

    postgres, valkey   unless their addresses are set; they die with the supervisor
    engine host        imports vLLM while the rest starts; dies with the supervisor, the engines that it forked do not
    control            the controller
    gateway × N        share the tenants' port: the supervisor binds it once and they inherit the listening socket, so
                       what a killed gateway had not accepted yet is served by the others

One thread and no event loop: it sleeps in `poll` until a signal or a child's death, so starting processes is safe. It
is a subreaper: an engine whose host has died becomes its child and is reaped here.

Stopping: gateways drain, then the controller stops the engines, then the engine host, Valkey, Postgres. What is left of
the engines is killed. A second Ctrl-C cuts each of these short. If the supervisor is killed, engines live on and the
next `up` on the same data directory adopts them; everything else goes with it, and the next `up` waits for that.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

from app import leftovers, readiness
from app.children import Child, engine_environ, environ_of, rotate, spawn
from app.claims import Claim, claim
from app.migrate import Migrated
from app.ownership import become_subreaper
from app.refusal import Refused
from app.settings import Settings
from app.stores import EmbeddedPostgres, EmbeddedValkey

HOST_MAIN: Final = Path(__file__).parent.parent / "engines" / "host" / "__main__.py"
_ROTATE_S: Final = 60.0
_HASTE_S: Final = 1.0
_LOOK_S: Final = 0.1


class UpRefused(Refused):
    """`up` can't start; nothing of it is running. The message is one line."""


class _Interrupted(Exception):
    """A signal asked us to stop while we were starting."""


class Supervisor:
    """Runs the whole machine from `run` until a signal."""

    def __init__(
        self,
        settings: Settings,
        *,
        environ: Mapping[str, str],
        migrate: Callable[[Settings], Migrated],
        say: Callable[[str], None],
        logs_to_files: bool,
    ) -> None:
        """`say` gets one line for each step, for people. `migrate` brings the database up to date."""
        self.settings = settings
        self._environ = environ
        self._migrate = migrate
        self._say = say
        self._logs_to_files = logs_to_files
        self._children: list[Child] = []
        self._started_at = time.monotonic()
        self._host_is_new = settings.engine.launcher == "local"
        self._asked = 0  # how often we were asked to stop
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._claim: Claim | None = None
        self._postgres: EmbeddedPostgres | None = None
        self._valkey: EmbeddedValkey | None = None

    def run(self, when_ready: Callable[[Migrated], None]) -> None:
        """Start everything, keep it running until SIGINT, SIGTERM or SIGHUP, stop everything.

        `when_ready` is called once all gateways are ready; `settings` has the real ports then. The engine host may be
        importing vLLM still; a request that needs a new engine waits for it. Raises what is `Refused`, after stopping
        what had started.
        """
        if self.settings.engine.launcher == "local" and not os.access(self.settings.engine_python, os.X_OK):
            python = self.settings.engine_python
            raise UpRefused(f"no engine environment in {python}: run `./dev setup`, or set GREENROOM_ENGINE__PYTHON")
        self._claim = claim(self.settings, self._say)
        self.settings = self._claim.settings
        self._watch_signals()
        become_subreaper()
        try:
            with contextlib.suppress(_Interrupted):
                migrated = self._start()
                when_ready(migrated)
                self._supervise()
        finally:
            self._stop()

    # Starting

    def _start(self) -> Migrated:
        settings = self.settings
        if not settings.database_url:
            self._postgres = EmbeddedPostgres(settings.data_path / "postgres", settings.postgres_dir, say=self._say)
            self._add(Child("postgres", self._launched(self._postgres), stop_signal=signal.SIGINT))
        if not settings.redis_url:
            self._valkey = EmbeddedValkey(settings.run_path / "valkey.sock")
            self._add(Child("valkey", self._launched(self._valkey)))
        if settings.engine.launcher == "local":
            self._add(self._host())
        if self._postgres:
            with self._step("postgres"):
                self._postgres.wait_ready(timeout_s=600.0, check=self._check)
        if self._valkey:
            with self._step("valkey"):
                self._valkey.wait_ready(timeout_s=30.0, check=self._check)
        with self._step("database schema"):
            migrated = self._migrate(settings)
        self._check()
        environ = environ_of(settings, self._environ)
        self._add(self._program("control", ["control"], environ, signal.SIGINT, 30.0))
        for index in range(settings.gateway.count):
            self._add(self._gateway(index, environ))
        for index in range(settings.gateway.count):
            with self._step(f"gateway {index}"):
                self._await(partial(readiness.gateway, settings, index), 60.0, f"gateway-{index}")
        return migrated

    def _host(self) -> Child:
        command, log = host_command(self.settings), self._log("engine-host")
        environ = engine_environ(self._environ)
        return Child("engine-host", lambda: spawn(command, environ, log=log), stop_s=10.0, log=log)

    def _gateway(self, index: int, environ: Mapping[str, str]) -> Child:
        assert self._claim is not None  # noqa: S101 (run() did)
        fd = self._claim.listener.fileno()
        stop_s = self.settings.gateway.drain_s + 15.0
        arguments = ["gateway", "--fd", str(fd), "--index", str(index)]
        return self._program(f"gateway-{index}", arguments, environ, signal.SIGTERM, stop_s, fd)

    def _program(
        self,
        name: str,
        arguments: list[str],
        environ: Mapping[str, str],
        stop_signal: signal.Signals,
        stop_s: float,
        *inherit: int,
    ) -> Child:
        """One of our own processes. It holds the lock on the data directory too, so the next `up` waits for its end."""
        assert self._claim is not None  # noqa: S101 (run() did)
        command = [sys.executable, "-P", "-m", "app", *arguments]
        fds, log = (self._claim.lock.fd, *inherit), self._log(name)
        return Child(
            name,
            lambda: spawn(command, environ, log=log, inherit=fds),
            stop_signal=stop_signal,
            stop_s=stop_s,
            log=log,
        )

    def _launched(self, store: EmbeddedPostgres | EmbeddedValkey) -> Callable[[], subprocess.Popen[bytes]]:
        def launch() -> subprocess.Popen[bytes]:
            store.launch()
            assert store.process is not None  # noqa: S101 (just launched)
            return store.process

        return launch

    def _log(self, name: str) -> Path | None:
        return self.settings.data_path / "logs" / f"{name}.log" if self._logs_to_files else None

    def _add(self, child: Child) -> None:
        self._children.append(child)
        child.start(time.monotonic())

    @contextlib.contextmanager
    def _step(self, what: str) -> Iterator[None]:
        yield
        self._say(f"{time.monotonic() - self._started_at:4.1f} s  {what} ready")

    def _await(self, ready: Callable[[], bool], timeout_s: float, name: str) -> None:
        """Wait until `ready`. A child that dies meanwhile is an answer too: it won't get better by itself."""
        give_up = time.monotonic() + timeout_s
        child = next(child for child in self._children if child.name == name)
        while not ready():
            self._check()
            for dead in self._reap():
                raise UpRefused(f"{dead.name} ended while starting: {self._last_words(dead)}")
            if time.monotonic() > give_up:
                raise UpRefused(f"{name} was not ready after {timeout_s:.0f} s: {self._last_words(child)}")
            time.sleep(0.02)

    def _last_words(self, child: Child) -> str:
        if child.log is None:
            return "its output is above"
        lines = child.log.read_text(errors="replace").strip().splitlines() if child.log.exists() else []
        return f"{lines[-1] if lines else 'it said nothing'} (see {child.log})"

    # Running

    def _supervise(self) -> None:
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        rotate_at = time.monotonic() + _ROTATE_S
        while not self._asked:
            now = time.monotonic()
            due = [child.due for child in self._children if child.due is not None]
            look = [now + _LOOK_S] if self._host_is_new else []
            poller.poll(max(0.0, min([rotate_at, *due, *look]) - now) * 1000)
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
            for child in self._reap():
                self._died(child)
            self._restart()
            self._look_at_host()
            if time.monotonic() >= rotate_at:
                rotate_at = time.monotonic() + _ROTATE_S
                for child in self._children:
                    if child.log is not None:
                        rotate(child.log)

    def _died(self, child: Child) -> None:
        wait = child.died(time.monotonic())
        why = f" ({self._last_words(child)})" if child.name == "engine-host" and self._host_is_new else ""
        self._say(f"{child.name} ended{why}; starting it again in {wait:.1f} s")

    def _look_at_host(self) -> None:
        """Say when the first engine host is ready; it imports vLLM for some seconds while all else runs already."""
        if self._host_is_new and readiness.host(self.settings.host_socket) is not None:
            self._host_is_new = False
            self._say(f"{time.monotonic() - self._started_at:4.1f} s  engine host ready")

    def _restart(self) -> None:
        for child in self._children:
            if child.due is not None and child.due <= time.monotonic():
                try:
                    child.start(time.monotonic())
                except Exception as error:
                    wait = child.died(time.monotonic())
                    self._say(f"{child.name} can't be started: {error}; next try in {wait:.1f} s")

    def _reap(self) -> list[Child]:
        """Bury every dead process below us; returns those of our children among them."""
        ours = {child.process.pid: child for child in self._children if child.process is not None}
        dead: list[Child] = []
        while True:
            try:
                peek = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return dead
            if peek is None:
                return dead
            child = ours.get(peek.si_pid)
            if child is None or child.process is None:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(peek.si_pid, os.WNOHANG)
            elif child.process.poll() is not None:
                dead.append(child)

    # Stopping

    def _stop(self) -> None:
        if self._claim:
            self._claim.listener.close()  # else what connects now would wait for an answer that never comes
        for names in (("gateway",), ("control",), ("engine-host",)):
            self._stop_children([child for child in self._children if child.name.startswith(names)])
        stores = [child.process.pid for child in self._children if child.process is not None and child.running]
        leftovers.sweep(self.settings.run_path, spare=stores, say=self._say)
        if self._valkey:
            self._valkey.stop()
        if self._postgres:
            self._postgres.stop()
        if self._claim:
            self._claim.release()

    def _stop_children(self, children: list[Child]) -> None:
        """Ask, wait, insist. Being asked once more to stop shortens each wait to a second."""
        running = [child for child in children if child.running]
        if not running:
            return
        self._say(f"stopping {', '.join(child.name for child in running)}")
        start, longest = time.monotonic(), max(child.stop_s for child in running)
        for child in running:
            child.signal(child.stop_signal)
        while running:
            self._reap()
            running = [child for child in running if child.running]
            if time.monotonic() - start > (_HASTE_S if self._asked > 1 else longest):
                for child in running:
                    self._say(f"{child.name} did not end in time; killing it")
                    child.signal(signal.SIGKILL)
                    child.process = None
                return
            time.sleep(0.02)

    # Signals

    def _watch_signals(self) -> None:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sig, self._asked_to_stop)

    def _asked_to_stop(self, _sig: int, _frame: FrameType | None) -> None:
        self._asked += 1

    def _check(self) -> None:
        if self._asked:
            raise _Interrupted


def host_command(settings: Settings) -> list[str]:
    """How the engine host is started, in the engine environment."""
    files = [str(settings.engine_python), str(HOST_MAIN)]
    cache = settings.data_path / "cache"  # vLLM's; it must outlive the run directory
    return [*files, "--socket", str(settings.host_socket), "--mode", settings.engine.start, "--cache", str(cache)]
