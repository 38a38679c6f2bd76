"""Controller and gateway, over a real Postgres and a real Valkey that is killed, frozen and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import msgspec
import pytest
import uuid_utils
from redis.asyncio import Redis

from app.notifications import Notifications
from app.stores import EmbeddedValkey
from engines import queries, valkey
from engines.fleet import DemandInbox, DemandReporter, FleetPublisher, FleetView, fleet_channel
from engines.model import Demand, Fleet, GatewayId, PoolDemand, PoolId

INSTALLATION = "0123abcd"
GATEWAY = GatewayId(str(uuid_utils.uuid7()))


class Exchange:
    """One controller's and one gateway's ends, each with clients of its own, as in two processes."""

    def __init__(self, pool: asyncpg.Pool[Any], url: str) -> None:
        self.theirs, self.ours = valkey.client(url), valkey.client(url)
        self.publisher = FleetPublisher(pool, self.theirs, INSTALLATION)
        self.view = FleetView(pool, self.ours, INSTALLATION)
        self.seen: list[tuple[int, int]] = []
        self.view.subscribe(lambda fleet: self.seen.append((fleet.epoch, fleet.version)))
        self.received: list[Demand] = []
        self.inbox = DemandInbox(pool, self.theirs, INSTALLATION, self.received.append)
        self.waiting = 0
        self.reporter = DemandReporter(pool, self.ours, INSTALLATION, self.collect)

    def collect(self) -> Demand:
        return Demand(
            gateway=GATEWAY,
            at=time.time(),
            fleet_epoch=1,
            fleet_version=self.view.current.version if self.view.current else 0,
            pools={PoolId("p"): PoolDemand(waiting=self.waiting)},
        )

    async def heard(self, waiting: int, within_s: float = 1.0) -> float:
        """Report this many waiting slots and return after how many seconds the controller knew."""
        self.waiting, began = waiting, time.monotonic()
        self.reporter.poke()
        await eventually(lambda: self.waiting_heard() == waiting, within_s)
        return time.monotonic() - began

    def waiting_heard(self) -> int | None:
        return self.received[-1].pools[PoolId("p")].waiting if self.received else None


def fleet(version: int, epoch: int = 1) -> Fleet:
    return Fleet(epoch=epoch, version=version, at=1.5)


async def eventually(condition: Callable[[], bool], within_s: float = 2.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running(*jobs: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    async def keep(job: Callable[[], Awaitable[None]]) -> None:
        await job()

    tasks = [asyncio.create_task(keep(job)) for job in jobs]
    try:
        yield
        assert not [task for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError), result


@pytest.fixture
async def exchange(db_pool: asyncpg.Pool[Any], valkey_server: EmbeddedValkey) -> AsyncIterator[Exchange]:
    made = Exchange(db_pool, valkey_server.url)
    yield made
    await made.theirs.aclose()
    await made.ours.aclose()


@pytest.fixture
async def notified(database: str, exchange: Exchange) -> AsyncIterator[Exchange]:
    """The exchange with notifications of Postgres delivered, as the processes have it."""
    notifications = Notifications(database)
    notifications.on(queries.FLEET_CHANNEL, exchange.view.postgres_notified)
    notifications.on(queries.DEMAND_CHANNEL, exchange.inbox.postgres_notified)
    async with running(notifications.run):
        await eventually(lambda: notifications.connected)
        yield exchange


def kill(server: EmbeddedValkey) -> None:
    """End the server as a crash would; its socket stays."""
    assert server.process is not None
    server.process.kill()
    server.process.wait()


@contextlib.contextmanager
def frozen(server: EmbeddedValkey):  # type: ignore[no-untyped-def]
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


async def listening(redis: Redis, channel: str) -> None:
    """Wait until somebody listens on the channel."""
    async with asyncio.timeout(2.0):
        while not (await redis.pubsub_numsub(channel))[0][1]:
            await asyncio.sleep(0.002)


async def test_a_published_fleet_reaches_the_gateway_within_milliseconds(exchange: Exchange) -> None:
    async with running(exchange.view.run):
        await listening(exchange.theirs, fleet_channel(INSTALLATION))
        began = time.monotonic()
        await exchange.publisher.publish(fleet(1))
        await eventually(lambda: exchange.view.current == fleet(1))
    assert time.monotonic() - began < 0.25


async def test_a_gateway_that_comes_later_gets_the_last_fleet(exchange: Exchange) -> None:
    await exchange.publisher.publish(fleet(7))
    async with running(exchange.view.run):
        await eventually(lambda: exchange.view.current == fleet(7))


async def test_a_gateway_gets_the_last_fleet_from_postgres_if_valkey_has_forgotten_it(exchange: Exchange) -> None:
    await exchange.publisher.publish(fleet(7))
    await exchange.theirs.flushall()
    async with running(exchange.view.run):
        await eventually(lambda: exchange.view.current == fleet(7))


async def test_only_newer_fleets_are_taken_and_each_is_told_once(exchange: Exchange) -> None:
    channel = fleet_channel(INSTALLATION)
    async with running(exchange.view.run):
        await listening(exchange.theirs, channel)
        for told in (fleet(2), fleet(1), fleet(2), fleet(1, epoch=2), fleet(9), fleet(2, epoch=2)):
            await valkey.publish(exchange.theirs, channel, msgspec.json.encode(told))
        await eventually(lambda: exchange.view.current == fleet(2, epoch=2))
    assert exchange.seen == [(1, 2), (2, 1), (2, 2)]


async def test_an_unreadable_message_is_dropped(exchange: Exchange) -> None:
    channel = fleet_channel(INSTALLATION)
    await exchange.theirs.set(channel, b"not json")
    async with running(exchange.view.run):
        await listening(exchange.theirs, channel)
        await valkey.publish(exchange.theirs, channel, b"{}")
        await exchange.publisher.publish(fleet(1))
        await eventually(lambda: exchange.view.current == fleet(1))


async def test_a_subscriber_that_fails_does_not_keep_others_from_hearing(exchange: Exchange) -> None:
    heard: list[int] = []

    def fails(_: Fleet) -> None:
        raise RuntimeError("subscriber")

    view = FleetView(exchange.publisher._pool, exchange.ours, INSTALLATION)
    view.subscribe(fails)
    view.subscribe(lambda told: heard.append(told.version))
    await exchange.publisher.publish(fleet(1))
    async with running(view.run):
        await eventually(lambda: heard == [1])


async def test_a_killed_valkey_leaves_the_fleet_known_and_newer_ones_come_by_postgres(
    notified: Exchange, valkey_server: EmbeddedValkey
) -> None:
    async with running(notified.view.run):
        await notified.publisher.publish(fleet(1))
        await eventually(lambda: notified.view.current == fleet(1))
        kill(valkey_server)
        assert notified.view.current == fleet(1)
        began = time.monotonic()
        await notified.publisher.publish(fleet(2))
        await eventually(lambda: notified.view.current == fleet(2))
    assert time.monotonic() - began < 1.0


async def test_postgres_is_polled_each_second_if_neither_valkey_nor_notifications_come(
    exchange: Exchange, valkey_server: EmbeddedValkey
) -> None:
    kill(valkey_server)
    async with running(exchange.view.run):
        await eventually(lambda: exchange.view._ways._channel._known_lost)
        await exchange.publisher.publish(fleet(1))
        await eventually(lambda: exchange.view.current == fleet(1), within_s=2.5)


async def test_a_frozen_valkey_is_noticed_and_costs_a_publish_less_than_a_second(
    notified: Exchange, valkey_server: EmbeddedValkey
) -> None:
    async with running(notified.view.run):
        await listening(notified.theirs, fleet_channel(INSTALLATION))
        with frozen(valkey_server):
            began = time.monotonic()
            await notified.publisher.publish(fleet(1))
            assert time.monotonic() - began < 1.0
            assert notified.view.current == fleet(1)
            await eventually(lambda: not notified.view._ways._channel.up)
        await eventually(lambda: notified.view._ways._channel.up, within_s=3.0)


async def test_a_valkey_that_is_back_empty_carries_fleets_again(
    exchange: Exchange, valkey_server: EmbeddedValkey
) -> None:
    async with running(exchange.view.run):
        await exchange.publisher.publish(fleet(1))
        await eventually(lambda: exchange.view.current == fleet(1))
        kill(valkey_server)
        await exchange.publisher.publish(fleet(2))
        valkey_server.start()
        await eventually(lambda: exchange.view._ways._channel.up, within_s=3.0)
        await eventually(lambda: exchange.view.current == fleet(2))
        await valkey.keep_and_publish(exchange.theirs, fleet_channel(INSTALLATION), msgspec.json.encode(fleet(3)))
        await eventually(lambda: exchange.view.current == fleet(3))


async def test_publishing_says_so_when_postgres_did_not_take_it(exchange: Exchange) -> None:
    await exchange.publisher._pool.close()
    with pytest.raises(asyncpg.InterfaceError):
        await exchange.publisher.publish(fleet(1))


async def test_a_hold_is_known_to_the_controller_within_milliseconds(exchange: Exchange) -> None:
    async with running(exchange.inbox.run, exchange.reporter.run):
        await listening(exchange.theirs, f"greenroom:{INSTALLATION}:demand")
        await exchange.heard(0)
        assert await exchange.heard(3) < 0.25


async def test_many_pokes_make_one_report(exchange: Exchange) -> None:
    async with running(exchange.inbox.run, exchange.reporter.run):
        await listening(exchange.theirs, f"greenroom:{INSTALLATION}:demand")
        await exchange.heard(0)
        before = len(exchange.received)
        for _ in range(50):
            exchange.reporter.poke()
        await exchange.heard(1)
        assert len(exchange.received) - before <= 2


async def test_a_silent_gateway_reports_each_half_second(exchange: Exchange) -> None:
    async with running(exchange.inbox.run, exchange.reporter.run):
        await eventually(lambda: len(exchange.received) >= 3)
    gaps = [b.at - a.at for a, b in zip(exchange.received, exchange.received[1:], strict=False)]
    assert max(gaps) < 1.0


async def test_demand_goes_by_postgres_while_valkey_is_killed_and_by_valkey_once_it_is_back(
    notified: Exchange, valkey_server: EmbeddedValkey, db_pool: asyncpg.Pool[Any]
) -> None:
    async with running(notified.inbox.run, notified.reporter.run):
        await notified.heard(1)
        kill(valkey_server)
        assert await notified.heard(2) < 0.75
        assert await notified.heard(3) < 0.25
        valkey_server.start()
        await eventually(lambda: notified.inbox._ways._channel.up, within_s=3.0)
        await eventually(lambda: not notified.reporter._valkey_lost.is_set(), within_s=3.0)
        stored = await queries.demand(db_pool, GATEWAY)
        await notified.heard(4)
        assert await queries.demand(db_pool, GATEWAY) == stored


async def test_demand_goes_by_postgres_while_valkey_is_frozen(
    notified: Exchange, valkey_server: EmbeddedValkey
) -> None:
    async with running(notified.inbox.run, notified.reporter.run):
        await notified.heard(1)
        with frozen(valkey_server):
            assert await notified.heard(2) < 1.0
            assert await notified.heard(3) < 0.25
        await eventually(lambda: not notified.reporter._valkey_lost.is_set(), within_s=3.0)
        await notified.heard(4)


async def test_demand_goes_by_postgres_if_no_controller_listens_in_valkey(
    exchange: Exchange, db_pool: asyncpg.Pool[Any]
) -> None:
    exchange.waiting = 5
    async with running(exchange.reporter.run):
        async with asyncio.timeout(2.0):
            while (stored := await queries.demand(db_pool, GATEWAY)) is None:
                await asyncio.sleep(0.01)
    assert stored.pools[PoolId("p")].waiting == 5


async def test_a_new_controller_reads_fresh_reports_but_no_old_ones(
    exchange: Exchange, db_pool: asyncpg.Pool[Any]
) -> None:
    old = GatewayId(str(uuid_utils.uuid7()))
    await queries.put_demand(db_pool, Demand(gateway=old, at=time.time() - 60, fleet_epoch=1, fleet_version=1))
    await queries.put_demand(db_pool, exchange.collect())
    async with running(exchange.inbox.run):
        await eventually(lambda: bool(exchange.received))
    assert [demand.gateway for demand in exchange.received] == [GATEWAY]


async def test_reports_of_one_gateway_are_received_in_order_and_once(
    exchange: Exchange, db_pool: asyncpg.Pool[Any]
) -> None:
    first, second = exchange.collect(), exchange.collect()
    channel = f"greenroom:{INSTALLATION}:demand"
    async with running(exchange.inbox.run):
        await listening(exchange.theirs, channel)
        for told in (second, first, second):
            await valkey.publish(exchange.theirs, channel, msgspec.json.encode(told))
        await queries.put_demand(db_pool, second)
        exchange.inbox.postgres_notified(GATEWAY)
        third = exchange.collect()
        await valkey.publish(exchange.theirs, channel, msgspec.json.encode(third))
        await eventually(lambda: bool(exchange.received) and exchange.received[-1] == third)
    assert exchange.received == [second, third]


async def test_a_gateway_that_leaves_says_so(exchange: Exchange) -> None:
    async with running(exchange.inbox.run):
        await exchange.reporter.leave()
        exchange.inbox.postgres_notified(GATEWAY)
        await eventually(lambda: bool(exchange.received) and exchange.received[-1].leaving)


async def test_leaving_takes_little_time_while_valkey_is_frozen(
    exchange: Exchange, valkey_server: EmbeddedValkey, db_pool: asyncpg.Pool[Any]
) -> None:
    with frozen(valkey_server):
        began = time.monotonic()
        await exchange.reporter.leave()
        assert time.monotonic() - began < 1.0
    stored = await queries.demand(db_pool, GATEWAY)
    assert stored is not None and stored.leaving


async def test_an_inbox_survives_a_receiver_that_fails(exchange: Exchange) -> None:
    received: list[Demand] = []

    def fails_once(demand: Demand) -> None:
        received.append(demand)
        if len(received) == 1:
            raise RuntimeError("receiver")

    inbox = DemandInbox(exchange.publisher._pool, exchange.theirs, INSTALLATION, fails_once)
    async with running(inbox.run, exchange.reporter.run):
        await eventually(lambda: len(received) >= 2)
