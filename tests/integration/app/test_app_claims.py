from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from app.claims import ClaimRefused, claim
from app.ownership import AlreadyOwned
from app.settings import GatewaySettings, Settings


def settings_in(directory: Path, **gateway: object) -> Settings:
    ports = {"port": 0, "operator_port": 0, **gateway}
    return Settings(
        data_dir=str(directory / "data"),
        run_dir=str(directory / "run"),
        gateway=GatewaySettings(**ports),  # type: ignore[arg-type]
    )


def ignore(_: str) -> None:
    pass


def test_a_claim_has_free_ports_and_goes_without_a_trace_but_the_data_directory(short_dir: Path) -> None:
    claimed = claim(settings_in(short_dir, count=3), ignore)
    assert claimed.settings.gateway.port == claimed.listener.getsockname()[1] > 0
    assert claimed.settings.gateway.operator_port > 0
    assert (short_dir / "run").stat().st_mode & 0o777 == 0o700
    claimed.release()
    assert [path.name for path in short_dir.iterdir()] == ["data"]
    claim(settings_in(short_dir), ignore).release()


def test_a_second_claim_on_the_same_data_directory_is_refused_in_one_line(short_dir: Path) -> None:
    claimed = claim(settings_in(short_dir), ignore)
    with pytest.raises(AlreadyOwned, match=rf"data directory {short_dir}/data is in use .* \(process {os.getpid()}\)"):
        claim(settings_in(short_dir), ignore)
    assert (short_dir / "run").exists()
    claimed.release()


@pytest.mark.parametrize("which", ["port", "operator_port"])
def test_a_port_in_use_is_named_and_nothing_is_touched(short_dir: Path, which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClaimRefused, match=f"can't listen on 127.0.0.1:{port}: address already in use"):
            claim(settings_in(short_dir, **{which: port}), ignore)
    assert list(short_dir.iterdir()) == []


def test_a_run_directory_that_others_can_enter_is_refused(short_dir: Path) -> None:
    (short_dir / "run").mkdir(mode=0o755)
    with pytest.raises(ClaimRefused, match="is not ours alone"):
        claim(settings_in(short_dir), ignore)
    (short_dir / "run").chmod(0o700)
    claim(settings_in(short_dir), ignore).release()
