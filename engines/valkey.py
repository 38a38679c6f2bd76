"""Valkey or Redis as something that may vanish, freeze and come back at any moment.

`Channel` follows one pub/sub channel and says whether it is up; `publish` says something once. Every wait is bounded by
`PATIENCE_S`, so a server that is stopped (and still accepts connections) is noticed as surely as one that is gone.
Nothing here retries a message: what was said while nobody listened is lost, and `joined` is where the caller looks up
what it may have missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

PATIENCE_S: Final = 0.5
"""Longest wait for one answer. Too short only means a detour over Postgres."""
QUIET_S: Final = 0.4
"""After so long without a message the server is asked whether it lives."""
FIRST_WAIT_S: Final = 0.05
LONGEST_WAIT_S: Final = 1.0
"""Bounds of the back-off between attempts to connect."""

AWAY: Final = (RedisError, OSError, TimeoutError)
"""What is raised when the server doesn't answer as it should."""

log = structlog.get_logger()


def client(url: str) -> Redis:
    """A client that doesn't retry: this module's callers do that their own way, and bound each wait themselves.

    It has no `socket_timeout` on purpose. With one, redis-py sends through `asyncio.wait_for`, which before Python 3.12
    swallows a cancellation that comes just as the bytes are out, and a task that should have ended goes on for ever.
    """
    return Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=None, socket_connect_timeout=PATIENCE_S)


async def publish(redis: Redis, channel: str, body: bytes) -> int:
    """Say `body` on `channel` and return how many heard it; raises one of `AWAY`."""
    async with asyncio.timeout(PATIENCE_S):
        return int(await redis.publish(channel, body))


async def keep_and_publish(redis: Redis, channel: str, body: bytes) -> None:
    """Keep `body` under the channel's name for those who come later, and say it; raises one of `AWAY`."""
    async with asyncio.timeout(PATIENCE_S):
        async with redis.pipeline(transaction=False) as pipe:
            pipe.set(channel, body)
            pipe.publish(channel, body)
            await pipe.execute()


async def kept(redis: Redis, channel: str) -> bytes | str | None:
    """What `keep_and_publish` kept last; raises one of `AWAY`."""
    async with asyncio.timeout(PATIENCE_S):
        return await redis.get(channel)


async def answers(redis: Redis) -> bool:
    """Whether the server answers a PING in time."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            return bool(await redis.ping())
    except AWAY:
        return False


class Channel:
    """One channel, followed for as long as `run` runs; owns its connection.

    `joined` is awaited each time that listening has begun, before the channel counts as up, and may raise one of `AWAY`
    to have it begin anew. `message` and `lost` are plain calls on the event loop. `lost` is called once per loss, and
    once if the very first attempt fails.
    """

    def __init__(
        self,
        redis: Redis,
        name: str,
        *,
        joined: Callable[[], Awaitable[None]],
        message: Callable[[bytes | str], None],
        lost: Callable[[], None],
    ) -> None:
        self._redis = redis
        self._name = name
        self._joined = joined
        self._message = message
        self._lost = lost
        self._known_lost = False
        self._wait_s = FIRST_WAIT_S
        self.up = False

    async def run(self) -> NoReturn:
        """Follow the channel until cancelled; reconnects with a back-off of at most `LONGEST_WAIT_S`."""
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await self._follow(pubsub)
            except AWAY as error:
                self._down(error)
            finally:
                self.up = False
            await asyncio.sleep(self._wait_s)
            self._wait_s = min(self._wait_s * 2, LONGEST_WAIT_S)

    async def _follow(self, pubsub: PubSub) -> NoReturn:
        async with asyncio.timeout(PATIENCE_S):
            await pubsub.subscribe(self._name)
        asked = False
        while True:
            async with asyncio.timeout(QUIET_S + PATIENCE_S):
                message = await pubsub.get_message(timeout=QUIET_S if self.up and not asked else PATIENCE_S)
            if message is None:
                if asked or not self.up:
                    raise TimeoutError(f"no answer within {PATIENCE_S} s")
                async with asyncio.timeout(PATIENCE_S):
                    await pubsub.ping()
                asked = True
                continue
            asked = False
            if message["type"] == "subscribe":
                await self._join()
            elif message["type"] == "message":
                self._message(message["data"])

    async def _join(self) -> None:
        await self._joined()
        if self._known_lost:
            log.info("valkey_back", channel=self._name)
        self.up, self._known_lost, self._wait_s = True, False, FIRST_WAIT_S

    def _down(self, error: BaseException) -> None:
        self.up = False
        if not self._known_lost:
            self._known_lost = True
            log.warning("valkey_away", channel=self._name, error=type(error).__name__)
            self._lost()
