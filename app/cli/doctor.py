"""`greenroom doctor`: looks at everything that Greenroom needs and says what is wrong and what to do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec
import rich_click as click
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from app import readiness
from app.children import engine_environ
from app.cli import settings
from app.installs import PG_MAJOR, InstallRefused, account, postgres_install, valkey_binary
from app.settings import Settings

IMPORT_S: Final = 180.0
GIB: Final = 1 << 30
PROBE: Final = """
import json, sys
import torch, vllm
print(json.dumps({"python": sys.version.split()[0], "torch": torch.__version__, "vllm": vllm.__version__,
                  "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0}))
"""


class Verdict(StrEnum):
    """How good a finding is."""

    GOOD = "good"
    NOTE = "note"
    BAD = "bad"


class Finding(Struct, frozen=True):
    """One thing looked at."""

    what: str
    verdict: Verdict
    says: str


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(*, as_json: bool) -> None:
    """Look at everything that Greenroom needs. Exit status 1 if something would keep it from working."""
    findings = list(examine(settings(), os.environ.copy()))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(findings), indent=2))
    else:
        show(findings)
    sys.exit(1 if any(finding.verdict is Verdict.BAD for finding in findings) else 0)


def show(findings: list[Finding]) -> None:
    """A table for people."""
    marks = {Verdict.GOOD: "[green]✓[/]", Verdict.NOTE: "[yellow]•[/]", Verdict.BAD: "[red]✗[/]"}
    table = Table(box=None, show_header=False)
    for finding in findings:
        table.add_row(marks[finding.verdict], finding.what, finding.says)
    Console().print(table)


def examine(tree: Settings, environ: dict[str, str]) -> Iterator[Finding]:
    """All findings, in order; the slow one (importing vLLM) included."""
    looks: list[Callable[[], Finding]] = [
        _python,
        lambda: _store("postgres", tree.database_url, _postgres),
        lambda: _store("valkey", tree.redis_url, _valkey),
        lambda: _engine_environment(tree, environ),
        lambda: _engine_host(tree),
        _memory,
        _shared_memory,
        lambda: _disk(tree.data_path),
        lambda: _run_dir(tree.run_path),
    ]
    for look in looks:
        yield look()
    yield from _ports(tree)


def _python() -> Finding:
    return Finding("python", Verdict.GOOD, f"{platform.python_version()} in {sys.prefix}")


def _postgres() -> str:
    runs_as = account()
    postgres_install()
    return f"version {PG_MAJOR}" + (f", run as {runs_as.pw_name}" if runs_as else "")


def _valkey() -> str:
    return valkey_binary().name


def _store(name: str, url: str, embedded: Callable[[], str]) -> Finding:
    if url:
        return Finding(name, Verdict.GOOD, "yours, as configured")
    try:
        return Finding(name, Verdict.GOOD, f"embedded: {embedded()}")
    except InstallRefused as refused:
        return Finding(name, Verdict.BAD, str(refused))


def _engine_environment(tree: Settings, environ: dict[str, str]) -> Finding:
    what, python = "engine environment", tree.engine_python
    if tree.engine.launcher == "memory":
        return Finding(what, Verdict.NOTE, "not needed: the launcher is `memory`, no real engine is started")
    if not os.access(python, os.X_OK):
        return Finding(what, Verdict.BAD, f"{python} is not there: run `./dev setup` or set GREENROOM_ENGINE__PYTHON")
    try:
        done = subprocess.run(
            [str(python), "-P", "-c", PROBE],
            env=engine_environ(environ) | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            capture_output=True,
            text=True,
            timeout=IMPORT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(what, Verdict.BAD, f"{python} could not import vllm within {IMPORT_S:.0f} s")
    if done.returncode:
        says = done.stderr.strip().splitlines()
        return Finding(what, Verdict.BAD, f"{python} can't import vllm: {says[-1] if says else done.returncode}")
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    devices = f"{facts['gpus']} GPUs" if facts["gpus"] else "no GPU: engines run on the CPU"
    return Finding(what, Verdict.GOOD, f"vLLM {facts['vllm']}, torch {facts['torch']}, {devices}")


def _engine_host(tree: Settings) -> Finding:
    what = "engine host"
    if tree.engine.start == "spawn":
        return Finding(what, Verdict.NOTE, "engines are started the stock way, as configured: tens of seconds each")
    answer = readiness.host(tree.host_socket)
    if answer is None:
        return Finding(what, Verdict.NOTE, f"not running (nothing answers on {tree.host_socket})")
    if answer.get("mode") != "fork":
        return Finding(what, Verdict.NOTE, f"starts engines the stock way, since it can't fork: {answer.get('gate')}")
    return Finding(what, Verdict.GOOD, f"process {answer.get('pid')} forks engines of vLLM {answer.get('vllm')}")


def _memory() -> Finding:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    verdict = Verdict.GOOD if free > 4 * GIB else Verdict.NOTE
    return Finding("memory", verdict, f"{free / GIB:.1f} of {total / GIB:.1f} GiB available, {os.cpu_count()} cores")


def _shared_memory() -> Finding:
    what = "shared memory"
    try:
        free = shutil.disk_usage("/dev/shm").free  # noqa: S108 (vLLM's, not ours)
    except OSError as error:
        return Finding(what, Verdict.BAD, f"no /dev/shm ({error.strerror}); engines need it")
    verdict = Verdict.GOOD if free > GIB // 2 else Verdict.BAD
    return Finding(what, verdict, f"{free / GIB:.1f} GiB free in /dev/shm (engines need 0.5)")


def _disk(data: Path) -> Finding:
    there = next(path for path in (data, *data.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Finding("data directory", Verdict.BAD, f"{data}: can't write to {there}")
    verdict = Verdict.GOOD if free > 5 * GIB else Verdict.NOTE
    return Finding("data directory", verdict, f"{data}: {free / GIB:.0f} GiB free")


def _run_dir(path: Path) -> Finding:
    longest = len(os.fsencode(path / "e" / ("0" * 8 + "-" + "0" * 12) / "t")) + 37  # what vLLM adds to it
    if longest > 107:
        return Finding("run directory", Verdict.BAD, f"{path} is {longest - 107} bytes too long for sockets in it")
    return Finding("run directory", Verdict.GOOD, str(path))


def _ports(tree: Settings) -> Iterator[Finding]:
    gateway = tree.gateway
    asked = [("tenants' port", gateway.host, gateway.port)]
    asked += [("operators' port", gateway.operator_host, gateway.operator_port + n) for n in range(gateway.count)]
    for index, (what, host, port) in enumerate(asked):
        if _is_free(host, port):
            yield Finding(what, Verdict.GOOD, f"{host}:{port} is free")
        elif readiness.gateway(tree, max(0, index - 1)):
            yield Finding(what, Verdict.GOOD, f"{host}:{port} is a running gateway's")
        else:
            yield Finding(what, Verdict.BAD, f"{host}:{port} is taken by something else")


def _is_free(host: str, port: int) -> bool:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        with socket.create_server((host, port), family=family):
            return True
    except OSError:
        return False
