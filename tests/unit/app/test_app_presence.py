"""A request's work is cut short by its client or the drain, and by nothing else under that name."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.drain import Drain
from app.presence import Interrupted, Presence, Reason


class Client:
    """Stays until told to leave."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def __call__(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}


async def work(client: Client, drain: Drain) -> str:
    async with Presence(client, drain):
        await asyncio.Event().wait()
    return "done"


async def started(task: asyncio.Task[Any], drain: Drain) -> None:
    while not drain.open and not task.done():
        await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_a_client_that_leaves_cuts_the_work_short() -> None:
    client, drain = Client(), Drain(60)
    task = asyncio.create_task(work(client, drain))
    await started(task, drain)
    client.left.set()
    with pytest.raises(Interrupted) as cut:
        await task
    assert cut.value.reason is Reason.CLIENT_GONE
    assert task.cancelling() == 0
    await drain.until_idle()


async def test_the_end_of_a_drain_cuts_the_work_short_and_not_its_beginning() -> None:
    client, drain = Client(), Drain(0.05)
    task = asyncio.create_task(work(client, drain))
    await started(task, drain)
    drain.begin()
    await asyncio.sleep(0)
    assert not task.done()
    with pytest.raises(Interrupted) as cut:
        await task
    assert cut.value.reason is Reason.DRAINED


async def test_work_that_begins_after_the_deadline_ends_at_its_first_wait() -> None:
    drain = Drain(60)
    drain.begin()
    drain.hurry()
    with pytest.raises(Interrupted):
        await work(Client(), drain)


async def test_a_cancellation_from_elsewhere_passes_through() -> None:
    client, drain = Client(), Drain(60)
    task = asyncio.create_task(work(client, drain))
    await started(task, drain)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await drain.until_idle()


async def test_a_cancellation_from_elsewhere_wins_over_a_client_that_leaves() -> None:
    client, drain = Client(), Drain(60)
    task = asyncio.create_task(work(client, drain))
    await started(task, drain)
    client.left.set()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises((asyncio.CancelledError, Interrupted)):
        await task
    await drain.until_idle()


async def test_work_that_ends_by_itself_is_left_alone() -> None:
    client, drain = Client(), Drain(60)
    async with Presence(client, drain):
        pass
    client.left.set()
    await asyncio.sleep(0)
    assert drain.open == 0


async def test_an_error_of_the_work_is_not_hidden() -> None:
    drain = Drain(60)
    with pytest.raises(ValueError, match="mine"):
        async with Presence(Client(), drain):
            raise ValueError("mine")


async def test_a_drain_tells_those_who_asked_once() -> None:
    drain, told = Drain(60), []
    drain.on_begin(lambda: told.append(drain.began))
    drain.begin()
    drain.begin()
    assert told == [True]
    await drain.until_begun()
