"""End to end: a whole `greenroom up` with two gateways, a real model and real vLLM engines.

Everything runs twice: with engines forked from the engine host, and with engines started the stock way, as the host
does where it can't fork. `stack` is one of each for the session; a test that needs a known beginning asks for `cold`,
which stops all engines first. A test that kills processes leaves the stack whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.bench.stack import Stack
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

    `bot` keeps its engine; `brief` leaves it after two seconds, on a pool of its own.
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


@pytest.fixture(scope="session", params=["fork", "spawn"])
def stack(request: pytest.FixtureRequest, demo_model: Path) -> Iterator[Stack]:
    """The session's stack for one way of starting engines. Stock starts outlast the usual hold of half a minute."""
    env = {"GREENROOM_ENGINE__START": request.param, "GREENROOM_GATEWAY__HOLD_S": "120"}
    with Stack(gateways=2, env=env) as running:
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
