"""One accepted request: open, prime, forward, record.

1. open: its row in the ledger is on its way while it waits for slots and for its engine; it is durable before the
   client's first byte, or the request does not happen.
2. prime: the engine's status and first event come before ours, so what the engine refuses is a true status. An engine
   that fails before that is passed over, and one more attempt is made elsewhere.
3. forward: bytes as they come, what came together goes together; usage is read on the way.
4. record: the closing row is durable before `[DONE]` or the body (or the client has waited 250 ms for it).

A client that leaves, or the end of a drain, interrupts whatever is waited for (`presence`); the engine's connection is
closed at once, which aborts the work there. However it ends, `close` is called exactly once for each attempt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog
from litestar.types import Receive, Send
from msgspec.structs import replace
from opentelemetry.trace import Span

from app import errors
from app.errors import EngineFailed, EngineRefused, ShuttingDown
from app.openai.body import ClientRequest
from app.parts import GatewayParts
from app.presence import Interrupted, Presence, Reason
from engines import sse
from engines.admission import Grant, Waited
from engines.arguments import served_name
from engines.books import engine_request_id
from engines.client import LARGEST_ERROR, Exchange
from engines.errors import EngineLost, EngineUnreachable
from engines.model import Variant
from engines.sse import EngineUsage, Portion, Relay
from tenants.usage import Outcome, Source, Tokens, UsageClose, UsageOpen

ATTEMPTS: Final = 2
CLOSE_S: Final = 0.25
"""The longest that an answer's end waits for its row."""
_DONE: Final = b"data: [DONE]\n\n"

