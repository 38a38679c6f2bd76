"""I11: nothing leaves the machine, engines are not on the network, secrets are not in engines."""

from __future__ import annotations

import stat
from pathlib import Path

from loadtests.bench.stack import Stack
from tests.e2e.chats import Client

LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
_LISTEN = "0A"


def test_i11_every_listening_socket_of_every_process_is_on_loopback(stack: Stack, client: Client) -> None:
    assert client.chat().good
    inodes = {inode for process in stack.processes() for inode in _sockets(process.pid)}
    listening = [entry for entry in _tcp() if entry["state"] == _LISTEN and entry["inode"] in inodes]
    assert listening, "the gateways listen"
    assert [entry for entry in listening if entry["address"] not in LOOPBACK] == []
    connected = [entry for entry in _tcp() if entry["state"] != _LISTEN and entry["inode"] in inodes]
    assert [entry for entry in connected if entry["remote"] not in LOOPBACK] == []


def test_i11_an_engine_is_reached_only_through_a_socket_in_a_private_directory(stack: Stack, client: Client) -> None:
    assert client.chat().good
    sockets = list((stack.run_dir / "e").glob("*/s"))
    assert sockets
    for socket in sockets:
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(stack.run_dir.stat().st_mode) & 0o077 in (0, 0o011)


def test_i11_no_engine_process_has_a_secret_or_an_address_of_a_store(stack: Stack, client: Client) -> None:
    assert client.chat().good
    sessions = {engine["pid"] for engine in stack.engines()}
    pepper = (stack.data_dir / "pepper").read_text().strip()
    secrets = [pepper, stack.admin_key, client.key, "postgresql://", "GREENROOM_DATA_DIR"]
    engines = [process for process in stack.processes() if process.session in sessions]
    assert len(engines) >= 2, "API server and EngineCore"
    for process in engines:
        # The title has overwritten what /proc shows of the environment, so the memory itself is searched.
        memory = _heap_and_stack(process.pid)
        assert b"VLLM_NO_USAGE_STATS" in memory, "the search would find an environment"
        assert [secret for secret in secrets if secret.encode() in memory] == []
        files = [_target(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert [file for file in files if "/pg/" in file or "valkey" in file] == []


def _heap_and_stack(pid: int) -> bytes:
    """What a process keeps in its heap and on its stack, where environments are."""
    parts = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if line.endswith(("[heap]", "[stack]")):
                start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
                memory.seek(start)
                parts.append(memory.read(end - start))
    return b"".join(parts)


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""


def _sockets(pid: int) -> set[str]:
    try:
        links = [_target(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return set()
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def _tcp() -> list[dict[str, str]]:
    entries = []
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            fields = line.split()
            entries.append(
                {
                    "address": fields[1].split(":")[0],
                    "remote": fields[2].split(":")[0],
                    "state": fields[3],
                    "inode": fields[9],
                }
            )
    return entries
