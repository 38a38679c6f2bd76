"""One child of the supervisor: how it is started, where its output goes, and when it is started again after a death.

A child that dies is started again at once; one that keeps dying within half a minute waits longer each time.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from app.ownership import dying_with_parent
from app.settings import PREFIX, Settings
from engines.host.environment import INHERITED

SETTLED_S: Final = 30.0
"""A child that lived so long has not failed to start."""
FIRST_WAIT_S: Final = 0.1
LONGEST_WAIT_S: Final = 15.0
LOG_BYTES: Final = 64 << 20


class Child:
    """A process that should be running, and what it takes to have it so. `now` is always monotonic seconds."""

    def __init__(
        self,
        name: str,
        launch: Callable[[], subprocess.Popen[bytes]],
        *,
        stop_signal: signal.Signals = signal.SIGTERM,
        stop_s: float = 10.0,
        log: Path | None = None,
    ) -> None:
        """`launch` starts it without waiting; `stop_s` is how long after `stop_signal` it may take to go."""
        self.name = name
        self.stop_signal = stop_signal
        self.stop_s = stop_s
        self.log = log
        self._launch = launch
        self._started_at = 0.0
        self._early_deaths = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.due: float | None = None
        """When it is to be started again; `None` while it runs or isn't wanted."""

    def start(self, now: float) -> None:
        """Launch it."""
        self.due = None
        self._started_at = now
        self.process = self._launch()

    def died(self, now: float) -> float:
        """Note its death and return in how many seconds it is due again."""
        self.process = None
        self._early_deaths = self._early_deaths + 1 if now - self._started_at < SETTLED_S else 0
        wait: float = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** max(0, self._early_deaths - 1))
        self.due = now + wait
        return wait

    @property
    def running(self) -> bool:
        """Whether there is a process that hasn't been seen dead."""
        return self.process is not None and self.process.poll() is None

    def signal(self, sig: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(sig)


def spawn(
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    log: Path | None,
    inherit: Sequence[int] = (),
    death: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own that gets `death` when this process dies; output to `log` or ours."""
    out = None if log is None else os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=tuple(inherit),
            start_new_session=True,  # a Ctrl-C in the terminal is for the supervisor alone
            preexec_fn=dying_with_parent(death),  # noqa: PLW1509 (the supervisor has one thread)
        )
    finally:
        if out is not None:
            os.close(out)


def environ_of(settings: Settings, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment in which `settings.load` gives these very settings, whatever `inherited` says."""
    kept = {name: value for name, value in inherited.items() if not name.startswith(PREFIX)}
    return kept | dict(_flatten(PREFIX, msgspec.to_builtins(settings)))


def engine_environ(inherited: Mapping[str, str]) -> dict[str, str]:
    """A fresh environment for the engine host: names on a short list and nothing of ours, no pepper, no database."""
    return {name: value for name, value in inherited.items() if name in INHERITED}


def _flatten(prefix: str, tree: dict[str, Any]) -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            flat += _flatten(f"{prefix}{name.upper()}__", value)
        else:
            flat.append((f"{prefix}{name.upper()}", str(value)))
    return flat


def rotate(log: Path, limit: int = LOG_BYTES) -> None:
    """Keep a log that a running process appends to below a size, and one older file; lines of a moment may be lost."""
    if log.exists() and log.stat().st_size > limit:
        shutil.copyfile(log, log.with_name(log.name + ".1"))
        os.truncate(log, 0)
