"""Where an engine's files are, from its start order; the directories are made here, readable by nobody else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engines.host.protocol import StartOrder

SOCKET_PATH_MAX = 107
"""Bytes of a Unix socket's path that Linux takes."""
ZMQ_SUFFIX = 37
"""Bytes that vLLM adds to TMPDIR for its own sockets: a slash and a UUID."""


@dataclass(frozen=True)
class Layout:
    """The paths of one engine; see `protocol`."""

    directory: Path
    run: Path

    @classmethod
    def of(cls, order: StartOrder) -> Layout:
        """The paths for an order; `ValueError` if one is relative or a socket's path would be too long."""
        layout = cls(directory=Path(order.engine_dir), run=Path(order.run_dir))
        for path in (layout.directory, layout.run, Path(order.model_path)):
            if not path.is_absolute():
                raise ValueError(f"{path} is not an absolute path")
        longest = max(len(bytes(layout.socket)), len(bytes(layout.temporary)) + ZMQ_SUFFIX)
        if longest > SOCKET_PATH_MAX:
            raise ValueError(
                f"run_dir {layout.run} is {longest - SOCKET_PATH_MAX} bytes too long for the sockets in it"
            )
        return layout

    @property
    def log(self) -> Path:
        """Standard output and error of all its processes."""
        return self.directory / "log"

    @property
    def book(self) -> Path:
        """The engine book."""
        return self.directory / "book.jsonl"

    @property
    def phases(self) -> Path:
        """Stamps of its start-up."""
        return self.directory / "phases.jsonl"

    @property
    def socket(self) -> Path:
        """Its HTTP server's Unix socket."""
        return self.run / "s"

    @property
    def temporary(self) -> Path:
        """Its TMPDIR: ZMQ sockets, torch's files."""
        return self.run / "t"

    def make(self) -> None:
        """Make the directories (0700) and remove a socket that an earlier engine left."""
        for path in (self.directory, self.run, self.temporary):
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o700)
        self.socket.unlink(missing_ok=True)
