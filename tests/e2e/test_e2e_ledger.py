"""Every accepted request has one final row, and its tokens are the engine's own."""

from __future__ import annotations

import time
from functools import partial

from loadtests.bench.stack import Stack
from tests.e2e.chats import Client, Load, Reply, at_once
from tests.e2e.rows import books, finals, query, reasons, settled


def test_i1_every_accepted_request_has_one_final_event_and_i2_its_tokens_are_the_books(
    stack: Stack, client: Client
) -> None:
    """Streams, non-streams, several sequences, refusals by the engine and clients that leave, all at once."""
    client.chat()
    settled(stack)
    before = set(finals(stack))
    calls = [
        partial(client.chat, stream=True),
        partial(client.chat),
        partial(client.chat, n=2, temperature=1.0),
        partial(client.chat, messages=[{"role": "user", "content": "word " * 4000}]),
        partial(client.leave, stream=True),
        partial(client.leave, stream=True, n=2, temperature=1.0),
        partial(client.leave, stream=False, after_s=1.0),
    ]
    replies = at_once(28, calls)
    settled(stack)
    events = {key: row for key, row in finals(stack).items() if key not in before}
    assert len(events) == 28
    entered = books(stack)
    for reply in (reply for reply in replies if isinstance(reply, Reply)):
        row = events[reply.request_id]
        if reply.status == 400:
            assert (row["outcome"], row["completion_tokens"], row["source"]) == ("engine_refused", 0, "none")
            continue
        assert reply.good, reply
        assert (row["outcome"], row["source"]) == ("completed", "stream")
        assert row["completion_tokens"] == reply.completion_tokens
    gone = {key: row["source"] for key, row in events.items() if row["outcome"] == "client_gone"}
    saw_tokens = [key for key in gone if key in replies]
    assert sorted(gone[key] for key in saw_tokens) == ["book"] * 4 + ["stream"] * 4
    # Whoever left before an engine had the request used nothing, and no engine says otherwise.
    unseen = {key: source for key, source in gone.items() if key not in saw_tokens}
    assert unseen == {key: "book" if key in entered else "none" for key in unseen}
    assert len(unseen) == 4
    for key, row in events.items():
        if row["source"] == "none":
            continue
        entry = entered[key]
        assert row["prompt_tokens"] == entry["prompt"], row
        if row["outcome"] == "client_gone" and row["source"] == "stream":
            # What the engine made after the client had gone is the platform's.
            assert 0 < row["completion_tokens"] <= entry["completion"], row
        else:
            assert row["completion_tokens"] == entry["completion"], row


def test_a_client_that_leaves_frees_its_engine_at_once(stack: Stack, client: Client) -> None:
    client.chat()
    settled(stack)
    request_id = client.leave(stream=True)
    left = time.time()
    settled(stack)
    stack.wait_until(lambda: request_id in reasons(stack), "the engine to abort", 10)
    assert reasons(stack)[request_id] == ["abort"]
    assert time.time() - left < 10
    assert finals(stack)[request_id]["outcome"] == "client_gone"


def test_a_first_request_is_marked_cold_and_the_next_is_not(stack: Stack, cold: Client) -> None:
    first, second = cold.chat(), cold.chat()
    settled(stack)
    rows = finals(stack)
    assert rows[first.request_id]["cold"] and rows[first.request_id]["held_us"] > 0
    assert not rows[second.request_id]["cold"] and rows[second.request_id]["held_us"] == 0
    assert rows[first.request_id]["first_token_us"] is None or rows[first.request_id]["first_token_us"] > 0


def test_usage_sums_what_the_rows_say(stack: Stack, client: Client) -> None:
    with Load(client, clients=4) as load:
        load.wait_for(8)
    assert load.bad == []
    settled(stack)
    (row,) = query(
        stack,
        "SELECT count(*) AS requests, sum(prompt_tokens)::bigint AS prompt,"
        " sum(completion_tokens)::bigint AS completion"
        " FROM usage_event WHERE final AND revision = 0 AND workspace = 'acme'",
    )
    rows = stack.greenroom("usage", "--by", "workspace")
    rows = rows["data"] if isinstance(rows, dict) else rows
    (acme,) = [entry for entry in rows if entry["workspace"] == "acme"]
    assert acme["requests"] == row["requests"]
    assert acme["prompt_tokens"] == row["prompt"]
    assert acme["completion_tokens"] == row["completion"]
