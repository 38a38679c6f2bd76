"""Clients for end-to-end tests: one chat, a streamed one, one that leaves, and a load of many at once."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

from loadtests import sse
from loadtests.bench.stack import Stack

PROMPT = "What is the capital of France?"


@dataclass
class Reply:
    """What came back of one request."""

    status: int
    request_id: str
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    """The decoded JSON of an answer that wasn't streamed."""
    stream: sse.Stream | None = None

    @property
    def good(self) -> bool:
        """It ended as an answer should."""
        if self.status != 200:
            return False
        return self.stream.failure is None if self.stream is not None else bool(self.body["choices"])

    @property
    def completion_tokens(self) -> int:
        """As the client was told."""
        if self.stream is not None:
            return self.stream.completion_tokens
        return int(self.body["usage"]["completion_tokens"])

    @property
    def text(self) -> str:
        """The answer."""
        if self.stream is not None:
            return self.stream.text
        return str(self.body["choices"][0]["message"]["content"])

    def __str__(self) -> str:
        failure = self.stream.failure if self.stream is not None else self.body
        return f"{self.status} {self.request_id} {failure}"


@dataclass
class Client:
    """A workspace's client; each request has a connection of its own."""

    stack: Stack
    key: str

    def chat(self, model: str = "bot", *, stream: bool = False, timeout_s: float = 120.0, **fields: Any) -> Reply:
        """One chat, read to its end."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": 16,
            "temperature": 0,
            "stream": stream,
            **fields,
        }
        if stream:
            body.setdefault("stream_options", {"include_usage": True})
        return self.post("/v1/chat/completions", body, timeout_s=timeout_s)

    def post(self, path: str, body: Any, *, key: str | None = None, timeout_s: float = 120.0) -> Reply:
        """One request with a JSON body (or bytes as they are)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.stack.port, timeout=timeout_s)
        try:
            connection.request("POST", path, _encoded(body), self._headers(key))
            return _read(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str, *, key: str | None = None) -> Reply:
        """One GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.stack.port, timeout=30)
        try:
            connection.request("GET", path, headers=self._headers(key))
            return _read(connection.getresponse())
        finally:
            connection.close()

    def leave(self, model: str = "bot", *, stream: bool, after_s: float = 0.0, chunks: int = 2, **fields: Any) -> str:
        """Ask for much and go: a stream after so many chunks, another after so many seconds. Returns the request's id.

        The id of a request that wasn't streamed is not known to the client, which never saw the headers: "".
        """
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Count from one to five hundred."}],
            "max_tokens": 1000,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
            **fields,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.stack.port, timeout=120)
        connection.request("POST", "/v1/chat/completions", _encoded(body), self._headers(None))
        request_id = ""
        if stream:
            response = connection.getresponse()
            assert response.status == 200, response.read()
            request_id = response.headers["x-request-id"]
            seen = 0
            while seen < chunks:
                line = response.readline()
                assert line, "the stream ended before we could leave"
                seen += b'"content"' in line
        else:
            time.sleep(after_s)
        if connection.sock is not None:
            connection.sock.close()
        connection.close()
        return request_id

    def _headers(self, key: str | None) -> dict[str, str]:
        return {"Content-Type": "application/json", "Authorization": f"Bearer {self.key if key is None else key}"}


class Load:
    """So many clients that ask one chat after another until they are told to stop; used as a context manager."""

    def __init__(self, client: Client, *, clients: int = 4, model: str = "bot", max_tokens: int = 24) -> None:
        self.replies: list[Reply] = []
        self.errors: list[str] = []
        """Connections that broke, by the error's name."""
        self._client, self._clients, self._model, self._max_tokens = client, clients, model, max_tokens
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def bad(self) -> list[str]:
        """Everything that was no good answer."""
        return [str(reply) for reply in self.replies if not reply.good] + self.errors

    def wait_for(self, count: int, timeout_s: float = 60.0) -> None:
        """Return once so many more requests have ended."""
        target, end = len(self.replies) + len(self.errors) + count, time.monotonic() + timeout_s
        while len(self.replies) + len(self.errors) < target:
            assert time.monotonic() < end, f"only {len(self.replies)} replies, {len(self.errors)} errors: {self.bad}"
            time.sleep(0.01)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._run, args=(n % 2 == 0,)) for n in range(self._clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, stream: bool) -> None:
        while not self._stop.is_set():
            try:
                self.replies.append(self._client.chat(self._model, stream=stream, max_tokens=self._max_tokens))
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(type(error).__name__)
                self._stop.wait(0.05)


def at_once(count: int, calls: Sequence[Any]) -> list[Any]:
    """Run the calls in threads of their own, all let go together; `calls` is repeated up to `count`."""
    barrier = threading.Barrier(count)

    def run(number: int) -> Any:
        barrier.wait()
        return calls[number % len(calls)]()

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def _encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def _read(response: http.client.HTTPResponse) -> Reply:
    headers = {name.lower(): value for name, value in response.getheaders()}
    reply = Reply(response.status, headers.get("x-request-id", ""), headers)
    if headers.get("content-type", "").startswith("text/event-stream"):
        reply.stream = sse.read(response.readline, time.perf_counter)
    else:
        text = response.read()
        reply.body = json.loads(text) if text else None
    return reply
