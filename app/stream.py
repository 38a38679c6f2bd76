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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog
from litestar.types import Receive, Send
from msgspec.structs import replace
from opentelemetry.trace import Span

from app import account, errors
from app.errors import EngineFailed, EngineRefused, ShuttingDown
from app.openai.body import ClientRequest
from app.parts import GatewayParts
from app.presence import Interrupted, Presence, Reason
from app.reply import Reply
from engines import sse
from engines.admission import Grant, Waited
from engines.arguments import served_name
from engines.books import engine_request_id
from engines.client import LARGEST_ERROR, Exchange
from engines.errors import EngineLost, EngineUnreachable
from engines.model import Engine, Variant
from engines.sse import EngineError, EngineUsage, Portion, Relay
from tenants.errors import LedgerUnavailable
from tenants.usage import Outcome, Source, Tokens, UsageClose, UsageOpen

ATTEMPTS: Final = 2
CLOSE_S: Final = 0.25
"""The longest that an answer's end waits for its row."""
_CHARGED: Final = frozenset({Outcome.COMPLETED, Outcome.CLIENT_GONE, Outcome.DRAINED})

T = TypeVar("T")
log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A request that has passed every check."""

    open: UsageOpen
    began: float
    """Its receipt on the clock of `time.perf_counter`."""
    variant: Variant
    asked: ClientRequest
    body: bytes
    """For the engine."""
    hold_s: float
    """How long it may wait for an engine or a slot."""
    span: Span


class Generation:
    """An accepted request on its way; used once."""

    def __init__(self, parts: GatewayParts, accepted: Accepted, send: Send) -> None:
        self._parts = parts
        self._accepted = accepted
        self._reply = Reply(send, began=accepted.began)
        self._served = served_name(accepted.variant.model.digest)
        self._row = accepted.open
        self._queued_us = self._held_us = 0
        self._grant: Grant | None = None
        self._exchange: Exchange | None = None
        self._engine: Engine | None = None
        self._usage: EngineUsage | None = None
        self._usage_is_total = False
        self._first_token_us: int | None = None
        self._closing: UsageClose | None = None
        self._closed: asyncio.Future[None] | None = None
        self._opened = parts.ledger.open(self._row)
        self._relay = self._new_relay()

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
            if errors.is_bug(error):
                log.exception("request_broke", request_id=str(self._row.request_id), error=type(error).__name__)
            self._close(errors.row(error).outcome or Outcome.ENGINE_FAILED, detail=errors.detail(error))
            await self._refuse(error)
        finally:
            self._let_go()
            self._close(Outcome.DRAINED)  # only what a stopping server cuts short comes here unclosed
            self._tell()

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
                begun = await begin(await self._dispatch())
            except (EngineUnreachable, EngineLost, EngineFailed) as error:
                if self._row.attempt == ATTEMPTS:
                    raise
                self._again(error)
            else:
                await self._recorded()
                return begun

    async def _dispatch(self) -> Exchange:
        accepted = self._accepted
        self._engine = (await self._granted()).engine
        if not accepted.asked.stream:
            await self._recorded()  # nobody sees a byte before the whole answer is there
        name = engine_request_id(str(self._row.request_id), self._row.attempt)
        self._exchange = await self._parts.client.post(
            self._engine, accepted.asked.endpoint.path, accepted.body, name, streams=accepted.asked.stream
        )
        return self._exchange

    async def _granted(self) -> Grant:
        """Wait for slots, for what is left of the hold; a request that the ledger refuses meanwhile waits no longer."""
        waited, left_s = Waited(), max(0.0, self._accepted.hold_s - self._queued_us / 1e6)
        asking = asyncio.ensure_future(
            self._parts.admission.admit(
                self._accepted.variant, slots=self._accepted.asked.sequences, wait_s=left_s, waited=waited
            )
        )
        try:
            either: set[asyncio.Future[Any]] = {asking, self._opened}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._opened.done():
                self._opened.result()
            await asyncio.wait({asking})
            self._grant = asking.result()
        finally:
            if self._grant is None:
                asking.add_done_callback(_give_back)
                asking.cancel()
                await asyncio.wait({asking})  # it leaves the queue in the next turn of the loop
            self._queued_us += waited.queued_us
            self._held_us += waited.held_us
        return self._grant

    async def _recorded(self) -> None:
        """Return once the open row is durable; `LedgerUnavailable` if it won't be."""
        await asyncio.wait({self._opened})
        self._opened.result()

    def _again(self, error: Exception) -> None:
        """Close an attempt that failed, which costs nothing; its close opens the next one."""
        if self._grant is not None:
            self._parts.admission.suspect(self._grant.engine)
        self._let_go()
        self._parts.ledger.close(self._row_of(Outcome.ENGINE_FAILED, final=False, detail=errors.detail(error)))
        self._row = replace(self._row, attempt=self._row.attempt + 1)
        self._opened = self._parts.ledger.open(self._row)
        self._engine, self._usage, self._relay = None, None, self._new_relay()

    def _new_relay(self) -> Relay:
        asked = self._accepted.asked
        return Relay(served=self._served, shown=asked.model, wanted=asked.wanted)

    async def _check(self, exchange: Exchange) -> None:
        """Our 200 comes only after the engine's."""
        if exchange.status == 200:
            return
        raise self._failure(sse.error_of(await exchange.start(LARGEST_ERROR), exchange.status))

    def _failure(self, error: EngineError) -> EngineFailed | EngineRefused:
        """What an engine's error is to the caller: its words if the fault is the caller's and can still be told."""
        if error.status not in errors.PASSED_ON or self._reply.status:
            return EngineFailed(f"the engine answered with an error ({error.status})")
        return EngineRefused(replace(error, message=error.message.replace(self._served, self._accepted.asked.model)))

    async def _prime(self, exchange: Exchange) -> Portion:
        await self._check(exchange)
        while True:
            portion = await self._portion(exchange)
            if portion.data or portion.done:
                return portion
            if portion.error is not None:
                raise self._failure(portion.error)

    async def _body(self, exchange: Exchange) -> bytes:
        await self._check(exchange)
        body, self._usage = sse.answer(await exchange.whole(), served=self._served, shown=self._accepted.asked.model)
        self._usage_is_total = True
        return body

    async def _portion(self, exchange: Exchange) -> Portion:
        """The next events. `EngineLost` for an end without `[DONE]`."""
        data = await exchange.some()
        if not data:
            raise EngineLost("the engine ended its stream without [DONE]")
        portion = self._relay.feed(data)
        self._usage, self._usage_is_total = self._relay.usage, self._relay.complete
        return portion

    # Answering --------------------------------------------------------------------------------------------------------

    async def _forward(self, portion: Portion) -> None:
        exchange = self._exchange
        if exchange is None:
            raise RuntimeError("forwarding without an exchange")
        await self._reply.begin_stream()
        self._first_token_us = self._elapsed_us()
        while True:
            if portion.data:
                await self._reply.more(portion.data)
            if portion.error is not None:
                raise self._failure(portion.error)
            if portion.done:
                break
            portion = await self._portion(exchange)
        self._close(Outcome.COMPLETED)
        self._release()
        await exchange.finish()
        await self._durable()
        await self._reply.end_stream()

    async def _whole(self, body: bytes) -> None:
        self._first_token_us = self._elapsed_us()
        self._close(Outcome.COMPLETED)
        self._release()
        await self._durable()
        await self._reply.whole(body)

    async def _refuse(self, error: Exception) -> None:
        """Say what went wrong once the row is written. A client that is gone won't hear."""
        await self._durable()
        await self._reply.refuse(error)

    # Ending -----------------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        if self._grant is not None:
            self._grant.release()
            self._grant = None

    def _let_go(self) -> None:
        """Close the engine's connection (aborting what is unfinished) and give the slots back."""
        if self._exchange is not None:
            self._exchange.abort()
            self._exchange = None
        self._release()

    def _close(self, outcome: Outcome, *, detail: str | None = None) -> None:
        if self._closing is None:
            self._closing = self._row_of(outcome, final=True, detail=detail)
            self._closed = self._parts.ledger.close(self._closing)

    async def _durable(self) -> None:
        """Wait for the closing row, but not for long."""
        if self._closed is None:
            return
        await asyncio.wait({self._closed}, timeout=CLOSE_S)
        if not self._closed.done():
            self._parts.metrics.closed_late()

    def _row_of(self, outcome: Outcome, *, final: bool, detail: str | None) -> UsageClose:
        source, tokens = self._tokens(outcome)
        return UsageClose(
            request_id=self._row.request_id,
            attempt=self._row.attempt,
            outcome=outcome,
            final=final,
            source=source,
            tokens=tokens,
            ended_at=self._parts.clock(),
            engine=self._engine.id if self._engine is not None else None,
            cold=self._held_us > 0,
            queued_us=self._queued_us,
            held_us=self._held_us,
            first_token_us=self._first_token_us,
            duration_us=self._elapsed_us(),
            detail=detail,
        )

    def _tokens(self, outcome: Outcome) -> tuple[Source | None, Tokens]:
        """Whose numbers count.

        1. Failures cost nothing, and what reached no engine used nothing.
        2. The engine's last word on all sequences, if it was read.
        3. What was read last of a single sequence that was cut short.
        4. Else the engine's book knows (of several sequences each chunk tells only of one).
        """
        if self._engine is None or outcome not in _CHARGED:
            return Source.NONE, Tokens()
        usage = self._usage
        cut_short = outcome is not Outcome.COMPLETED and self._accepted.asked.sequences == 1
        if usage is None or not (self._usage_is_total or cut_short):
            return None, Tokens()
        return Source.STREAM, Tokens(prompt=usage.prompt, cached=usage.cached, completion=usage.completion)

    def _elapsed_us(self) -> int:
        return int((time.perf_counter() - self._accepted.began) * 1e6)

    def _tell(self) -> None:
        parts, closing = self._parts, self._closing
        if closing is None:
            return
        if self._was_not_recorded():
            log.info("refused", request_id=str(self._row.request_id), status=self._reply.status, detail=closing.detail)
            parts.metrics.refused(self._reply.status)
            return
        account.tell(
            parts.telemetry,
            parts.metrics,
            self._accepted.span,
            opened=self._row,
            closed=closing,
            status=self._reply.status,
            engine=self._engine,
        )

    def _was_not_recorded(self) -> bool:
        """The ledger would not take it, so it was never accepted."""
        opened = self._opened
        if self._row.attempt > 1 or not opened.done() or opened.cancelled():
            return False
        return isinstance(opened.exception(), LedgerUnavailable)


def _give_back(asking: asyncio.Future[Grant]) -> None:
    """Release slots that were granted to a request in the moment in which it ended."""
    if not asking.cancelled() and asking.exception() is None:
        asking.result().release()
