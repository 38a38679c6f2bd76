"""The life of an engine as one table.

| from | to |
|---|---|
| PLACED | STARTING, STOPPED |
| STARTING | READY, FAILED, STOPPING |
| READY | DRAINING, FAILED, ASLEEP |
| ASLEEP | WAKING, STOPPING, FAILED |
| WAKING | READY, FAILED, STOPPING |
| DRAINING | STOPPING, READY, FAILED |
| STOPPING | STOPPED |
| FAILED | STOPPED |

FAILED keeps its memory: it is given out again only once the process group is gone, which is STOPPED.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from engines.errors import TransitionRefused
from engines.model import Engine, EngineState

_S = EngineState

TABLE: Final[Mapping[EngineState, frozenset[EngineState]]] = {
    _S.PLACED: frozenset({_S.STARTING, _S.STOPPED}),
    _S.STARTING: frozenset({_S.READY, _S.FAILED, _S.STOPPING}),
    _S.READY: frozenset({_S.DRAINING, _S.FAILED, _S.ASLEEP}),
    _S.ASLEEP: frozenset({_S.WAKING, _S.STOPPING, _S.FAILED}),
    _S.WAKING: frozenset({_S.READY, _S.FAILED, _S.STOPPING}),
    _S.DRAINING: frozenset({_S.STOPPING, _S.READY, _S.FAILED}),
    _S.STOPPING: frozenset({_S.STOPPED}),
    _S.FAILED: frozenset({_S.STOPPED}),
    _S.STOPPED: frozenset(),
}

PENDING: Final = frozenset({_S.PLACED, _S.STARTING, _S.WAKING})
"""On its way to READY."""
SERVING: Final = frozenset({_S.READY})
"""Takes new requests."""
LIVE: Final = frozenset(_S) - {_S.STOPPED}
"""Not over yet."""
HOLDS_MEMORY: Final = LIVE - {_S.ASLEEP}
"""Its reservation counts against the device."""
HAS_PROCESS: Final = frozenset({_S.STARTING, _S.READY, _S.ASLEEP, _S.WAKING, _S.DRAINING, _S.STOPPING, _S.FAILED})
"""A process group may exist."""


def transition(engine: Engine, to: EngineState, now: float) -> Engine:
    """Return the engine in its new state, entered at `now`; `TransitionRefused` if the table lacks the change."""
    if to not in TABLE[engine.state]:
        raise TransitionRefused(f"engine {engine.id} is {engine.state} and can't become {to}")
    return msgspec.structs.replace(engine, state=to, since=now)
