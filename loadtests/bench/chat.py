"""One streamed chat by a client as thin as can be: `http.client` over TCP or a Unix socket, read line by line."""

from __future__ import annotations

import http.client
import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from loadtests import sse

PROMPT = "What is the capital of France?"


class ChatFailed(Exception):
    """A chat that was refused, or whose stream did not end well; the message says which."""


@dataclass(frozen=True)
class Answer:
    """A chat that ended well."""

    sent_at: float
    """When the request was made, before connecting: seconds since the epoch."""
    first_token_s: float
    """From then to the first `data:` event with content."""
    total_s: float
    request_id: str | None
    """`X-Request-Id` of the answer."""
    stream: sse.Stream


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect; `OSError` while nobody listens."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(str(self._path))
        except OSError:
            self.sock.close()
            self.sock = None
            raise


def ask(
    connection: http.client.HTTPConnection,
    *,
    model: str,
    key: str | None = None,
    prompt: str = PROMPT,
    max_tokens: int = 16,
) -> Answer:
    """Send one chat at temperature 0 and read its whole answer; the connection is closed. `ChatFailed`, `OSError`."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    sent_at, start = time.time(), time.perf_counter()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ChatFailed(f"status {response.status}: {response.read()[:500].decode(errors='replace')}")
        stream = sse.read(response.readline, time.perf_counter)
    finally:
        connection.close()
    first_token_s = stream.first_token_s(start)
    if stream.failure or first_token_s is None or stream.ended is None:
        raise ChatFailed(stream.failure or "an answer without a token")
    return Answer(sent_at, first_token_s, stream.ended - start, response.getheader("x-request-id"), stream)