T = TypeVar("T")
log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A request that has passed every check."""

    open: UsageOpen
    variant: Variant
    asked: ClientRequest
    body: bytes
    """For the engine."""
    span: Span


class Generation:
    """An accepted request on its way; used once."""

    def __init__(self, parts: GatewayParts, accepted: Accepted, send: Send) -> None:
        self._parts = parts
        self._accepted = accepted
        self._send = send
        self._row = accepted.open
        self._began = time.perf_counter()
        self._waited = Waited()
        self._queued_us = self._held_us = 0
        self._grant: Grant | None = None
        self._exchange: Exchange | None = None
        self._engine: str | None = None
        self._phases_us: dict[str, int] = {}
        self._usage: EngineUsage | None = None
        self._status = 0
        self._first_token_us: int | None = None
        self._closed: asyncio.Future[None] | None = None
        self._opened = parts.ledger.open(self._row)
        self._relay = Relay(
            served=served_name(accepted.variant.model.digest),
            shown=accepted.asked.model,
            wanted=accepted.asked.wanted,
        )

    async def run(self, receive: Receive) -> None:
        """Answer, whatever happens."""
        try:
            async with Presence(receive, self._parts.drain):
                await self._answer()
        except Interrupted as cut:
            self._let_go()
            self._close(Outcome(cut.reason.value))
            if cut.reason is Reason.DRAINED:
                await self._refuse(ShuttingDown("this gateway is shutting down; ask again"))
        except Exception as error:
            self._let_go()
            line = errors.row(error)
            if line.outcome is None or line.code == "internal_error":
                log.exception("request_broke", request_id=str(self._row.request_id), error=type(error).__name__)
            self._close(line.outcome or Outcome.ENGINE_FAILED, detail=errors.detail(error))
            await self._refuse(error)
        finally:
            self._let_go()
            self._close(Outcome.DRAINED)  # only what a stopping server cuts short comes here unclosed

    async def _answer(self) -> None:
        if self._accepted.asked.stream:
            await self._forward(await self._attempts(self._prime))
        else:
            await self._whole(await self._attempts(self._body))

    # Attempts ---------------------------------------------------------------------------------------------------------

    async def _attempts(self, begin: Callable[[Exchange], Awaitable[T]]) -> T:
        """Have an engine begin its answer; a second one if the first fails before that."""
        while True:
            try:
                await self._dispatch()
                if self._exchange is None:
                    raise RuntimeError("dispatched without an exchange")
                begun = await begin(self._exchange)
                await self._opened
            except (EngineUnreachable, EngineLost, EngineFailed) as error:
                if self._row.attempt == ATTEMPTS:
                    raise
                self._again(error)
            else:
                return begun

    async def _dispatch(self) -> None:
        accepted, settings = self._accepted, self._parts.settings
        self._waited = Waited()
        try:
            self._grant = await self._parts.admission.admit(
                accepted.variant,
                slots=accepted.asked.sequences,
                wait_s=settings.stream_hold_s if accepted.asked.stream else settings.hold_s,
                waited=self._waited,
            )
        finally:
            self._queued_us += self._waited.queued_us
            self._held_us += self._waited.held_us
        engine = self._grant.engine
        self._engine, self._phases_us = engine.id, engine.phases_us
        name = engine_request_id(str(self._row.request_id), self._row.attempt)
        self._exchange = await self._parts.client.post(engine, accepted.asked.endpoint.path, accepted.body, name)

    def _again(self, error: Exception) -> None:
        """Close an attempt that failed, which costs nothing; its close opens the next one."""
        if self._grant is not None:
            self._parts.admission.suspect(self._grant.engine)
        self._let_go()
        self._parts.ledger.close(self._closing(Outcome.ENGINE_FAILED, final=False, detail=errors.detail(error)))
        self._row = replace(self._row, attempt=self._row.attempt + 1)
        self._opened = self._parts.ledger.open(self._row)
        self._engine, self._usage = None, None

    async def _check(self, exchange: Exchange) -> None:
        if exchange.status >= 500:
            raise EngineFailed(f"the engine answered {exchange.status}")
        if exchange.status >= 400:
            raise EngineRefused(sse.error_of(await exchange.start(LARGEST_ERROR), exchange.status))
        if exchange.status != 200:
            raise EngineFailed(f"the engine answered {exchange.status}")

    async def _prime(self, exchange: Exchange) -> Portion:
        await self._check(exchange)
        while True:
            portion = await self._portion(exchange)
            if portion.data or portion.done:
                return portion

    async def _body(self, exchange: Exchange) -> bytes:
        await self._check(exchange)
        body, self._usage = sse.answer(
            await exchange.whole(),
            served=served_name(self._accepted.variant.model.digest),
            shown=self._accepted.asked.model,
        )
        return body

    async def _portion(self, exchange: Exchange) -> Portion:
        """The next events; `EngineRefused`, `EngineFailed` for an error frame, `EngineLost` for an end without one."""
        data = await exchange.some()
        if not data:
            raise EngineLost("the engine ended its stream without [DONE]")
        portion = self._relay.feed(data)
        self._usage = self._relay.usage
        if portion.error is not None:
            if portion.error.status < 500:
                raise EngineRefused(portion.error)
            raise EngineFailed(f"the engine sent an error frame ({portion.error.status})")
        return portion

    # Answering --------------------------------------------------------------------------------------------------------

    async def _forward(self, portion: Portion) -> None:
        if self._exchange is None:
            raise RuntimeError("forwarding without an exchange")
        await self._start(200, _STREAM_HEADERS)
        self._first_token_us = self._elapsed_us()
        while not portion.done:
            await self._more(portion.data)
            portion = await self._portion(self._exchange)
        if portion.data:
            await self._more(portion.data)
        self._finished()
        await self._durable()
        await self._send({"type": "http.response.body", "body": _DONE, "more_body": False})

    async def _whole(self, body: bytes) -> None:
        self._first_token_us = self._elapsed_us()
        self._finished()
        await self._durable()
        length = (b"content-length", str(len(body)).encode())
        await self._start(200, [(b"content-type", b"application/json"), length])
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _finished(self) -> None:
        """The engine is done: its slots are free for the next, and the row is on its way."""
        self._let_go()
        self._close(Outcome.COMPLETED)

    async def _durable(self) -> None:
        if self._closed is None:
            return
        await asyncio.wait({self._closed}, timeout=CLOSE_S)
        if not self._closed.done():
            self._parts.metrics.closed_late()

    async def _refuse(self, error: Exception) -> None:
        """Say what went wrong: as a response, or in the stream if that has begun. A client that is gone won't hear."""
        if not self._status:
            answer = errors.answer(error)
            await self._start(answer.status, answer.headers)
            await self._send({"type": "http.response.body", "body": answer.body, "more_body": False})
        elif self._accepted.asked.stream:
            body = errors.frame(error) + _DONE
            await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status
        ours = [
            (b"x-request-id", str(self._row.request_id).encode()),
            (b"openai-processing-ms", str(self._elapsed_us() // 1000).encode()),
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *ours]})

    async def _more(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    # Ending -----------------------------------------------------------------------------------------------------------

    def _let_go(self) -> None:
        """Close the engine's connection (aborting what is unfinished) and give the slots back."""
        if self._exchange is not None:
            self._exchange.abort()
            self._exchange = None
        if self._grant is not None:
            self._grant.release()
            self._grant = None

    def _close(self, outcome: Outcome, *, detail: str | None = None) -> None:
        if self._closed is not None:
            return
        closing = self._closing(outcome, final=True, detail=detail)
        self._closed = self._parts.ledger.close(closing)
        self._tell(closing)

    def _closing(self, outcome: Outcome, *, final: bool, detail: str | None) -> UsageClose:
        source, tokens = self._tokens(outcome)
        return UsageClose(
            request_id=self._row.request_id,
            attempt=self._row.attempt,
            outcome=outcome,
            final=final,
            source=source,
            tokens=tokens,
            ended_at=self._parts.clock(),
            engine=self._engine,
            cold=self._held_us > 0,
            queued_us=self._queued_us,
            held_us=self._held_us,
            first_token_us=self._first_token_us,
            duration_us=self._elapsed_us(),
            detail=detail,
        )

    def _tokens(self, outcome: Outcome) -> tuple[Source | None, Tokens]:
        """Failures cost nothing; else the last usage read; if an engine worked and none was, the book knows."""
        if self._engine is None or outcome not in _CHARGED:
            return Source.NONE, Tokens()
        if self._usage is None:
            return None, Tokens()
        usage = self._usage
        return Source.STREAM, Tokens(prompt=usage.prompt, cached=usage.cached, completion=usage.completion)

    def _elapsed_us(self) -> int:
        return int((time.perf_counter() - self._began) * 1e6)

    def _tell(self, closing: UsageClose) -> None:
        """One line, one trace, and the metrics."""
        row, tokens = self._row, closing.tokens
        facts: dict[str, int | str | bool] = {
            "request_id": str(row.request_id),
            "workspace": row.workspace,
            "variant": row.variant,
            "endpoint": row.endpoint,
            "stream": row.stream,
            "attempt": row.attempt,
            "outcome": str(closing.outcome),
            "status": self._status,
            "engine": closing.engine or "",
            "cold": closing.cold,
            "prompt_tokens": tokens.prompt,
            "cached_tokens": tokens.cached,
            "completion_tokens": tokens.completion,
            "source": str(closing.source or "pending"),
            "queued_us": closing.queued_us,
            "held_us": closing.held_us,
            "first_token_us": closing.first_token_us or 0,
            "duration_us": closing.duration_us,
        }
        log.info("request", trace_id=row.trace_id, key=row.key, detail=closing.detail, **facts)
        self._trace(closing, facts)
        self._parts.metrics.ended(row.workspace, row.variant, closing.outcome, tokens)
        self._parts.metrics.timed(queued_us=closing.queued_us, first_token_us=closing.first_token_us, cold=closing.cold)

    def _trace(self, closing: UsageClose, facts: Mapping[str, int | str | bool]) -> None:
        telemetry, span = self._parts.telemetry, self._accepted.span
        received = self._row.received_at
        dispatched = received + closing.queued_us / 1e6
        telemetry.part(span, "queue", received, dispatched, {})
        if closing.cold:
            phases = {f"phase.{name}_us": took for name, took in self._phases_us.items()}
            telemetry.part(span, "cold_start", dispatched - closing.held_us / 1e6, dispatched, phases)
        if closing.engine is not None:
            telemetry.part(span, "engine", dispatched, closing.ended_at, {"engine": closing.engine})
        telemetry.part(span, "settle", closing.ended_at, self._parts.clock(), {})
        telemetry.end(span, closing.ended_at, facts)


_CHARGED: Final = frozenset({Outcome.COMPLETED, Outcome.CLIENT_GONE, Outcome.DRAINED})
_STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
