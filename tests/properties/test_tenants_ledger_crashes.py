"""Random lives of gateways, with everything that can go wrong between them and a real Postgres.

Truth is fixed beforehand: what the engine counted for each attempt. Whatever happens on the way, in the end every
accepted request has one final event (I1) whose tokens are the engine's (I2), and the sums are those of the events.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, Final
from uuid import UUID

import asyncpg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metering import NOW, Books, Pool, closed, opened, silence, tables

from tenants import queries
from tenants.errors import LedgerUnavailable
from tenants.ledger import Ledger
from tenants.reaper import Reaper
from tenants.usage import Outcome, Source, Tokens, UsageClose, UsageOpen

LONG: Final = NOW + 10_000
WORKSPACES: Final = ("acme", "globex")


class Life:
    """Two gateways after each other or at once, one book, two reapers."""

    def __init__(self, pool: Pool, killer: asyncpg.Connection[Any], seed: int) -> None:
        self.pool = pool
        self.killer = killer
        self.random = random.Random(seed)
        self.books = Books()
        self.gateways: dict[str, tuple[Ledger, asyncio.Task[None]]] = {}
        self.running: list[tuple[str, UsageOpen]] = []
        self.said: list[tuple[str, UsageClose]] = []
        self.accepted: dict[UUID, str] = {}
        self.cuts: list[asyncio.Task[None]] = []
        self.killing = asyncio.Lock()

    def start(self) -> None:
        gateway = str(UUID(int=self.random.getrandbits(128)))
        ledger = Ledger(self.pool, gateway, pid=1)
        self.gateways[gateway] = ledger, asyncio.create_task(ledger.run())

    async def kill(self) -> None:
        """A gateway is gone with all that it knew; another takes its place."""
        self.start()
        await self._gone(self.random.choice(list(self.gateways)))

    async def _gone(self, gateway: str) -> None:
        _, task = self.gateways.pop(gateway)
        task.cancel()
        await asyncio.wait({task})
        self.running = [(owner, row) for owner, row in self.running if owner != gateway]
        self.said = [(owner, close) for owner, close in self.said if owner != gateway]
        await self._retried(lambda: silence(self.pool, 60, gateway))

    async def arrive(self) -> None:
        """Some requests arrive at once; a few reach no engine."""
        gateway = self.random.choice(list(self.gateways))
        ledger = self.gateways[gateway][0]
        rows = [
            opened(workspace=self.random.choice(WORKSPACES), gateway=gateway, stream=self.random.random() < 0.5)
            for _ in range(self.random.randint(1, 6))
        ]
        for row in rows:
            self._answer(row)
        answers = await asyncio.gather(*(ledger.open(row) for row in rows), return_exceptions=True)
        for row, answer in zip(rows, answers, strict=True):
            assert answer is None or isinstance(answer, LedgerUnavailable)
            if answer is None:
                self.accepted[row.request_id] = row.workspace
                self.running.append((gateway, row))

    def _answer(self, row: UsageOpen) -> None:
        """What the engine counts, if it gets there."""
        if self.random.random() < 0.8:
            prompt = self.random.randint(1, 100)
            tokens = Tokens(prompt, self.random.randint(0, prompt), self.random.randint(0, 100))
            self.books.write(row, tokens)

    def _truth(self, row: UsageOpen | UsageClose) -> Tokens | None:
        line = self.books.lines.get((row.request_id, row.attempt))
        return None if line is None else line.tokens

    def _pick(self) -> tuple[str, UsageOpen] | None:
        if not self.running:
            return None
        return self.running.pop(self.random.randrange(len(self.running)))

    def _close(self, gateway: str, close: UsageClose) -> asyncio.Future[None]:
        self.said.append((gateway, close))
        return self.gateways[gateway][0].close(close)

    async def end(self) -> None:
        """A request ends; now and then somebody waits for it to be durable."""
        if (picked := self._pick()) is None:
            return
        gateway, row = picked
        tokens = self._truth(row)
        if tokens is None:
            close = closed(row, outcome=Outcome.LOAD_FAILED, source=Source.NONE, tokens=Tokens(), engine=None)
        elif row.stream:
            close = closed(row, tokens=tokens)
        else:
            close = closed(row, outcome=Outcome.CLIENT_GONE, source=None, tokens=Tokens())
        future = self._close(gateway, close)
        if self.random.random() < 0.3:
            await future

    async def fail(self) -> None:
        """An attempt fails and the next one begins, if its row can be made durable."""
        if (picked := self._pick()) is None:
            return
        gateway, row = picked
        self.books.lines.pop((row.request_id, row.attempt), None)
        self._close(
            gateway, closed(row, outcome=Outcome.ENGINE_FAILED, final=False, source=Source.NONE, tokens=Tokens())
        )
        again = opened(
            request_id=row.request_id,
            attempt=row.attempt + 1,
            workspace=row.workspace,
            gateway=gateway,
            stream=row.stream,
        )
        self._answer(again)
        self.gateways[gateway][0].open(again)
        self.running.append((gateway, again))

    async def repeat(self) -> None:
        """Something that was said is said again."""
        if self.said:
            gateway, close = self.random.choice(self.said)
            self.gateways[gateway][0].close(close)

    async def cut(self) -> None:
        """All connections break in a moment, wherever they are then."""
        self.cuts.append(asyncio.create_task(self._cut(self.random.uniform(0, 0.004))))

    async def _cut(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        async with self.killing:
            await self.killer.execute(
                """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE pid <> pg_backend_pid() AND datname = current_database()"""
            )

    async def lapse(self) -> None:
        """A living gateway's lease ends; reapers come before it is back."""
        await self._retried(lambda: silence(self.pool, 60, self.random.choice(list(self.gateways))))
        await self.reap()

    async def reap(self) -> None:
        reapers = [Reaper(self.pool, self.books.find) for _ in range(2)]
        await asyncio.gather(*(reaper.sweep(LONG) for reaper in reapers), return_exceptions=True)

    async def settle(self) -> None:
        """All gateways write what they have."""
        async with asyncio.timeout(20):
            while any(ledger._opens or ledger._closes for ledger, _ in self.gateways.values()):
                await asyncio.sleep(0.001)

    async def _retried(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Do something of the test's own, whose connection may have been cut as well."""
        async with asyncio.timeout(10):
            while True:
                try:
                    return await work()
                except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
                    await asyncio.sleep(0.005)

    async def finish(self) -> None:
        """Some gateways leave in order, the rest die; then the reaper has all the time it needs."""
        await asyncio.gather(*self.cuts)
        for gateway in list(self.gateways):
            if self.random.random() < 0.5:
                await self.gateways[gateway][0].drain(0.2)
            await self._gone(gateway)
        await self._retried(lambda: Reaper(self.pool, self.books.find).sweep(LONG))

    async def check(self) -> None:
        after = await tables(self.pool)
        after.check_i1()
        assert after.opens == {}
        assert set(self.accepted) <= set(after.events)
        expected = dict.fromkeys(WORKSPACES, (0, 0, 0, 0))
        for request in after.events:
            [final] = [e for e in after.last(request) if e.final]
            truth = self.books.lines.get((request, final.attempt))
            counted = (final.prompt, final.cached, final.completion)
            assert counted == (
                (truth.tokens.prompt, truth.tokens.cached, truth.tokens.completion) if truth else (0, 0, 0)
            )
            if request not in self.accepted:
                assert final.outcome == Outcome.GATEWAY_LOST  # its gateway died before it could answer
        for row in await self.pool.fetch("SELECT DISTINCT ON (request_id) request_id, workspace FROM usage_event"):
            [final] = [e for e in after.last(row["request_id"]) if e.final]
            values = (1, final.prompt, final.cached, final.completion)
            expected[row["workspace"]] = tuple(map(sum, zip(expected[row["workspace"]], values, strict=True)))  # type: ignore[assignment]
        sums = await queries.all_usage_sums(self.pool, since=0, until=LONG, by=["workspace"])
        summed = {s.group.workspace: (s.requests, s.prompt_tokens, s.cached_tokens, s.completion_tokens) for s in sums}
        assert summed == {workspace: values for workspace, values in expected.items() if values[0]}


STEPS: Final = {
    "arrive": 6,
    "end": 8,
    "fail": 3,
    "repeat": 2,
    "cut": 2,
    "lapse": 1,
    "reap": 1,
    "kill": 1,
    "settle": 2,
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.sampled_from([step for step, weight in STEPS.items() for _ in range(weight)]), max_size=60),
    seed=st.integers(0, 2**32),
)
def test_i1_i2_whatever_is_cut_killed_said_twice_or_reaped_every_request_is_counted_once(
    database: str, steps: list[str], seed: int
) -> None:
    async def live() -> None:
        killer = await asyncpg.connect(database)
        await killer.execute("TRUNCATE usage_open, usage_event, instance")
        async with asyncpg.create_pool(database, min_size=0, max_size=8) as pool:
            life = Life(pool, killer, seed)
            life.start()
            life.start()
            for step in steps:
                await getattr(life, step)()
            await life.finish()
            await life.check()
        await killer.close()

    asyncio.run(live())
