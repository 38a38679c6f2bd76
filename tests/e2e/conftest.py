"""End to end: a whole `greenroom up` with two gateways, a real model and real vLLM engines.

`stack` is one for the session, with engines forked; each test that needs a known beginning asks for `cold`, which stops
all engines first. A test that kills processes says so by its own fixture and leaves the stack whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.bench.stack import MODEL, Stack
from tests.e2e.chats import Client

ROOT = Path(__file__).parent.parent.parent
DEMO_MODEL = ROOT / "var" / "models" / "smollm2-135m"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts real engines; a hang must have time to be one."""
    for item in items:
        if Path(item.fspath).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The converted demo model, which `./dev setup` makes."""
    assert (DEMO_MODEL / "config.json").exists(), "no demo model: run ./dev setup"
    return DEMO_MODEL


def furnish(stack: Stack, model: Path) -> Client:
    """Workspace `acme` with its variants, and a client with its key.

    `bot` keeps its engine; `brief` leaves it after two seconds, on a pool of its own; `sized` has another size again.
    """
    key = stack.set_up(
        model,
        {
            "bot": {},
            "brief": {"scaling": {"idle_timeout_s": 2}, "arguments": {"max_model_len": 1024}},
        },
        workspace="acme",
    )
    return Client(stack, key)


@pytest.fixture(scope="session")
def stack(demo_model: Path) -> Iterator[Stack]:
    """The session's stack."""
    with Stack(gateways=2) as running:
        running.client = furnish(running, demo_model)  # type: ignore[attr-defined]
        yield running


@pytest.fixture
def client(stack: Stack) -> Client:
    """A client of workspace `acme`."""
    return stack.client  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def cold(stack: Stack, client: Client) -> Client:
    """The same, with no engine running."""
    stack.stop_engines()
    return client


__all__ = ["MODEL", "furnish"]
