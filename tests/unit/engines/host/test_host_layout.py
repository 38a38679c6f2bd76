"""An engine's files and directories."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from engines.host.layout import SOCKET_PATH_MAX, ZMQ_SUFFIX, Layout
from engines.host.protocol import StartOrder

ORDER = StartOrder(
    engine="e1",
    epoch=1,
    model_path="/models/a",
    served_name="m",
    engine_dir="/data/engines/e1",
    run_dir="/run/g/e1",
    argv=(),
)


def test_paths_are_those_of_the_protocol() -> None:
    layout = Layout.of(ORDER)
    found = [layout.log, layout.book, layout.phases, layout.socket, layout.temporary]
    assert [str(path) for path in found] == [
        "/data/engines/e1/log",
        "/data/engines/e1/book.jsonl",
        "/data/engines/e1/phases.jsonl",
        "/run/g/e1/s",
        "/run/g/e1/t",
    ]


@pytest.mark.parametrize("name", ["engine_dir", "run_dir", "model_path"])
def test_a_relative_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not an absolute path"):
        Layout.of(replace(ORDER, **{name: "here"}))


def test_a_runtime_directory_is_refused_from_the_first_byte_on_that_is_too_many_for_its_sockets() -> None:
    longest = SOCKET_PATH_MAX - ZMQ_SUFFIX - len("/t")
    Layout.of(replace(ORDER, run_dir="/" + "r" * (longest - 1)))
    with pytest.raises(ValueError, match="1 bytes too long"):
        Layout.of(replace(ORDER, run_dir="/" + "r" * longest))


def test_directories_are_made_for_nobody_else_and_an_old_socket_is_removed(short_dir: Path) -> None:
    layout = Layout(directory=short_dir / "engines" / "e", run=short_dir / "e")
    layout.make()
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(layout.socket))
    layout.make()
    assert not layout.socket.exists()
    for path in (layout.directory, layout.run, layout.temporary):
        assert path.stat().st_mode & 0o777 == 0o700
